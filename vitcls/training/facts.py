"""What a report says of the run that made it, and the last lines of a command."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from typing import Any

from vitcls.data import DatasetInfo
from vitcls.metrics import METRICS
from vitcls.training.announce import dataset_line, devices_line


def facts(config, info: DatasetInfo, *, step: int) -> dict[str, Any]:
    """Rows for the head of the report."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))
    return {
        "Model": config.model.name,
        "Objective": config.task.name + ("" if config.task.name == "classify" else f" ({_keys(config.task)})"),
        "Data": dataset_line(info),
        "Checkpoint": f"step {step:,}",
        "Test-time augmentation": config.test_time_augmentation,
        "Seed": str(config.seed),
        "Devices": devices_line(),
        "Machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {versions}",
        "Command": command_line(),
        "Date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "Skipped files": [f"{file.path}: {file.reason}" for file in info.skipped],
    }


def _keys(block) -> str:
    return ", ".join(f"{key} {value}" for key, value in block.items() if key != "name")


def command_line() -> str:
    """This process's command as it can be given to a shell again: `vitcls VERB ...` or `python -m vitcls.VERB ...`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    name = os.path.basename(sys.argv[0])
    program = ["python", "-m", module.name.removesuffix(".__main__")] if module else [name]
    return shlex.join([*program, *sys.argv[1:]])


def headline(results: dict, workdir) -> str:
    """The last lines of a command: the main numbers and where the report is."""
    numbers = ", ".join(
        f"{metric.headline} {metric.show(results[name])}"
        for name, metric in METRICS.items()
        if metric.headline and name in results
    )
    return f"{results['split']}: {numbers} on {results['num_examples']:,} images\nreport: {workdir}/report/index.html"
