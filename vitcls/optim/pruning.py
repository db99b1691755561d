"""Magnitude pruning: the smallest weights of every kernel are 0."""

from typing import Any

import jax
import jax.numpy as jnp

from vitcls.optim.masks import decay_mask

PyTree = Any


def magnitude_masks(params: PyTree, fraction: jax.Array | float) -> PyTree:
    """For each kernel a bool array, False for its `fraction` of smallest magnitude; None for all other parameters.

    Per layer (Han et al. 2015). Works on traced arrays; ties fall to the mask together.
    """

    def mask(param, is_kernel: bool):
        if not is_kernel:
            return None
        magnitudes = jnp.sort(jnp.abs(param).reshape(-1))
        count = jnp.floor(jnp.asarray(fraction) * magnitudes.shape[0]).astype(jnp.int32)
        threshold = jnp.where(count > 0, magnitudes[jnp.maximum(count - 1, 0)], -1.0)
        return jnp.abs(param) > threshold

    return jax.tree.map(mask, params, decay_mask(params))
