"""Mixup and CutMix: pairs of examples become mixtures of both."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.core.registry import require
from vitcls.data.augment.geometry import box

_QUANTILES = 1025  # of Beta, on an even grid


@dataclasses.dataclass(frozen=True)
class Mixup:
    """lambda ~ Beta(alpha, alpha) of an example and the rest of the other (Zhang et al. 2018)."""

    probability: float = 0.0  # of a pair
    alpha: float = 0.8

    def __post_init__(self):
        require(self, "alpha", self.alpha > 0, "above 0")


@dataclasses.dataclass(frozen=True)
class CutMix(Mixup):
    """A box of the other example, 1 - lambda of the area, lambda ~ Beta(alpha, alpha) (Yun et al. 2019)."""

    alpha: float = 1.0


@dataclasses.dataclass(frozen=True)
class Mix:
    """Of each pair of neighbours mixup, CutMix or neither.

    Both examples of a pair share one lambda: x_a = lambda x_a + (1 - lambda) x_b, and the other way round. In CutMix
    lambda is what is left of the image once the box is clipped at its borders.
    """

    mixup: Mixup
    cutmix: CutMix

    @property
    def probability(self) -> float:
        """That a pair is mixed."""
        return self.mixup.probability + self.cutmix.probability

    def __call__(self, keys: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """keys [B], images [B, H, W, C], targets [B, K] -> images and targets; raises ValueError for an odd B."""
        if len(images) % 2:
            raise ValueError(
                f"mixup and CutMix mix pairs of examples, but {len(images)} is an odd number; make it even"
            )
        pairs = images.reshape(-1, 2, *images.shape[1:])  # [B, H, W, C] -> [B / 2, 2, H, W, C]
        target_pairs = targets.reshape(-1, 2, targets.shape[-1])
        pair_keys = keys.reshape(-1, 2, *keys.shape[1:])[:, 0]
        pixels, lam = jax.vmap(lambda key: self._kept(key, images.shape[1:3]))(pair_keys)
        pixels, lam = pixels[:, None], lam[:, None, None]
        pairs = pixels * pairs + (1 - pixels) * pairs[:, ::-1]
        target_pairs = lam * target_pairs + (1 - lam) * target_pairs[:, ::-1]
        return pairs.reshape(images.shape), target_pairs.reshape(targets.shape)

    def _kept(self, key: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """How much of each pixel, [H, W, 1], and of each target, scalar, an example keeps."""
        choice_key, lambda_key, box_key = jax.random.split(key, 3)
        choice, position = jax.random.uniform(choice_key), jax.random.uniform(lambda_key)
        lam = _lookup(_beta_quantiles(self.mixup.alpha), position)
        pixels = jnp.broadcast_to(lam, size)
        if self.cutmix.probability:
            center = jax.random.uniform(box_key, (2,))
            inside = _cutmix_box(center, size, _lookup(_beta_quantiles(self.cutmix.alpha), position))
            cut = choice >= self.mixup.probability
            pixels = jnp.where(cut, 1.0 - inside, pixels)
            lam = jnp.where(cut, jnp.mean(1.0 - inside), lam)
        mixed = choice < self.probability
        return jnp.where(mixed, pixels, 1.0)[..., None], jnp.where(mixed, lam, 1.0)


def _cutmix_box(center: jax.Array, size: tuple[int, int], lam: jax.Array) -> jax.Array:
    """float32 [H, W], 1 in a box of 1 - lam of the area around `center` (in [0, 1)), clipped at the borders."""
    half = jnp.sqrt(1 - lam) / 2
    (height, width), (row, column) = size, (jnp.floor(center[0] * size[0]), jnp.floor(center[1] * size[1]))
    half_height, half_width = jnp.round(half * height), jnp.round(half * width)
    inside = box(size, row - half_height, column - half_width, row + half_height, column + half_width)
    return inside.astype(jnp.float32)


@functools.cache  # a step is traced more than once
def _beta_quantiles(alpha: float) -> np.ndarray:
    """Quantiles of Beta(alpha, alpha) on an even grid: drawing by rejection would loop on the device."""
    from scipy.special import betaincinv  # scipy.stats takes three times as long to import

    return betaincinv(alpha, alpha, np.linspace(0, 1, _QUANTILES)).astype(np.float32)


def _lookup(quantiles: np.ndarray, position: jax.Array) -> jax.Array:
    """The quantile at `position` in [0, 1), between two of the grid; an even grid needs no search."""
    place = position * (len(quantiles) - 1)
    index = jnp.floor(place).astype(jnp.int32)
    low, high = jnp.asarray(quantiles)[index], jnp.asarray(quantiles)[index + 1]
    return low + (high - low) * (place - index)
