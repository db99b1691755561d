"""Gaussian noise."""

import dataclasses

import jax
import jax.numpy as jnp

from vitcls.core.registry import require


@dataclasses.dataclass(frozen=True)
class Noise:
    """Adds to every value of every channel a number of its own; the result is clipped."""

    probability: float = 0.0
    std: float = 0.05  # of images in [0, 1]

    def __post_init__(self):
        require(self, "std", self.std >= 0, "at least 0")

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        return jnp.clip(image + 255 * self.std * jax.random.normal(key, image.shape), 0, 255)
