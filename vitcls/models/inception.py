"""GoogLeNet (Szegedy et al. 2015, arXiv 1409.4842) and Inception v3 (Szegedy et al. 2016, arXiv 1512.00567).

Neither has the auxiliary classifiers of its paper, which evaluation does without.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.models import checks, layers
from vitcls.models.preset import Preset


class Conv(NamedTuple):
    """A step of a branch: convolution, norm, activation."""

    features: int
    kernel_size: int | tuple[int, int] = 1
    stride: int = 1
    padding: str | int | None = None


class Pool(NamedTuple):
    """A step of a branch: 3x3 pooling."""

    pool: Callable
    stride: int = 1
    padding: str | int = 1


class Fork(NamedTuple):
    """The last step of a branch: two convolutions of the same map, side by side."""

    left: Conv
    right: Conv


class Mixed(nn.Module):
    """Branches of the same map, their channels joined: [B, H, W, C] -> [B, H', W', C']."""

    branches: tuple[tuple[str, tuple[Conv | Pool | Fork, ...]], ...]  # (name, steps); a dict would be sorted by remat
    unit: Callable[..., layers.ConvNorm]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def apply(step: Conv, y: jax.Array, name: str) -> jax.Array:
            return self.unit(**step._asdict(), name=name)(y, train=train)

        joined = []
        for branch, steps in self.branches:
            y = x
            for i, step in enumerate(steps, start=1):
                match step:
                    case Pool():
                        y = step.pool(y, 3, step.stride, step.padding)
                    case Conv():
                        y = apply(step, y, f"{branch}_{i}")
                    case Fork():
                        sides = (apply(side, y, f"{branch}_{i}_{way}") for way, side in step._asdict().items())
                        y = jnp.concatenate(list(sides), axis=-1)
            joined.append(y)
        return jnp.concatenate(joined, axis=-1)


class _Inception(nn.Module):
    """What both networks share: images float [B, H, W, C], normalised -> logits float32 [B, num_classes]."""

    num_classes: int
    width_multiplier: float = 1.0  # of all channels
    stem: str = "standard"
    norm: str = "batch"
    activation: str = "relu"
    dropout: float = 0.0  # before the classifier
    grouped_conv: str = "auto"  # the form of convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each inception module in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    def _unit(self) -> Callable[..., layers.ConvNorm]:
        return functools.partial(
            _conv_norm,
            self.width_multiplier,
            norm=self.norm,
            epsilon=1e-3,
            activation=self.activation,
            grouped_conv=self.grouped_conv,
            dtype=self.dtype,
        )

    def _mix(self, name: str, branches: dict, x: jax.Array, train: bool) -> jax.Array:
        x = layers.checkpointed(Mixed, self.remat)(tuple(branches.items()), self._unit(), name=name)(x, train)
        self.sow("intermediates", f"{name}_map", x)
        return x


def _conv_norm(width_multiplier: float, features: int, *args, **kwargs) -> layers.ConvNorm:
    return layers.ConvNorm(max(1, round(width_multiplier * features)), *args, **kwargs)


class GoogLeNet(_Inception):
    """GoogLeNet, table 1 of its paper, with batch normalisation; parameters, norms' statistics and logits float32.

    Sown into 'intermediates': 'stem_map', 'inception_3a_map' ... 'inception_5b_map' [B, H', W', C'], 'features' [B, D].

    Raises ValueError for a field that cannot work and for images smaller than the total stride.
    """

    dropout: float = 0.4
    stem: str = "standard"  # 'small': the 7x7 is a 3x3 of stride 1, and the two poolings beside it are left out
    large_kernel: int = 3  # of the third branch: 5 in the paper, 3 in the weights that torchvision published
    local_response_norm: bool = False  # beside the first two poolings, for norm='none', as in the paper

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self)
        checks.check_stem(self, images.shape, {"standard": 32, "small": 4})
        respond = layers.local_response_norm if self.local_response_norm else lambda x: x
        pool = functools.partial(layers.max_pool, size=3, stride=2, padding="CEIL")

        unit = self._unit()
        x = images.astype(self.dtype)
        if self.stem == "small":
            x = respond(unit(64, 3, name="stem_1")(x, train=train))
        else:
            x = respond(pool(unit(64, 7, 2, name="stem_1")(x, train=train)))
        x = unit(64, 1, name="stem_2")(x, train=train)
        x = respond(unit(192, 3, name="stem_3")(x, train=train))
        x = x if self.stem == "small" else pool(x)
        self.sow("intermediates", "stem_map", x)
        for module, (one, reduce_3, three, reduce_5, five, pooled) in _GOOGLENET.items():
            if module == "4a":
                x = pool(x)
            if module == "5a":
                x = layers.max_pool(x, 2, 2, "CEIL")
            branches = {
                "1x1": (Conv(one),),
                "3x3": (Conv(reduce_3), Conv(three, 3)),
                "5x5": (Conv(reduce_5), Conv(five, self.large_kernel)),
                "pool": (Pool(layers.max_pool), Conv(pooled)),
            }
            x = self._mix(f"inception_{module}", branches, x, train)
        return layers.classify(self, jnp.mean(x.astype(jnp.float32), axis=(1, 2)), train=train)


_GOOGLENET = {  # 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool proj
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class InceptionV3(_Inception):
    """Inception v3, table 1 of its paper; parameters, statistics of norms and logits are float32 whatever `dtype`.

    Sown into 'intermediates': 'stem_map', 'mixed_1_map' ... 'mixed_11_map' [B, H', W', C'] and 'features' [B, D].

    Raises ValueError for a field that cannot work and for images that shrink to nothing.
    """

    dropout: float = 0.2
    stem: str = "standard"  # 'small': its convolutions keep the size, and its poolings are left out
    count_padding: bool = (
        False  # average pooling counts the zeros around a map, as torchvision's and timm's networks do
    )

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self)
        checks.check_stem(self, images.shape, {"standard": 75, "small": 7})
        x = images.astype(self.dtype)
        unit, small = self._unit(), self.stem == "small"
        stride, valid = (1, None) if small else (2, 0)
        convs = (Conv(32, 3, stride, valid), Conv(32, 3, 1, valid), Conv(64, 3), Conv(80), Conv(192, 3, 1, valid))
        for i, conv in enumerate(convs, start=1):
            x = unit(**conv._asdict(), name=f"stem_{i}")(x, train=train)
            if i in (3, 5) and not small:
                x = layers.max_pool(x, 3, 2)
        self.sow("intermediates", "stem_map", x)
        average = Pool(functools.partial(layers.avg_pool, count_padding=self.count_padding))
        for i, branches in enumerate(_inception_v3(average), start=1):
            x = self._mix(f"mixed_{i}", branches, x, train)
        return layers.classify(self, jnp.mean(x.astype(jnp.float32), axis=(1, 2)), train=train)


_SHRINK = Pool(layers.max_pool, stride=2, padding=0)


def _figure_5(average: Pool, pooled: int) -> dict:
    return {
        "1x1": (Conv(64),),
        "5x5": (Conv(48), Conv(64, 5)),
        "3x3": (Conv(64), Conv(96, 3), Conv(96, 3)),
        "pool": (average, Conv(pooled)),
    }


def _figure_6(average: Pool, width: int) -> dict:
    row, column = (1, 7), (7, 1)
    return {
        "1x1": (Conv(192),),
        "7x7": (Conv(width), Conv(width, row), Conv(192, column)),
        "7x7_twice": (Conv(width), Conv(width, column), Conv(width, row), Conv(width, column), Conv(192, row)),
        "pool": (average, Conv(192)),
    }


def _figure_7(average: Pool) -> dict:
    return {
        "1x1": (Conv(320),),
        "3x3": (Conv(384), Fork(Conv(384, (1, 3)), Conv(384, (3, 1)))),
        "3x3_twice": (Conv(448), Conv(384, 3), Fork(Conv(384, (1, 3)), Conv(384, (3, 1)))),
        "pool": (average, Conv(192)),
    }


_FIRST_SHRINK = {
    "3x3": (Conv(384, 3, 2, 0),),
    "3x3_twice": (Conv(64), Conv(96, 3), Conv(96, 3, 2, 0)),
    "pool": (_SHRINK,),
}
_SECOND_SHRINK = {
    "3x3": (Conv(192), Conv(320, 3, 2, 0)),
    "7x7": (Conv(192), Conv(192, (1, 7)), Conv(192, (7, 1)), Conv(192, 3, 2, 0)),
    "pool": (_SHRINK,),
}


def _inception_v3(average: Pool) -> list[dict]:
    """The branches of each module; `average` is the pooling of those that keep the size."""
    return [
        *(_figure_5(average, pooled) for pooled in (32, 64, 64)),
        _FIRST_SHRINK,
        *(_figure_6(average, width) for width in (128, 160, 160, 192)),
        _SECOND_SHRINK,
        *[_figure_7(average)] * 2,
    ]


PRESETS = {
    "googlenet": Preset(GoogLeNet, {}, "Szegedy et al. 2015, arXiv 1409.4842"),
    "inception_v3": Preset(InceptionV3, {}, "Szegedy et al. 2016, arXiv 1512.00567", (299, 299, 3)),
}
