"""Changes of images that grow by degrees: what is hidden, where it is, how large, how fine.

Each is a pure function like the corruptions: (key, image float32 [H, W, C] in [0, 1], parameters) -> image.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.data.corruptions.digital import jpeg_compression, jpeg_tables, sampled
from vitcls.data.corruptions.matrices import box_matrix, filtered, linear_matrix

_HIDDEN = 0.5  # the gray of what is hidden


class Curve(NamedTuple):
    """A change, its levels from the weakest on, and what they are."""

    apply: Callable[[jax.Array, jax.Array, Any], jax.Array]
    levels: tuple[float, ...]
    meaning: str
    title: str
    prepare: Callable[[Any, int, int], Any] = lambda level, height, width: level / 100  # the parameters of a size


def occlusion(key: jax.Array, image: jax.Array, share: float) -> jax.Array:
    """Hides this share of the image behind one gray rectangle of the image's proportions."""
    height, width, _ = image.shape
    side = jnp.sqrt(share)
    place = jax.random.uniform(key, (2,))
    rows, columns = (
        _between(jnp.arange(size), jnp.rint(at * (size - jnp.rint(side * size))), jnp.rint(side * size))
        for at, size in zip(place, (height, width), strict=True)
    )
    return jnp.where((rows[:, None] & columns[None])[..., None], _HIDDEN, image)


def _between(places: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    return (places >= first) & (places < first + count)


def patch_drop(key: jax.Array, image: jax.Array, share: float) -> jax.Array:
    """Hides this share of the patches of a grid, of 16 pixels or an eighth of the image (Naseer et al. 2021)."""
    height, width, _ = image.shape
    side = max(1, min(16, min(height, width) // 8))
    rows, columns = -(-height // side), -(-width // side)
    order = jax.random.permutation(key, rows * columns)
    hidden = (order < jnp.rint(share * rows * columns)).reshape(rows, columns)
    hidden = hidden.repeat(side, 0)[:height].repeat(side, 1)[:, :width]
    return jnp.where(hidden[..., None], _HIDDEN, image)


def shift(key: jax.Array, image: jax.Array, share: float) -> jax.Array:
    """Moves the image by this share of its side, in whole pixels and any direction; the border is mirrored."""
    angle = jax.random.uniform(key, maxval=2 * np.pi)
    height, width, _ = image.shape
    down, right = jnp.rint(share * height * jnp.sin(angle)), jnp.rint(share * width * jnp.cos(angle))
    return _mapped(image, lambda y, x: (y - down, x - right))


def rotation(key: jax.Array, image: jax.Array, degrees: float) -> jax.Array:
    """Turns the image about its middle, to the left or to the right; the border is mirrored."""
    angle = jnp.deg2rad(jnp.where(jax.random.bernoulli(key), degrees, -degrees))
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    return _mapped(image, lambda y, x: (cosine * y - sine * x, sine * y + cosine * x))


def scale(key: jax.Array, image: jax.Array, factor: float) -> jax.Array:
    """Shows the image larger or smaller about its middle; the border is mirrored."""
    del key
    return _mapped(image, lambda y, x: (y / factor, x / factor))


def _mapped(image: jax.Array, source: Callable) -> jax.Array:
    """The image whose pixel (y, x), from the middle, is that of `source(y, x)`."""
    height, width, _ = image.shape
    middle = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(height) - middle[0], jnp.arange(width) - middle[1], indexing="ij")
    y, x = source(y, x)
    return sampled(image, y + middle[0], x + middle[1], "mirror")


def resolution(key: jax.Array, image: jax.Array, sides: tuple[np.ndarray, ...]) -> jax.Array:
    """Means of fewer pixels, made as large again by linear interpolation."""
    del key
    return filtered(filtered(image, *sides[:2]), *sides[2:])


def _resolution_sides(percent: float, height: int, width: int) -> tuple[np.ndarray, ...]:
    small = [max(1, round(size * percent / 100)) for size in (height, width)]
    down = (box_matrix(size, new) for size, new in zip((height, width), small, strict=True))
    up = (linear_matrix(new, size) for size, new in zip((height, width), small, strict=True))
    return (*down, *up)


_SHARES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
CURVES: dict[str, Curve] = {
    "occlusion": Curve(occlusion, _SHARES, "share of the image behind a rectangle [%]", "Occlusion"),
    "patch_drop": Curve(patch_drop, _SHARES, "share of the patches hidden [%]", "Patch drop"),
    "shift": Curve(shift, (3, 6, 12.5, 18.75, 25), "shift [% of the side]", "Shift"),
    "rotation": Curve(
        rotation, (5, 10, 15, 30, 45, 90), "rotation [degrees]", "Rotation", lambda level, height, width: level
    ),
    "scale": Curve(scale, (50, 75, 90, 110, 125, 150), "size [%]", "Scale"),
    "resolution": Curve(resolution, (75, 50, 37.5, 25, 12.5), "resolution [%]", "Resolution", _resolution_sides),
    "jpeg": Curve(jpeg_compression, (95, 75, 50, 25, 10, 5), "JPEG quality", "JPEG", jpeg_tables),
}


def levels_of(name: str, sides: Iterable[int]) -> tuple[float, ...]:
    """The levels of a curve that change images of all these longer sides: shifts by less than a pixel do not."""
    least = min(sides)
    return tuple(level for level in CURVES[name].levels if name != "shift" or round(level / 100 * least))
