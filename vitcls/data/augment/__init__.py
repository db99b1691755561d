"""Augmentation on the device: pure, jitted with the training step, every choice a function of the example's own key.

One file for each, a frozen dataclass whose fields are the keys of its block in `config.augment`; it is called as
(key, image float32 [H, W, C] in [0, 255]) -> image, in the order of AUGMENTATIONS, with its `probability`. What has
probability 0 is not even traced. Mixup or CutMix comes last.
"""

import zlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from vitcls.core.errors import UserError
from vitcls.core.registry import Registry, require
from vitcls.data.augment.mix import Mix
from vitcls.data.augment.test_time import TEST_TIME, views
from vitcls.data.augment.warp import Warp

__all__ = ["AUGMENTATIONS", "TEST_TIME", "make_augment", "mixes_pairs", "to_float", "views"]


def _check(entry: Any) -> None:
    require(entry, "probability", 0 <= entry.probability <= 1, "in [0, 1]")


AUGMENTATIONS = Registry(
    "config.augment",
    {
        "crop": "vitcls.data.augment.crop:Crop",
        "flip": "vitcls.data.augment.flip:Flip",
        "randaugment": "vitcls.data.augment.randaugment:RandAugment",
        "trivialaugment": "vitcls.data.augment.randaugment:TrivialAugment",
        "rotate": "vitcls.data.augment.warp:Rotate",
        "scale": "vitcls.data.augment.warp:Scale",
        "color": "vitcls.data.augment.color:Color",
        "noise": "vitcls.data.augment.noise:Noise",
        "erase": "vitcls.data.augment.erase:Erase",
        "mixup": "vitcls.data.augment.mix:Mixup",
        "cutmix": "vitcls.data.augment.mix:CutMix",
    },
    separate=True,
    check=_check,
)
# The random streams of version 0.1, by its order; that of any other name is made of the name.
_FIRST_STREAMS = ("crop", "flip", "randaugment", "trivialaugment", "warp", "color", "noise", "erase", "mix")


class Transform(Protocol):
    """An augmentation of one image."""

    probability: float

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """`image` float32 [H, W, C] in [0, 255] -> the same."""


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [...] -> float32 [...] in [0, 1]."""
    return images.astype(jnp.float32) / 255


def make_augment(config) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Builds augment(keys [B], images uint8 [B, H, W, C], targets [B, K]) -> (images float32 in [0, 1], targets).

    `config` is the block `augment` of a config; raises UserError for a value that is impossible. Mixup and CutMix
    join the neighbours 2j and 2j + 1: in a shuffled batch that is as random as any pairing, and it never leaves a
    device. B must then be even.
    """
    transforms, mix = _create(config)
    active = [(_stream(name), transform) for name, transform in transforms if transform.probability > 0]

    def transform_one(key: jax.Array, image: jax.Array) -> jax.Array:
        for stream, transform in active:
            choice_key, op_key = jax.random.split(jax.random.fold_in(key, stream))
            changed = transform(op_key, image)
            if transform.probability < 1:
                changed = jnp.where(jax.random.bernoulli(choice_key, transform.probability), changed, image)
            image = changed
        return image

    def augment(keys: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = images.astype(jnp.float32)
        if active:
            images = jax.vmap(transform_one)(keys, images)
        images = images / 255
        if not mix.probability:
            return images, targets
        return mix(jax.vmap(jax.random.fold_in, (0, None))(keys, _stream("mix")), images, targets)

    return augment


def _create(config) -> tuple[list[tuple[str, Transform]], Mix]:
    """The augmentations of one image with their names, in order, and that of pairs."""
    entries = {
        name: AUGMENTATIONS.create(name, config[name], key=f"{AUGMENTATIONS.key}.{name}") for name in AUGMENTATIONS
    }
    mix = Mix(entries.pop("mixup"), entries.pop("cutmix"))
    if mix.probability > 1:
        raise UserError(
            "config.augment.mixup.probability and config.augment.cutmix.probability add up to "
            f"{mix.probability:g}; a pair gets one or the other, so make them at most 1 together"
        )
    entries["rotate"] = Warp(entries["rotate"], entries.pop("scale"))  # one resampling for both
    return [("warp" if name == "rotate" else name, entry) for name, entry in entries.items()], mix


def _stream(name: str) -> int:
    """The random stream of an augmentation: its own, whatever else there is."""
    return _FIRST_STREAMS.index(name) if name in _FIRST_STREAMS else zlib.crc32(name.encode())


def mixes_pairs(config) -> bool:
    """Whether batches must be made of whole pairs."""
    return config.mixup.probability + config.cutmix.probability > 0
