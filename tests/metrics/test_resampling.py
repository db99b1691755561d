"""The bootstrap against the table of metrics on images that are really drawn, and intervals against known truths."""

import numpy as np
import pytest
import scipy.sparse

from vitcls.metrics import evidence_of, resampling, summarize
from vitcls.metrics.resampling import (
    METRICS_OF_PREDICTIONS,
    bootstrap,
    bootstrap_interval,
    gap_interval,
    gaps,
    weighted_metrics,
)


def predictions(count, num_classes, seed=0, decimals=None):
    """Labels and probabilities; with `decimals` there are many ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=count)
    scores = np.exp(rng.normal(size=(count, num_classes)) + 1.5 * np.eye(num_classes)[labels])
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    return labels, (probabilities if decimals is None else probabilities.round(decimals)).astype(np.float32)


def draw(count, resamples, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(resamples)], axis=1)


@pytest.mark.parametrize(
    ("count", "num_classes", "decimals"), [(60, 3, None), (60, 3, 1), (40, 12, None), (25, 30, None), (50, 2, 1)]
)
def test_weights_are_images_that_are_repeated(count, num_classes, decimals):
    labels, probabilities = predictions(count, num_classes, decimals=decimals)
    weights = draw(count, 5)
    found = weighted_metrics(labels, probabilities, weights.astype(np.float32))
    for r, column in enumerate(weights.T):
        rows = np.repeat(np.arange(count), column)
        expected = summarize(evidence_of(labels[rows], probabilities[rows]), METRICS_OF_PREDICTIONS)
        for name, value in expected.items():
            assert found[name][r] == pytest.approx(value, abs=1e-12), name


def test_labels_of_one_class_have_metrics_too():
    _, probabilities = predictions(20, 3)
    labels = np.zeros(20, int)
    found = weighted_metrics(labels, probabilities, np.ones((20, 1), np.float32))
    for name, value in summarize(evidence_of(labels, probabilities), METRICS_OF_PREDICTIONS).items():
        assert found[name][0] == pytest.approx(value), name


def test_every_model_is_resampled_with_the_same_images(monkeypatch):
    labels, probabilities = predictions(50, 3)
    whole = bootstrap(labels, probabilities, 20)
    monkeypatch.setattr(resampling, "_BLOCK", 3 * 50)  # a few resamples at a time, as of large sets
    parts = bootstrap(labels, probabilities, 20)
    assert set(whole) == {*METRICS_OF_PREDICTIONS, "ece_luck"}
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, rtol=0, atol=1e-12)
    again = bootstrap(labels, np.roll(probabilities, 1, axis=1), 20)
    images = [np.bincount(np.random.default_rng(0).integers(50, size=50), minlength=50)]
    right = np.roll(probabilities, 1, axis=1).argmax(axis=1) == labels
    assert again["accuracy"][0] == pytest.approx((right * images[0]).sum() / 50)
    assert np.std(whole["accuracy"]) == pytest.approx(
        np.sqrt(whole["accuracy"].mean() * (1 - whole["accuracy"].mean()) / 50), rel=0.5
    )


def coverage(simulations=1_000, count=300, resamples=300):
    """How often intervals of accuracy and of the difference of two models that share their hard images hold the truth.

    Of an image with difficulty u, uniform, the models are right with probability 1 - u / 2 and 1 - 0.7 u.
    """
    held = {"accuracy": 0, "difference": 0}
    labels = np.zeros(count, int)
    for seed in range(simulations):
        rng = np.random.default_rng(seed)
        hard, luck = rng.random(count), rng.random((2, count))
        right = [luck[0] > hard / 2, luck[1] > 0.7 * hard]
        one, two = (
            bootstrap(labels, np.stack([r, ~r], axis=1).astype(np.float32), resamples, seed)["accuracy"] for r in right
        )
        low, high = bootstrap_interval(one)
        held["accuracy"] += low <= 0.75 <= high
        low, high = bootstrap_interval(one - two)
        held["difference"] += low <= 0.1 <= high
    return {name: hits / simulations for name, hits in held.items()}


@pytest.mark.by_turns
def test_intervals_of_95_percent_hold_the_truth_so_often():
    for name, share in coverage().items():
        assert 0.93 <= share <= 0.97, (name, share)


def test_the_interval_of_calibration_is_around_what_was_measured():
    """The percentile interval is not: a resample has more calibration error than the images that it is drawn from."""
    labels, probabilities = predictions(100, 3)
    ece = summarize(evidence_of(labels, probabilities), ["ece"])["ece"]
    found = bootstrap(labels, probabilities, 200)
    assert found["ece"].mean() > ece
    low, high = gap_interval(ece, found["ece"], found["ece_luck"])
    assert 0 <= low < ece < high == pytest.approx(np.quantile(found["ece"], 0.975))
    assert gap_interval(0.1, np.full(9, 0.2), np.full(9, 0.3)) == (0, pytest.approx(0.2))  # luck may have been all


def test_luck_lowers_what_is_far_from_0_and_only_raises_what_is_not():
    """A bin that is 30 too high in every image alike, one whose two images balance, and one of what seldom happens."""
    rare = [0, 0, 0, 0, 0, -0.1, -0.1]  # twice p = 0.1, and it did not happen
    differences = scipy.sparse.csr_array(np.array([[10.0, 10, 10, 0, 0, 0, 0], [0, 0, 0, 1, -1, 0, 0], rare]))
    weights = np.array([[1] * 7, [0, 1, 1, 3, 0, 1, 1], [2, 2, 1, 0, 0, 2, 0], [1, 1, 1, 1, 1, 0, 0]], np.float32).T
    sums, luck = gaps(differences, weights)
    np.testing.assert_allclose(sums, [30.2, 20 + 3 + 0.2, 50.2, 30], rtol=1e-6)
    wider = np.sqrt(2 * 0.1 * 0.9) / np.sqrt(2 * 0.1**2 - 0.2**2 / 7)  # the deviation of p against that of resamples
    np.testing.assert_allclose(luck, [0, -10 + 3, 20, 0.2 * wider], rtol=1e-6, atol=1e-6)
