"""Losses per example, on soft targets, in float32 whatever the dtype of the logits."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitcls.core.registry import Registry, require_range

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [B, K], targets [B, K]) -> [B]


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Keys of `config.loss` whatever the loss."""

    label_smoothing: float = 0.0  # share of every target that is spread evenly over the classes
    class_weights: tuple = ()  # () for none, ('balanced',), or one weight per class
    l2: float = 0.0  # l2 / 2 * sum of squares of the decayed parameters, added to the loss

    def __post_init__(self):
        require_range(self, label_smoothing=(0, 0.99), l2=(0, math.inf))


LOSSES = Registry(
    "config.loss",
    {"cross_entropy": "vitcls.tasks.losses:CrossEntropy", "focal": "vitcls.tasks.losses:Focal"},
    shared=LossSettings,
)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """-sum_k targets_k log p_k with p = softmax(logits)."""

    def __call__(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(logits, targets)


@dataclasses.dataclass(frozen=True)
class Focal:
    """-sum_k targets_k (1 - p_k)^focal_gamma log p_k (Lin et al. 2017, equation 4)."""

    focal_gamma: float = 2.0

    def __post_init__(self):
        require_range(self, focal_gamma=(0, math.inf))

    def __call__(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        return focal(logits, targets, self.focal_gamma)


def make_loss(name: str, *, label_smoothing: float, class_weights: np.ndarray, **fields: Any) -> Loss:
    """Returns loss(logits [B, K], targets [B, K]) -> float32 [B].

    The targets are smoothed first; then class k counts `class_weights[k]` times. With l_k the loss of class k,

        loss = sum_k class_weights[k] * smoothed_targets[k] * l_k,

    which weighs the two classes of a mixed example separately, and is what torch's `CrossEntropyLoss(weight=...)`
    computes before its reduction. The mean over a batch divides by the number of examples, torch's by the sum of
    their weights; with balanced weights the two agree over an epoch.

    Args:
      name: one of LOSSES.
      label_smoothing: share of every target that is spread evenly over the classes, in [0, 1).
      class_weights: float32 [K].
      fields: those of the loss; others are ignored.

    Raises:
      UserError: for an unknown name or an impossible field.
    """
    entry = LOSSES.create(name, fields)
    weights = jnp.asarray(class_weights, jnp.float32)

    def loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
        return entry(logits, weights[None, :] * smooth(targets, label_smoothing))

    return loss


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-sum_k targets_k log p_k with p = softmax(logits): [B, K], [B, K] -> float32 [B]."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets.astype(jnp.float32))


def focal(logits: jax.Array, targets: jax.Array, gamma: float) -> jax.Array:
    """-sum_k targets_k (1 - p_k)^gamma log p_k: [B, K], [B, K] -> float32 [B] (Lin et al. 2017, equation 4).

    Every class keeps its own factor, so soft targets are allowed; with gamma 0 it is the cross-entropy.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    # Exactly 0 for a certain prediction, where the slope of x^gamma is infinite for gamma < 1.
    one_minus_p = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(jnp.float32).tiny)
    return -jnp.sum(targets.astype(jnp.float32) * one_minus_p**gamma * log_p, axis=-1)


def smooth(targets: jax.Array, amount: float) -> jax.Array:
    """(1 - amount) targets + amount / K: [B, K] -> float32 [B, K] (Szegedy et al. 2016, section 7)."""
    return optax.smooth_labels(targets.astype(jnp.float32), amount)


def class_weights(spec: Sequence[Any], class_counts: np.ndarray) -> np.ndarray:
    """Returns one weight per class, float32 [K].

    Args:
      spec: () for ones, ('balanced',) for N / (K * count) as in scikit-learn, or K numbers of which one is above 0.
      class_counts: training examples of each class, [K], summing to N.

    Raises:
      ValueError: for a wrong number of weights, an impossible weight, or 'balanced' with an empty class.
    """
    counts = np.asarray(class_counts)
    num_classes = len(counts)
    if len(spec) == 0:
        return np.ones(num_classes, np.float32)
    if tuple(spec) == ("balanced",):
        if not np.all(counts > 0):
            empty = int(np.flatnonzero(counts <= 0)[0])
            raise ValueError(
                f"class_weights=('balanced',) cannot weigh class {empty}, which has no training example; "
                "give one number per class"
            )
        return (counts.sum() / (num_classes * counts)).astype(np.float32)
    if len(spec) != num_classes:
        raise ValueError(
            f"class_weights={tuple(spec)} has {len(spec)} entries for {num_classes} classes; "
            "give (), ('balanced',) or one number per class"
        )
    try:
        weights = np.asarray(spec, np.float32)
    except (TypeError, ValueError):
        weights = np.full(num_classes, np.nan, np.float32)
    if not (np.all(np.isfinite(weights)) and np.all(weights >= 0) and np.any(weights > 0)):
        raise ValueError(
            f"class_weights={tuple(spec)} is impossible; weights are finite numbers, at least 0, not all 0"
        )
    return weights


def l2_penalty(params: Any, mask: Any) -> jax.Array:
    """Half the sum of squares of the parameters that `mask` (a tree of bools, see optim.decay_mask) keeps, float32.

    Its gradient is the parameter itself, so that l2 times the penalty is the `weight_decay=l2` of PyTorch's Adam.
    """
    kept = jax.tree.map(lambda param, keep: param.astype(jnp.float32) if keep else None, params, mask)
    return 0.5 * jnp.asarray(optax.tree.norm(kept, squared=True), jnp.float32)
