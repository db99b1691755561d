"""Sums over examples on the devices, under a mask."""

import jax
import jax.numpy as jnp

Sums = dict[str, jax.Array]


def evaluation_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Sums over a batch; an example with mask 0 is nowhere in them, whatever its logits and label.

    The first of equal logits is the prediction. A logit that is not a number ranks above all, so that a model which
    has diverged gets nothing right.

    Args:
      logits: [B, K].
      labels: int32 [B].
      mask: float32 [B], 0 or 1.

    Returns:
      float32 scalars loss, correct, correct_top5 (of the top min(5, K)) and count, and confusion int32 [K, K]
      (rows: true class, columns: predicted).
    """
    num_classes = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    kept = mask > 0
    log_p = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]  # cross-entropy, without smoothing
    # The number of classes ahead of the true one says all that a sort of the logits would.
    classes = jnp.arange(num_classes)[None, :]
    true_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    behind = (logits < true_logit) | ((logits == true_logit) & (classes >= labels[:, None]))
    rank = jnp.sum(~behind, axis=-1)  # [B, K] -> [B]
    predicted = jnp.argmax(logits, axis=-1)
    return {
        "loss": jnp.sum(jnp.where(kept, mask * losses, 0.0)),
        "correct": jnp.sum(mask * (rank == 0)),
        "correct_top5": jnp.sum(mask * (rank < 5)),
        "count": jnp.sum(mask),
        "confusion": jnp.zeros((num_classes, num_classes), jnp.int32).at[labels, predicted].add(kept.astype(jnp.int32)),
    }


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over both."""
    return jax.tree.map(jnp.add, a, b)
