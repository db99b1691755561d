"""Metrics: sums on the device under a mask, and what scikit-learn makes of predictions on the host."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BINS = 15  # of the expected calibration error (Guo et al. 2017)
Sums = dict[str, jax.Array]


def evaluation_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Sums over a batch; an example with mask 0 is nowhere in them.

    Args:
      logits: [B, K]; labels: int32 [B]; mask: float32 [B], 0 or 1.
    Returns:
      float32 scalars loss (cross-entropy, without smoothing), correct, correct_top5 and count, and confusion int32
      [K, K] (rows: true class, columns: predicted).
    """
    num_classes = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    true_log_p = jnp.take_along_axis(log_p, labels[:, None], axis=-1)
    # The rank of the true class; of equal logits the lower class comes first, as with argmax.
    classes = jnp.arange(num_classes)[None, :]
    true_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    rank = jnp.sum((logits > true_logit) | ((logits == true_logit) & (classes < labels[:, None])), axis=-1)
    predicted = jnp.argmax(logits, axis=-1)
    kept = mask > 0
    confusion = jnp.zeros((num_classes, num_classes), jnp.int32).at[labels, predicted].add(kept.astype(jnp.int32))
    return {
        "loss": jnp.sum(jnp.where(kept, -true_log_p[:, 0], 0.0)),
        "correct": jnp.sum(mask * (rank == 0)),
        "correct_top5": jnp.sum(mask * (rank < 5)),
        "count": jnp.sum(mask),
        "confusion": confusion,
    }


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over both."""
    return jax.tree.map(jnp.add, a, b)


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Loss, accuracy and top-5 accuracy from sums on the host; raises ValueError where nothing was counted."""
    count = float(sums["count"])
    if not count:
        raise ValueError("there is no example to evaluate: every one of them is masked")
    return {
        "loss": float(sums["loss"]) / count,
        "accuracy": float(sums["correct"]) / count,
        "top5_accuracy": float(sums["correct_top5"]) / count,
    }
