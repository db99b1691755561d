"""Maps by the gradient of a logit, or by what covering a part of the image does to it; for any classifier.

`forward(variables, images float32 [B, H, W, C] in [0, 1]) -> logits [B, K]`, and `classes` int [B] throughout. All loops
run on the device, one batch in memory at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vitcls.attribution.network import PyTree


def logits_of(forward: Callable, variables: PyTree, images: jax.Array, classes: jax.Array) -> jax.Array:
    """The logit of the class of each image, [B]."""
    return jnp.take_along_axis(forward(variables, images), classes[:, None], axis=1)[:, 0]


def gradient(forward: Callable, variables: PyTree, images: jax.Array, classes: jax.Array) -> jax.Array:
    """d logit / d pixel, [B, H, W, C]."""
    return jax.grad(lambda pixels: jnp.sum(logits_of(forward, variables, pixels, classes)))(images)


def integrated_gradients(
    forward: Callable, variables: PyTree, images: jax.Array, classes: jax.Array, baseline: jax.Array, steps: jax.Array
) -> jax.Array:
    """(x - x0) times the mean gradient on the way from x0 to x (Sundararajan et al. 2017, equation 1).

    By the midpoint rule. The sum over an image tends to the difference of its logit and that of the baseline.

    Args:
      baseline: x0, broadcast to [B, H, W, C].
      steps: of the sum, an int that may be traced: one program for all.
    """
    origin = jnp.broadcast_to(baseline, images.shape)
    way = images - origin

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + gradient(forward, variables, origin + (i + 0.5) / steps * way, classes)

    return way * jax.lax.fori_loop(0, steps, add, jnp.zeros_like(images)) / steps


def completeness_error(attributions: jax.Array, differences: jax.Array) -> jax.Array:
    """|sum - difference| / |difference| for each image, [B]: 0 where the attributions [B, ...] add up to the logit."""
    sums = jnp.sum(attributions, axis=tuple(range(1, attributions.ndim)))
    return jnp.abs(sums - differences) / jnp.maximum(jnp.abs(differences), 1e-12)


def smoothgrad(
    forward: Callable,
    variables: PyTree,
    images: jax.Array,
    classes: jax.Array,
    key: jax.Array,
    *,
    samples: int = 32,
    noise: float = 0.15,
) -> jax.Array:
    """The mean gradient under Gaussian noise (Smilkov et al. 2017, section 3), [B, H, W, C].

    `noise` is its standard deviation, as a fraction of the range of each image.
    """
    spread = noise * (jnp.max(images, axis=(1, 2, 3)) - jnp.min(images, axis=(1, 2, 3)))[:, None, None, None]

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        shifts = spread * jax.random.normal(jax.random.fold_in(key, i), images.shape, images.dtype)
        return total + gradient(forward, variables, images + shifts, classes)

    return jax.lax.fori_loop(0, samples, add, jnp.zeros_like(images)) / samples


def occlusion(
    forward: Callable,
    variables: PyTree,
    images: jax.Array,
    classes: jax.Array,
    baseline: jax.Array,
    *,
    window: tuple[int, int],
    stride: tuple[int, int],
) -> jax.Array:
    """How far the logit falls when a window is filled with the baseline (Zeiler & Fergus 2014, section 4.2), [B, H, W].

    A pixel has the mean over the windows that cover it. The last window of a row or column is moved to the border.
    """
    height, width = images.shape[1:3]
    starts = [_starts(size, *sides) for size, *sides in zip((height, width), window, stride, strict=True)]
    tops, lefts = (axis.ravel() for axis in jnp.meshgrid(*starts, indexing="ij"))
    full = logits_of(forward, variables, images, classes)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]

    def cover(totals: tuple, start: tuple) -> tuple:
        falls, counts = totals
        top, left = start
        covered = (rows >= top) & (rows < top + window[0]) & (columns >= left) & (columns < left + window[1])
        without = jnp.where(covered[None, :, :, None], baseline, images)
        fall = full - logits_of(forward, variables, without, classes)
        return (falls + fall[:, None, None] * covered[None], counts + covered), None

    empty = jnp.zeros(images.shape[:3], jnp.float32), jnp.zeros((height, width), jnp.float32)
    (falls, counts), _ = jax.lax.scan(cover, empty, (tops, lefts))
    return falls / counts[None]


def _starts(size: int, window: int, stride: int) -> jax.Array:
    starts = list(range(0, size - window + 1, stride))
    return jnp.array(starts if starts[-1] == size - window else [*starts, size - window])
