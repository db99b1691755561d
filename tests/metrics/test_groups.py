"""Groups: by hand, against scipy, and what chance alone does."""

import numpy as np
import pytest
from scipy.stats import fisher_exact

from vitcls.metrics import expected_calibration_error
from vitcls.metrics.groups import SMALL, by_group


def draw(count, seed=0, num_classes=3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=count)
    z = rng.normal(size=(count, num_classes))
    z[np.arange(count), labels] += 1.5
    return labels, z, rng


def softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)


def test_each_group_is_measured_as_if_it_were_alone():
    labels, z, rng = draw(600)
    groups = rng.choice(["a", "b", "rare"], 600, p=[0.6, 0.37, 0.03])
    p = softmax(z)
    rows = {row["group"]: row for row in by_group(labels, p, list(groups))["groups"]}
    for name, row in rows.items():
        inside = groups == name
        assert row["num_examples"] == inside.sum() and row["small"] == (inside.sum() < SMALL)
        assert row["accuracy"]["value"] == pytest.approx(np.mean(p[inside].argmax(1) == labels[inside]))
        assert row["ece"]["value"] == pytest.approx(expected_calibration_error(labels[inside], p[inside]))
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
    assert rows["rare"]["small"] and "p_holm" not in rows["rare"]
    right = p.argmax(1) == labels
    raw = [
        fisher_exact([[right[m].sum(), (~right[m]).sum()] for m in (groups == g, groups != g)])[1] for g in ("a", "b")
    ]
    assert sorted(rows[g]["p_holm"] for g in ("a", "b")) == pytest.approx(
        sorted([min(1, 2 * min(raw)), max(max(raw), min(1, 2 * min(raw)))])
    )


def test_two_groups_are_one_test():
    """Of one against the other, which is no more true for being asked twice."""
    labels, z, rng = draw(300)
    groups = rng.choice(["a", "b"], 300)
    right = softmax(z).argmax(1) == labels
    expected = fisher_exact([[right[m].sum(), (~right[m]).sum()] for m in (groups == "a", groups == "b")])[1]
    assert expected < 1
    rows = by_group(labels, softmax(z), list(groups))["groups"]
    assert [row["p_holm"] for row in rows] == pytest.approx([expected, expected])


def test_a_class_that_one_group_gets_too_often_is_found():
    labels, z, rng = draw(2_000)
    groups = rng.choice(["a", "b"], 2_000)
    z[groups == "b", 2] += 1.0
    found = by_group(labels, softmax(z), list(groups))["differences"]
    predicted = z.argmax(axis=1)
    for name, rows in (
        ("demographic_parity", np.ones(2_000, bool)),
        ("true_positive_rate", labels == 2),
        ("false_positive_rate", labels != 2),
    ):
        rates = {g: np.mean(predicted[rows & (groups == g)] == 2) for g in ("a", "b")}
        if name != "true_positive_rate":
            assert found[name]["class"] == 2 and found[name]["highest"] == "b" and found[name]["p"] < 0.01
            assert found[name]["value"] == pytest.approx(rates["b"] - rates["a"])
            assert 0 < found[name]["low"] < found[name]["value"] < found[name]["high"]
        assert found[name]["value"] >= rates["b"] - rates["a"] - 1e-12


@pytest.mark.by_turns
def test_groups_by_chance_are_seldom_called_different():
    """Of 40 times about two are below 0.05; more than 8 have a probability of 1 in 10,000."""
    alarms = proved = 0
    for seed in range(40):
        labels, z, rng = draw(200, seed)
        groups = rng.choice(["a", "b", "c"], 200)
        found = by_group(labels, softmax(z), list(groups))["differences"]["demographic_parity"]
        alarms += found["p"] < 0.05
        proved += found["low"] > 0
    assert alarms <= 8 and proved <= 4  # one is expected to lie above 0 by chance


def test_without_two_groups_that_are_large_enough_nothing_is_compared():
    labels, z, _ = draw(100)
    found = by_group(labels, softmax(z), ["a"] * 90 + ["b"] * 10)
    assert found["differences"] is None and len(found["groups"]) == 2
