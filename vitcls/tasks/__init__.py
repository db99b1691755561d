"""Training objectives: a name of `config.task.name` stands for a frozen dataclass whose fields are the block's keys.

`build(context) -> Task` makes the record of pure functions that the training step runs; see `vitcls.tasks.base`.
"""

from vitcls.core.registry import Registry
from vitcls.tasks.base import Aux, Context, Output, Task, Tools, TrainedRun, Updated

__all__ = ["TASKS", "Aux", "Context", "Output", "Task", "Tools", "TrainedRun", "Updated"]

TASKS = Registry(
    "config.task",
    {
        "adversarial": "vitcls.tasks.adversarial:Adversarial",
        "certified": "vitcls.tasks.certified:Certified",
        "classify": "vitcls.tasks.classify:Classify",
        "distill": "vitcls.tasks.distill:Distill",
        "simclr": "vitcls.tasks.simclr:SimCLR",
    },
    separate=True,
)
