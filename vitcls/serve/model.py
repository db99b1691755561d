"""What is served: a run or an exported program, with all that an answer depends on."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from vitcls import predict
from vitcls.attribution.explainer import Explainer, make_explainer
from vitcls.core.errors import RunError, UserError
from vitcls.data import images as image_files
from vitcls.data.images import Decoding
from vitcls.export import artefact
from vitcls.models.weights.hub import sha256_of
from vitcls.training import build, calibration, checkpoint, novelty, run_dir
from vitcls.training.files import CALIBRATION_FILE, CHECKPOINTS, UNKNOWN_FILE


class Answers(NamedTuple):
    """What a model says of n images."""

    outputs: np.ndarray  # float32 [n, K]; logits of a run, probabilities of a program
    probabilities: np.ndarray  # float32 [n, K], calibrated where the run is
    unknown: np.ndarray | None = None  # bool [n], unlike anything seen in training; None where that was not measured
    distance: np.ndarray | None = None  # float [n], how unlike


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that answers batches of fixed sizes, and its name."""

    source: str  # the workdir or file
    version: str  # SHA-256 of the weights' manifest
    preprocessing: dict[str, Any]  # all else that an answer depends on
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    decoding: Decoding
    about: dict[str, Any]  # for people
    program: Callable[[np.ndarray], Answers]  # images uint8 [B, H, W, C]; each B is compiled at its first call
    explainer: Callable[[], Explainer] | None  # None where there are no weights to look into

    def decode(self, data: bytes) -> np.ndarray:
        """An image file as the model was trained to see it, uint8 [H, W, C]; raises BadImage."""
        size, channels = self.image_shape[:2], self.image_shape[2]
        return image_files.decode(data, size=size, channels=channels, decoding=self.decoding)

    def warm_up(self, sizes: Sequence[int]) -> None:
        """Compiles for batches of these sizes."""
        for size in sizes:
            self.program(np.zeros((size, *self.image_shape), np.uint8))

    def answer(self, images: Sequence[np.ndarray], size: int) -> Answers:
        """Of n images uint8 [H, W, C], in a batch of `size`; raises RunError where the model has diverged."""
        batch = np.zeros((size, *self.image_shape), np.uint8)
        np.stack(images, out=batch[: len(images)])
        found = Answers(*(part if part is None else part[: len(images)] for part in self.program(batch)))
        if not np.isfinite(found.probabilities).all():
            raise RunError("the model gives probabilities that are not finite; serve an earlier --checkpoint")
        return found

    @functools.cached_property
    def preprocessing_json(self) -> str:
        return json.dumps(self.preprocessing, sort_keys=True)

    def name_of_answer(self, image_sha256: str) -> str:
        """The id of what this model, with this preprocessing, says of this file."""
        said = f"{self.version} {self.preprocessing_json} {image_sha256}"
        return hashlib.sha256(said.encode()).hexdigest()[:32]


def of_workdir(path: os.PathLike | str, which: str = "") -> Served:
    """A run; raises UserError for what is none, or has no classifier."""
    trained = run_dir.open_workdir(path)
    config, info = trained.config, trained.info
    predict.require_classifier(trained)
    model = build.make_model(config, info)
    step, variables = trained.restore(model, which or config.report.checkpoint)
    variables = jax.device_put(variables)
    version = sha256_of(trained.path / CHECKPOINTS / str(step) / checkpoint.MANIFEST)
    kept = novelty.read(trained.path)
    preprocessing = {
        "decoding": dataclasses.asdict(trained.decoding),
        "mean": list(info.mean),
        "std": list(info.std),
        "test_time_augmentation": config.test_time_augmentation,
        "calibration": _digest(trained.path / CALIBRATION_FILE),
        "unknown": _digest(trained.path / UNKNOWN_FILE),
    }
    return Served(
        str(path),
        version,
        preprocessing,
        tuple(info.class_names),
        tuple(info.image_shape),
        trained.decoding,
        _about(trained, step, version),
        _program(trained, model, step, variables, kept if kept and kept.checkpoint_step == step else None),
        lambda: make_explainer(build.make_explained(config, model, info), variables, tuple(info.image_shape)),
    )


def _program(
    trained: run_dir.Workdir, model: nn.Module, step: int, variables: Any, kept: novelty.Novelty | None
) -> Callable[[np.ndarray], Answers]:
    config, info = trained.config, trained.info
    logits_of = build.make_predict(config, model, info)
    outputs_step = build.make_outputs_step(config, model, info)
    scale = predict.scaling_of(trained, step)

    @jax.jit
    def forward(variables: Any, images: jax.Array) -> tuple:
        logits = logits_of(variables, images).astype(np.float32)
        return logits, jax.nn.softmax(logits, axis=-1), outputs_step(variables, {"image": images}) if kept else None

    def program(images: np.ndarray) -> Answers:
        logits, probabilities, outputs = jax.device_get(forward(variables, images))
        answers = Answers(logits, np.asarray(scale(probabilities), np.float32))
        return answers._replace(unknown=kept.unknown(outputs), distance=kept.distance(outputs)) if kept else answers

    return program


def _about(trained: run_dir.Workdir, step: int, version: str) -> dict[str, Any]:
    """Of a run: what of it is of this checkpoint."""
    calibrated, info = calibration.read(trained.path), trained.info
    return _said(
        trained.config.model.name,
        info.name,
        info.class_names,
        info.image_shape,
        {"step": step, "sha256": version},
        calibrated is not None and calibrated.checkpoint_step == step,
        trained.reported(step),
    )


def _said(
    model: str,
    dataset: str,
    classes: Sequence[str],
    image_shape: Sequence[int],
    checkpoint: dict[str, Any],
    calibrated: bool,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """What is said of a model to those who use it: no path, and nothing of the machine."""
    return {
        "model": model,
        "dataset": dataset,
        "classes": list(classes),
        "image_shape": list(image_shape),
        "checkpoint": checkpoint,
        "calibrated": calibrated,
        "test": {key: metrics[key] for key in ("accuracy", "num_examples") if key in metrics},
    }


def _digest(path: pathlib.Path) -> str | None:
    """SHA-256 of a file, or of those of all files of a directory; None where there is none."""
    if not path.is_dir():
        return sha256_of(path) if path.exists() else None
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def of_artefact(path: os.PathLike | str) -> Served:
    """What `vitcls export` wrote, weights alone excepted, in its own runtime; raises UserError for what is none."""
    answer, about = artefact.load(str(path))
    try:
        decoding = Decoding(**about["decoding"])
        version, shape, classes = about["checkpoint"]["sha256"], tuple(about["image_shape"]), tuple(about["classes"])
    except (KeyError, TypeError):
        raise UserError(f"{path} does not say how its images are decoded; export it again") from None

    def program(images: np.ndarray) -> Answers:
        probabilities = answer(images)
        return Answers(probabilities, probabilities)

    names, calibrated = about["config"], about["calibration"] is not None
    said = _said(
        names["model"]["name"],
        names["dataset"]["name"],
        classes,
        shape,
        about["checkpoint"],
        calibrated,
        about["metrics"],
    )
    # "test" is of the run; a program that was rounded or pruned may be worse.
    said |= {key: about[key] for key in ("weights", "pruned") if key in about}
    preprocessing = {"program": _digest(pathlib.Path(path)), "decoding": about["decoding"]}
    return Served(str(path), version, preprocessing, classes, shape, decoding, said, program, None)
