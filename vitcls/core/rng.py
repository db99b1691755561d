"""Randomness that does not depend on how a batch is laid out over devices.

Every random choice is a pure function of (seed, step, position in the global batch), so that one device, a sharded
`jit` and a `pmap` draw the same numbers, and no key is ever carried or saved.
"""

import jax
import jax.numpy as jnp


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The key of training step `step` (int32 scalar)."""
    return jax.random.fold_in(jax.random.key(seed), step)


def example_positions(batch_size: int, axis_name: str | None) -> jax.Array:
    """Positions int32 [batch_size] in the global batch of the examples seen here.

    Under `jit` (`axis_name` None) the whole batch is seen; under `pmap` only this device's part of it.
    """
    positions = jnp.arange(batch_size, dtype=jnp.int32)
    return positions if axis_name is None else positions + jax.lax.axis_index(axis_name) * batch_size


def example_keys(key: jax.Array, batch_size: int, axis_name: str | None) -> jax.Array:
    """One key per example of the batch, [batch_size]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, example_positions(batch_size, axis_name))
