"""Corruptions that spread each pixel over its neighbours."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.data.corruptions.matrices import (
    both,
    filter_matrix,
    filtered,
    gaussian_kernel,
    gaussian_matrix,
    to_levels,
    zoom_matrix,
)

Sides = tuple[np.ndarray, np.ndarray]  # matrices of rows and columns


def gaussian_blur(key: jax.Array, image: jax.Array, sides: Sides) -> jax.Array:
    """Of a camera out of focus, with a soft edge."""
    del key
    return filtered(image, *sides)


def gaussian_sides(std: float, height: int, width: int) -> Sides:
    return both(gaussian_matrix, height, width, std)


def defocus_blur(key: jax.Array, image: jax.Array, kernel: np.ndarray) -> jax.Array:
    """Of a camera out of focus: every point becomes the disk of its aperture, [k, k]."""
    del key
    return correlate(image, kernel)


def disk(strength: tuple[float, float], height: int, width: int) -> np.ndarray:
    """A disk of a radius in pixels, its edge softened by a Gaussian of few pixels, float32 [k, k]."""
    del height, width
    radius, softness = strength
    reach = max(8, int(radius))
    squares = np.arange(-reach, reach + 1) ** 2
    inside = (squares[:, None] + squares <= radius**2).astype(np.float64)
    soft = filter_matrix(len(squares), gaussian_kernel(softness, 1 if radius <= 8 else 2), "reflect")
    kernel = soft @ (inside / inside.sum()) @ soft.T
    used = np.flatnonzero(kernel.max(axis=0) > 1e-6)
    return kernel[used[0] : used[-1] + 1, used[0] : used[-1] + 1].astype(np.float32)


def correlate(image: jax.Array, kernel: np.ndarray) -> jax.Array:
    """[H, W, C] with an odd [k, k], mirrored at the border without its edge, [H, W, C]."""
    radius = kernel.shape[0] // 2
    padded = jnp.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    planes = jnp.moveaxis(padded, -1, 0)[:, None]  # [C, 1, H, W]: each channel for itself
    return jnp.moveaxis(jax.lax.conv(planes, jnp.asarray(kernel)[None, None], (1, 1), "VALID")[:, 0], 0, -1)


class Glass(NamedTuple):
    """How pixels are moved behind frosted glass."""

    sides: Sides
    reach: int  # in pixels
    rounds: int


def glass_of(strength: tuple[float, int, int], height: int, width: int) -> Glass:
    std, reach, rounds = strength
    return Glass(gaussian_sides(std, height, width), reach, rounds)


def glass_blur(key: jax.Array, image: jax.Array, glass: Glass) -> jax.Array:
    """Blurs, lets each pixel take the colour of a neighbour, from the last to the first, and blurs again."""
    height, width, _ = image.shape
    blurred = to_levels(filtered(image, *glass.sides)) / 255
    rows, columns = (jnp.maximum(size - 2 * glass.reach, 0) for size in (height, width))

    def take_one(i: jax.Array, source: jax.Array) -> jax.Array:
        place = i % (rows * columns)
        row, column = height - glass.reach - place // columns, width - glass.reach - place % columns
        down, right = jax.random.randint(jax.random.fold_in(key, i), (2,), -glass.reach, glass.reach)
        return source.at[row * width + column].set(source[(row + down) * width + column + right])

    source = jax.lax.fori_loop(0, glass.rounds * rows * columns, take_one, jnp.arange(height * width))
    return filtered(blurred.reshape(height * width, -1)[source].reshape(image.shape), *glass.sides)


def motion_weights(strength: tuple[int, float], height: int, width: int) -> np.ndarray:
    """How long the camera is at each pixel of its way, float32 [2 radius + 1]: half of a Gaussian."""
    del height, width
    radius, std = strength
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / std) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def motion_blur(key: jax.Array, image: jax.Array, weights: np.ndarray) -> jax.Array:
    """Of a camera that moves, by up to 45 degrees from the horizontal."""
    return moved(image, weights, jax.random.uniform(key, minval=-45.0, maxval=45.0))


def moved(image: jax.Array, weights: jax.Array, degrees: jax.Array) -> jax.Array:
    """The mean of an image [H, W, ...] on a straight way; what comes in at the border repeats it."""
    height, width = image.shape[:2]
    angle, steps = jnp.deg2rad(degrees), jnp.arange(len(weights))
    down, right = -jnp.ceil(steps * jnp.sin(angle) - 0.5), -jnp.ceil(steps * jnp.cos(angle) - 0.5)
    gone = jnp.cumsum((jnp.abs(down) >= height) | (jnp.abs(right) >= width)) > 0  # the way leaves the image
    weights = jnp.where(gone, 0.0, weights)

    def add_one(total: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        weight, y, x = at
        rows = jnp.clip(jnp.arange(height) - y, 0, height - 1)
        columns = jnp.clip(jnp.arange(width) - x, 0, width - 1)
        return total + weight * image[rows][:, columns], None

    ways = (weights, down.astype(jnp.int32), right.astype(jnp.int32))
    return jax.lax.scan(add_one, jnp.zeros_like(image), ways)[0]


def zoom_blur(key: jax.Array, image: jax.Array, sides: Sides) -> jax.Array:
    """Of a camera that comes nearer: the mean of the image and of zooms, with matrices [Z, H, H] and [Z, W, W]."""
    del key

    def add_one(total: jax.Array, one: Sides) -> tuple[jax.Array, None]:
        return total + filtered(image, *one), None

    return jax.lax.scan(add_one, image, sides)[0] / (len(sides[0]) + 1)


def zoom_sides(strength: tuple[float, float], height: int, width: int) -> Sides:
    stop, step = strength
    factors = np.arange(1, stop, step)
    rows, columns = zip(*(both(zoom_matrix, height, width, factor) for factor in factors), strict=True)
    return np.stack(rows), np.stack(columns)
