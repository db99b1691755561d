"""Linear filters of images as matrices, float32 [H, H]: rows are new pixels, columns old ones. Made on the host."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def to_levels(image: jax.Array) -> jax.Array:
    """[0, 1] as whole numbers from 0 to 255, float32, cut off as the files of CIFAR-10-C are."""
    return jnp.floor(255 * jnp.clip(image, 0, 1) + 1e-3)


def filtered(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Filters [H, W, ...] along both sides: [H, W, ...] with [P, H] and [Q, W] -> [P, Q, ...]."""
    image = jnp.tensordot(rows, image, 1)
    return jnp.moveaxis(jnp.tensordot(columns, image, axes=(1, 1)), 0, 1)


def filter_matrix(size: int, kernel: np.ndarray, border: str = "edge") -> np.ndarray:
    """The matrix that correlates with a kernel of odd length; beyond the border as numpy.pad has it."""
    radius = len(kernel) // 2
    source = np.pad(np.arange(size), radius, mode=border)
    matrix = np.zeros((size, size))
    for offset, weight in enumerate(kernel):
        np.add.at(matrix, (np.arange(size), source[offset : offset + size]), weight)
    return matrix.astype(np.float32)


def gaussian_kernel(std: float, radius: int) -> np.ndarray:
    """The normal density at whole numbers from -radius to radius, which sums to 1."""
    if std == 0:
        return np.ones(1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
    return weights / weights.sum()


def gaussian_matrix(size: int, std: float, border: str = "edge", truncate: float = 4.0) -> np.ndarray:
    """A Gaussian blur that ends after `truncate` deviations."""
    return filter_matrix(size, gaussian_kernel(std, int(truncate * std + 0.5)), border)


def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """The middle of an image, made larger by linear interpolation to the size that it was."""
    crop = math.ceil(size / factor)
    zoomed = round(crop * factor)
    first = (size - crop) // 2
    places = (np.arange(size) + (zoomed - size) // 2) * (crop - 1) / max(zoomed - 1, 1)
    low = np.clip(np.floor(places).astype(int), 0, crop - 1)
    high, share = np.minimum(low + 1, crop - 1), places - low
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size), first + low), 1 - share)
    np.add.at(matrix, (np.arange(size), first + high), share)
    return matrix.astype(np.float32)


def box_matrix(size: int, new_size: int) -> np.ndarray:
    """Means of the old pixels whose middle lies in a new one, float32 [new_size, size]; the nearest where none does."""
    scale = size / new_size
    centers = (np.arange(new_size)[:, None] + 0.5) * scale
    within = np.abs(np.arange(size) + 0.5 - centers) <= max(scale, 1) / 2 - 1e-9
    nearest = np.arange(size) == np.minimum(np.floor(centers), size - 1)
    inside = np.where(within.any(axis=1, keepdims=True), within, nearest)
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def linear_matrix(size: int, new_size: int) -> np.ndarray:
    """Linear interpolation between the middles of pixels, float32 [new_size, size]; flat beyond the outermost."""
    places = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    low = np.floor(places).astype(int)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size), low), 1 - (places - low))
    np.add.at(matrix, (np.arange(new_size), np.minimum(low + 1, size - 1)), places - low)
    return matrix.astype(np.float32)


def both(make: Callable[..., np.ndarray], height: int, width: int, *values) -> tuple[np.ndarray, np.ndarray]:
    """The matrices of both sides."""
    return make(height, *values), make(width, *values)
