"""The tests of significance against SciPy, Holm's correction against its definition, letters against cases by hand."""

import itertools

import numpy as np
import pytest
from scipy import stats

from vitcls.metrics.significance import (
    MOST_PERMUTATIONS,
    holm,
    least_p,
    letters,
    mcnemar_exact,
    permutation_test,
    pooled_deviation,
    seeds_needed,
    welch_test,
)


@pytest.mark.parametrize(("b", "c"), [(0, 1), (1, 5), (5, 1), (10, 25), (7, 7), (300, 412), (20_000, 20_500)])
def test_mcnemar_is_the_binomial_test(b, c):
    assert mcnemar_exact(b, c) == pytest.approx(stats.binomtest(b, b + c, 0.5).pvalue, rel=1e-9)


def test_mcnemar_of_models_that_are_right_on_the_same_images_is_1():
    assert mcnemar_exact(0, 0) == 1


def scipy_permutation_test(a, b):
    """All permutations, two-sided by the absolute difference."""
    difference = lambda a, b, axis: np.abs(np.mean(a, axis=axis) - np.mean(b, axis=axis))  # noqa: E731
    return stats.permutation_test((a, b), difference, alternative="greater", n_resamples=np.inf, vectorized=True).pvalue


@pytest.mark.parametrize(("sizes", "shift"), [((2, 2), 5), ((3, 3), 1), ((4, 4), 0.8), ((2, 5), 1), ((7, 6), 0.7)])
def test_few_permutations_are_all_tried(sizes, shift):
    rng = np.random.default_rng(sum(sizes))
    a, b = rng.normal(size=sizes[0]), rng.normal(shift, size=sizes[1])
    test = permutation_test(a, b)
    assert test.exact and test.permutations == len(list(itertools.combinations(range(sum(sizes)), sizes[0])))
    assert test.p == pytest.approx(scipy_permutation_test(a, b))


def test_accuracies_that_tie_count_as_extreme():
    """0.1 + 0.2 is not 0.3: sums in another order must still be the same mean."""
    a, b = [0.1, 0.2, 0.3], [0.6, 0.7, 0.8]
    assert permutation_test(a, b).p == pytest.approx(2 / 20)
    assert permutation_test([0.3, 0.1, 0.2], b) == permutation_test(a, b)
    assert permutation_test(a, a).p == 1


def test_many_permutations_are_a_sample_that_repeats():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=10), rng.normal(1, size=10)
    test, exact = permutation_test(a, b), scipy_permutation_test(a, b)
    assert not test.exact and test.permutations == MOST_PERMUTATIONS
    assert test.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / MOST_PERMUTATIONS))
    assert permutation_test(a, b) == test
    assert permutation_test(a, b + 100, limit=1_000).p >= 1 / 1_001  # never 0


def closed_testing(p_values):
    """Holm's adjusted p by its definition: the largest Bonferroni p of all sets of tests that this one is in."""
    tests = range(len(p_values))
    sets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(tests, size)]
    return [max(min(1, len(s) * min(p_values[i] for i in s)) for s in sets if t in s) for t in tests]


@pytest.mark.parametrize("p_values", [[0.01], [0.04, 0.01, 0.03], [0.2, 0.2, 0.9, 0.001], [1, 0.5, 0.02, 0.03, 0.0]])
def test_holm_is_closed_testing_with_bonferroni(p_values):
    np.testing.assert_allclose(holm(p_values), closed_testing(p_values))


def test_holm_of_nothing_is_nothing():
    assert holm([]).shape == (0,)


@pytest.mark.parametrize(
    ("count", "separated", "expected"),
    [
        (1, [], ["a"]),
        (3, [], ["a", "a", "a"]),
        (3, [(0, 1), (0, 2), (1, 2)], ["a", "b", "c"]),
        (3, [(0, 2)], ["a", "ab", "b"]),
        (4, [(0, 2), (0, 3), (1, 3)], ["a", "ab", "bc", "c"]),
        (4, [(0, 1), (2, 3)], ["ab", "cd", "ac", "bd"]),
        (4, [(0, 3), (1, 3), (2, 3)], ["a", "a", "a", "b"]),
    ],
)
def test_letters_of_cases_by_hand(count, separated, expected):
    assert letters(count, separated) == expected


@pytest.mark.parametrize("seed", range(20))
def test_two_groups_share_a_letter_unless_they_are_separated(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 9))
    pairs = list(itertools.combinations(range(count), 2))
    separated = {pair for pair in pairs if rng.random() < 0.5}
    shown = letters(count, separated)
    assert all(shown)
    assert {(i, j) for i, j in pairs if not set(shown[i]) & set(shown[j])} == separated


def test_the_pooled_deviation_is_that_of_the_t_test():
    a, b = [0.9, 0.92, 0.95], [0.8, 0.83, 0.81]
    assert pooled_deviation(a, b) == pytest.approx(np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2))
    t = stats.ttest_ind(a, b := [0.8, 0.83, 0.81, 0.85]).statistic
    assert (np.mean(a) - np.mean(b)) / (pooled_deviation(a, b) * np.sqrt(1 / 3 + 1 / 4)) == pytest.approx(t)


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 394), (0.5, 64), (0.8, 26), (1.0, 17), (-1.0, 17)])
def test_seeds_needed_are_those_of_cohens_table(effect, seeds):
    """Cohen 1988, table 2.4.1, with the last digit of G*Power."""
    assert seeds_needed(effect, 1.0) == seeds
    assert seeds_needed(effect / 100, 0.01) == seeds


def test_seeds_needed_find_the_difference_in_four_cases_of_five():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4_000, 17)), rng.normal(1.0, size=(4_000, 17))
    assert 0.78 < np.mean(stats.ttest_ind(a, b, axis=1).pvalue <= 0.05) < 0.83


def test_seeds_needed_at_the_edges():
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(1e-6, 1.0) is None
    assert seeds_needed(1.0, 0.0) == seeds_needed(50.0, 1.0) == 2  # without a deviation there is no variance
    assert seeds_needed(1.0, 1.0, alpha=0.05 / 78) > 2 * seeds_needed(1.0, 1.0)  # of the pairs of 13 rows


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (2, 5), (4, 3)])
def test_the_least_p_is_that_of_groups_far_apart(sizes):
    a, b = np.arange(sizes[0]), 100 + np.arange(sizes[1])
    assert permutation_test(a, b).p == pytest.approx(least_p(*sizes))


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (2, 7)])
@pytest.mark.parametrize("shift", [0.0, 1.5, 60.0])
def test_welchs_test_is_scipys(sizes, shift):
    rng = np.random.default_rng(sum(sizes))
    a, b = rng.normal(size=sizes[0]), rng.normal(shift, 3, size=sizes[1])
    test, expected = welch_test(a, b, step=1e-9), stats.ttest_ind(a, b, equal_var=False)
    assert tuple(test) == pytest.approx((expected.pvalue, expected.statistic, expected.df))


@pytest.mark.parametrize("seeds", [2, 3, 4])
@pytest.mark.parametrize(("images", "deviation"), [(359, 0.003), (359, 0.001), (10_000, 0.002), (10_000, 0.0003)])
def test_equal_recipes_are_seldom_separated(seeds, images, deviation):
    """At 0.05, and at the level that Holm's correction for 78 pairs begins with; accuracies are of whole images."""
    rng = np.random.default_rng(0)
    scores = np.round(images * rng.normal(0.95, deviation, (4_000, 2, seeds))) / images
    p = np.array([welch_test(a, b, step=1 / images).p for a, b in scores])
    assert np.mean(p <= 0.05) <= 0.055 and np.mean(p <= 0.05 / 78) <= 0.001


def test_seeds_that_are_equal_by_chance_do_not_make_a_difference_certain():
    assert 0.01 < welch_test([0.98] * 3, [0.98 - 1 / 359] * 3, step=1 / 359).p < 0.02
    assert welch_test([0.98] * 3, [0.98] * 3, step=1 / 359).p == 1
