"""A probe whose classifier is one layer is a network: it is kept as one, to be used like any other run."""

import pathlib
import shutil
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from vitcls.models.variables import variable_shapes
from vitcls.training import build, checkpoint
from vitcls.training.files import CHECKPOINTS

_KERNEL, _BIAS = "params/head/kernel", "params/head/bias"


def has_head(config, info) -> bool:
    """Whether the classifier of the config's model is one layer over its features."""
    shapes = variable_shapes(build.make_model(config, info), info.image_shape)
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
    return _KERNEL in shapes and shapes.get(_BIAS) == shapes[_KERNEL][1:]


def keep(path: pathlib.Path, config, variables: Mapping[str, np.ndarray], head: tuple[np.ndarray, np.ndarray]) -> None:
    """Saves what a run is evaluated by, as the checkpoint of step 0, in place of one that is there.

    `variables` are those before the classifier, by path; `head` is its kernel [D, K] and its bias [K].
    """
    scale = config.model.get("logit_scale", 1.0)  # by which the model multiplies what its head says
    kernel, bias = (np.asarray(leaf / scale, np.float32) for leaf in head)
    flat = {path: np.asarray(leaf) for path, leaf in variables.items()} | {_KERNEL: kernel, _BIAS: bias}
    tree = traverse_util.unflatten_dict(flat, sep="/")
    prefix = "ema_" if config.optimizer.ema_decay else ""
    state = {f"{prefix}{kind}": tree.get(kind, {}) for kind in ("params", "batch_stats")}
    shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)
    with checkpoint.Checkpoints(path / CHECKPOINTS, keep=1, metric=config.checkpoint.metric) as checkpoints:
        checkpoints.save(0, {"state": state}, record={}, metrics=None)
