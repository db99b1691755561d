"""Colour jitter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.core.registry import require
from vitcls.data.augment.randaugment import luma


@dataclasses.dataclass(frozen=True)
class Color:
    """Brightness, contrast, saturation and hue as in torchvision's ColorJitter, but always in this order.

    The three factors are uniform in [max(0, 1 - limit), 1 + limit], the turn of the hue in +-limit of the circle.
    """

    probability: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1

    def __post_init__(self):
        for field in ("brightness", "contrast", "saturation"):
            require(self, field, getattr(self, field) >= 0, "at least 0")
        require(self, "hue", 0 <= self.hue <= 0.5, "in [0, 0.5]")

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        highest = np.array([self.brightness, self.contrast, self.saturation], np.float32)
        lowest = np.minimum(highest, 1.0)
        factor_key, hue_key = jax.random.split(key)
        brightness, contrast, saturation = jax.random.uniform(factor_key, (3,), minval=1 - lowest, maxval=1 + highest)
        image = _blend(jnp.zeros(()), image, brightness)
        image = _blend(jnp.mean(luma(image)), image, contrast)
        if image.shape[-1] == 3:
            image = _blend(luma(image), image, saturation)
            turn = jax.random.uniform(hue_key, minval=-self.hue, maxval=self.hue)
            image = _turn_hue(image, turn) if self.hue else image
        return image


def _blend(base: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """base at factor 0, image at 1, beyond it above; clipped to [0, 255]."""
    return jnp.clip(base + (image - base) * factor, 0, 255)


def _turn_hue(image: jax.Array, turn: jax.Array) -> jax.Array:
    """Turns the hue of an RGB image by a share of the circle, through HSV."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value, low = jnp.max(image, axis=-1), jnp.min(image, axis=-1)
    spread = value - low
    safe = jnp.where(spread > 0, spread, 1.0)
    hue = jnp.select(
        [value == red, value == green], [(green - blue) / safe % 6, (blue - red) / safe + 2], (red - green) / safe + 4
    )
    hue = hue + 6 * turn
    # Each channel falls from value to low over a third of the circle (the closed form of HSV -> RGB).
    sector = (np.array([5.0, 3.0, 1.0], np.float32)[None, None, :] + hue[..., None]) % 6
    fall = jnp.clip(jnp.minimum(sector, 4 - sector), 0, 1)
    return value[..., None] - spread[..., None] * fall
