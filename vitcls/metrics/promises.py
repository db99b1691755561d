"""What a classifier can promise of images like those of its validation split: sets that hold the truth, and answers
that are right as often as asked, or none.

Sets are of conformal prediction: whatever the classifier, if the held-out examples and those to come are exchangeable.
"""

import math
from typing import NamedTuple

import numpy as np

CERTAINTY = 0.95  # of every promise, over the examples that happened to be held out
_EQUAL = 1e-6  # scores that differ by less are equal: sums of all probabilities, or where isotonic scaling is flat
_TESTS = 20  # of thresholds of confidence
_PENALTIES = (0.001, 0.01, 0.05, 0.1, 0.3, 1.0)  # among which the sets of RAPS are chosen
_FREE = (1, 2, 5)


class Regularization(NamedTuple):
    """Of RAPS (Angelopoulos et al. 2021, section 2): each class beyond `free` adds `penalty` to the score; 0 is APS."""

    penalty: float = 0.0
    free: int = 0


class TooFew(ValueError):
    """The examples are too few for what is asked; the message says how many are needed."""


def class_scores(probabilities: np.ndarray, regularization: Regularization) -> np.ndarray:
    """How much probability comes before and with each class, from the most probable on: float64 [N, K].

    APS (Romano et al. 2020), without its random part: the score of the true class is a score of conformal prediction
    all the same, and the same image has the same set on every call.
    """
    p = probabilities.astype(np.float64)
    order = np.argsort(-p, axis=1, kind="stable")
    rank = np.arange(1, p.shape[1] + 1)
    beyond = regularization.penalty * np.maximum(rank - regularization.free, 0)
    ordered = np.cumsum(np.take_along_axis(p, order, axis=1), axis=1) + beyond
    scores = np.empty_like(p)
    np.put_along_axis(scores, order, ordered, axis=1)
    return scores


def set_threshold(scores: np.ndarray, coverage: float) -> float:
    """The score up to which a class is in the set, of the true classes' scores [n] of examples that were held out.

    The coverage of the k-th smallest is distributed as Beta(k, n + 1 - k) (Vovk 2012, section 3): the first k that has
    at least `coverage` with a certainty of 95 % is taken. Raises TooFew where not even the last has.
    """
    from scipy.stats import beta

    count = len(scores)
    k = np.arange(1, count + 1)
    enough = beta.ppf(1 - CERTAINTY, k, count + 1 - k) >= coverage
    if not enough.any():
        needed = math.ceil(math.log(1 - CERTAINTY) / math.log(coverage))
        raise TooFew(f"{count} held-out examples cannot promise sets for {percent(coverage)}; that takes {needed:,}")
    return float(np.sort(scores)[enough.argmax()])


def label_sets(probabilities: np.ndarray, threshold: float, regularization: Regularization) -> np.ndarray:
    """The classes up to the threshold, and the most probable in any case: bool [N, K].

    The same for probabilities in float32 or float64.
    """
    sets = class_scores(probabilities, regularization) <= threshold + _EQUAL
    sets[np.arange(len(sets)), probabilities.argmax(axis=1)] = True
    return sets


def choose_regularization(labels: np.ndarray, probabilities: np.ndarray, coverage: float) -> Regularization:
    """That with the smallest sets on these examples, which must not be those of the thresholds; APS for too few."""
    rows, sizes = np.arange(len(labels)), {}
    for tried in (Regularization(), *(Regularization(penalty, free) for penalty in _PENALTIES for free in _FREE)):
        try:
            threshold = set_threshold(class_scores(probabilities, tried)[rows, labels], coverage)
        except TooFew:
            return Regularization()
        sizes[tried] = label_sets(probabilities, threshold, tried).sum(axis=1).mean()
    return min(sizes, key=sizes.get)


class Answers(NamedTuple):
    """Answers are given from this confidence on; so many of the held-out images are answered, and right."""

    threshold: float
    answered: float
    accuracy: float


def answer_threshold(confidence: np.ndarray, correct: np.ndarray, accuracy: float) -> Answers:
    """The least confidence from which answers are right with probability `accuracy`, with a certainty of 95 %.

    As Geifman & El-Yaniv 2017: the surest 5, 10, ... 100 % are tested by an exact binomial bound (Clopper & Pearson)
    at a twentieth of 5 % each, so that all of them hold at once.

    Args:
      confidence: of the predicted classes [n]; correct: bool [n], of examples that were held out.

    Raises TooFew where no threshold can promise it.
    """
    from scipy.stats import beta

    order = np.argsort(-confidence, kind="stable")
    ordered, right = confidence[order], np.cumsum(correct[order])
    for twentieths in range(_TESTS, 0, -1):
        least_sure = ordered[max(math.ceil(twentieths * len(ordered) / _TESTS), 1) - 1]
        answered = int(np.count_nonzero(are_answered(ordered, least_sure)))  # equals are answered together
        hits = int(right[answered - 1])
        bound = beta.ppf((1 - CERTAINTY) / _TESTS, hits, answered - hits + 1) if hits else 0.0
        if bound >= accuracy:
            return Answers(float(least_sure), answered / len(ordered), hits / answered)
    needed = math.ceil(math.log((1 - CERTAINTY) / _TESTS) / math.log(accuracy))
    raise TooFew(
        f"no confidence of {len(ordered):,} held-out examples promises that {percent(accuracy)} of the answers are "
        f"right; that takes {needed:,} of them without a mistake, and more with"
    )


def are_answered(confidence: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the confidence of predictions [...], in float32 or float64, is enough for an answer."""
    return confidence >= threshold - _EQUAL


def can_be_asked(share: float) -> bool:
    """Whether it is one that may be promised; all or nothing, and less than half, are not."""
    return 0.5 <= share < 1


def percent(share: float) -> str:
    """Of a promise, in as many digits as it has: 0.995 is '99.5%'."""
    return f"{100 * share:.10g}%"


def proportion(happened: np.ndarray) -> dict[str, float | None]:
    """value, low and high of the share of True in bool [n], by the exact 95 % interval; None where n is 0."""
    from scipy.stats import binomtest

    if not len(happened):
        return {"value": None, "low": None, "high": None}
    found = binomtest(int(happened.sum()), len(happened))
    low, high = found.proportion_ci(0.95, method="exact")
    return {"value": float(happened.mean()), "low": float(low), "high": float(high)}


class RiskCoverage(NamedTuple):
    """Of the images that are answered from each confidence on, [N]: their share of all, and the share of wrong ones."""

    coverage: np.ndarray
    risk: np.ndarray

    @property
    def area(self) -> float:
        """The mean risk over coverages (AURC, Geifman et al. 2019)."""
        return float(self.risk.mean())


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> RiskCoverage:
    """The curve of answering only the surest images."""
    order = np.argsort(-confidence, kind="stable")
    answered = np.arange(1, len(order) + 1)
    return RiskCoverage(answered / len(order), np.cumsum(~correct[order]) / answered)
