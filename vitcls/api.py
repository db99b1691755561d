"""The Python interface: a trained run as an object, and models by name. `import vitcls` offers all of it."""

import fnmatch
import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from vitcls import models, predict
from vitcls.core.errors import UserError
from vitcls.data import images as image_files
from vitcls.data.augment import to_float
from vitcls.training import build, metrics_log, run_dir, steps


class Run:
    """A run that has been trained in a workdir; what it holds is read when it is asked for."""

    def __init__(self, workdir: os.PathLike | str, checkpoint: str | int = ""):
        """`checkpoint`: 'last', 'best' or a step; that of the report if left out. Raises UserError for no workdir."""
        self._opened = run_dir.open_workdir(workdir)
        self._checkpoint = str(checkpoint) or self.config.report.checkpoint

    def __repr__(self) -> str:
        return f"Run({self._opened.name!r}: {self.config.model.name} on {self._opened.info.name})"

    @property
    def path(self) -> pathlib.Path:
        return self._opened.path

    @property
    def config(self):
        """The resolved config, an ml_collections.ConfigDict."""
        return self._opened.config

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._opened.info.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """H, W, C as the model sees images."""
        return self._opened.info.image_shape

    @functools.cached_property
    def model(self) -> nn.Module:
        """The Linen module: `model.apply(variables, normalised images float32 [B, H, W, C], train=False)` -> logits."""
        return build.make_model(self.config, self._opened.info)

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        """Parameters and batch statistics as numpy arrays: the averages where the run kept some."""
        return self._opened.restore(self.model, self._checkpoint)[1]

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, C] as the model takes them, float32 [N, H, W, C]."""
        info = self._opened.info
        return np.asarray(steps.make_normalize(info.mean, info.std)(to_float(images)))

    @property
    def metrics(self) -> dict[str, Any]:
        """The report's metrics.json; raises UserError where there is no report yet."""
        file = self.path / "report" / "metrics.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            raise UserError(f"{file} is not there yet; train to the end, or evaluate the run") from None

    @property
    def history(self) -> list[dict[str, float]]:
        """The events of metrics.jsonl: `step` and then names such as 'train/loss'."""
        return metrics_log.read_history(self.path)

    @functools.cached_property
    def _classify(self) -> Callable[[np.ndarray], np.ndarray]:
        return predict.make_classifier(self._opened, self._checkpoint)

    def predict(self, images: np.ndarray | Sequence[os.PathLike | str]) -> np.ndarray:
        """Probabilities float32 [N, K] of images uint8 [N, H, W, C], or of image files by their paths.

        Files, and arrays of another size, are resized and cropped as the run's own test images were; arrays of the
        model's size are taken as they are. Raises UserError for what is
        not such images, and for files that cannot be read, which it names.
        """
        return self._classify(self._decoded(images))

    def _decoded(self, images: np.ndarray | Sequence[os.PathLike | str]) -> np.ndarray:
        if isinstance(images, str | os.PathLike):
            raise UserError(f"predict takes a list of paths; give ['{images}']")
        if hasattr(images, "__array__"):  # of JAX too
            images = np.asarray(images)
        else:
            images = list(images)
            if not all(isinstance(path, str | os.PathLike) for path in images):
                raise UserError("predict takes paths, or one array uint8 [N, H, W, C]; np.stack makes one of several")
            return predict.read_all([pathlib.Path(path) for path in images], self._opened)
        *size, channels = self.image_shape
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != channels:
            raise UserError(
                f"images are {images.dtype} {list(images.shape)}; they must be uint8 [N, H, W, {channels}], or paths"
            )
        if list(images.shape[1:3]) == size or not len(images):
            return images
        dataset = self.config.dataset
        decoding = image_files.Decoding(eval_crop=dataset.eval_crop, interpolation=dataset.interpolation)
        return image_files.resize_all(images, tuple(size), decoding)


def open_run(workdir: os.PathLike | str, checkpoint: str | int = "") -> Run:
    """Opens the run in a workdir; see `Run`."""
    return Run(workdir, checkpoint)


def list_models(pattern: str = "*") -> list[str]:
    """The names of models that fit a pattern such as '*vit*'."""
    return fnmatch.filter(models.names(), pattern)


def create_model(name: str, num_classes: int = 0, **fields: Any) -> nn.Module:
    """The Linen module of a model; `fields` replace those of its preset, and `num_classes` 0 is the paper's.

    Raises UserError for an unknown model or field, with the nearest name.
    """
    return models.create(name, num_classes or models.preset(name).num_classes, **fields)
