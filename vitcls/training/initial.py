"""What a run starts from: published weights, or those of another run; their file is needed once."""

import json
import os
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax import traverse_util

from vitcls.core.errors import UserError
from vitcls.data import DatasetInfo
from vitcls.models.variables import variable_shapes
from vitcls.models.weights import hub, load
from vitcls.models.weights.adapt import adapt
from vitcls.models.weights.preprocessing import Preprocessing
from vitcls.training import build, checkpoint, run_dir
from vitcls.training.files import CHECKPOINTS, INIT_FILE


class Start(NamedTuple):
    """The weights of `config.init.weights`; a run that has begun knows them by its record alone."""

    record: dict  # init.json: SHA-256 of the file, its mean and std
    words: str  # what the log says of them
    source: load.WeightsFile | run_dir.Workdir | None = None  # None where the file is not needed any more
    colors_taken: bool = False  # whether the mean and std of the data are theirs
    variables: dict[str, np.ndarray] | None = None  # by path, as the model takes them


def look(config, path: pathlib.Path | None) -> Start | None:
    """Opens the weights that the config names, None where it names none.

    A run in the workdir `path` that has saved anything does not need them; if they are there, they must be the same.
    Raises UserError for weights that are not there, cannot be used, or are others than those of the run.
    """
    weights = config.init.weights
    if not weights:
        return None
    record = _recorded(path)
    begun = record is not None and checkpoint.steps(path / CHECKPOINTS)
    if begun and not os.path.exists(weights):
        return Start(record, f"as the run began ({weights} is not there any more, nor needed)")
    source, sha256, found = _open(config, weights)
    if record is not None and record["sha256"] != sha256:
        raise UserError(
            f"config.init.weights={weights} is not what the run in {path} began with; give the original, or use "
            "another --workdir"
        )
    words = f"{weights}, SHA-256 {sha256[:12]}..., head '{config.init.head}'"
    return Start({"sha256": sha256, "mean": found.mean, "std": found.std}, words, None if begun else source)


def _recorded(path: pathlib.Path | None) -> dict | None:
    """init.json of the run in a workdir; None where there is none."""
    if path is None or not (path / INIT_FILE).exists():
        return None
    try:
        record = json.loads((path / INIT_FILE).read_text(encoding="utf-8"))
        return {"sha256": str(record["sha256"]), "mean": tuple(record["mean"]), "std": tuple(record["std"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / INIT_FILE} is damaged ({error}); restore it, or use another --workdir") from None


def _open(config, weights: str) -> tuple[load.WeightsFile | run_dir.Workdir, str, Preprocessing]:
    """The opened file or run, what identifies it, and how its images were prepared."""
    if not os.path.isdir(weights):
        load.check_publisher(weights, config.model.name, **_fields(config))
        path = hub.located(weights)
        file = load.open_weights(path)
        return file, hub.sha256_of(path), load.published(config.model.name, file, **_fields(config))
    trained = run_dir.open_workdir(weights)
    step = trained.find_step(trained.config.report.checkpoint)
    manifest = trained.path / CHECKPOINTS / str(step) / checkpoint.MANIFEST
    info, dataset = trained.info, trained.config.dataset
    found = Preprocessing(info.mean, info.std, info.image_shape[0], dataset.eval_crop, dataset.interpolation)
    return trained, hub.sha256_of(manifest), found


def with_preprocessing(config, start: Start | None, channels: int) -> tuple:
    """(the config, start), where mean and std are those of the weights unless the config has its own."""
    if start is None or (config.dataset.mean and config.dataset.std):
        return config, start
    found = Preprocessing(start.record["mean"], start.record["std"], 0).for_channels(channels)
    config = config.copy_and_resolve_references()
    config.dataset.mean = config.dataset.mean or found.mean
    config.dataset.std = config.dataset.std or found.std
    return config.lock(), start._replace(colors_taken=True)


def read(config, info: DatasetInfo, model: nn.Module, start: Start | None) -> Start | None:
    """Reads the variables that the run starts with, as its `model` takes them; no device work.

    Raises UserError for all weights that are missing, do not fit or are too many, and for a head that is to be kept but
    is of other classes.
    """
    if start is None or start.source is None:
        return start
    keep = config.init.head == "keep"
    if build.make_task(config, info).wrap(model) is not model:
        raise UserError(
            f"config.init.weights is not for config.task.name='{config.task.name}', whose network has more than a model"
        )
    read_source = _of_run if isinstance(start.source, run_dir.Workdir) else _of_file
    given, channels = read_source(config, info, start.source, keep)
    shapes = traverse_util.flatten_dict(variable_shapes(model, info.image_shape), sep="/")
    variables, notes = adapt(config.model.name, given, shapes, (channels, info.image_shape[-1]), head=keep)
    if keep and isinstance(start.source, load.WeightsFile):
        first, last = info.class_names[0], info.class_names[-1]
        notes.append(f"its outputs are taken for the classes of the data in their order, '{first}' to '{last}'")
    return start._replace(variables=variables, source=None, words="; ".join([start.words, *notes]))


def _of_file(config, info: DatasetInfo, file: load.WeightsFile, keep: bool) -> tuple[dict[str, np.ndarray], int]:
    """The variables of a file of published weights, and the channels that they know."""
    given = load.convert(config.model.name, file, head=keep, **_fields(config))
    if keep and given.num_classes != info.num_classes:
        raise UserError(
            f"config.init.head='keep' is impossible: {file.path} tells {given.num_classes} classes apart, and the data "
            f"have {info.num_classes}; use 'new'"
        )
    return given.variables, given.channels


def _fields(config) -> dict[str, Any]:
    """Those of the model."""
    return {key: value for key, value in config.model.items() if key != "name"}


def _of_run(config, info: DatasetInfo, trained: run_dir.Workdir, keep: bool) -> tuple[dict[str, np.ndarray], int]:
    """The variables of another run, and the channels that they know."""
    if keep and trained.info.class_names != info.class_names:
        raise UserError(
            f"config.init.head='keep' is impossible: the classes of {trained.path} are not those of the data; use 'new'"
        )
    model = build.make_model(trained.config, trained.info)
    _, variables = trained.restore(model, trained.config.report.checkpoint)
    flat = traverse_util.flatten_dict(variables, sep="/")
    if any("/encoder/" in path for path in flat):  # of an objective with a projection on top
        flat = {path.replace("/encoder/", "/"): leaf for path, leaf in flat.items() if "/encoder/" in path}
    return {path: np.asarray(leaf) for path, leaf in flat.items()}, trained.info.image_shape[-1]
