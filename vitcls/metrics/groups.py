"""Whom a classifier fails: accuracy, calibration and decisions by group, with intervals and tests.

Definitions are one class against the rest: demographic parity is P(predicted k | group), equalised odds are P(predicted
k | true k, group) and P(predicted k | not k, group) (Hardt et al. 2016); a difference is between the groups furthest
apart.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls.metrics.calibration_scores import calibration_gaps
from vitcls.metrics.promises import proportion
from vitcls.metrics.resampling import draw_weights, estimate, gap_interval
from vitcls.metrics.significance import holm

SMALL = 30  # images below which a group is shown, but not ranked or tested
_RESAMPLES = 1_000


def by_group(labels: np.ndarray, probabilities: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """What is known of each group, and of the differences between those that are not small; plain JSON.

    Args:
      labels: int [N]; probabilities: float [N, K]; groups: the name of each image's group [N].
    """
    names = sorted(set(groups))
    which = np.searchsorted(names, groups)
    predicted = probabilities.argmax(axis=1)
    right = predicted == labels
    rows = []
    for g, name in enumerate(names):
        inside = which == g
        rows.append(
            {
                "group": name,
                "num_examples": int(inside.sum()),
                "small": bool(inside.sum() < SMALL),
                "accuracy": proportion(right[inside]),
                "mean_confidence": estimate({"p": probabilities[inside].max(axis=1)}, lambda means: means["p"]),
                "ece": _ece(labels[inside], probabilities[inside]),
            }
        )
    large = [g for g, row in enumerate(rows) if not row["small"]]
    chances = [_against_rest(right, which == g) for g in large]
    for g, p in zip(large, chances if len(rows) == 2 else holm(chances), strict=True):  # of two groups it is one test
        rows[g]["p_holm"] = float(p)
    if len(large) < 2:
        return {"groups": rows, "differences": None}
    kept = np.isin(which, large)
    place = np.searchsorted(large, which[kept])
    return {
        "groups": rows,
        "differences": _differences(
            labels[kept], predicted[kept], place, [names[g] for g in large], probabilities.shape[1]
        ),
    }


def _ece(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    confidence, right = probabilities.max(axis=1).astype(np.float64), probabilities.argmax(axis=1) == labels
    count = len(labels)
    value = float(calibration_gaps(confidence, right, np.ones((count, 1), np.float32))[0][0] / count)
    if count < 2:
        return {"value": value, "low": None, "high": None}
    drawn = [calibration_gaps(confidence, right, weights) for weights in draw_weights(count, _RESAMPLES, 0)]
    low, high = gap_interval(value, *(np.concatenate(parts) / count for parts in zip(*drawn, strict=True)))
    return {"value": value, "low": low, "high": high}


def _against_rest(right: np.ndarray, inside: np.ndarray) -> float:
    """The two-sided p of Fisher's exact test: is a group's accuracy that of the others?"""
    from scipy.stats import fisher_exact

    table = [[int(right[part].sum()), int((~right[part]).sum())] for part in (inside, ~inside)]
    return float(fisher_exact(table)[1])


def _differences(
    labels: np.ndarray, predicted: np.ndarray, place: np.ndarray, names: Sequence[str], num_classes: int
) -> dict[str, Any]:
    """The largest differences between groups: of accuracy, and by class of parity and odds, with 95 % intervals.

    The bootstrap draws the images of each group anew. A largest difference of noise is above 0: from the lower end of
    an interval the most is taken off by which luck moves the rates of any groups and class, and p is how often labels
    of groups that are dealt anew make as large a difference, over all classes.
    """
    found = _rates(labels, predicted, place, len(names), num_classes)
    rng = np.random.default_rng(0)
    inside = [np.flatnonzero(place == g) for g in range(len(names))]
    drawn, luck, dealt = [], [], []
    for _ in range(_RESAMPLES):
        again = np.concatenate([rng.choice(rows, len(rows)) for rows in inside])
        rates = _rates(labels[again], predicted[again], place[again], len(names), num_classes, least=0)
        drawn.append(_spreads({name: np.where(np.isnan(found[name]), np.nan, rates[name]) for name in found}))
        luck.append(_spreads({name: rates[name] - found[name] for name in found}))
        shuffled = rng.permutation(place)
        dealt.append(_spreads(_rates(labels, predicted, shuffled, len(names), num_classes)))
    values, result = _spreads(found), {}
    for name, spread in values.items():
        if np.isnan(spread).all():
            result[name] = None
            continue
        k = int(np.nanargmax(spread))
        largest, moved = (np.array([np.nanmax(each[name]) for each in many]) for many in (drawn, luck))
        low, high = gap_interval(float(spread[k]), largest, moved)
        noise = np.array([np.nanmax(each[name][~np.isnan(spread)], initial=0.0) for each in dealt])
        rates = found[name][:, k]
        result[name] = {
            "value": float(spread[k]),
            "low": low,
            "high": high,
            "p": float((1 + np.sum(noise >= spread[k] - 1e-12)) / (1 + _RESAMPLES)),
            "class": k if name != "accuracy" else None,
            "highest": names[int(np.nanargmax(rates))],
            "lowest": names[int(np.nanargmin(rates))],
        }
    return result


def _rates(
    labels: np.ndarray,
    predicted: np.ndarray,
    place: np.ndarray,
    num_groups: int,
    num_classes: int,
    *,
    least: int = SMALL,
) -> dict[str, np.ndarray]:
    """Of each group, [G, 1] or by class [G, K]; NaN where fewer than `least` images say it."""

    def counts(of: np.ndarray, mask: np.ndarray | slice = slice(None)) -> np.ndarray:
        flat = place[mask] * num_classes + of[mask]
        return np.bincount(flat, minlength=num_groups * num_classes).reshape(num_groups, num_classes).astype(float)

    right = predicted == labels
    true, guessed, hits = counts(labels), counts(predicted), counts(labels, right)
    size = true.sum(axis=1, keepdims=True)

    def share(of: np.ndarray, total: np.ndarray) -> np.ndarray:
        total = np.broadcast_to(total, of.shape)
        return np.where(total >= least, of / np.maximum(total, 1), np.nan)

    return {
        "accuracy": share(hits.sum(axis=1, keepdims=True), size),
        "demographic_parity": share(guessed, size),
        "true_positive_rate": share(hits, true),
        "false_positive_rate": share(guessed - hits, size - true),
    }


def _spreads(rates: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The difference of the groups furthest apart, [1] or by class [K]; NaN where fewer than two groups say it."""
    spreads = {}
    for name, values in rates.items():
        known = ~np.isnan(values)
        highest = np.where(known, values, -np.inf).max(axis=0)
        lowest = np.where(known, values, np.inf).min(axis=0)
        enough = known.sum(axis=0) > 1
        spreads[name] = np.where(enough, np.where(enough, highest, 0.0) - np.where(enough, lowest, 0.0), np.nan)
    return spreads
