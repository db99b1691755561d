"""Random erasing, and cutout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.core.registry import require, require_choice
from vitcls.data.augment.geometry import box

_RATIO = (0.3, 3.3)  # of the erased box, width / height (Zhong et al. 2020)


@dataclasses.dataclass(frozen=True)
class Erase:
    """Random erasing (Zhong et al. 2020); with fill 'zero' it is cutout (DeVries & Taylor 2017)."""

    probability: float = 0.0
    min_area: float = 0.02  # of the image
    max_area: float = 1 / 3
    fill: str = "noise"  # or 'zero'

    def __post_init__(self):
        require(self, "min_area", 0 < self.min_area <= self.max_area, "above 0 and at most max_area")
        require(self, "max_area", self.max_area < 1, "below 1")
        require_choice(self, "fill", ("noise", "zero"))

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        box_key, fill_key = jax.random.split(key)
        inside = _random_box(box_key, image.shape[:2], (self.min_area, self.max_area))[..., None]
        fill = jnp.zeros(()) if self.fill == "zero" else jax.random.uniform(fill_key, image.shape, maxval=255.0)
        return jnp.where(inside, fill, image)


def _random_box(key: jax.Array, size: tuple[int, int], areas: tuple[float, float]) -> jax.Array:
    """bool [H, W]: a box wholly inside, its share of the area and its ratio drawn from their ranges."""
    area_key, ratio_key, row_key, column_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, minval=areas[0], maxval=areas[1]) * size[0] * size[1]
    ratio = jnp.exp(jax.random.uniform(ratio_key, minval=np.log(_RATIO[0]), maxval=np.log(_RATIO[1])))
    height = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, size[0])
    width = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, size[1])
    top = jnp.floor(jax.random.uniform(row_key) * (size[0] - height + 1))
    left = jnp.floor(jax.random.uniform(column_key) * (size[1] - width + 1))
    return box(size, top, left, top + height, left + width)
