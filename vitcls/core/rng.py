"""How a traced function knows where its examples are, and randomness that does not depend on that.

Every random choice is a pure function of (seed, step, position in the global batch), so that one device, a sharded
`jit` and a `pmap` draw the same numbers, and no key is ever carried or saved.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

BATCH_AXIS = "data"  # the name of the axis of devices
_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def spread_over(mesh: Mesh) -> Iterator[None]:
    """A context in which functions are traced whose global batches lie on these devices, in equal blocks."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def batch_mesh() -> Mesh | None:
    """The devices that share the batch that is seen here; None where it is one's, under `pmap`, and if nobody says."""
    mesh = None if mapped_axis() else _mesh.get()
    return mesh if mesh is not None and mesh.size > 1 else None


def batch_blocks() -> int:
    """How many devices share the batch that is seen here: 1 under `pmap`, and where nobody says."""
    mesh = batch_mesh()
    return 1 if mesh is None else mesh.size


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
