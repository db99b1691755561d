"""Probabilities made honest: against truths that are known, a general optimiser, and naive sums."""

import json

import numpy as np
import pytest
import scipy.special
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import log_loss

from vitcls.metrics import scaling
from vitcls.metrics.calibration_scores import calibration_scores, weighted_scores


def draw(count, num_classes=5, sharpness=2.0, seed=0):
    """Labels drawn with probabilities that are known, and those probabilities made too sure of themselves."""
    rng = np.random.default_rng(seed)
    z = 2 * rng.normal(size=(count, num_classes))
    honest = softmax(z, axis=1)
    labels = (honest.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    return labels, softmax(sharpness * z, axis=1).astype(np.float32), honest


def test_temperature_finds_what_was_done_to_the_logits():
    labels, sure, honest = draw(20_000)
    fitted = scaling.Temperature.fit(labels, sure)
    assert fitted.temperature == pytest.approx(2.0, rel=0.03)
    np.testing.assert_allclose(fitted(sure), honest, atol=0.02)
    assert (fitted(sure).argmax(axis=1) == sure.argmax(axis=1)).all()


def test_vector_scaling_is_the_optimum_of_its_loss():
    """Against Nelder and Mead, which need no gradient; with one example more, of any class."""
    labels, sure, _ = draw(400, num_classes=3)
    log_p = np.log(sure.astype(np.float64))

    def loss(parameters):
        weights, biases = parameters.reshape(2, 3)
        each = log_softmax(weights * log_p + biases, axis=1)
        return -(each[np.arange(400), labels].sum() + each.mean(axis=1).mean()) / 401

    start = np.array([1.0, 1, 1, 0, 0, 0])
    options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-8, "fatol": 1e-12}
    expected = minimize(loss, start, method="Nelder-Mead", options=options)
    fitted = scaling.Vector.fit(labels, sure)
    assert loss(np.array([fitted.weights, fitted.biases]).ravel()) == pytest.approx(expected.fun, rel=1e-5)


@pytest.mark.parametrize("method", ["temperature", "vector"])
def test_a_few_that_are_all_right_are_no_proof_that_none_is_wrong(method):
    """As of a run whose validation images are few and right: what is fitted to them is no worse on others."""
    labels, probabilities, _ = draw(2_000, num_classes=10, sharpness=1.0)
    right = np.flatnonzero((probabilities.argmax(axis=1) == labels) & (probabilities.max(axis=1) > 0.8))
    fitted = scaling.METHODS[method].fit(labels[right[:60]], probabilities[right[:60]])
    others = np.concatenate([right[60:], np.flatnonzero(probabilities.argmax(axis=1) != labels)[:5]])
    before, after = probabilities[others], fitted(probabilities[others])
    assert log_loss(labels[others], after, labels=range(10)) < 1.3 * log_loss(labels[others], before, labels=range(10))


def test_isotonic_scaling_is_a_regression_of_each_class():
    labels, sure, _ = draw(300)
    least = 1 / 602
    columns = [
        IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip")
        .fit(sure[:, k], labels == k)
        .predict(sure[:, k])
        for k in range(5)
    ]
    expected = np.stack(columns, axis=1)
    fitted = scaling.Isotonic.fit(labels, sure)
    np.testing.assert_allclose(fitted(sure), expected / expected.sum(axis=1, keepdims=True), rtol=1e-5)
    assert (fitted(np.eye(5, dtype=np.float32)) > 0).all()


@pytest.mark.parametrize("name", scaling.METHODS)
def test_every_method_survives_json_and_certain_predictions(name):
    labels, sure, _ = draw(60)
    sure[0] = np.eye(5)[labels[0]]
    fitted = scaling.METHODS[name].fit(labels, sure)
    again = scaling.from_json(json.loads(json.dumps(scaling.to_json(fitted))))
    assert again == fitted
    out = again(np.eye(5, dtype=np.float32))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out.sum(axis=1), 1)


def test_the_choice_is_by_examples_that_were_not_fitted_on():
    labels, sure, honest = draw(2_000)
    chosen, losses = scaling.choose(labels, sure)
    assert chosen == "temperature" and losses["temperature"] < losses["none"] - 0.1
    assert losses["none"] == pytest.approx(log_loss(labels, sure), rel=1e-4)
    few_labels, few, _ = draw(40, num_classes=20)
    assert scaling.choose(few_labels, few)[0] in ("none", "temperature")  # 40 numbers of 32 images would fit noise
    assert scaling.choose(*draw(9)[:2])[0] == "none"
    assert scaling.choose(labels, honest.astype(np.float32))[0] in ("none", "temperature")


def test_scores_are_those_of_their_definitions():
    labels, sure, _ = draw(500)
    found = calibration_scores(labels, sure, resamples=200)
    p = sure.astype(np.float64)
    one_hot = np.eye(5)[labels]
    assert found["loss"]["value"] == pytest.approx(log_loss(labels, sure), rel=1e-5)
    assert found["brier"]["value"] == pytest.approx(np.mean(np.sum((p - one_hot) ** 2, axis=1)), rel=1e-6)

    def gap(confidence, happened, bins):
        return sum(abs(np.sum(happened[bins == b] - confidence[bins == b])) for b in range(15)) / len(confidence)

    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    width = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    assert found["ece"]["value"] == pytest.approx(gap(confidence, right, width))
    mass = np.empty(500, int)
    mass[np.argsort(confidence, kind="stable")] = np.arange(500) * 15 // 500
    assert found["ece_equal_mass"]["value"] == pytest.approx(gap(confidence, right, mass))
    classwise = [gap(p[:, k], one_hot[:, k], np.clip(np.ceil(p[:, k] * 15).astype(int) - 1, 0, 14)) for k in range(5)]
    assert found["ece_classwise"]["value"] == pytest.approx(np.mean(classwise))
    for row in found.values():
        assert row["low"] <= row["value"] <= row["high"]
    order = np.argsort(-confidence, kind="stable")
    risks = [np.mean(~right[order[:n]]) for n in range(1, 501)]
    assert found["aurc"]["value"] == pytest.approx(np.mean(risks))


@pytest.mark.parametrize("sharpness", [1.0, 1.6])
def test_intervals_of_calibration_hold_what_is_true(sharpness):
    """Of 40 classifiers: of honest ones no error is proved, of sharper ones the true error is within."""
    names = ("ece", "ece_equal_mass", "ece_classwise")

    def drawn(count, seed):
        rng = np.random.default_rng(seed)
        z = 2 * rng.normal(size=(count, 5))
        p = scipy.special.softmax(z, axis=1)
        labels = (p.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
        return labels, scipy.special.softmax(sharpness * z, axis=1).astype(np.float32)

    truth = dict.fromkeys(names, 0.0)
    if sharpness > 1:
        found = weighted_scores(*drawn(200_000, 99), np.ones((200_000, 1), np.float32))
        truth = {name: found[name][0] for name in names}
    held = dict.fromkeys(names, 0)
    for seed in range(40):
        found = calibration_scores(*drawn(1_000, seed), resamples=100)
        for name in names:
            held[name] += found[name]["low"] <= truth[name] <= found[name]["high"]
    assert min(held.values()) >= 35  # 38 are expected
    if sharpness > 1:
        assert all(found[name]["low"] > 0 for name in ("ece", "ece_equal_mass"))
    assert calibration_scores(*drawn(1, 0), resamples=9)["ece_classwise"]["low"] is None
