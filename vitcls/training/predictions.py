"""The predictions that an evaluation has kept, report/predictions.npz, read back and checked."""

import dataclasses
import json
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls.core.errors import UserError
from vitcls.core.registry import defaults
from vitcls.data.sources import SOURCES, load_source, source_of
from vitcls.training.run_dir import Workdir, data_dir

_OF_CARVED_TEST = ("test", "split_seed")  # keys of config.dataset
_OF_CARVED_VALIDATION = ("validation", "num_folds", "fold")
_OF_TRAINING = ("fraction", "corrections", "correction_weight")  # which of the others are trained on
_OF_PIXELS = ("image_size", "eval_crop", "interpolation", "max_value", "mean", "std")
_ARRAYS = ("labels", "probabilities", "ids")


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a run said of a split; probabilities are read when they are asked for, since they can be large."""

    run: Workdir
    report: dict[str, Any]  # metrics.json
    labels: np.ndarray  # int32 [N]
    ids: np.ndarray  # int64 [N], places in the split

    def probabilities(self) -> np.ndarray:
        """float32 [N, K]; raises UserError where they do not fit the labels or are not finite."""
        (probabilities,) = _read(self.run.path, ("probabilities",))
        expected = (len(self.labels), self.run.info.num_classes)
        if probabilities.shape != expected or probabilities.dtype != np.float32:
            raise _damaged(self.run.path, f"it holds {probabilities.dtype} {probabilities.shape}, not {expected}")
        if not np.isfinite(probabilities.sum(axis=1)).all():
            raise _damaged(self.run.path, "not all probabilities are finite")
        return probabilities


def read_predictions(run: Workdir) -> Predictions:
    """The predictions of the last evaluation of a run; raises UserError, one line, where they are not whole."""
    labels, ids = _read(run.path, ("labels", "ids"))
    report = _read_report(run.path)
    counts = {len(labels), len(ids), report.get("num_examples")}
    if len(counts) > 1 or labels.ndim != 1 or labels.dtype.kind != "i":
        raise _damaged(run.path, "it is not of the same evaluation as metrics.json")
    if not len(labels) or labels.min() < 0 or labels.max() >= run.info.num_classes:
        raise _damaged(run.path, f"labels are not in 0 .. {run.info.num_classes - 1}")
    return Predictions(run, report, labels, ids)


def _read(workdir: pathlib.Path, names: Sequence[str]) -> list[np.ndarray]:
    file = workdir / "report" / "predictions.npz"
    try:
        # np.load itself leaves a damaged file open.
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as kept:
            if missing := [name for name in _ARRAYS if name not in kept]:
                raise _damaged(workdir, f"it has no {missing[0]}")
            return [kept[name] for name in names]
    except FileNotFoundError:
        raise UserError(
            f"{workdir} has no report/predictions.npz; train to the end, or run `vitcls evaluate --workdir={workdir}`"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(workdir, str(error)) from None


def _read_report(workdir: pathlib.Path) -> dict[str, Any]:
    file = workdir / "report" / "metrics.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        found = {key: report[key] for key in ("dataset", "split", "checkpoint_step", "num_examples")}
        return found | {"calibrated": report.get("calibrated", False)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be used ({type(error).__name__}: {error}); run `vitcls evaluate --workdir={workdir}`"
        ) from None


def _damaged(workdir: pathlib.Path, why: str) -> UserError:
    file = workdir / "report" / "predictions.npz"
    return UserError(f"{file} is damaged: {why}; run `vitcls evaluate --workdir={workdir}` to write it again")


def check_same_images(predictions: Sequence[Predictions]) -> None:
    """Raises UserError where runs were evaluated otherwise, or on other images, as far as their workdirs tell."""
    first = predictions[0]
    for other in predictions[1:]:
        if first.report["calibrated"] != other.report["calibrated"]:
            calibrated, plain = sorted((first, other), key=lambda one: one.report["calibrated"], reverse=True)
            raise UserError(
                f"the report of {calibrated.run.path} is of calibrated probabilities and that of {plain.run.path} is "
                "not; run vitcls evaluate for both, with --calibrated or without"
            )
        if difference := _difference(first, other):
            raise UserError(
                f"{first.run.path} and {other.run.path} were evaluated on different test images ({difference}); "
                "compare runs of the same data and split"
            )


def _difference(a: Predictions, b: Predictions) -> str:
    """In what the images of two evaluations differ, in words; '' where they are the same."""
    if a.report["split"] != b.report["split"]:
        return f"splits {a.report['split']} and {b.report['split']}"
    if a.run.config.dataset.name != b.run.config.dataset.name:
        return f"data sets {a.run.config.dataset.name} and {b.run.config.dataset.name}"
    if a.run.info.class_names != b.run.info.class_names:
        return "their classes are not the same"
    if len(a.labels) != len(b.labels):
        return f"{len(a.labels):,} and {len(b.labels):,} images"
    if not (np.array_equal(a.labels, b.labels) and np.array_equal(a.ids, b.ids)):
        return "their labels or places in the split are not the same"
    ours, theirs = _carving(a), _carving(b)
    changed = [key for key in ours if ours[key] != theirs[key]]
    if changed and not (set(changed) <= set(_OF_CARVED_TEST) and _has_own_test(a)):
        return f"config.dataset.{changed[0]} is {ours[changed[0]]} and {theirs[changed[0]]}"
    if _same_training_images(a, b) and not np.allclose(a.run.info.mean, b.run.info.mean, rtol=1e-6, atol=0):
        return "the means of their training images are not the same"
    return ""


def _carving(predictions: Predictions) -> dict[str, Any]:
    """The keys of config.dataset that decide which images a split has, and how they are made up."""
    config = predictions.run.config.dataset
    keys = [*_OF_CARVED_TEST, *defaults(SOURCES[source_of(config.name)])]
    if predictions.report["split"] != "test":
        keys += _OF_CARVED_VALIDATION
    return {key: config[key] for key in keys}


def _has_own_test(predictions: Predictions) -> bool:
    """Whether the test split comes with the data, so that none is carved; False where they cannot be read any more."""
    if predictions.report["split"] != "test":
        return False
    config = predictions.run.config.dataset.copy_and_resolve_references()
    try:
        config.data_dir = data_dir(predictions.run.path, predictions.run.config)
        return "test" in load_source(config).splits
    except UserError:
        return False


def _same_training_images(a: Predictions, b: Predictions) -> bool:
    """Whether by their configs both were trained on the same images, of which dataset.json then has the same means."""
    ours, theirs = a.run.config.dataset, b.run.config.dataset
    keys = (*_OF_CARVED_TEST, *_OF_CARVED_VALIDATION, *_OF_TRAINING, *_OF_PIXELS)
    return all(ours[key] == theirs[key] for key in keys)
