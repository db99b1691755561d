"""Which test a pair gets, what the letters and intervals follow from, and the images that groups differ on."""

import json

import numpy as np
import pytest
from scipy import stats

from vitcls.metrics import evidence_of, summarize
from vitcls.metrics.comparison import compare, disagreements, score
from vitcls.metrics.resampling import METRICS_OF_PREDICTIONS

LABELS = np.arange(200) % 4
SKILLS = {"bad": 0.2, "fair": 1.2, "good": 2.6, "best": 2.62}


def run(skill, seed=0):
    rng = np.random.default_rng(seed)
    scores = np.exp(rng.normal(size=(200, 4)) + skill * np.eye(4)[LABELS])
    return (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)


def scored(skill, *seeds):
    return [score(LABELS, run(skill, seed), resamples=100) for seed in seeds]


@pytest.fixture(scope="module")
def several():
    return compare({"bad": scored(0.5, 0, 1, 2, 3), "good": scored(2.0, 4, 5, 6, 7), "alone": scored(2.1, 8)})


def test_a_group_is_the_mean_of_its_seeds_best_first(several):
    assert [(group["name"], group["num_seeds"]) for group in several["groups"]] == [
        ("alone", 1),
        ("good", 4),
        ("bad", 4),
    ]
    values = [summarize(evidence_of(LABELS, run(0.5, seed)), METRICS_OF_PREDICTIONS) for seed in range(4)]
    for name, numbers in several["groups"][2]["metrics"].items():
        of_seeds = [value[name] for value in values]
        assert numbers["value"] == pytest.approx(np.mean(of_seeds))
        assert numbers["deviation"] == pytest.approx(np.std(of_seeds, ddof=1))
        assert numbers["low"] <= numbers["high"]
    assert several["groups"][0]["metrics"]["accuracy"]["deviation"] is None


def test_the_test_of_a_pair_follows_from_its_seeds(several):
    alone_good, alone_bad, good_bad = several["pairs"]
    assert (good_bad["a"], good_bad["b"], good_bad["test"]) == ("good", "bad", "permutation")
    assert good_bad["exact"] and good_bad["permutations"] == 70 and good_bad["p"] == pytest.approx(2 / 70)
    assert good_bad["separated"] and good_bad["p_holm"] == good_bad["p"]  # one pair is tested
    for pair in (alone_good, alone_bad):
        assert (pair["test"], pair["p"], pair["p_holm"], pair["separated"]) == (None, None, None, False)
        assert pair["seeds_needed"] is None
    assert [group["letters"] for group in several["groups"]] == ["ab", "a", "b"]


def test_seeds_too_few_for_a_permutation_test_have_welchs():
    """Of 4 seeds each p is at least 2 / 70, which separates two groups, but none of four after the correction."""
    groups = {name: scored(skill, *range(4 * i, 4 * i + 4)) for i, (name, skill) in enumerate(SKILLS.items())}
    result = compare(groups)
    assert {pair["test"] for pair in result["pairs"]} == {"welch"}
    for pair in result["pairs"]:
        a, b = ([run.metrics["accuracy"] for run in groups[pair[key]]] for key in "ab")
        expected = stats.ttest_ind(a, b, equal_var=False)
        assert (pair["p"], pair["t"], pair["freedom"]) == pytest.approx(
            (expected.pvalue, expected.statistic, expected.df)
        )
        assert pair["permutation_p"] >= 2 / 70
    letters = {group["name"]: group["letters"] for group in result["groups"]}
    assert letters == {"best": "a", "good": "a", "fair": "b", "bad": "c"}
    json.dumps(result, allow_nan=False)


def test_single_runs_have_mcnemars_test_corrected_for_all_pairs():
    probabilities = {name: run(skill, seed) for seed, (name, skill) in enumerate({"a": 0.5, "b": 0.9, "c": 2}.items())}
    result = compare({name: [score(LABELS, p, resamples=100)] for name, p in probabilities.items()})
    assert [pair["test"] for pair in result["pairs"]] == ["mcnemar"] * 3
    for pair in result["pairs"]:
        first, second = (probabilities[pair[key]].argmax(axis=1) == LABELS for key in "ab")
        only = int((first & ~second).sum()), int((second & ~first).sum())
        assert (pair["only_a"], pair["only_b"]) == only
        assert pair["p"] == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
        assert pair["differences"]["accuracy"]["value"] == pytest.approx((only[0] - only[1]) / 200)
    largest = max(pair["p"] for pair in result["pairs"])
    smallest = min(pair["p"] for pair in result["pairs"])
    adjusted = {pair["p"]: pair["p_holm"] for pair in result["pairs"]}
    assert adjusted[smallest] == pytest.approx(min(1, 3 * smallest)) and adjusted[largest] >= largest
    json.dumps(result, allow_nan=False)


def test_what_is_below_alpha_for_itself_need_not_be_after_the_correction():
    right = np.ones((3, 20), bool)
    right[1, :6], right[2, 6:12] = False, False
    models = [np.where(row[:, None], [0.9, 0.1], [0.1, 0.9]).astype(np.float32) for row in right]
    labels = np.zeros(20, int)
    result = compare({name: [score(labels, p, resamples=2)] for name, p in zip("abc", models, strict=True)})
    assert [pair["p"] for pair in result["pairs"]] == pytest.approx([2 / 64, 2 / 64, 1])
    assert [pair["p_holm"] for pair in result["pairs"]] == pytest.approx([6 / 64, 6 / 64, 1])
    assert not any(pair["separated"] for pair in result["pairs"])
    assert [group["letters"] for group in result["groups"]] == ["a", "a", "a"]


def test_a_difference_is_paired():
    """Two models that make the same mistakes differ by little, however uncertain the accuracy of each is."""
    base = run(1.0)
    other = base.copy()
    other[:4] = base[:4][:, ::-1]
    result = compare({"base": [score(LABELS, base)], "other": [score(LABELS, other)]})
    width = lambda numbers: numbers["high"] - numbers["low"]  # noqa: E731
    (pair,) = result["pairs"]
    assert width(pair["differences"]["accuracy"]) < 0.5 * width(result["groups"][0]["metrics"]["accuracy"])


def test_images_on_which_groups_differ_are_those_that_only_one_gets_right():
    sure, wrong = np.float32([0.9, 0.1]), np.float32([0.1, 0.9])
    unsure, doubt = np.float32([0.55, 0.45]), np.float32([0.45, 0.55])
    labels = np.zeros(4, int)
    first = np.stack([sure, sure, sure, unsure])
    second = np.stack([sure, unsure, wrong, doubt])
    groups = {"first": [score(labels, first, resamples=2)], "second": [score(labels, second, resamples=2)]}
    rows = disagreements(groups, labels)
    assert [row["id"] for row in rows] == [2, 3, 1]  # 1: both are right; 0: they agree
    assert rows[0]["groups"]["second"] == {"predicted": 1, "true_probability": pytest.approx(0.1)}
    assert rows[0]["spread"] == pytest.approx(0.8)
    assert disagreements(groups, labels, count=1) == rows[:1]
    apart = disagreements({"both": [*groups["first"], *groups["second"]]}, labels)
    assert [row["id"] for row in apart] == [2, 3, 1] and list(apart[0]["groups"]) == ["run 1", "run 2"]


def test_a_single_group_has_intervals_and_no_pairs():
    result = compare({"one": scored(1.0, 0, 1)})
    assert result["pairs"] == [] and result["groups"][0]["letters"] == "a"
