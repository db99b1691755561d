"""A crop of the padded image."""

import dataclasses

import jax
import jax.numpy as jnp

from vitcls.core.registry import require, require_choice

PADDINGS = {"zero": "constant", "reflect": "reflect"}  # of jnp.pad


@dataclasses.dataclass(frozen=True)
class Crop:
    """A window of the image's own size in the image with `padding` pixels on each side (He et al. 2016)."""

    probability: float = 0.0
    padding: int = 4  # pixels
    fill: str = "zero"  # or 'reflect'

    def __post_init__(self):
        require(self, "padding", 0 <= self.padding <= 1_024, "in [0, 1024] pixels")
        require_choice(self, "fill", tuple(PADDINGS))

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        margin = (self.padding, self.padding)
        padded = jnp.pad(image, (margin, margin, (0, 0)), PADDINGS[self.fill])
        row, column = jax.random.randint(key, (2,), 0, 2 * self.padding + 1)
        return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
