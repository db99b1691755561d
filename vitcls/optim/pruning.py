"""Magnitude pruning: the smallest weights of every kernel are 0 and stay so, ever more of them as training goes on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vitcls.optim.masks import decay_mask

PyTree = Any


class PruningState(NamedTuple):
    """Saved with the run, so that what is pruned stays so when it goes on."""

    count: jax.Array  # int32 scalar: updates so far
    masks: PyTree  # for each kernel bools of its shape, False for what is 0; the scalar True for other parameters
    inner: PyTree


def magnitude_masks(params: PyTree, fraction: jax.Array | float) -> PyTree:
    """For each kernel bools, False for its `fraction` of smallest magnitude; the scalar True for all other parameters.

    Per layer (Han et al. 2015, arXiv 1506.02626). Ties fall to the mask together.
    """

    def mask(param: jax.Array, is_kernel: bool) -> jax.Array:
        if not is_kernel:
            return jnp.ones((), bool)
        magnitudes = jnp.sort(jnp.abs(param).reshape(-1))
        count = jnp.floor(jnp.asarray(fraction) * magnitudes.size).astype(jnp.int32)
        threshold = jnp.where(count > 0, magnitudes[jnp.maximum(count - 1, 0)], -1.0)
        return jnp.abs(param) > threshold

    return jax.tree.map(mask, params, decay_mask(params))


def masked(params: PyTree, masks: PyTree) -> PyTree:
    """The parameters with 0 where a mask is False."""
    return jax.tree.map(lambda param, mask: jnp.where(mask, param, jnp.zeros((), param.dtype)), params, masks)


def prune(
    optimizer: optax.GradientTransformation,
    fraction: float,
    begin: int,
    end: int,
    every: int,
    trained: PyTree | None = None,
) -> optax.GradientTransformation:
    """`optimizer` of a network whose kernels lose weights from step `begin` to `end`, and train on without them.

    At every `every`-th step the smallest s_t = f (1 - (1 - (t - begin) / (end - begin))^3) of each kernel are pruned, f
    being `fraction` (Zhu & Gupta 2017, arXiv 1710.01878, equation 1, from 0). Whoever adds the updates to parameters
    calls `keep_pruned` then, as an update times a learning rate cannot make a weight exactly 0. `trained` has a bool
    for each parameter, False for what is frozen and stays as it is.
    """

    def choose(params: PyTree, share: jax.Array | float) -> PyTree:
        masks = magnitude_masks(params, share)
        return masks if trained is None else jax.tree.map(lambda m, t: m if t else jnp.ones_like(m), masks, trained)

    def init(params: PyTree) -> PruningState:
        return PruningState(jnp.zeros((), jnp.int32), choose(params, 0.0), optimizer.init(params))

    def update(gradients: PyTree, state: PruningState, params: PyTree) -> tuple[PyTree, PruningState]:
        updates, inner = optimizer.update(masked(gradients, state.masks), state.inner, params)
        step = state.count
        progress = jnp.clip((step - begin) / max(end - begin, 1), 0.0, 1.0)
        share = fraction * (1 - (1 - progress) ** 3)
        due = (step >= begin) & (step <= end) & (((step - begin) % every == 0) | (step == end))
        masks = jax.lax.cond(due, lambda: choose(params, share), lambda: state.masks)
        return updates, PruningState(step + 1, masks, inner)

    return optax.GradientTransformation(init, update)


def keep_pruned(params: PyTree, opt_state: PyTree) -> PyTree:
    """The parameters, or their average, with 0 for what is pruned; as they are where nothing is."""
    return masked(params, opt_state.masks) if isinstance(opt_state, PruningState) else params
