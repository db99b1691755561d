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
from vitcls.models.weights.hub import sha256_of
from vitcls.training import calibration, checkpoint
from vitcls.training.files import CALIBRATION_FILE, CHECKPOINTS
from vitcls.training.opened import Opened, open_with_data

PyTree = Any
_CHECKED = 1_000  # test images
_CALIBRATION = 200  # training images


@dataclasses.dataclass(frozen=True)
class Source:
    """A run with the share of its weights that are set to 0 on the way out."""

    opened: Opened
    prune: float

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
        return self._some("train", _CALIBRATION)[0]

    def expected(self, scale: Scaling | None) -> Expected:
        """Some test images, and what the run and the pruned network say of them."""
        images, rows = self._some("test", _CHECKED)
        labels, of_run, of_network = self._predictions
        scaled = ((scale(p).astype(np.float32) if scale else p)[rows] for p in (of_run, of_network))
        return Expected(images, labels[rows], *scaled)

    @functools.cached_property
    def _predictions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels, and the probabilities of the run and of the pruned network, of the test split."""
        labels, of_run = self.opened.predictions("test")
        if not self.prune:
            return labels, of_run, of_run
        variables = self.opened.partition.replicate(self.variables)
        return labels, of_run, dataclasses.replace(self.opened, variables=variables).predictions("test")[1]

    def _some(self, name: str, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `most` images of a split, always the same, and their places."""
        split = getattr(self.opened.dataset, name)
        rows = np.sort(np.random.default_rng(0).permutation(len(split.labels))[:most])
        return data.pixels(split.take(rows), self.opened.trained.info.image_shape), rows

    def about(self, scale: Scaling | None, precision: str, activations: str) -> dict[str, Any]:
        """What an exported file says of itself."""
        trained = self.opened.trained
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
    return Source(opened, prune)
