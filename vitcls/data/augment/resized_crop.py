"""Random resized crops on the devices, of images that stay there."""

import math

import jax
import jax.numpy as jnp

_TRIES = 10
_METHODS = {"bilinear": "linear", "bicubic": "cubic"}  # as JAX calls them; both kernels are Pillow's


def random_resized_crop(
    key: jax.Array,
    image: jax.Array,
    aspect: jax.Array,
    size: tuple[int, int],
    area: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
) -> jax.Array:
    """A random box of an image (Szegedy et al. 2015), uint8 [h, w, C] -> uint8 [*size, C], with antialiasing.

    `image` may have been squeezed: `aspect` is the width / height that it had. The box has a share of its area and a
    width / height in the given ranges; where ten tries do not fit, it is the largest in the middle with a ratio in
    range, as `data.images.random_resized_crop_box` has it. `interpolation` is 'bilinear' or 'bicubic'.
    """
    top, left, height, width = _box(key, aspect, area, ratio)
    rows, columns = image.shape[:2]
    scale = jnp.stack([size[0] / (height * rows), size[1] / (width * columns)])
    shift = -jnp.stack([top * rows, left * columns]) * scale
    shape = (*size, image.shape[2])
    method = _METHODS[interpolation]
    resized = jax.image.scale_and_translate(image.astype(jnp.float32), shape, (0, 1), scale, shift, method)
    return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)


def _box(key: jax.Array, aspect: jax.Array, area: tuple[float, float], ratio: tuple[float, float]) -> jax.Array:
    """[4]: top, left, height and width, as shares of the image's height and width."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    areas = aspect * jax.random.uniform(area_key, (_TRIES,), minval=area[0], maxval=area[1])  # the height is 1
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = jnp.exp(jax.random.uniform(ratio_key, (_TRIES,), minval=low, maxval=high))
    widths, heights = jnp.sqrt(areas * ratios), jnp.sqrt(areas / ratios)
    fits = (widths <= aspect) & (heights <= 1)
    nearest = jnp.clip(aspect, ratio[0], ratio[1])
    middle = jnp.stack([jnp.minimum(1.0, aspect / nearest), jnp.minimum(aspect, nearest)])
    first = jnp.argmax(fits)
    chosen = jnp.where(jnp.any(fits), jnp.stack([heights[first], widths[first]]), middle)
    size = jnp.minimum(chosen / jnp.stack([jnp.ones_like(aspect), aspect]), 1.0)
    random = jax.random.uniform(place_key, (2,))
    corner = jnp.where(jnp.any(fits), random, 0.5) * (1 - size)
    return jnp.concatenate([corner, size])
