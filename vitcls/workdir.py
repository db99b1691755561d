"""What a run leaves on disk, and how it is found again.

config.json      the resolved config          metrics.jsonl        events of training and evaluation
dataset.json     classes, shape, mean, std    checkpoints/<step>/  see checkpoint.py
"""

import dataclasses
import json
import os
import pathlib

import flax.linen as nn
import jax

from vitcls import checkpoint, experiment
from vitcls import config as configs
from vitcls.data import DatasetInfo
from vitcls.errors import UserError

CONFIG_FILE, DATASET_FILE, CHECKPOINTS, PROFILE = "config.json", "dataset.json", "checkpoints", "profile"


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A workdir that has been trained in."""

    path: pathlib.Path
    config: configs.ConfigDict
    info: DatasetInfo

    def find_step(self, which: str) -> int:
        """The step of the checkpoint 'last', 'best' or a number; it is whole. Raises UserError where there is none."""
        folder = self.path / CHECKPOINTS
        if which == "last":
            step = checkpoint.latest_whole(folder, set_aside=False)
        elif which == "best":
            step = checkpoint.best(folder, self.config.checkpoint.metric)
        elif which.isdigit() and int(which) in checkpoint.steps(folder):
            step = int(which)
            if problem := checkpoint.damage(folder / which):
                raise UserError(f"checkpoint {folder / which} cannot be used: {problem}")
        else:
            raise UserError(
                f"checkpoint '{which}' is not there; use 'last', 'best' or one of {checkpoint.steps(folder)}"
            )
        if step is None:
            raise UserError(f"{folder} has no '{which}' checkpoint; train first, with the same --workdir")
        return step

    def restore_variables(self, model: nn.Module, step: int) -> dict:
        """The variables of `model` for evaluation, as numpy arrays: the EMA of the parameters where there is one."""
        shapes = experiment.variable_shapes(model, self.info)
        params = "ema_params" if self.config.optimizer.ema_decay else "params"
        template = {params: shapes["params"], "batch_stats": shapes.get("batch_stats", {})}
        tree, _ = checkpoint.restore(self.path / CHECKPOINTS, step, {"state": template})
        host = jax.device_get(tree["state"])
        return {"params": host[params], "batch_stats": host["batch_stats"]}


def open_workdir(path: os.PathLike | str) -> Workdir:
    """Reads a workdir back; raises UserError where there is no run in it."""
    path = pathlib.Path(path)
    try:
        config = configs.from_json((path / CONFIG_FILE).read_text())
        info = DatasetInfo.from_json((path / DATASET_FILE).read_text())
    except OSError as error:
        raise UserError(f"{path} is not the workdir of a run: {error.filename} cannot be read") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return Workdir(path, config, info)


def max_value(path: os.PathLike | str) -> float | None:
    """The white of the images (`DatasetInfo.max_value`) of the run in a workdir; None where there is none yet."""
    try:
        return DatasetInfo.from_json((pathlib.Path(path) / DATASET_FILE).read_text()).max_value
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # `begin` says what is wrong
        return None


def begin(path: os.PathLike | str, config: configs.ConfigDict, info: DatasetInfo) -> None:
    """Makes the workdir of a run, or checks that the run that is in it already is the same.

    Raises UserError where the workdir holds a run of another config or other data: nothing of it is overwritten.
    """
    path = pathlib.Path(path)
    complete = {  # what an older version wrote has fewer keys
        CONFIG_FILE: lambda text: configs.to_json(configs.from_json(text)),
        DATASET_FILE: lambda text: DatasetInfo.from_json(text).to_json(),
    }
    for name, text in ((CONFIG_FILE, configs.to_json(config)), (DATASET_FILE, info.to_json())):
        if not (path / name).exists():
            write_atomically(path / name, text)
            continue
        try:
            old = _flatten(json.loads(complete[name]((path / name).read_text())))
            new = _flatten(json.loads(text))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path / name} is damaged; restore it, or use another --workdir") from None
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            shown = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(f"{path} holds a run with another {name}: {shown}{more}; use another --workdir")


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a small file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _flatten(tree, prefix: str = "") -> dict:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in _flatten(value, f"{prefix}.{key}".lstrip(".")).items()
    }
