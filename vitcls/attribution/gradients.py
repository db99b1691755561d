"""Maps by the gradient of a logit, or by what covering a part of the image does to it; for any classifier.

They call a compiled `gradient(images)` or `score(images)` again and again, so that memory is that of one batch whatever
the number of steps. The loop is Python's: in a loop of XLA, convolutions take four times as long on a CPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vitcls.attribution.network import PyTree


def logits_of(forward: Callable, variables: PyTree, images: jax.Array, classes: jax.Array) -> jax.Array:
    """The logit of the class int [B] of each image, [B]."""
    return jnp.take_along_axis(forward(variables, images), classes[:, None], axis=1)[:, 0]


def gradient_of(forward: Callable, variables: PyTree, images: jax.Array, classes: jax.Array) -> jax.Array:
    """d logit / d pixel for the class int [B] of each image, [B, H, W, C]."""
    return jax.grad(lambda pixels: jnp.sum(logits_of(forward, variables, pixels, classes)))(images)


def integrated_gradients(gradient: Callable, images: jax.Array, baseline: jax.Array, steps: int) -> jax.Array:
    """(x - x0) times the mean gradient on the way from x0 to x (Sundararajan et al. 2017, equation 1).

    By the midpoint rule. The sum over an image tends to the difference of its logit and that of the baseline.

    Args:
      gradient: images [B, H, W, C] -> d logit / d pixel, of the same shape.
      baseline: x0, of that shape too, or [1, 1, 1, C].
    """
    way, total = images - baseline, jnp.zeros_like(images)
    for i in range(steps):
        total += gradient(baseline + (i + 0.5) / steps * way)
    return way * total / steps


def completeness_error(attributions: jax.Array, differences: jax.Array) -> jax.Array:
    """|sum - difference| / |difference| for each image, [B]: 0 where the attributions [B, ...] add up to the logit."""
    sums = jnp.sum(attributions, axis=tuple(range(1, attributions.ndim)))
    return jnp.abs(sums - differences) / jnp.maximum(jnp.abs(differences), 1e-12)


def smoothgrad(
    gradient: Callable, images: jax.Array, key: jax.Array, *, samples: int = 32, noise: float = 0.15
) -> jax.Array:
    """The mean gradient under Gaussian noise (Smilkov et al. 2017, section 3), [B, H, W, C].

    `noise` is its standard deviation, as a fraction of the range of each image; `gradient` as above.
    """
    images = jnp.asarray(images)
    spread = noise * (jnp.max(images, axis=(1, 2, 3)) - jnp.min(images, axis=(1, 2, 3)))[:, None, None, None]
    total = jnp.zeros_like(images)
    for one in jax.random.split(key, samples):
        total += gradient(images + spread * jax.random.normal(one, images.shape, images.dtype))
    return total / samples


def occlusion(
    score: Callable, images: jax.Array, baseline: jax.Array, *, window: tuple[int, int], stride: tuple[int, int]
) -> jax.Array:
    """How far the logit falls when a window is filled with the baseline (Zeiler & Fergus 2014, section 4.2), [B, H, W].

    A pixel has the mean over the windows that cover it. The last window of a row or column is moved to the border.
    `score` gives the logits [B] of images [B, H, W, C]; `baseline` is of that shape, or [1, 1, 1, C].
    """
    full, size = score(images), images.shape[1:3]
    falls, counts = jnp.zeros(images.shape[:3], jnp.float32), jnp.zeros((1, *size), jnp.float32)
    for top in _starts(size[0], window[0], stride[0]):
        for left in _starts(size[1], window[1], stride[1]):
            covered = jnp.zeros((1, *size)).at[:, top : top + window[0], left : left + window[1]].set(1)
            fall = full - score(jnp.where(covered[..., None] > 0, baseline, images))
            falls, counts = falls + fall[:, None, None] * covered, counts + covered
    return falls / counts


def _starts(size: int, window: int, stride: int) -> list[int]:
    starts = list(range(0, size - window + 1, stride))
    return starts if starts[-1] == size - window else [*starts, size - window]
