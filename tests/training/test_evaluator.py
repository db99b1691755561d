"""An evaluation gives the sums and, where they are asked for, the probabilities of every example, and keeps no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls import data, metrics
from vitcls.core import sharding
from vitcls.training.evaluator import Evaluator


def eval_step(variables, batch):
    """A classifier of one product; each image is its features."""
    logits = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32) @ variables
    return metrics.evaluation_sums(logits, batch["label"], batch["mask"]), jax.nn.softmax(logits)


@pytest.mark.parametrize("wanted", [False, True])
def test_batches_leave_nothing_on_the_devices_but_the_sums(wanted):
    partition = sharding.all_devices("data")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 4, (61, 2, 2, 1), np.uint8)
    labels = rng.integers(0, 7, 61).astype(np.int32)
    weights = rng.normal(size=(4, 7)).astype(np.float32)
    batches = data.EvaluationBatches(
        data.Split(images, labels), image_shape=(2, 2, 1), partition=partition, batch_size=8
    )
    kept = []

    def watched():
        for batch in batches:
            yield batch
            kept.append(sum(array.shape == (8, 7) for array in jax.live_arrays()))

    evaluator = Evaluator(
        partition, partition.compile_evaluation(lambda weights, batch, bank: eval_step(weights, batch)), 7
    )
    probabilities = np.full((61, 7), np.nan, np.float32) if wanted else None
    sums = evaluator(partition.replicate(weights), watched(), probabilities)
    assert len(kept) == 8
    assert max(kept) <= 1  # those of the newest batch
    logits = images.reshape(61, 4) @ weights
    assert sums["count"] == 61
    assert sums["correct"] == np.sum(logits.argmax(axis=1) == labels)
    if wanted:
        expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probabilities, expected, rtol=1e-4)
