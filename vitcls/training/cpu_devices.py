"""How many virtual devices a CPU is for a training run.

XLA's CPU backend runs chains of small operations on one core, so that small networks train faster as two devices with
half of the batch each; large ones lose. Results are the same but for the order of sums: order, augmentation, dropout
and batch statistics depend on places in the global batch (vitcls/core/rng.py). Norms of 'local_batch', which are of a
device's examples, do not, and leave it at one.
"""

import os

from vitcls import models
from vitcls.training import build

# By module: the field that says how large a model is, and the largest value with which two devices were the faster
# (benchmarks/cpu_devices.py; docs/performance.md). More than two have not been measured.
TWO_ARE_FASTER = {"LeNet5": ("hidden_width", 84), "VisionTransformer": ("hidden_dim", 64)}


def choose(config, *, cores: int = 0) -> int:
    """As many as a resolved config says, else 2 where they are faster and can share a batch, or 1.

    `cores` are by default those that this process may use.
    """
    if config.partition.cpu_devices:
        return config.partition.cpu_devices
    unit = 2 * build.examples_kept_together(config) * config.optimizer.accumulate
    field, largest = TWO_ARE_FASTER.get(models.preset(config.model.name).module.__name__, ("", 0))
    small = field and config.model[field] <= largest and "local_batch" not in config.model.values()
    shared = config.partition.strategy == "data" and config.batch_size % unit == 0
    return 2 if small and shared and (cores or _cores()) > 1 else 1


def _cores() -> int:
    """That this process may use; those of the machine where the system does not say, as macOS."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1
