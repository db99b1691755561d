"""Augmentation on the device: pure, jitted with the training step, every choice a function of the example's own key.

Each block of `config.augment` has a probability; what has probability 0 is not even traced. In order: padded crop,
horizontal flip, RandAugment, TrivialAugment, rotation and scale (one resampling), colour jitter, noise, erasing; then
mixup or CutMix. Between those an image is float32 [H, W, C] in [0, 255].
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.core.errors import UserError, unknown
from vitcls.data.augment import randaugment
from vitcls.data.augment.geometry import affine, rotation_matrix

FILLS = ("noise", "zero")
PADDINGS = ("zero", "reflect")
TEST_TIME = ("none", "mirror", "mirror_shift")
_RATIO = (0.3, 3.3)  # of the erased box, width / height (Zhong et al. 2020)
_QUANTILES = 1025  # of Beta, on an even grid
Vary = Callable[[jax.Array, jax.Array], jax.Array]  # key, image float32 [H, W, C] in [0, 255] -> image


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [...] -> float32 [...] in [0, 1]."""
    return images.astype(jnp.float32) / 255


def make_augment(config) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Builds augment(keys [B], images uint8 [B, H, W, C], targets [B, K]) -> (images float32 in [0, 1], targets).

    `config` is the block `augment` of a config; raises UserError for a value that is impossible. Mixup and CutMix
    join the neighbours 2j and 2j + 1: in a shuffled batch that is as random as any pairing, and it never leaves a
    device. B must then be even.
    """
    _validate(config)
    active = [
        (number, _probability(config, name), make(config))
        for number, (name, make) in enumerate(_VARIATIONS.items())
        if _probability(config, name) > 0
    ]

    def vary(key: jax.Array, image: jax.Array) -> jax.Array:
        for number, probability, function in active:
            choice_key, key_of_it = jax.random.split(jax.random.fold_in(key, number))
            varied = function(key_of_it, image)
            if probability < 1:
                varied = jnp.where(jax.random.bernoulli(choice_key, probability), varied, image)
            image = varied
        return image

    mix = _make_mix(config)

    def augment(keys: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = images.astype(jnp.float32)
        if active:
            images = jax.vmap(vary)(keys, images)
        images = images / 255
        return mix(keys, images, targets) if mix else (images, targets)

    return augment


def mixes_pairs(config) -> bool:
    """Whether batches must be made of whole pairs."""
    return config.mixup.probability + config.cutmix.probability > 0


def views(kind: str, images: jax.Array) -> list[tuple[float, jax.Array]]:
    """The versions of images [B, H, W, C] whose logits an evaluation adds up, and the weight of each.

    'none' is the images alone, 'mirror' them and their mirror images; 'mirror_shift' adds both moved by a pixel along
    a diagonal, either way, at half the weight (Jordan 2024, section 3.5).
    """
    height, width = images.shape[1:3]
    weighted = [(1.0, images)]
    if kind == "mirror_shift":
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
        weighted = [(0.5, images), (0.25, padded[:, :height, :width]), (0.25, padded[:, 2:, 2:])]
    if kind != "none":
        weighted = [(weight / 2, view) for weight, image in weighted for view in (image, image[:, :, ::-1])]
    return weighted


def _crop(config) -> Vary:
    padding, mode = config.crop.padding, "constant" if config.crop.fill == "zero" else "reflect"

    def crop(key: jax.Array, image: jax.Array) -> jax.Array:
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode)
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)

    return crop


def _flip(config) -> Vary:
    return lambda key, image: image[:, ::-1]


def _warp(config) -> Vary:
    """Rotation and scale, each with its own probability, in one resampling."""
    limit, low, high = config.rotate.degrees, config.scale.low, config.scale.high

    def warp(key: jax.Array, image: jax.Array) -> jax.Array:
        angle_key, rotate_key, factor_key, scale_key = jax.random.split(key, 4)
        degrees = jax.random.uniform(angle_key, minval=-limit, maxval=limit)
        degrees = jnp.where(jax.random.bernoulli(rotate_key, config.rotate.probability), degrees, 0.0)
        factor = jax.random.uniform(factor_key, minval=low, maxval=high)
        factor = jnp.where(jax.random.bernoulli(scale_key, config.scale.probability), factor, 1.0)
        # The centre stays where it is, so that to zoom is to divide the matrix.
        return affine(image, rotation_matrix(degrees) / factor)

    return warp


def _probability(config, name: str) -> float:
    """That of a variation; `warp` draws for rotation and for scale itself, so it is always applied if either can be."""
    if name == "warp":
        return float(config.rotate.probability > 0 or config.scale.probability > 0)
    return config[name].probability


def _color(config) -> Vary:
    """Brightness, contrast, saturation and hue as in torchvision's ColorJitter, but always in this order.

    The three factors are uniform in [max(0, 1 - limit), 1 + limit], the turn of the hue in +-limit of the circle.
    """
    limits = config.color
    highest = np.array([limits.brightness, limits.contrast, limits.saturation], np.float32)
    lowest = np.minimum(highest, 1.0)

    def color(key: jax.Array, image: jax.Array) -> jax.Array:
        factor_key, hue_key = jax.random.split(key)
        brightness, contrast, saturation = jax.random.uniform(factor_key, (3,), minval=1 - lowest, maxval=1 + highest)
        image = _blend(jnp.zeros(()), image, brightness)
        image = _blend(jnp.mean(randaugment.luma(image)), image, contrast)
        if image.shape[-1] == 3:
            image = _blend(randaugment.luma(image), image, saturation)
            turn = jax.random.uniform(hue_key, minval=-limits.hue, maxval=limits.hue)
            image = _turn_hue(image, turn) if limits.hue else image
        return image

    return color


def _blend(base: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """base at factor 0, image at 1, beyond it above; clipped to [0, 255]."""
    return jnp.clip(base + (image - base) * factor, 0, 255)


def _turn_hue(image: jax.Array, turn: jax.Array) -> jax.Array:
    """Turns the hue of an RGB image by a share of the circle, through HSV."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value, low = jnp.max(image, axis=-1), jnp.min(image, axis=-1)
    spread = value - low
    safe = jnp.where(spread > 0, spread, 1.0)
    hue = jnp.select(
        [value == red, value == green], [(green - blue) / safe % 6, (blue - red) / safe + 2], (red - green) / safe + 4
    )
    hue = hue + 6 * turn
    # Each channel falls from value to low over a third of the circle (the closed form of HSV -> RGB).
    sector = (np.array([5.0, 3.0, 1.0], np.float32)[None, None, :] + hue[..., None]) % 6
    fall = jnp.clip(jnp.minimum(sector, 4 - sector), 0, 1)
    return value[..., None] - spread[..., None] * fall


def _noise(config) -> Vary:
    std = 255 * config.noise.std
    return lambda key, image: jnp.clip(image + std * jax.random.normal(key, image.shape), 0, 255)


def _erase(config) -> Vary:
    """Random erasing (Zhong et al. 2020); with fill 'zero' it is cutout (DeVries & Taylor 2017)."""
    areas, zero = (config.erase.min_area, config.erase.max_area), config.erase.fill == "zero"

    def erase(key: jax.Array, image: jax.Array) -> jax.Array:
        box_key, fill_key = jax.random.split(key)
        inside = _random_box(box_key, image.shape[:2], areas)[..., None]
        fill = jnp.zeros(()) if zero else jax.random.uniform(fill_key, image.shape, maxval=255.0)
        return jnp.where(inside, fill, image)

    return erase


def _random_box(key: jax.Array, size: tuple[int, int], areas: tuple[float, float]) -> jax.Array:
    """bool [H, W]: a box wholly inside, its share of the area and its ratio drawn from their ranges."""
    area_key, ratio_key, row_key, column_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, minval=areas[0], maxval=areas[1]) * size[0] * size[1]
    ratio = jnp.exp(jax.random.uniform(ratio_key, minval=np.log(_RATIO[0]), maxval=np.log(_RATIO[1])))
    height = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, size[0])
    width = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, size[1])
    top = jnp.floor(jax.random.uniform(row_key) * (size[0] - height + 1))
    left = jnp.floor(jax.random.uniform(column_key) * (size[1] - width + 1))
    return _box(size, top, left, top + height, left + width)


def _box(size: tuple[int, int], top, left, bottom, right) -> jax.Array:
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None, :]
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


_VARIATIONS: dict[str, Callable[..., Vary]] = {
    "crop": _crop,
    "flip": _flip,
    "randaugment": lambda config: randaugment.make_randaugment(
        config.randaugment.num_ops, config.randaugment.magnitude
    ),
    "trivialaugment": lambda config: randaugment.trivialaugment,
    "warp": _warp,
    "color": _color,
    "noise": _noise,
    "erase": _erase,
}
_MIX = len(_VARIATIONS)


def _make_mix(config):
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of pairs, None where neither has a probability.

    Both examples of a pair share one lambda ~ Beta(alpha, alpha): x_a = lambda x_a + (1 - lambda) x_b, and the other
    way round. In CutMix lambda is what is left of the image once the box is clipped at its borders.
    """
    mixup_probability, cutmix_probability = config.mixup.probability, config.cutmix.probability
    if not mixes_pairs(config):
        return None
    quantiles = {name: _beta_quantiles(config[name].alpha) for name in ("mixup", "cutmix")}

    def kept(key: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """How much of each pixel, [H, W, 1], and of each target, scalar, an example keeps."""
        choice_key, lambda_key, box_key = jax.random.split(jax.random.fold_in(key, _MIX), 3)
        choice, position = jax.random.uniform(choice_key), jax.random.uniform(lambda_key)
        share = _lookup(quantiles["mixup"], position)
        pixels = jnp.broadcast_to(share, size)
        if cutmix_probability:
            center = jax.random.uniform(box_key, (2,))
            box = _cutmix_box(center, size, _lookup(quantiles["cutmix"], position))
            cut = choice >= mixup_probability
            pixels = jnp.where(cut, 1.0 - box, pixels)
            share = jnp.where(cut, jnp.mean(1.0 - box), share)
        mixed = choice < mixup_probability + cutmix_probability
        return jnp.where(mixed, pixels, 1.0)[..., None], jnp.where(mixed, share, 1.0)

    def mix(keys: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        if len(images) % 2:
            raise UserError(f"mixup and CutMix mix pairs of examples, but {len(images)} is an odd number; make it even")
        pairs = images.reshape(-1, 2, *images.shape[1:])  # [B, H, W, C] -> [B / 2, 2, H, W, C]
        target_pairs = targets.reshape(-1, 2, targets.shape[-1])
        pair_keys = keys.reshape(-1, 2, *keys.shape[1:])[:, 0]
        pixels, share = jax.vmap(lambda key: kept(key, images.shape[1:3]))(pair_keys)
        pixels, share = pixels[:, None], share[:, None, None]
        pairs = pixels * pairs + (1 - pixels) * pairs[:, ::-1]
        target_pairs = share * target_pairs + (1 - share) * target_pairs[:, ::-1]
        return pairs.reshape(images.shape), target_pairs.reshape(targets.shape)

    return mix


def _cutmix_box(center: jax.Array, size: tuple[int, int], share: jax.Array) -> jax.Array:
    """float32 [H, W], 1 in a box of 1 - share of the area around `center` (in [0, 1)), clipped at the borders."""
    half = jnp.sqrt(1 - share) / 2
    (height, width), (row, column) = size, (jnp.floor(center[0] * size[0]), jnp.floor(center[1] * size[1]))
    half_height, half_width = jnp.round(half * height), jnp.round(half * width)
    box = _box(size, row - half_height, column - half_width, row + half_height, column + half_width)
    return box.astype(jnp.float32)


@functools.cache  # a config is checked once, and its steps built once
def _beta_quantiles(alpha: float) -> np.ndarray:
    """Quantiles of Beta(alpha, alpha) on an even grid: drawing by rejection would loop on the device."""
    from scipy.stats import beta

    return beta.ppf(np.linspace(0, 1, _QUANTILES), alpha, alpha).astype(np.float32)


def _lookup(quantiles: np.ndarray, position: jax.Array) -> jax.Array:
    """The quantile at `position` in [0, 1), between two of the grid; an even grid needs no search."""
    place = position * (len(quantiles) - 1)
    index = jnp.floor(place).astype(jnp.int32)
    low, high = jnp.asarray(quantiles)[index], jnp.asarray(quantiles)[index + 1]
    return low + (high - low) * (place - index)


def _validate(config) -> None:
    def require(key: str, condition: bool, expected: str) -> None:
        block, field = key.split(".")
        if not condition:
            raise UserError(f"config.augment.{key}={config[block][field]} is impossible; it must be {expected}")

    for block, fields in config.items():
        for field, value in fields.items():
            require(f"{block}.{field}", isinstance(value, str) or math.isfinite(value), "finite")
        require(f"{block}.probability", 0 <= fields.probability <= 1, "in [0, 1]")
    require("crop.padding", 0 <= config.crop.padding <= 1_024, "in [0, 1024] pixels")
    if config.crop.fill not in PADDINGS:
        raise unknown("config.augment.crop.fill", config.crop.fill, PADDINGS)
    require("rotate.degrees", config.rotate.degrees >= 0, "at least 0")
    require("scale.low", 0 < config.scale.low <= config.scale.high, "above 0 and at most config.augment.scale.high")
    for field in ("brightness", "contrast", "saturation"):
        require(f"color.{field}", config.color[field] >= 0, "at least 0")
    require("color.hue", 0 <= config.color.hue <= 0.5, "in [0, 0.5]")
    require("noise.std", config.noise.std >= 0, "at least 0")
    require("erase.min_area", 0 < config.erase.min_area <= config.erase.max_area, "above 0 and at most max_area")
    require("erase.max_area", config.erase.max_area < 1, "below 1")
    if config.erase.fill not in FILLS:
        raise unknown("config.augment.erase.fill", config.erase.fill, FILLS)
    require("randaugment.num_ops", 1 <= config.randaugment.num_ops <= 32, "in [1, 32]")
    require("randaugment.magnitude", 0 <= config.randaugment.magnitude <= 10, "in [0, 10]")
    require("mixup.alpha", config.mixup.alpha > 0, "above 0")
    require("cutmix.alpha", config.cutmix.alpha > 0, "above 0")
    together = config.mixup.probability + config.cutmix.probability
    if together > 1:
        raise UserError(
            f"config.augment.mixup.probability and config.augment.cutmix.probability add up to {together:g}; a pair "
            "gets one or the other, so make them at most 1 together"
        )
