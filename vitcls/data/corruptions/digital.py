"""Corruptions by cameras, displays and files: colours, pixels, JPEG; and elastic cloth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from vitcls.data.corruptions.blur import Sides
from vitcls.data.corruptions.matrices import box_matrix, filtered, gaussian_matrix, linear_matrix


def contrast(key: jax.Array, image: jax.Array, share: float) -> jax.Array:
    """Leaves this share of what each channel differs from its mean."""
    del key
    mean = image.mean(axis=(0, 1), keepdims=True)
    return mean + share * (image - mean)


def brightness(key: jax.Array, image: jax.Array, more: float) -> jax.Array:
    """Adds to the value of HSV: hue and saturation stay."""
    del key
    value = image.max(axis=-1, keepdims=True)
    brighter = jnp.clip(value + more, 0, 1)
    return jnp.where(value > 0, image * brighter / jnp.maximum(value, 1e-9), brighter)


_GRAY_BELOW = np.array([0, 1, 1], np.float32).reshape(1, 1, 3)  # how a gray pixel turns red


def saturate(key: jax.Array, image: jax.Array, strength: tuple[float, float]) -> jax.Array:
    """Multiplies the saturation of HSV and adds to it; a gray pixel of three channels
    has no hue and turns red by what is added."""
    del key
    factor, more = strength
    most, least = image.max(axis=-1, keepdims=True), image.min(axis=-1, keepdims=True)
    spread = most - least
    saturation = jnp.where(most > 0, spread / jnp.maximum(most, 1e-9), 0.0)
    below = jnp.where(spread > 0, (most - image) / jnp.maximum(spread, 1e-9), _GRAY_BELOW[..., : image.shape[-1]])
    return most * (1 - jnp.clip(factor * saturation + more, 0, 1) * below)


def pixelate(key: jax.Array, image: jax.Array, sides: tuple[np.ndarray, ...]) -> jax.Array:
    """Fewer pixels, as squares: matrices of rows and columns to the small size, and back."""
    del key
    down, across, *back = sides
    small = 255 * image
    for axis, matrix in ((1, across), (0, down)):  # which Pillow rounds one after the other
        small = jnp.floor(jnp.moveaxis(jnp.tensordot(matrix, small, axes=(1, axis)), 0, axis) + 0.5)
    return filtered(small / 255, *back)


def pixel_sides(share: float, height: int, width: int) -> tuple[np.ndarray, ...]:
    small = [max(int(size * share), 1) for size in (height, width)]
    down = [box_matrix(size, new) for size, new in zip((height, width), small, strict=True)]
    up = [box_matrix(new, size) for size, new in zip((height, width), small, strict=True)]
    return (*down, *up)


# Annex K of ITU-T T.81, for brightness and for colour.
_LUMINANCE = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMINANCE = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""
_TABLES = np.array([_LUMINANCE.split(), _CHROMINANCE.split()], int).reshape(2, 8, 8)
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]], np.float32
)
_TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136286, -0.714136286], [1, 1.772, 0]], np.float32)
_MIDDLE = np.array([0, 128, 128], np.float32).reshape(1, 1, 3)  # of Y, Cb and Cr
_WAVES = (
    np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(8) + 1) / 16) * np.sqrt(np.r_[1, np.full(7, 2)] / 8)[:, None]
)
_DCT = _WAVES.astype(np.float32)  # [frequency, pixel]


def jpeg_tables(quality: int, height: int, width: int) -> np.ndarray:
    """How coarse each frequency is at a quality of 1 to 100, float32 [2, 8, 8], as libjpeg scales the tables."""
    del height, width
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((_TABLES * scale + 50) // 100, 1, 255).astype(np.float32)


def jpeg_compression(key: jax.Array, image: jax.Array, tables: jax.Array) -> jax.Array:
    """What is left of an image in a JPEG file, whose colours have half the resolution."""
    del key
    pixels = jnp.rint(255 * jnp.clip(image, 0, 1))
    if image.shape[-1] == 1:
        return _coded(pixels[..., 0], tables[0])[..., None] / 255
    height, width, _ = image.shape
    color = jnp.rint(pixels @ _TO_YCC.T + _MIDDLE)
    even = jnp.pad(color[..., 1:], ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    halves = jnp.floor(even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2, 2).mean(axis=(1, 3)) + 0.5)
    up = [linear_matrix(half, 2 * half)[:size] for half, size in zip(halves.shape[:2], (height, width), strict=True)]
    planes = [_coded(color[..., 0], tables[0])]
    planes += [jnp.rint(filtered(_coded(halves[..., i], tables[1]), *up)) for i in (0, 1)]
    return jnp.rint((jnp.stack(planes, -1) - _MIDDLE) @ _TO_RGB.T) / 255


def _coded(plane: jax.Array, table: jax.Array) -> jax.Array:
    """A plane [H, W] from 0 to 255 after its frequencies were rounded, in blocks of 8 by 8."""
    height, width = plane.shape
    padded = jnp.pad(plane, ((0, -height % 8), (0, -width % 8)), mode="edge") - 128
    blocks = padded.reshape(padded.shape[0] // 8, 8, padded.shape[1] // 8, 8).swapaxes(1, 2)  # [h, w, 8, 8]
    steps = table[None, None]
    waves = _DCT @ blocks @ _DCT.T / steps
    waves = jnp.sign(waves) * jnp.floor(jnp.abs(waves) + 0.5) * steps  # halves are rounded away from zero
    back = (_DCT.T @ waves @ _DCT).swapaxes(1, 2).reshape(padded.shape)
    return jnp.clip(jnp.rint(back + 128), 0, 255)[:height, :width]


class Cloth(NamedTuple):
    """How an image is stretched: three points by up to `affine` pixels, and each pixel by a smooth field."""

    affine: float
    smooth: Sides
    factor: float  # of a field that was in [-1, 1] before it was smoothed


def cloth_of(strength: tuple[float, float, float], height: int, width: int) -> Cloth:
    """Of factor, smoothness and affine, in shares of the image's side."""
    factor, smooth, affine = strength
    sides = tuple(gaussian_matrix(size, smooth * size, "symmetric", 3.0) for size in (height, width))
    return Cloth(affine * height, sides, factor * height)


def elastic_transform(key: jax.Array, image: jax.Array, cloth: Cloth) -> jax.Array:
    """Stretches the image as a whole, by three points that move, and then each pixel by a smooth random field."""
    points_key, field_key = jax.random.split(key)
    height, width, _ = image.shape
    y, x = jnp.meshgrid(jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32), indexing="ij")
    center, reach = np.array([width // 2, height // 2], np.float32), min(height, width) // 3
    points = center + reach * np.array([[1, 1], [1, -1], [-1, -1]], np.float32)
    moved = points + jax.random.uniform(points_key, (3, 2), minval=-cloth.affine, maxval=cloth.affine)
    back = jnp.linalg.solve(jnp.c_[moved, jnp.ones(3)], jnp.asarray(points))  # [3, 2]: from new places to old ones
    places = jnp.stack([x, y, jnp.ones_like(x)], axis=-1) @ back
    image = sampled(image, places[..., 1], places[..., 0], "mirror")
    fields = jax.random.uniform(field_key, (2, height, width), minval=-1.0)
    right, down = cloth.factor * jax.vmap(filtered, in_axes=(0, None, None))(fields, *cloth.smooth)
    return sampled(image, y + down, x + right, "reflect")


def sampled(image: jax.Array, y: jax.Array, x: jax.Array, border: str) -> jax.Array:
    """[H, W, C] at places in pixels, [P, Q] each, by linear interpolation: [P, Q, C]; borders as scipy names them."""
    at = jax.vmap(lambda plane: map_coordinates(plane, (y, x), order=1, mode=border), -1, -1)
    return at(image)
