"""Rotation and scale, in one resampling."""

import dataclasses

import jax
import jax.numpy as jnp

from vitcls.core.registry import require
from vitcls.data.augment.geometry import affine, rotation_matrix


@dataclasses.dataclass(frozen=True)
class Rotate:
    """Turns the image by an angle uniform in +-degrees."""

    probability: float = 0.0
    degrees: float = 15.0

    def __post_init__(self):
        require(self, "degrees", self.degrees >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Zooms by a factor uniform in [low, high]."""

    probability: float = 0.0
    low: float = 0.8
    high: float = 1.25

    def __post_init__(self):
        require(self, "low", 0 < self.low <= self.high, "above 0 and at most config.augment.scale.high")


@dataclasses.dataclass(frozen=True)
class Warp:
    """Both, each with its own probability."""

    rotate: Rotate
    scale: Scale

    @property
    def probability(self) -> float:
        """It draws for each by itself, so it is always applied if either can be."""
        return float(self.rotate.probability > 0 or self.scale.probability > 0)

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        angle_key, rotate_key, factor_key, scale_key = jax.random.split(key, 4)
        degrees = jax.random.uniform(angle_key, minval=-self.rotate.degrees, maxval=self.rotate.degrees)
        degrees = jnp.where(jax.random.bernoulli(rotate_key, self.rotate.probability), degrees, 0.0)
        factor = jax.random.uniform(factor_key, minval=self.scale.low, maxval=self.scale.high)
        factor = jnp.where(jax.random.bernoulli(scale_key, self.scale.probability), factor, 1.0)
        # The centre stays where it is, so that to zoom is to divide the matrix.
        return affine(image, rotation_matrix(degrees) / factor)
