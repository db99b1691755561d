"""How often bootstrap intervals of 95 % hold the truth: what `vitcls compare` shows was chosen by it.

    python -m benchmarks.intervals --images=300,2000

Made-up classifiers whose metrics are known from a large set are measured on small ones, drawn anew each time. The
intervals are the percentile, the basic and the BCa interval (Efron & Tibshirani 1993, chapters 13 and 14; Davison &
Hinkley 1997, section 2.4), of each metric and of its difference between two classifiers; and for the calibration error
that of gaps, which is used.
"""

import sys
from collections.abc import Iterator

import numpy as np

from benchmarks import harness
from vitcls import cli
from vitcls.metrics.resampling import METRICS_OF_PREDICTIONS, gap_interval, weighted_metrics

CLASSES = 5
_LARGE = 100_000  # images from which the truth is known
_PARTS = 50  # of the images, left out one after the other for BCa
QUANTILES = (0.025, 0.975)


def draw(count: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels [N] and the probabilities [N, K] of two classifiers; the second is noisier and surer of itself."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count)
    seen = rng.normal(size=(count, CLASSES)) + 1.5 * np.eye(CLASSES)[labels]
    logits = [scale * (seen + rng.normal(0, 0.5, seen.shape)) for scale in (1.0, 1.4)]
    scores = [np.exp(value - value.max(axis=1, keepdims=True)) for value in logits]
    return labels, [(value / value.sum(axis=1, keepdims=True)).astype(np.float32) for value in scores]


def quantities(labels: np.ndarray, classifiers: list[np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric of the first classifier and its difference from the second, under weights [N, R]: name -> [R]."""
    first, second = (weighted_metrics(labels, probabilities, weights) for probabilities in classifiers)
    return first | {f"{name}, difference": first[name] - second[name] for name in METRICS_OF_PREDICTIONS}


def make_weights(count: int, resamples: int, seed: int) -> np.ndarray:
    """All images once, without each part, and drawn anew: float32 [N, 1 + parts + resamples]."""
    rng = np.random.default_rng(seed)
    drawn = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples)]
    without = np.arange(count)[:, None] % _PARTS != np.arange(_PARTS)
    return np.concatenate([np.ones((count, 1)), without, np.stack(drawn, axis=1)], axis=1).astype(np.float32)


def intervals(values: np.ndarray) -> Iterator[tuple[str, tuple[float, float]]]:
    """(kind, (low, high)) from the values under `make_weights`."""
    from scipy.special import ndtr, ndtri

    estimate, jackknife, resampled = values[0], values[1 : 1 + _PARTS], values[1 + _PARTS :]
    low, high = np.quantile(resampled, QUANTILES)
    yield "percentile", (low, high)
    yield "basic", (2 * estimate - high, 2 * estimate - low)
    below = np.mean(resampled < estimate) + np.mean(resampled == estimate) / 2
    bias = ndtri(np.clip(below, 1e-4, 1 - 1e-4))
    gaps = jackknife.mean() - jackknife
    acceleration = np.sum(gaps**3) / max(6 * np.sum(gaps**2) ** 1.5, 1e-300)
    shifted = bias + ndtri(np.array(QUANTILES))
    yield "BCa", tuple(np.quantile(resampled, ndtr(bias + shifted / (1 - acceleration * shifted))))


def coverage(count: int, simulations: int, resamples: int) -> list[harness.Row]:
    """A row for each metric and difference: the share of simulations, in %, in which an interval held the truth."""
    truth = quantities(*draw(_LARGE, seed=2**31), np.ones((_LARGE, 1), np.float32))
    held: dict[str, dict[str, int]] = {name: {} for name in truth if name != "ece_luck"}
    for seed in range(simulations):
        found = quantities(*draw(count, seed), make_weights(count, resamples, seed))
        luck = found.pop("ece_luck")[1 + _PARTS :]
        for name, values in found.items():
            kinds = dict(intervals(values))
            if name == "ece":
                kinds["of gaps"] = gap_interval(values[0], values[1 + _PARTS :], luck)
            for kind, (low, high) in kinds.items():
                held[name][kind] = held[name].get(kind, 0) + int(low <= truth[name][0] <= high)
    return [
        {"images": count, "metric": name} | {kind: 100 * hits / simulations for kind, hits in kinds.items()}
        for name, kinds in held.items()
    ]


def main(argv: list[str]) -> None:
    flags = cli.Parser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", default="", help="directory for JSON, CSV and Markdown")
    flags.add_argument("--images", type=harness.integers, default=[300, 2_000], metavar="N,N", help="sizes of the sets")
    flags.add_argument("--simulations", type=int, default=1_000)
    flags.add_argument("--resamples", type=int, default=500)
    args = flags.parse_args(argv)
    rows = [row for count in args.images for row in coverage(count, args.simulations, args.resamples)]
    harness.publish("intervals", rows, args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
