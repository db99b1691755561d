import numpy as np
import pytest

from vitcls.data.splits import fold_split, stratified_split
from vitcls.errors import UserError

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


def test_split_holds_out_every_class_of_a_small_set():
    labels = np.repeat(np.arange(5), 3)
    rest, held = stratified_split(labels, 0.1, seed=0)  # one tenth of 15 would be 2 examples
    assert set(labels[held]) == set(labels[rest]) == set(range(5))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_split_refuses_a_fraction_that_is_none(fraction):
    with pytest.raises(UserError, match="above 0 and below 1"):
        stratified_split(LABELS, fraction, seed=0)


def test_split_refuses_classes_that_are_too_small():
    with pytest.raises(UserError, match="class 'cat' has a single example"):
        stratified_split(np.array([0, 0, 1, 0]), 0.5, seed=0, class_names=("dog", "cat"))
    with pytest.raises(UserError, match="class '1' has a single example"):
        stratified_split(np.array([0, 0, 1, 0]), 0.5, seed=0)
    with pytest.raises(UserError, match="too few to hold out"):
        stratified_split(np.array([0, 0, 1, 1]), 0.9, seed=0)
    with pytest.raises(UserError, match="class '1' is too small"):
        stratified_split(np.array([0] * 100 + [1] * 2), 0.9, seed=0)


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
    with pytest.raises(UserError, match="more than the 10 training examples of class 'd'"):
        fold_split(LABELS, 11, 0, seed=0, class_names="abcd")
