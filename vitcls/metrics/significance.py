"""Is one classifier better than another? Tests, their correction for many pairs, and how many seeds would tell.

`mcnemar_exact`, two-sided or one-sided, is of two trained models; `permutation_test` and `welch_test` are of two
training recipes, each by the scores of its seeds.
"""

import bisect
import itertools
import math
import string
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

MOST_PERMUTATIONS = 20_000  # that are all tried; of more, so many at random
_MOST_SEEDS = 10_000


def mcnemar_exact(b: int, c: int) -> float:
    """The two-sided p of McNemar's exact test: were b and c drawn with one half each? (McNemar 1947)

    Args:
      b: images that only the first model gets right; c: only the second.
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5)))


def mcnemar_exact_one_sided(b: int, c: int) -> float:
    """The one-sided p of McNemar's exact test: how probable are b or more of b + c, drawn with at most one half each?

    Args:
      b: images that only the first model gets right; c: only the second. A small p says that the second is worse.
    """
    from scipy.special import bdtr

    return float(bdtr(c, b + c, 0.5))


class PermutationTest(NamedTuple):
    """The two-sided p, of how many permutations, and whether these were all that there are."""

    p: float
    permutations: int
    exact: bool


def permutation_test(
    a: Sequence[float], b: Sequence[float], limit: int = MOST_PERMUTATIONS, seed: int = 0
) -> PermutationTest:
    """How often seeds dealt anew to two groups differ in their means by no less than `a` and `b` do.

    All ways to deal them are tried where there are at most `limit`; else `limit` at random, and the data as they are
    count as one more, so that p is never 0 (Phipson & Smyth 2010).

    Args:
      a, b: one score per seed; the groups may differ in size.
    """
    values, size = np.concatenate([a, b]).astype(np.float64), len(a)
    exact = math.comb(len(values), size) <= limit
    if exact:
        first = np.array(list(itertools.combinations(range(len(values)), size)))
    else:
        rng = np.random.default_rng(seed)
        first = np.argsort(rng.random((limit, len(values))), axis=1)[:, :size]
    sums = values[first].sum(axis=1)
    differences = np.abs(sums / size - (values.sum() - sums) / len(b))
    observed = abs(np.mean(a) - np.mean(b))
    extreme = int(np.count_nonzero(differences >= observed - 1e-12 * np.abs(values).max()))  # but for rounding
    p = extreme / len(first) if exact else (extreme + 1) / (limit + 1)
    return PermutationTest(p, len(first), exact)


def least_p(a: int, b: int) -> float:
    """The least p that a permutation test of `a` and `b` seeds can have, with all permutations."""
    return (2 if a == b else 1) / math.comb(a + b, a)


class WelchTest(NamedTuple):
    """The two-sided p, Student's t and its degrees of freedom."""

    p: float
    t: float
    freedom: float


def welch_test(a: Sequence[float], b: Sequence[float], step: float) -> WelchTest:
    """Welch's t test of the means of two groups, each with a deviation of its own (Welch 1947).

    The variance of a group is taken as no less than step ** 2 / 12, that of rounding: a few accuracies on few images
    may be equal by chance.

    Args:
      a, b: one score per seed, at least two each; the groups may differ in size.
      step: what scores are multiples of, 1 / N for the accuracy on N images; above 0.
    """
    from scipy.special import stdtr

    squares = [max(float(np.var(group, ddof=1)), step**2 / 12) / len(group) for group in (a, b)]
    t = float(np.mean(a) - np.mean(b)) / math.sqrt(sum(squares))
    freedom = sum(squares) ** 2 / sum(
        square**2 / (len(group) - 1) for square, group in zip(squares, (a, b), strict=True)
    )
    return WelchTest(2 * float(stdtr(freedom, -abs(t))), t, freedom)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p values adjusted for as many tests, [tests]: below alpha they are significant all together (Holm 1979)."""
    p_values = np.asarray(p_values, np.float64)
    order = np.argsort(p_values, kind="stable")
    stepped = p_values[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted


def letters(count: int, separated: Collection[tuple[int, int]]) -> list[str]:
    """The compact letter display: two of `count` groups share a letter unless they are `separated` (Piepho 2004).

    Groups are numbered in the order in which they are shown, so that the first has the letter a.
    """
    columns = [frozenset(range(count))]
    for i, j in separated:
        split = [part for column in columns for part in _without_both(column, i, j)]
        columns = [column for column in dict.fromkeys(split) if not any(column < other for other in split)]
    columns.sort(key=sorted)
    return ["".join(_letter(k) for k, column in enumerate(columns) if group in column) for group in range(count)]


def _without_both(column: frozenset[int], i: int, j: int) -> tuple[frozenset[int], ...]:
    return (column - {j}, column - {i}) if {i, j} <= column else (column,)


def _letter(k: int) -> str:
    return string.ascii_letters[k] if k < len(string.ascii_letters) else f"({k + 1})"


def pooled_deviation(a: Sequence[float], b: Sequence[float]) -> float:
    """The standard deviation within two groups, from the squares of both; at least one has two scores."""
    squares = sum(np.sum((np.asarray(group) - np.mean(group)) ** 2) for group in (a, b))
    return math.sqrt(squares / (len(a) + len(b) - 2))


def seeds_needed(difference: float, deviation: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Seeds of each of two groups with which a difference of the means would be found with probability `power`.

    The power is that of the two-sided t test (Cohen 1988, section 2), which Welch's and a permutation test come near.
    None where no number that anybody trains would do, such as for no difference.
    """
    counts = range(2, _MOST_SEEDS)
    enough = bisect.bisect_left(counts, power, key=lambda n: _power(n, difference, deviation, alpha))
    return counts[enough] if enough < len(counts) else None


def _power(n: int, difference: float, deviation: float, alpha: float) -> float:
    """That of the two-sided t test with n scores in each group, less the tail on the wrong side."""
    from scipy.special import nctdtr, stdtrit

    if not deviation or not difference:
        return float(difference != 0)
    freedom = 2 * n - 2
    effect = min(abs(difference) / deviation * math.sqrt(n / 2), 30.0)  # beyond, the power is 1 and nctdtr fails
    return 1 - float(nctdtr(freedom, effect, stdtrit(freedom, 1 - alpha / 2)))
