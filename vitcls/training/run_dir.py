"""What a run leaves on disk (see files.py), and how it is found again."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vitcls import config as configs
from vitcls.core import buckets, durations, errors
from vitcls.core.errors import UserError
from vitcls.core.registry import paths
from vitcls.data import DatasetInfo
from vitcls.data.images import Decoding
from vitcls.data.sources import PLACELESS
from vitcls.models import forms
from vitcls.models.variables import variable_shapes
from vitcls.tasks import TASKS
from vitcls.training import checkpoint, places
from vitcls.training.files import (
    CHECKPOINTS,
    CONFIG_FILE,
    CORRECTIONS,
    DATASET_FILE,
    FAILED_FILE,
    FROZEN_FILE,
    INIT_FILE,
    MOVED_FILE,
)

PyTree = Any
_FORMS = {f"model.{field}" for field in forms.FIELDS}  # which compute the same; older versions had other defaults
_PATHS = {"init.weights", "dataset.corrections"}
_PLACES = {"partition.cpu_devices"}  # of the machine, on which no result depends
_REMOVAL = 1.0  # seconds in which a run has removed a checkpoint that it began to remove


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A workdir that has been trained in."""

    path: pathlib.Path
    config: configs.ConfigDict
    info: DatasetInfo

    @property
    def name(self) -> str:
        """How the user has named it, by its path or its URL."""
        return errors.said(str(self.path))

    @property
    def decoding(self) -> Decoding:
        """How image files become what the model was trained to see."""
        dataset = self.config.dataset
        return Decoding(self.info.max_value, dataset.eval_crop, dataset.interpolation)

    def reported(self, step: int) -> dict[str, Any]:
        """metrics.json of the report, where it is of the checkpoint of this step; else {}."""
        report = self.path / "report" / "metrics.json"
        try:
            metrics = json.loads(report.read_text(encoding="utf-8"))
            return metrics if metrics.get("checkpoint_step") == step else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{report} cannot be read ({error}); run vitcls evaluate again") from None

    def find_step(self, which: str) -> int:
        """The step of the checkpoint 'last', 'best' or a number; it is whole. Raises UserError where there is none."""
        folder = self.path / CHECKPOINTS
        if self.config.probe.features and not checkpoint.steps(folder):
            raise UserError(
                f"{self.path} holds a probe, which has no network of its own; linear and svm on a network have one"
            )
        if which == "last" or (which == "best" and self.config.probe.features):  # which has but one
            step = checkpoint.latest_whole(folder, quarantine=False)
        elif which == "best":
            step = checkpoint.best(folder, self.config.checkpoint.metric)
        elif which in map(str, checkpoint.steps(folder)):
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

    def restore(self, model: nn.Module, which: str) -> tuple[int, dict]:
        """The step of `which` checkpoint and its variables, as `find_step` and `restore_variables` give them.

        The run may be alive, and remove a checkpoint while it is read: then the one that is the last or best by now
        is taken.
        """
        folder = self.path / CHECKPOINTS
        while True:
            there = checkpoint.steps(folder)
            try:
                step = self.find_step(which)
                return step, self.restore_variables(model, step)
            except Exception:  # what is missing in the middle of a read fails in many ways
                time.sleep(_REMOVAL)
                if checkpoint.steps(folder) == there:
                    raise

    def restore_variables(self, model: nn.Module, step: int) -> dict:
        """The variables of `model` for evaluation, as numpy arrays: the averages where there are any."""
        shapes, folder = variable_shapes(model, self.info.image_shape), self.path / CHECKPOINTS
        params, statistics = "params", "batch_stats"
        if self.config.optimizer.ema_decay:
            params = "ema_params"
            if checkpoint.has(folder, step, "state", "ema_batch_stats"):  # 0.1.0 did not average them
                statistics = "ema_batch_stats"
        template = {params: shapes["params"], statistics: shapes.get("batch_stats", {})}
        tree, _ = checkpoint.restore(folder, step, {"state": template})
        host = jax.device_get(tree["state"])
        return {"params": host[params], "batch_stats": host[statistics]}


def open_workdir(path: os.PathLike | str) -> Workdir:
    """Reads a workdir back; raises UserError where there is no run in it."""
    said, path = os.fspath(path), places.copied(path)
    values = []
    for name, read in ((CONFIG_FILE, configs.from_json), (DATASET_FILE, DatasetInfo.from_json)):
        try:
            values.append(read((path / name).read_text(encoding="utf-8")))
        except OSError:
            raise UserError(f"{said} is not the workdir of a run: its {name} cannot be read") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{name} of {said} cannot be used: {error}") from None
    config, info = values
    if config.dataset.corrections and (path / CORRECTIONS).is_dir():  # wherever the workdir is now
        with config.unlocked():
            config.dataset.corrections = os.path.abspath(path / CORRECTIONS)
    return Workdir(path, config, info)


def data_dir(path: pathlib.Path | None, config: configs.ConfigDict, moved_to: str = "") -> str:
    """Where the data of `config` are: `moved_to` if given, else where the run in the workdir `path` was told before.

    Raises UserError where a run has lost its data, and for a place of data that are in none.
    """
    if moved_to and config.dataset.name in PLACELESS:
        raise UserError(
            f"--data_dir={moved_to}: the images of '{config.dataset.name}' are in no directory; leave it out"
        )
    place = configs.place_of_data(moved_to, config.dataset.name, "--data_dir") or config.dataset.data_dir
    if path is None:
        return place
    try:
        began = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))["dataset"]["data_dir"]
        if not moved_to and began == place:
            place = json.loads((path / MOVED_FILE).read_text(encoding="utf-8"))["data_dir"]
    except (OSError, ValueError, KeyError, TypeError):  # there is no run, or its data have not moved
        pass
    there = not place or buckets.is_url(place) or os.path.exists(place)
    if (path / CONFIG_FILE).exists() and not there:
        raise UserError(f"the data of the run in {path} are not in {place}; say where they are with --data_dir=DIR")
    return place


def max_value(path: pathlib.Path) -> float | None:
    """The white of the images (`DatasetInfo.max_value`) of the run in a workdir; None where there is none yet."""
    try:
        return DatasetInfo.from_json((path / DATASET_FILE).read_text(encoding="utf-8")).max_value
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # `begin` says what is wrong
        return None


def begin(
    path: pathlib.Path,
    config: configs.ConfigDict,
    info: DatasetInfo,
    *,
    place: str = "",
    frozen: PyTree = None,
    initial: dict | None = None,
) -> None:
    """Makes the workdir of a run, or checks that the run that is in it already is the same.

    An older version's config is completed first. `place` is where the data are; if that is not where the config has
    them, they may have another name there, and moved.json remembers it. `frozen` are the arrays of the task, and
    `initial` is the record of the weights from which the run began (initial.Start); where they come from may change, as
    long as they are the same. Raises UserError where the workdir holds a run of another
    config or other data: nothing of it is overwritten.
    """
    moved = place not in ("", config.dataset.data_dir)
    free = {
        DATASET_FILE: {"name"} if moved else set(),  # that of a folder
        CONFIG_FILE: _free_keys(config),
        FROZEN_FILE: set(),
        INIT_FILE: set(),
    }
    texts = {CONFIG_FILE: configs.to_json(config), DATASET_FILE: info.to_json()}
    if frozen is not None:
        texts[FROZEN_FILE] = json.dumps({"sha256": _digest(frozen)}) + "\n"
    if initial is not None:
        texts[INIT_FILE] = json.dumps(initial) + "\n"
    there = {name for name in texts if (path / name).exists()}
    for name in sorted(there):
        _check_same(path, name, texts[name], free[name])
    for name in texts.keys() - there:
        write_atomically(path / name, texts[name])
    if moved:
        write_atomically(path / MOVED_FILE, json.dumps({"data_dir": place}) + "\n")
    elif place:  # they are back
        (path / MOVED_FILE).unlink(missing_ok=True)
    (path / FAILED_FILE).unlink(missing_ok=True)


_READERS = {
    CONFIG_FILE: lambda text: configs.from_json(text).to_dict(),
    DATASET_FILE: lambda text: dataclasses.asdict(DatasetInfo.from_json(text)),
    FROZEN_FILE: lambda text: {"sha256": json.loads(text)["sha256"]},
    INIT_FILE: lambda text: {"sha256": json.loads(text)["sha256"]},
}


def _digest(tree: PyTree) -> str:
    """SHA-256 of the arrays of a tree and their places in it."""
    digest = hashlib.sha256()
    for place, leaf in jax.tree.leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(place)} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()


def _check_same(path: pathlib.Path, name: str, text: str, free: Collection[str]) -> None:
    """Raises UserError where the file `name` says otherwise than `text`, but for the keys that are `free`."""
    changes = _changes(path, name, text, free)
    if changes:
        changed = list(changes)
        shown = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in list(changes.items())[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        advice = "use another --workdir"
        if changed == ["dataset.data_dir"]:
            advice = "if the data have moved, leave the config as it was and add --data_dir=DIR"
        if changed == ["total"]:
            advice += f", which may begin with its weights: --config.init.weights={path} --config.init.head=keep"
        if name == FROZEN_FILE:
            raise UserError(
                f"what config.task keeps fixed (a teacher's weights) is not what the run in {path} began with; give "
                "the original, or use another --workdir"
            )
        if name == INIT_FILE:
            raise UserError(
                f"config.init.weights is not the file with which the run in {path} began; give the original, or use "
                "another --workdir"
            )
        raise UserError(f"{path} holds a run with another {name}: {shown}{more}; {advice}")


def _changes(path: pathlib.Path, name: str, text: str, free: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """key -> (what the file `name` says, what `text` does) where they differ, by key, but for those that are `free`."""
    try:
        old = configs.flatten(_READERS[name]((path / name).read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path / name} is damaged ({error}); restore it, or use another --workdir") from None
    new = configs.flatten(_READERS[name](text))
    pairs = {key: (old.get(key), new.get(key)) for key in sorted((old.keys() | new.keys()) - set(free))}
    return {key: pair for key, pair in pairs.items() if not _same(*pair)}


def _free_keys(config: configs.ConfigDict) -> set[str]:
    """Of a config, what may change when a run goes on."""
    return {f"task.{key}" for key in paths(TASKS[config.task.name])} | _PATHS | _FORMS | _PLACES


def config_changes(path: pathlib.Path, config: configs.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """key -> (what it was, what it is) for which the run in the workdir `path` would not go on with `config`.

    Raises OSError where there is no run, UserError where its config is damaged.
    """
    return _changes(path, CONFIG_FILE, configs.to_json(config), _free_keys(config))


def _same(old: Any, new: Any) -> bool:
    """Whether two values mean the same; means and deviations of the same images may be rounded otherwise elsewhere."""
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        return all(map(_same, old, new))
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-12)
    return durations.same(old, new)


def write_atomically(path: pathlib.Path, text: str, *, once: bool = False) -> None:
    """Writes a small file atomically, also where several processes write it at once.

    The last one stays, and with `once` the first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            (os.link if once else os.replace)(temporary, path)
        except FileExistsError:  # another process was first
            pass
        except OSError:
            if not once:
                raise
            os.replace(temporary, path)  # a disk without hard links
    finally:
        temporary.unlink(missing_ok=True)
