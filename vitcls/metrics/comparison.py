"""Classifiers side by side on the same images: intervals, paired tests, letters, and where they differ most.

A group is one training recipe: one classifier, or several that differ in the seed only.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitcls.metrics.resampling import (
    METRICS_OF_PREDICTIONS,
    RESAMPLES,
    bootstrap,
    bootstrap_interval,
    gap_interval,
    weighted_metrics,
)
from vitcls.metrics.significance import (
    holm,
    least_p,
    letters,
    mcnemar_exact,
    permutation_test,
    pooled_deviation,
    seeds_needed,
    welch_test,
)

ALPHA = 0.05
Groups = Mapping[str, Sequence["Scores"]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a comparison needs of one classifier's predictions on N images."""

    predicted: np.ndarray  # int [N]
    correct: np.ndarray  # bool [N]
    confidence: np.ndarray  # of the predicted class, float32 [N]
    true_probability: np.ndarray  # of the true class, float32 [N]
    metrics: dict[str, float]
    resampled: dict[str, np.ndarray]  # the metrics in bootstrap resamples, float64 [resamples]


def score(labels: np.ndarray, probabilities: np.ndarray, resamples: int = RESAMPLES) -> Scores:
    """The scores of labels int [N] and probabilities float32 [N, K], which are not needed any more then."""
    as_they_are = weighted_metrics(labels, probabilities, np.ones((len(labels), 1), np.float32))
    predicted = probabilities.argmax(axis=1)
    return Scores(
        predicted,
        predicted == labels,
        probabilities.max(axis=1),
        np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0],
        {name: float(value[0]) for name, value in as_they_are.items()},
        bootstrap(labels, probabilities, resamples),
    )


def compare(groups: Groups, alpha: float = ALPHA) -> dict[str, Any]:
    """Every group, best accuracy first, and every pair of them, as plain JSON; all numbers are finite or None.

    The interval of a group is that of the mean over its seeds, on images drawn anew; `deviation` is that between seeds.
    p is of McNemar's exact test where both have one seed. Where both have several it is of their accuracies: of the
    permutation test if these seeds can separate anything by it, after Holm's correction, else of Welch's t test, with
    `permutation_p` beside it. Else it is None; `p_holm` is adjusted for all pairs that are tested.
    """
    groups = dict(sorted(groups.items(), key=lambda group: -_mean(group[1], "accuracy")))
    names = list(groups)
    indices = list(itertools.combinations(range(len(names)), 2))
    strictest = alpha / max(sum(_is_tested(groups[names[i]], groups[names[j]]) for i, j in indices), 1)
    pairs = [_pair(names[i], names[j], groups[names[i]], groups[names[j]], strictest) for i, j in indices]
    tested = [pair for pair in pairs if pair["p"] is not None]
    for pair, p in zip(tested, holm([pair["p"] for pair in tested]), strict=True):
        pair |= {"p_holm": float(p), "separated": bool(p <= alpha)}
    separated = [index for index, pair in zip(indices, pairs, strict=True) if pair["separated"]]
    rows = [
        {"name": name, "letters": shared, "num_seeds": len(runs), "metrics": _intervals(runs)}
        for (name, runs), shared in zip(groups.items(), letters(len(names), separated), strict=True)
    ]
    return {"alpha": alpha, "groups": rows, "pairs": pairs}


def _mean(runs: Sequence[Scores], name: str) -> float:
    return float(np.mean([run.metrics[name] for run in runs]))


def _resampled(runs: Sequence[Scores], name: str) -> np.ndarray:
    """The mean over the runs of a metric in each resample, [resamples]."""
    return np.mean([run.resampled[name] for run in runs], axis=0)


def _intervals(runs: Sequence[Scores]) -> dict[str, dict[str, float | None]]:
    rows = {}
    for name in METRICS_OF_PREDICTIONS:
        value, resampled = _mean(runs, name), _resampled(runs, name)
        low, high = bootstrap_interval(resampled)
        if name == "ece":
            low, high = gap_interval(value, resampled, _resampled(runs, "ece_luck"))
        deviation = float(np.std([run.metrics[name] for run in runs], ddof=1)) if len(runs) > 1 else None
        rows[name] = {"value": value, "low": low, "high": high, "deviation": deviation}
    return rows


def _is_tested(a: Sequence[Scores], b: Sequence[Scores]) -> bool:
    return len(a) == len(b) == 1 or min(len(a), len(b)) > 1


def _pair(name_a: str, name_b: str, a: Sequence[Scores], b: Sequence[Scores], strictest: float) -> dict[str, Any]:
    differences = {}
    for name in METRICS_OF_PREDICTIONS:
        low, high = bootstrap_interval(_resampled(a, name) - _resampled(b, name))
        differences[name] = {"value": _mean(a, name) - _mean(b, name), "low": low, "high": high}
    return {
        "a": name_a,
        "b": name_b,
        "differences": differences,
        **_test(a, b, strictest),
        "p_holm": None,
        "separated": False,
        "seeds_needed": _seeds_needed(a, b, strictest),
    }


def _accuracies(runs: Sequence[Scores]) -> list[float]:
    return [run.metrics["accuracy"] for run in runs]


def _test(a: Sequence[Scores], b: Sequence[Scores], strictest: float) -> dict[str, Any]:
    """The test of the question that these runs allow; `strictest` is the first level of Holm's correction."""
    if not _is_tested(a, b):
        return {"test": None, "p": None}
    if len(a) == 1:
        only_a = int(np.count_nonzero(a[0].correct & ~b[0].correct))
        only_b = int(np.count_nonzero(b[0].correct & ~a[0].correct))
        return {"test": "mcnemar", "only_a": only_a, "only_b": only_b, "p": mcnemar_exact(only_a, only_b)}
    permuted = permutation_test(_accuracies(a), _accuracies(b))
    if least_p(len(a), len(b)) <= strictest:
        return {"test": "permutation", **permuted._asdict()}
    welch = welch_test(_accuracies(a), _accuracies(b), step=1 / len(a[0].correct))
    return {"test": "welch", **welch._asdict(), "permutation_p": permuted.p}


def _seeds_needed(a: Sequence[Scores], b: Sequence[Scores], strictest: float) -> int | None:
    """Of each group, to separate them; None where no deviation between seeds is known."""
    if min(len(a), len(b)) < 2:
        return None
    scores = _accuracies(a), _accuracies(b)
    difference = float(np.mean(scores[0]) - np.mean(scores[1]))
    return seeds_needed(difference, pooled_deviation(*scores), alpha=strictest)


def disagreements(groups: Groups, labels: np.ndarray, count: int = 18) -> list[dict[str, Any]]:
    """The images on which groups differ most: first in how many of their seeds are right, then in the probability.

    Each is its place `id` among the images, the true `label`, the `spread` of the mean probability of the true class,
    and what a group says: its most frequent `predicted` class and that probability. A single group is taken apart into
    its seeds.
    """
    if len(groups) == 1:
        groups = {f"run {i}": [run] for i, run in enumerate(*groups.values(), 1)}
    mean = np.stack([np.mean([run.true_probability for run in runs], axis=0) for runs in groups.values()])
    right = np.stack([np.mean([run.correct for run in runs], axis=0) for runs in groups.values()])  # [groups, N]
    spread = np.ptp(mean, axis=0)
    chosen = np.lexsort((-spread, -np.ptp(right, axis=0)))[:count]
    return [
        {
            "id": int(i),
            "label": int(labels[i]),
            "spread": float(spread[i]),
            "groups": {
                name: {"predicted": _vote(runs, i), "true_probability": float(mean[g, i])}
                for g, (name, runs) in enumerate(groups.items())
            },
        }
        for i in chosen
        if spread[i] > 0
    ]


def _vote(runs: Sequence[Scores], i: int) -> int:
    return int(np.bincount([run.predicted[i] for run in runs]).argmax())
