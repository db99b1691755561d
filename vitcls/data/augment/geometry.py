"""Affine maps of an image, in one resampling, and boxes in it."""

import jax
import jax.numpy as jnp


def affine(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Resamples an image [H, W, C] bilinearly; black comes in from outside.

    Args:
      matrix: [2, 3]: the output pixel (x, y, 1), x to the right, y down, from the centre, comes from matrix @ it.
    """
    height, width, _ = image.shape
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    center_y, center_x = (height - 1) / 2, (width - 1) / 2
    x, y = columns - center_x, rows - center_y
    source_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] + center_x
    source_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] + center_y
    return _bilinear(image, source_y, source_x)


def _bilinear(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Values of an image [H, W, C] at fractional places [H, W]; 0 outside."""
    height, width, channels = image.shape
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0))).reshape(-1, channels)
    rows, columns = jnp.clip(rows + 1, 0, height + 1), jnp.clip(columns + 1, 0, width + 1)
    top, left = jnp.floor(rows).astype(jnp.int32), jnp.floor(columns).astype(jnp.int32)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    bottom, far = jnp.minimum(top + 1, height + 1), jnp.minimum(left + 1, width + 1)

    def at(row: jax.Array, column: jax.Array) -> jax.Array:
        return padded[row * (width + 2) + column]

    above = at(top, left) * (1 - right) + at(top, far) * right
    below = at(bottom, left) * (1 - right) + at(bottom, far) * right
    return above * (1 - down) + below * down


def rotation_matrix(degrees: jax.Array) -> jax.Array:
    """Turns the picture counter-clockwise."""
    angle = jnp.deg2rad(degrees)
    cosine, sine, zero = jnp.cos(angle), jnp.sin(angle), jnp.zeros(())
    return jnp.array([[cosine, -sine, zero], [sine, cosine, zero]])


def box(size: tuple[int, int], top, left, bottom, right) -> jax.Array:
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None, :]
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
