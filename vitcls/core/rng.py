"""How a traced function knows where its examples are, and randomness that does not depend on that.

Every random choice is a pure function of (seed, step, position in the global batch), so that one device, a sharded
`jit` and a `pmap` draw the same numbers, and no key is ever carried or saved.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

BATCH_AXIS = "data"  # the name of the axis of devices
_devices = contextvars.ContextVar("devices", default=1)


@contextlib.contextmanager
def spread_over(devices: int) -> Iterator[None]:
    """A context in which functions are traced whose global batches lie on so many devices, in equal blocks."""
    token = _devices.set(devices)
    try:
        yield
    finally:
        _devices.reset(token)


def batch_blocks() -> int:
    """How many devices share the batch that is seen here: 1 under `pmap`, and where nobody says."""
    return 1 if mapped_axis() else _devices.get()


def mapped_axis() -> str | None:
    """BATCH_AXIS where a function is traced under `pmap`, and so sees this device's part of a batch; else None."""
    try:
        jax.lax.axis_size(BATCH_AXIS)
    except NameError:
        return None
    return BATCH_AXIS


def step_key(seed: jax.Array | int, step: jax.Array) -> jax.Array:
    """The key of training step `step`; int32 scalars."""
    return jax.random.fold_in(jax.random.key(seed), step)


def example_positions(batch_size: int) -> jax.Array:
    """Positions int32 [batch_size] in the global batch of the examples seen here."""
    positions, axis = jnp.arange(batch_size, dtype=jnp.int32), mapped_axis()
    return positions if axis is None else positions + jax.lax.axis_index(axis) * batch_size


def example_keys(key: jax.Array, batch_size: int) -> jax.Array:
    """One key per example of the batch, [batch_size]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, example_positions(batch_size))
