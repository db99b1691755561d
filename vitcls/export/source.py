"""What is exported: the network of a run, how well it does, and the images to say so by."""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import numpy as np

import vitcls
from vitcls import data
from vitcls.core.errors import UserError
from vitcls.export import compress
from vitcls.export.check import Expected
from vitcls.metrics.scaling import Scaling
from vitcls.models import forms
from vitcls.models.weights.hub import sha256_of
from vitcls.training import build, calibration, checkpoint
from vitcls.training.evaluator import make_evaluator
from vitcls.training.files import CALIBRATION_FILE, CHECKPOINTS
from vitcls.training.opened import Opened, open_with_data

PyTree = Any
_CHECKED = 1_000  # test images
_CALIBRATION = 200  # training images


@dataclasses.dataclass(frozen=True)
class Source:
    """A run with the share of its weights that are set to 0 on the way out."""

    run: Opened
    opened: Opened  # the same, computed as the file will be
    prune: float

    @property
    def dtype(self) -> str:
        """Of what the layers give."""
        return self.opened.trained.config.model.get("dtype", "float32")

    @functools.cached_property
    def in_float32(self) -> "Source":
        """For runtimes that do not compute in bfloat16."""
        if self.dtype == "float32":
            return self
        return dataclasses.replace(self, opened=_computed(self.opened, dtype="float32"))

    @functools.cached_property
    def variables(self) -> PyTree:
        """On the host, as they are exported before they are rounded."""
        host = jax.tree.map(np.asarray, self.opened.partition.to_host(self.opened.variables))
        return compress.pruned(host, self.prune) if self.prune else host

    @functools.cached_property
    def scale(self) -> Scaling | None:
        """That of the workdir's calibration, if there is one of this checkpoint."""
        if not (self.opened.trained.path / CALIBRATION_FILE).exists():
            return None
        return calibration.read_for(self.opened.trained.path, self.opened.step).scaling

    @functools.cached_property
    def calibration_images(self) -> np.ndarray:
        """Training images uint8 [N, H, W, C], by which the range of activations is found."""
        return self._pixels(self._some("train", _CALIBRATION))

    def expected(self, scale: Scaling | None, precision: str = "float32") -> Expected:
        """Some test images, and what the run, the pruned network and that with rounded weights say of them, in JAX."""
        rounded = self._of_network
        if precision != "float32":
            rounded = self._probabilities(compress.restore(compress.round_weights(self.variables, precision)))
        found = (self._of_run, self._of_network if self.prune else self._of_run, self._of_network, rounded)
        scaled = ((scale(p).astype(np.float32) if scale else p) for p in found)
        return Expected(self._pixels(self._checked), self._checked.labels, *scaled)

    @functools.cached_property
    def _of_run(self) -> np.ndarray:
        return self.run.probabilities(self.run.batches_of(self._checked), len(self._checked.labels))

    @functools.cached_property
    def _of_network(self) -> np.ndarray:
        return self._probabilities(self.variables) if self.prune or self.opened is not self.run else self._of_run

    def _probabilities(self, variables: PyTree) -> np.ndarray:
        """Of the test images that are checked, float32 [N, K], without calibration, computed as the file will be."""
        opened = dataclasses.replace(self.opened, variables=self.opened.partition.replicate(variables))
        return opened.probabilities(opened.batches_of(self._checked), len(self._checked.labels))

    @functools.cached_property
    def _checked(self) -> data.Split:
        return self._some("test", _CHECKED)

    def _some(self, name: str, most: int) -> data.Split:
        """Up to `most` images of a split, always the same."""
        split = getattr(self.opened.dataset, name)
        return split.take(np.sort(np.random.default_rng(0).permutation(len(split.labels))[:most]))

    def _pixels(self, split: data.Split) -> np.ndarray:
        return data.pixels(split, self.opened.trained.info.image_shape)

    def about(self, scale: Scaling | None, precision: str, activations: str) -> dict[str, Any]:
        """What an exported file says of itself."""
        trained = self.run.trained
        metrics = trained.reported(self.opened.step)
        manifest = trained.path / CHECKPOINTS / str(self.opened.step) / checkpoint.MANIFEST
        return {
            "vitcls": vitcls.__version__,
            "image_shape": list(trained.info.image_shape),
            "classes": list(trained.info.class_names),
            "decoding": dataclasses.asdict(trained.decoding),
            "calibration": type(scale).__name__.lower() if scale else None,
            "weights": precision,
            "activations": activations,
            "pruned": self.prune,
            "checkpoint": {"step": self.opened.step, "sha256": sha256_of(manifest)},
            "metrics": {key: value for key, value in metrics.items() if isinstance(value, str | int | float)},
            "config": json.loads(trained.config.to_json_best_effort()),
        }


def open_source(path: os.PathLike | str, *, prune: float = 0.0, checkpoint: str = "", data_dir: str = "") -> Source:
    """The run of a workdir; raises UserError where it cannot be exported."""
    if not 0 <= prune < 1:
        raise UserError(f"--prune={prune:g} is impossible; it is a share of the weights, at least 0 and below 1")
    opened = open_with_data(path, splits=("train", "test"), checkpoint=checkpoint, data_dir=data_dir)
    opened.require_classifier()
    return Source(opened, _computed(opened, **dict.fromkeys(forms.FIELDS, "auto")), prune)


def _computed(opened: Opened, **fields: str) -> Opened:
    """A run whose model has other `fields`, as far as it has them, with the same weights."""
    model = opened.trained.config.model
    changed = {key: value for key, value in fields.items() if model.get(key, value) != value}
    if not changed:
        return opened
    config = opened.trained.config.copy_and_resolve_references()
    config.model.update(changed)
    trained = dataclasses.replace(opened.trained, config=config)
    model = build.make_model(config, trained.info)
    evaluator = make_evaluator(config, model, trained.info, opened.dataset, opened.partition)
    return dataclasses.replace(opened, trained=trained, model=model, evaluator=evaluator)
