import jax
import numpy as np
import pytest

from vitcls.data.order import epoch_order, first_place, offset_on_device

LABELS = np.repeat([0, 1, 2], [50, 10, 3]).astype(np.int32)


def order(epoch, *, seed=0, balanced=False):
    return np.asarray(epoch_order(seed, epoch, LABELS, num_classes=3, balanced=balanced))


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own():
    orders = [order(epoch) for epoch in range(3)]
    for visited in orders:
        np.testing.assert_array_equal(np.sort(visited), np.arange(len(LABELS)))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], order(0, seed=1))
    np.testing.assert_array_equal(orders[0], order(0))


def test_balanced_sampling_gives_every_class_the_same_number_of_places():
    visited = order(0, balanced=True)
    np.testing.assert_array_equal(np.bincount(LABELS[visited]), [21, 21, 21])
    # A class passes through all of its examples before it repeats one.
    np.testing.assert_array_equal(np.bincount(visited[LABELS[visited] == 2] - 60), [7, 7, 7])
    assert np.bincount(visited[LABELS[visited] == 1] - 50).tolist().count(2) == 9
    assert len(set(visited[LABELS[visited] == 0])) == 21
    assert set(visited) != set(order(1, balanced=True))


@pytest.mark.parametrize(
    ("batch_size", "num_examples"),
    [(7, 50), (64, 50), (50, 50), (1, 3), (4096, 1_281_167), (2**20, 2**31 - 1), (2**20 - 1, 3)],
)
def test_batches_follow_each_other_without_a_gap(batch_size, num_examples):
    given = {"batch_size": batch_size, "num_examples": num_examples}
    on_device = jax.jit(lambda step: offset_on_device(step, **given))
    for step in (0, 1, 49, 50, 51, 12_345, 1_999_999, 2**31 - 1):
        expected = divmod(step * batch_size, num_examples)
        assert first_place(step, **given) == expected
        assert int(on_device(np.int32(step))) == expected[1]
