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
        weighted = [(0.5, images), (0.25, padded[:, :height, :width]), (0.25, padded[:, 2:, 2:])]
    if kind != "none":
        weighted = [(weight / 2, view) for weight, image in weighted for view in (image, image[:, :, ::-1])]
    return weighted
