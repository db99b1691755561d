import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from vitcls.core.errors import UserError
from vitcls.data import splits
from vitcls.data.splits import fold_split, stratified_split

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [100, 60, 30, 10])).astype(np.int32)


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_split_is_a_stratified_partition_in_order(fraction):
    rest, held = stratified_split(LABELS, fraction, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(len(LABELS)))
    assert np.all(np.diff(rest) > 0) and np.all(np.diff(held) > 0)
    expected = fraction * np.bincount(LABELS)
    assert np.all(np.abs(np.bincount(LABELS[held], minlength=4) - expected) < 1)


def test_split_depends_on_the_seed_alone():
    first, again, other = (stratified_split(LABELS, 0.2, seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_split_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    for trial in range(300):
        labels = random.integers(0, random.integers(1, 40), size=random.integers(2, 400))
        labels = labels[np.bincount(labels)[labels] > 1]
        if trial % 3 == 0:  # classes of one size, whose remainders are equal
            labels = random.permutation(np.repeat(np.arange(random.integers(1, 30)), random.integers(2, 20)))
        number, num_classes = int(random.uniform(0.1, 0.9) * len(labels)), len(np.unique(labels))
        if not 0 < num_classes <= number <= len(labels) - num_classes:
            continue
        _, held = train_test_split(np.arange(len(labels)), test_size=number, stratify=labels, random_state=trial)
        np.testing.assert_array_equal(np.sort(splits._draw(labels, number, trial)), np.sort(held))


def test_split_holds_out_every_class_of_a_small_set():
    labels = np.repeat(np.arange(5), 3)
    rest, held = stratified_split(labels, 0.1, seed=0)  # one tenth of 15 would be 2 examples
    assert set(labels[held]) == set(labels[rest]) == set(range(5))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_split_refuses_a_fraction_that_is_none(fraction):
    with pytest.raises(UserError, match="above 0 and below 1"):
        stratified_split(LABELS, fraction, seed=0)


@pytest.mark.parametrize(
    ("labels", "fraction", "seed", "expected"),
    [
        (np.repeat(np.arange(5), 3), 0.1, 0, [0, 4, 7, 10, 12]),
        (np.repeat(np.arange(3), 2), 0.5, 1, [1, 3, 4]),
        (np.repeat([0, 2, 5], [9, 2, 4]), 0.3, 7, [1, 4, 9, 14]),
    ],
)
def test_splits_of_0_1_0_stay_what_they_were(labels, fraction, seed, expected):
    """Old workdirs are continued with these."""
    assert stratified_split(labels, fraction, seed)[1].tolist() == expected


def test_a_single_example_stays_in_training_and_the_others_are_split_as_without_it(caplog):
    singles = np.array([7, 5])
    labels = np.insert(LABELS, [50, 120], singles)
    others = np.flatnonzero(labels < 4)
    rest, held = stratified_split(labels, 0.2, seed=3, class_names="abcdefgh", split="test")
    np.testing.assert_array_equal(held, others[stratified_split(LABELS, 0.2, seed=3)[1]])
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(len(labels)))
    assert np.all(np.diff(rest) > 0) and set(singles) < set(labels[rest])
    (line,) = caplog.messages
    assert line.startswith("2 classes, the first is 'f', have a single example, which stays in training; the test")
    stratified_split(np.array([0, 0, 1, 0]), 0.5, seed=0)
    assert caplog.messages[1].startswith("class '1' has a single example, which stays in training; the validation")


@pytest.mark.parametrize("counts", [(2, 2), (100, 2), (50, 3, 2)])
@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99])
def test_a_large_fraction_leaves_training_one_example_of_every_class(counts, fraction):
    labels = np.repeat(np.arange(len(counts)), counts)
    rest, held = stratified_split(labels, fraction, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(len(labels)))
    assert set(labels[rest]) == set(labels) and len(held) and np.all(np.diff(held) > 0)


@pytest.mark.parametrize("labels", [[], [0], [0, 1, 2]])
def test_nothing_can_be_held_out_of_classes_of_one(labels):
    labels = np.array(labels, np.int32)
    with pytest.raises(UserError, match=r"no class has two examples.* set config.dataset.validation=0 or"):
        stratified_split(labels, 0.5, seed=0)
    with pytest.raises(UserError, match=r"no class has two examples.* give the data set a test split of its own"):
        stratified_split(labels, 0.5, seed=0, split="test")


def test_folds_are_stratified_and_each_example_is_held_out_once():
    folds = [fold_split(LABELS, 5, fold, seed=1) for fold in range(5)]
    np.testing.assert_array_equal(np.sort(np.concatenate([held for _, held in folds])), np.arange(len(LABELS)))
    for rest, held in folds:
        np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(len(LABELS)))
        assert np.all(np.diff(rest) > 0) and np.all(np.diff(held) > 0)
        np.testing.assert_array_equal(np.bincount(LABELS[held]), np.bincount(LABELS) // 5)


@pytest.mark.parametrize(("num_folds", "fold"), [(5, 5), (5, -1), (1, 0), (0, 0)])
def test_folds_that_do_not_exist(num_folds, fold):
    with pytest.raises(UserError, match="there is no fold"):
        fold_split(LABELS, num_folds, fold, seed=0)


def test_more_folds_than_examples_of_a_class():
    with pytest.raises(UserError, match="more than the 10 training examples of class 'd'; set it to at most 10 or add"):
        fold_split(LABELS, 11, 0, seed=0, class_names="abcd")
    with pytest.raises(UserError, match="more than the 1 training examples of class '1'; set it to 0 or add"):
        fold_split(np.array([0, 0, 1]), 2, 0, seed=0)
