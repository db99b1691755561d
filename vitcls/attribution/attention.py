"""Maps of the attention weights of a transformer; they are the same for every class."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vitcls.attribution.network import grid


def last_attention(weights: Sequence[jax.Array], size: tuple[int, int]) -> jax.Array:
    """How much the last block looks at each patch, in the mean over its heads.

    Args:
      weights: of each block, [B, heads, N, N]; rows sum to 1.
      size: H and W of the images.
    Returns:
      float32 [B, rows, columns].
    """
    return _seen(jnp.mean(weights[-1].astype(jnp.float32), axis=1), size)


def rollout(weights: Sequence[jax.Array], size: tuple[int, int]) -> jax.Array:
    """The product of (W + I) / 2 over all blocks, W the mean over the heads (Abnar & Zuidema 2020, section 3).

    Arguments and result as of `last_attention`.
    """
    mixed = None
    for each in weights:
        mean = jnp.mean(each.astype(jnp.float32), axis=1)
        layer = (mean + jnp.eye(mean.shape[-1], dtype=jnp.float32)[None]) / 2
        mixed = layer if mixed is None else layer @ mixed
    return _seen(mixed, size)


def _seen(mixed: jax.Array, size: tuple[int, int]) -> jax.Array:
    """What the class token takes of each patch, or without one all patches in the mean: [B, N, N] -> [B, h, w]."""
    rows, columns, extra = grid(mixed.shape[-1], size)
    seen = mixed[:, 0, 1:] if extra else jnp.mean(mixed, axis=1)
    return seen.reshape(-1, rows, columns)
