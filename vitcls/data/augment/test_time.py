"""Test-time augmentation: the views of an image over whose logits an evaluation averages."""

import jax
import jax.numpy as jnp

TEST_TIME = ("none", "mirror", "mirror_shift")


def views(kind: str, images: jax.Array) -> list[tuple[float, jax.Array]]:
    """The versions of images [B, H, W, C] whose logits an evaluation adds up, and the weight of each.

    'none' is the images alone, 'mirror' them and their mirror images; 'mirror_shift' adds both moved by a pixel along
    a diagonal, either way, at half the weight (Jordan 2024, section 3.5).
    """
    height, width = images.shape[1:3]
    weighted = [(1.0, images)]
    if kind == "mirror_shift":
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
        weighted = [(0.5, images), (0.25, _box(padded, 0, height, width)), (0.25, _box(padded, 2, height, width))]
    if kind != "none":
        weighted = [(weight / 2, view) for weight, image in weighted for view in (image, jnp.flip(image, 2))]
    return weighted


def _box(images: jax.Array, start: int, height: int, width: int) -> jax.Array:
    """That of rows and columns from `start` on; a slice also where the batch is symbolic."""
    rows = jax.lax.slice_in_dim(images, start, start + height, axis=1)
    return jax.lax.slice_in_dim(rows, start, start + width, axis=2)
