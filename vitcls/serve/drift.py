"""Has what is asked of a server changed? Unknowns, corrections, classes, confidence and features, each watched alone.

What the answers were like on the test split of the run is measured once and kept in the workdir (drift.json). Where the
data are not there, and for what the test split does not tell (how often users correct, distances of features), the
first answers are the reference, which `state` says.

While nothing changes and answers are independent, a server raises a false alarm of any kind within 10,000 answers with
a probability of at most 2 %: 1 % as a reference sample may mislead, and 1 % by chance (vitcls/serve/detector.py).
"""

import bisect
import dataclasses
import datetime
import json
import logging
import math
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls import predict
from vitcls.core.errors import UserError
from vitcls.data import pixels
from vitcls.serve.detector import Detector
from vitcls.training import run_dir
from vitcls.training.files import CALIBRATION_FILE, DRIFT_FILE, UNKNOWN_FILE
from vitcls.training.opened import open_with_data

_logger = logging.getLogger("vitcls")
FIRST, FIRST_CORRECTIONS = 500, 100  # answers, and what users say, that are a reference where there is no other
_MOST = 2_000  # test images that are looked at
_GROUPS = 100  # of neighbouring classes, where there are more
_BINS = 10  # of numbers
KINDS = ("unknown", "corrections", "classes", "confidence", "features")
HORIZON, PROBABILITY = 10_000, 0.01  # see above
DELTA = PROBABILITY / len(KINDS)
THRESHOLD = HORIZON / DELTA


@dataclasses.dataclass(frozen=True)
class Reference:
    """Of which run, and what its answers to test images were."""

    checkpoint_step: int
    stamps: tuple[float, ...]  # when calibration and threshold were written, 0 for not
    num_images: int
    classes: tuple[int, ...]  # how often each class was answered
    edges: tuple[float, ...]  # of bins of the probability of the answer, chosen by one half of the images
    confidence: tuple[int, ...]  # how many of the other half are in each
    unknown: tuple[int, ...]  # known, unknown; () where the run cannot tell


def reference(workdir: pathlib.Path, checkpoint: str = "") -> Reference | None:
    """That of a run: read from drift.json, or measured and written there; None where its data are not there.

    Raises UserError where there is no such run or checkpoint.
    """
    trained = run_dir.open_workdir(workdir)
    step = trained.find_step(checkpoint or trained.config.report.checkpoint)
    paths = (trained.path / name for name in (CALIBRATION_FILE, UNKNOWN_FILE))
    stamps = tuple(path.stat().st_mtime if path.exists() else 0.0 for path in paths)
    kept = _read(trained.path)
    if kept is not None and (kept.checkpoint_step, kept.stamps) == (step, stamps):
        return kept
    try:
        opened = open_with_data(workdir, splits=("test",), checkpoint=str(step))
    except UserError as error:
        _logger.warning("drift is measured against the first %d answers, as %s", FIRST, error)
        return None
    test = opened.files.test
    chosen = np.sort(np.random.default_rng(0).permutation(len(test.labels))[:_MOST])
    images = pixels(test.take(chosen), trained.info.image_shape)
    made = _measure(trained, images, step, stamps)
    run_dir.write_atomically(trained.path / DRIFT_FILE, json.dumps(dataclasses.asdict(made), indent=2) + "\n")
    return made


def _measure(trained: run_dir.Workdir, images: np.ndarray, step: int, stamps: tuple[float, ...]) -> Reference:
    """By the same functions that answer."""
    probabilities = predict.make_classifier(trained, str(step))(images)
    answers, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    judge = predict.make_judge(trained, str(step))
    unknown: tuple[int, ...] = ()
    if judge is not None:
        strange = np.concatenate([judge(images[start : start + 32]) for start in range(0, len(images), 32)])
        unknown = (int((~strange).sum()), int(strange.sum()))
    edges, counts = _binned(confidence[np.random.default_rng(1).permutation(len(images))])
    classes = np.bincount(answers, minlength=trained.info.num_classes)
    return Reference(step, stamps, len(images), tuple(classes.tolist()), edges, counts, unknown)


def _read(workdir: pathlib.Path) -> Reference | None:
    """drift.json; None where it is not there or damaged, as it can be made anew."""
    try:
        values = json.loads((workdir / DRIFT_FILE).read_text(encoding="utf-8"))
        return Reference(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except (OSError, ValueError, TypeError):
        return None


def _binned(values: np.ndarray) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Edges at the quantiles of the first half of numbers [N], and the counts of the other half.

    Of one half alone, so that the counts are a multinomial sample.
    """
    half = len(values) // 2
    edges = np.unique(np.quantile(values[:half], np.linspace(0, 1, _BINS + 1)[1:-1]))
    counts = np.bincount(np.searchsorted(edges, values[half:], side="right"), minlength=len(edges) + 1)
    return tuple(edges.tolist()), tuple(counts.tolist())


class _Watch:
    """One kind: a detector, as soon as there is a reference."""

    def __init__(self, first: int):
        self._first, self._values = first, []  # what becomes the reference where none is given
        self._edges: tuple[float, ...] = ()
        self.measured_against = ""
        self.detector: Detector | None = None

    def begin(self, measured_against: str, counts: Sequence[int], edges: tuple[float, ...] = ()) -> None:
        """Takes a reference: how often each category, or each bin of numbers, came."""
        self._edges, self.measured_against, self._values = edges, measured_against, []
        self.detector = Detector(np.array(counts), delta=DELTA, threshold=THRESHOLD)

    def update(self, value: float, categories: int) -> bool:
        """Takes a category, or with `categories` = 0 a number; True for an alarm."""
        if self.detector is not None:
            return self.detector.update(int(value) if categories else self._bin(value))
        self._values.append(value)
        if len(self._values) == self._first and categories:
            self.begin(f"the first {self._first}", np.bincount(np.array(self._values, int), minlength=categories))
        elif len(self._values) == self._first:
            edges, counts = _binned(np.array(self._values))
            self.begin(f"the first {self._first}", counts, edges)
        return False

    def _bin(self, value: float) -> int:
        return bisect.bisect_right(self._edges, value)

    def words(self) -> str:
        return self.measured_against or f"nothing yet: the first {self._first}, of which {len(self._values)} came"


class Drift:
    """What is asked of a server, against a reference. Of any thread, in constant memory.

    Args:
      num_classes: of the run.
      reference: see `reference`; without one the first answers are it.
    """

    def __init__(self, num_classes: int, reference: Reference | None = None):
        self._groups = np.arange(num_classes) * min(num_classes, _GROUPS) // num_classes  # of each class
        self._lock = threading.Lock()
        self._watches = {kind: _Watch(FIRST_CORRECTIONS if kind == "corrections" else FIRST) for kind in KINDS}
        if reference is not None:
            against = f"{reference.num_images:,} test images"
            grouped = np.bincount(self._groups, weights=reference.classes).astype(int)
            self._watches["classes"].begin(against, grouped)
            self._watches["confidence"].begin(against, reference.confidence, reference.edges)
            if reference.unknown:
                self._watches["unknown"].begin(against, reference.unknown)
        self._classes = np.zeros(num_classes, np.int64)
        self._answers, self._judged, self._unknown, self._feedback, self._corrections = 0, 0, 0, 0, 0
        self._alarms: dict[str, dict[str, Any]] = {}

    def observe(self, predicted: int, probability: float, unknown: bool | None, feature_distance: float | None) -> None:
        """Takes an answer: its class, what it said, and where they are known, whether it is unlike anything seen and
        how far its features are from those of the training.
        """
        with self._lock:
            self._answers += 1
            self._classes[predicted] += 1
            self._update("classes", self._groups[predicted], self._groups[-1] + 1)
            self._update("confidence", probability)
            if unknown is not None:
                self._judged += 1
                self._unknown += bool(unknown)
                self._update("unknown", bool(unknown), 2)
            if feature_distance is not None and math.isfinite(feature_distance):
                self._update("features", feature_distance)

    def feedback(self, right: bool) -> None:
        """Takes what a user says of an answer."""
        with self._lock:
            self._feedback += 1
            self._corrections += not right
            self._update("corrections", not right, 2)

    def _update(self, kind: str, value: float, categories: int = 0) -> None:
        watch = self._watches[kind]
        if not watch.update(value, categories):
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        count = self._alarms.get(kind, {"count": 0})["count"] + 1
        self._alarms[kind] = {"time": now, "answers": self._answers, "count": count}
        if count & (count - 1) == 0:  # the first, second, fourth, ... of its kind
            _logger.warning(
                "drift: %s, after %s answers, against %s", kind, f"{self._answers:,}", watch.measured_against
            )

    def alarms(self) -> tuple[str, ...]:
        """The kinds that have rung."""
        with self._lock:
            return tuple(self._alarms)

    def state(self) -> dict[str, Any]:
        """Counts and shares so far, the recent distribution of classes beside that of the reference, and the alarms.

        alarms: kind -> time of the newest (ISO 8601, UTC), answers at that time, and how many there were.
        measured_against: kind -> what is its reference, or how many more answers become it.
        """
        with self._lock:
            classes = self._watches["classes"].detector
            return {
                "answers": self._answers,
                "feedback": self._feedback,
                "unknown_share": self._unknown / self._judged if self._judged else None,
                "correction_share": self._corrections / self._feedback if self._feedback else None,
                "class_counts": self._classes.tolist(),
                "recent_classes": None if classes is None else classes.recent.tolist(),
                "reference_classes": None if classes is None else classes.reference.tolist(),
                "measured_against": {kind: watch.words() for kind, watch in self._watches.items()},
                "alarms": {kind: dict(alarm) for kind, alarm in self._alarms.items()},
                "false_alarms": f"at most {2 * PROBABILITY:.0%} within {HORIZON:,} answers while nothing changes",
            }
