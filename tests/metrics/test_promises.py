"""Promises: kept as often as they say, on examples drawn anew, whatever the classifier."""

import numpy as np
import pytest
from scipy.special import softmax

from vitcls.metrics import promises
from vitcls.metrics.promises import Regularization, TooFew


def draw(rng, count, num_classes=8):
    """Labels and the probabilities of a classifier that is too sure and sees noise."""
    z = 2 * rng.normal(size=(count, num_classes))
    honest = softmax(z, axis=1)
    labels = (honest.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    return labels, softmax(1.7 * z + rng.normal(size=z.shape), axis=1)


def true_scores(labels, probabilities, shape):
    return promises.class_scores(probabilities, shape)[np.arange(len(labels)), labels]


def test_scores_are_sums_of_the_more_probable_classes():
    scores = promises.class_scores(np.array([[0.2, 0.5, 0.3]]), Regularization())
    np.testing.assert_allclose(scores, [[1.0, 0.5, 0.8]])
    scores = promises.class_scores(np.array([[0.2, 0.5, 0.3]]), Regularization(penalty=0.1, free=1))
    np.testing.assert_allclose(scores, [[1.2, 0.5, 0.9]])


@pytest.mark.by_turns
@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_sets_hold_the_truth_as_often_as_promised(coverage):
    """In at least 95 % of 300 simulations (with room for chance: the 1 % quantile of a binomial is 92 %)."""
    rng = np.random.default_rng(0)
    kept, sizes = [], []
    for _ in range(300):
        (fit_labels, fit), (labels, held), (new_labels, new) = (draw(rng, count) for count in (150, 150, 2_000))
        shape = promises.choose_regularization(fit_labels, fit, coverage)
        threshold = promises.set_threshold(true_scores(labels, held, shape), coverage)
        sets = promises.label_sets(new, threshold, shape)
        kept.append(sets[np.arange(len(new)), new_labels].mean() >= coverage)
        sizes.append(sets.sum(axis=1).mean())
    assert np.mean(kept) >= 0.92
    assert np.mean(sizes) < 7  # of 8: they say something


def test_sets_are_refused_where_too_few_were_held_out():
    scores = np.linspace(0, 1, 58)
    with pytest.raises(TooFew, match="58 held-out examples cannot promise sets for 95%; that takes 59"):
        promises.set_threshold(scores, 0.95)
    assert promises.set_threshold(np.linspace(0, 1, 59), 0.95) == 1.0
    assert promises.set_threshold(np.arange(10_000.0), 0.9) == pytest.approx(9_050, abs=3)  # 0.9 and 1.645 deviations


@pytest.mark.parametrize("num_classes", [2, 3])
def test_float32_has_the_same_sets_and_answers(num_classes):
    """As `vitcls predict` gives them; the least probable class has a score of 1, and few levels are many equals."""
    rng = np.random.default_rng(num_classes)
    labels, levels = rng.integers(num_classes, size=2_000), rng.integers(1, 8, size=(2_000, num_classes)) / 7
    levels[np.arange(2_000), labels] += 0.6
    probabilities = levels / levels.sum(axis=1, keepdims=True)
    held, shown = slice(0, 1_000), slice(1_000, None)
    for regularization in (promises.Regularization(), promises.Regularization(0.1, 1)):
        scores = promises.class_scores(probabilities, regularization)[np.arange(2_000), labels]
        for coverage in (0.8, 0.9, 0.95):
            threshold = promises.set_threshold(scores[held], coverage)
            sets = [promises.label_sets(p[shown], threshold, regularization) for p in both(probabilities)]
            assert np.array_equal(*sets)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    threshold = promises.answer_threshold(confidence[held], right[held], 0.93).threshold
    answered = [promises.are_answered(each[shown], threshold) for each in both(confidence)]
    assert np.array_equal(*answered) and 0 < answered[0].mean() < 1


def both(values):
    return values, values.astype(np.float32)


def test_no_set_is_empty():
    sets = promises.label_sets(np.array([[0.9, 0.1]]), 0.0, Regularization())
    assert sets.tolist() == [[True, False]]


def test_answers_are_right_as_often_as_promised():
    rng = np.random.default_rng(1)
    kept, answered = [], []
    for _ in range(200):
        (labels, held), (new_labels, new) = draw(rng, 400), draw(rng, 4_000)
        try:
            promise = promises.answer_threshold(held.max(axis=1), held.argmax(axis=1) == labels, 0.6)
        except TooFew:
            continue
        given = new.max(axis=1) >= promise.threshold
        kept.append((new.argmax(axis=1) == new_labels)[given].mean() >= 0.6)
        answered.append(given.mean())
    assert len(kept) > 150 and np.mean(kept) >= 0.92 and np.mean(answered) > 0.2


def test_answers_are_refused_where_nothing_is_sure_enough():
    with pytest.raises(TooFew, match="95% of the answers are right; that takes 117 of them without"):
        promises.answer_threshold(np.linspace(0, 1, 30), np.ones(30, bool), 0.95)
    with pytest.raises(TooFew):
        promises.answer_threshold(np.linspace(0, 1, 116), np.ones(116, bool), 0.95)
    assert promises.answer_threshold(np.linspace(0, 1, 117), np.ones(117, bool), 0.95).answered == 1
    everything = promises.answer_threshold(np.linspace(0, 1, 300), np.ones(300, bool), 0.95)
    assert everything == (0.0, 1.0, 1.0)
    ties = promises.answer_threshold(np.full(300, 0.7), np.arange(300) < 299, 0.95)
    assert ties == (0.7, 1.0, 299 / 300)  # equals are answered together


def test_risk_falls_with_coverage_where_confidence_means_something():
    curve = promises.risk_coverage(np.array([0.9, 0.6, 0.8]), np.array([True, False, False]))
    np.testing.assert_allclose(curve.coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 2 / 3])
    assert curve.area == pytest.approx(7 / 18)


def test_proportions_have_exact_intervals():
    found = promises.proportion(np.arange(20) < 18)  # Clopper & Pearson's of 18 in 20, from R's binom.test
    assert found == {
        "value": 0.9,
        "low": pytest.approx(0.6830173, abs=1e-6),
        "high": pytest.approx(0.9876515, abs=1e-6),
    }
    assert promises.proportion(np.zeros(0, bool)) == {"value": None, "low": None, "high": None}
