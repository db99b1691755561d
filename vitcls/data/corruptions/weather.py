"""Corruptions that something lies upon the image."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.data.corruptions.blur import Sides, correlate, gaussian_sides, motion_weights, moved
from vitcls.data.corruptions.matrices import both, filter_matrix, filtered, to_levels, zoom_matrix
from vitcls.data.images import LUMA

_WATER = np.array([175, 238, 238], np.float32) / 255
_MUD = np.array([63, 42, 20], np.float32) / 255
# What six photos of frost in ImageNet-C have: mean and deviation of red, green and blue.
_FROST = np.array(
    [
        [[0.30, 0.58, 0.65], [0.11, 0.06, 0.06]],
        [[0.79, 0.81, 0.84], [0.08, 0.09, 0.09]],
        [[0.79, 0.81, 0.84], [0.08, 0.09, 0.09]],
        [[0.54, 0.60, 0.65], [0.11, 0.11, 0.12]],
        [[0.44, 0.48, 0.53], [0.17, 0.17, 0.16]],
        [[0.28, 0.37, 0.41], [0.14, 0.17, 0.19]],
    ],
    np.float32,
)


def gray(image: jax.Array) -> jax.Array:
    """The brightness [H, W, 1] of [H, W, 1 or 3]."""
    return image @ LUMA[:, None] if image.shape[-1] == 3 else image


def tinted(mask: jax.Array, color: np.ndarray, channels: int) -> jax.Array:
    """A colour, or its brightness, where a mask [H, W] is: [H, W, C]."""
    color = color if channels == 3 else color @ LUMA
    return mask[..., None] * color.reshape(1, 1, -1)


def plasma(key: jax.Array, size: int, decay: jax.Array) -> jax.Array:
    """A fractal landscape in [0, 1], float32 [size, size], by diamonds and squares; `size` is a power of two.

    From one scale to the next its roughness falls by `decay`.
    """
    heights, step, wibble = jnp.zeros((1, 1)), size, 100.0
    while step >= 2:
        key, a, b, c = jax.random.split(key, 4)
        squares = heights + jnp.roll(heights, -1, 0)
        squares = _wibbled(a, squares + jnp.roll(squares, -1, 1), wibble)
        level = squares + jnp.roll(squares, 1, 0) + heights + jnp.roll(heights, -1, 1)
        upright = squares + jnp.roll(squares, 1, 1) + heights + jnp.roll(heights, -1, 0)
        rows = (
            jnp.stack([heights, _wibbled(b, level, wibble)], -1),
            jnp.stack([_wibbled(c, upright, wibble), squares], -1),
        )
        count = 2 * len(heights)
        heights = jnp.stack(rows, axis=1).reshape(count, count)  # [n, 2, n, 2]
        step, wibble = step // 2, wibble / decay
    heights = heights - heights.min()
    return heights / jnp.maximum(heights.max(), 1e-9)


def _wibbled(key: jax.Array, of_four: jax.Array, wibble: jax.Array) -> jax.Array:
    return of_four / 4 + wibble * jax.random.uniform(key, of_four.shape, minval=-wibble, maxval=wibble)


def _landscape(key: jax.Array, shape: tuple[int, ...], decay: jax.Array) -> jax.Array:
    """A part [H, W, 1] of a landscape that is large enough."""
    size = 1 << (max(shape[:2]) - 1).bit_length()
    return plasma(key, size, decay)[: shape[0], : shape[1], None]


def fog(key: jax.Array, image: jax.Array, strength: tuple[float, float]) -> jax.Array:
    """A bright landscape over the image, as bright at most as it was."""
    thickness, decay = strength
    brightest = image.max()
    foggy = image + thickness * _landscape(key, image.shape, decay)
    return foggy * brightest / (brightest + thickness)


def frost(key: jax.Array, image: jax.Array, strength: tuple[float, float]) -> jax.Array:
    """Ice on the window: ridges of a landscape with the colours of the photos that ImageNet-C lays over its images."""
    kept, ice = strength
    which, where = jax.random.split(key)
    mean, deviation = jnp.asarray(_FROST)[:, :, None, None][jax.random.randint(which, (), 0, len(_FROST))]
    ridges = 1 - 2 * jnp.abs(_landscape(where, image.shape, 1.6) - 0.5)
    ridges = (ridges - ridges.mean()) / jnp.maximum(ridges.std(), 1e-6)
    crystals = jnp.clip(mean + deviation * ridges, 0, 1)  # [H, W, 3]
    return kept * image + ice * (crystals if image.shape[-1] == 3 else gray(crystals))


class Snow(NamedTuple):
    """A snowfall: flakes are what exceeds `least` of normal numbers, made larger and moved by the wind."""

    mean: float
    std: float
    zoom: Sides
    least: float
    motion: np.ndarray
    kept: float  # of the image; the rest is whitened


def snow_of(strength: tuple[float, ...], height: int, width: int) -> Snow:
    mean, std, zoom, least, radius, blur, kept = strength
    weights = motion_weights((int(radius), blur), height, width)
    return Snow(mean, std, both(zoom_matrix, height, width, zoom), least, weights, kept)


def snow(key: jax.Array, image: jax.Array, fall: Snow) -> jax.Array:
    """Flakes that fall, seen twice, over an image that is whiter."""
    flake_key, wind_key = jax.random.split(key)
    flakes = filtered(fall.mean + fall.std * jax.random.normal(flake_key, image.shape[:2]), *fall.zoom)
    flakes = jnp.clip(jnp.where(flakes < fall.least, 0.0, flakes), 0, 1)
    flakes = moved(flakes, fall.motion, jax.random.uniform(wind_key, minval=-135.0, maxval=-45.0))[..., None]
    flakes = jnp.rint(255 * flakes) / 255
    white = jnp.maximum(image, gray(image) * 1.5 + 0.5)
    return fall.kept * image + (1 - fall.kept) * white + flakes + jnp.rot90(flakes, 2)


class Spatter(NamedTuple):
    """Drops of water or mud: what exceeds `least` of blurred normal numbers."""

    mean: float
    std: float
    sides: Sides
    least: float
    opacity: float  # of water
    edge: Sides  # of mud
    mud: bool
    mean3: Sides


def spatter_of(strength: tuple[float, ...], height: int, width: int) -> Spatter:
    mean, std, blur, least, last, mud = strength
    mean3 = both(filter_matrix, height, width, np.full(3, 1 / 3), "reflect")
    edge = gaussian_sides(last, height, width)
    return Spatter(mean, std, gaussian_sides(blur, height, width), least, last, edge, bool(mud), mean3)


def spatter(key: jax.Array, image: jax.Array, drops: Spatter) -> jax.Array:
    """Drops on the lens: turquoise water that shines at its edges, or brown mud."""
    liquid = filtered(drops.mean + drops.std * jax.random.normal(key, image.shape[:2]), *drops.sides)
    liquid = jnp.where(liquid < drops.least, 0.0, liquid)
    mud = filtered((liquid > drops.least).astype(jnp.float32), *drops.edge)
    mud = jnp.where(mud < 0.8, 0.0, mud)
    channels = image.shape[-1]
    muddy = image * (1 - mud[..., None]) + tinted(mud, _MUD, channels)
    wet = image + tinted(_shine(liquid, drops), _WATER, channels)
    return jnp.where(drops.mud, muddy, wet)


def _shine(liquid: jax.Array, drops: Spatter) -> jax.Array:
    """How bright water is, float32 [H, W]: an emboss of the distance to its edges."""
    levels = to_levels(liquid)
    distance = jnp.floor(filtered(_distance(_edges(levels)), *drops.mean3) + 1e-3)
    relief = correlate(_equalized(distance)[..., None], _EMBOSS)[..., 0]
    relief = jnp.rint(filtered(jnp.clip(relief, 0, 255), *drops.mean3))
    shine = levels * relief
    return drops.opacity * shine / jnp.maximum(shine.max(), 1e-6)


_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
_SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32)
_LOW, _HIGH = 50, 150  # of Canny's edges
_FARTHEST, _FAR = 20, 1e6  # pixels, and a square beyond it


def _edges(levels: jax.Array) -> jax.Array:
    """Canny's edges of [H, W] from 0 to 255, bool [H, W]."""
    x, y = (correlate(levels[..., None], kernel)[..., 0] for kernel in (_SOBEL, _SOBEL.T))
    slope, steep = jnp.abs(x) + jnp.abs(y), jnp.abs(y) / jnp.maximum(jnp.abs(x), 1e-6)

    def beside(dy: int, dx: int) -> jax.Array:
        height, width = slope.shape
        return jnp.pad(slope, 1)[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    def ridge(dy: int, dx: int) -> jax.Array:
        return (slope > beside(-dy, -dx)) & (slope >= beside(dy, dx))

    diagonal = jnp.where(x * y >= 0, ridge(1, 1), ridge(1, -1))
    top = jnp.where(steep < 0.4142, ridge(0, 1), jnp.where(steep > 2.4142, ridge(1, 0), diagonal))
    weak, strong = top & (slope > _LOW), top & (slope > _HIGH)

    def grow(_: int, found: jax.Array) -> jax.Array:
        near = jax.lax.reduce_window(found.astype(jnp.float32), -jnp.inf, jax.lax.max, (3, 3), (1, 1), "SAME")
        return weak & (near > 0)

    return jax.lax.fori_loop(0, max(slope.shape), grow, strong)


def _distance(edges: jax.Array) -> jax.Array:
    """Pixels to the nearest edge, at most 20, float32 [H, W]: along columns, then along rows."""
    squares, far = jnp.where(edges, 0.0, _FAR), _FARTHEST
    for axis in (0, 1):
        size = squares.shape[axis]
        padded = jnp.pad(squares, [(far, far) if a == axis else (0, 0) for a in (0, 1)], constant_values=_FAR)
        shifted = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) + (i - far) ** 2 for i in range(2 * far + 1))
        squares = functools.reduce(jnp.minimum, shifted)
    return jnp.minimum(jnp.sqrt(squares), far)


def _equalized(levels: jax.Array) -> jax.Array:
    """Whole numbers [H, W] spread over 0 to 255 by their ranks; alike ones stay as they are."""
    ordered = jnp.sort(levels.ravel())
    most, least = jnp.searchsorted(ordered, levels, side="right"), jnp.searchsorted(ordered, ordered[0], side="right")
    spread = jnp.rint(255 * (most - least) / jnp.maximum(levels.size - least, 1))
    return jnp.where(least == levels.size, levels, spread)
