"""Scores of what is unknown: against definitions by hand, scikit-learn's and scipy's."""

import numpy as np
import pytest
from scipy.special import logsumexp, softmax
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from vitcls.metrics import unknown
from vitcls.metrics.unknown import Outputs


def draw(count, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    features = rng.normal(size=(count, 6)) @ np.diag([1, 2, 0.5, 1, 1, 3]) + 4 * np.eye(3, 6)[labels] + shift
    return Outputs(features[:, :3].astype(np.float32), features.astype(np.float32)), labels


def test_softmax_and_energy_are_of_the_logits():
    outputs, labels = draw(50, 0)
    z = outputs.logits.astype(np.float64)
    np.testing.assert_allclose(unknown.MaximumSoftmax.fit(outputs, labels)(outputs), softmax(z, axis=1).max(axis=1))
    np.testing.assert_allclose(unknown.Energy.fit(outputs, labels)(outputs), logsumexp(z, axis=1))


def test_mahalanobis_is_scikit_learns_distance_to_the_nearest_class():
    train, labels = draw(500, 0)
    others, _ = draw(40, 1, shift=2.0)
    features = train.features.astype(np.float64)
    means = np.stack([features[labels == k].mean(axis=0) for k in range(3)])
    covariance = EmpiricalCovariance(assume_centered=True).fit(features - means[labels])
    expected = np.stack([covariance.mahalanobis(others.features - mean) for mean in means]).min(axis=0)
    np.testing.assert_allclose(-unknown.Mahalanobis.fit(train, labels)(others), expected, rtol=1e-8)


def test_a_feature_that_never_varies_does_no_harm():
    train, labels = draw(100, 0)
    dead = Outputs(train.logits, np.concatenate([train.features, np.zeros((100, 2), np.float32)], axis=1))
    np.testing.assert_allclose(
        unknown.Mahalanobis.fit(dead, labels)(dead), unknown.Mahalanobis.fit(train, labels)(train), rtol=1e-6
    )


def test_neighbours_are_scikit_learns():
    train, labels = draw(200, 0)
    others, _ = draw(1_100, 1)  # more than a block

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    expected = NearestNeighbors(n_neighbors=50).fit(unit(train.features)).kneighbors(unit(others.features))[0][:, -1]
    np.testing.assert_allclose(-unknown.NearestNeighbors.fit(train, labels)(others), expected, atol=1e-5)
    few = unknown.NearestNeighbors.fit(Outputs(train.logits[:5], train.features[:5]), labels[:5])
    assert few.neighbors == 5 and np.isfinite(few(others)).all()


def test_separation_is_that_of_scikit_learn_and_its_intervals_hold_the_truth():
    """Of two normal distributions the AUROC is known: Phi(d / sqrt 2)."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(30):
        known, other = rng.normal(1.0, 1, 200), rng.normal(0, 1, 150)
        found = unknown.separation(known, other)
        held += found["auroc"]["low"] <= 0.7602 <= found["auroc"]["high"]
    assert held >= 25  # of 30; at 95 % fewer than 25 have a probability of 0.3 %
    assert_as_scikit_learn(found, known, other)


def test_equal_scores_are_as_scikit_learn_takes_them():
    rng = np.random.default_rng(0)
    known, other = rng.integers(2, 8, 60) / 4, rng.integers(0, 6, 45) / 4
    assert_as_scikit_learn(unknown.separation(known, other), known, other)


def assert_as_scikit_learn(found, known, other):
    truth = np.arange(len(known) + len(other)) < len(known)
    scores = np.concatenate([known, other])
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(truth, scores))
    assert found["aupr_known"]["value"] == pytest.approx(average_precision_score(truth, scores))
    assert found["aupr_unknown"]["value"] == pytest.approx(average_precision_score(~truth, -scores))
    assert found["fpr95"]["value"] == np.mean(other >= np.sort(known)[len(known) // 20])


def test_the_threshold_keeps_the_share_that_was_asked_for():
    scores = np.random.default_rng(0).permutation(100.0 * np.arange(100))
    assert np.mean(scores >= unknown.threshold(scores)) == 0.95
    assert np.mean(scores >= unknown.threshold(scores, 1.0)) == 1.0
