"""ResNet (He et al. 2016, arXiv 1512.03385), and the residual stages that ResNeXt shares."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.models import checks, convolutions, layers
from vitcls.models.preset import Preset

_CHOICES = {
    "block": ("basic", "bottleneck"),
    "shortcut": ("projection", "identity", "all"),
    "stride_on": ("3x3", "1x1"),
}


class ResNet(nn.Module):
    """images float [B, H, W, C], normalised -> logits float32 [B, num_classes].

    Parameters, statistics of norms and logits are float32 whatever `dtype`, the type of the rest. Sown into
    'intermediates': 'stem_map', 'stage_1_map' ... 'stage_N_map' (maps [B, H', W', C']) and 'features' [B, D].

    Raises ValueError for a field that cannot work and for images smaller than the total stride.
    """

    num_classes: int
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage; every stage but the first halves the map
    block: str = "bottleneck"  # 'basic': two 3x3 convolutions
    width: int = 64  # channels of the stem and inside the first stage's blocks; each stage doubles them
    stem: str = "standard"  # stem_kernel with stride 2, then 3x3 max pooling; 'small': 3x3, stride 1, no pooling
    stem_kernel: int = 7
    stride_on: str = "3x3"  # the convolution of a bottleneck that halves the map; '1x1' as in the paper
    shortcut: str = "projection"  # where the shape changes (option B); 'identity': zeros (A); 'all': everywhere (C)
    norm: str = "batch"
    activation: str = "relu"
    dropout: float = 0.0  # before the classifier
    block_dropout: float = 0.0  # inside each block, before its last convolution
    drop_path: float = 0.0  # of the last block; grows linearly from 0
    grouped_conv: str = "auto"  # the form of grouped convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each block in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        self._check(images.shape)
        unit = self._unit()
        x = images.astype(self.dtype)
        if self.stem == "small":
            x = unit(self.width, 3, name="stem")(x, train=train)
        else:
            x = unit(self.width, self.stem_kernel, stride=2, name="stem")(x, train=train)
            x = layers.max_pool(x, 3, 2, 1)
        self.sow("intermediates", "stem_map", x)

        block = layers.checkpointed(ResidualBlock, self.remat)
        rates = iter(layers.linear_rates(self.drop_path, sum(self.depths)))
        maps = []
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                x = block(
                    kind=self.block,
                    inner=self._inner_width() << stage,
                    features=(self.width if self.block == "basic" else 4 * self.width) << stage,
                    stride=2 if stage and not i else 1,
                    groups=self._groups(),
                    unit=unit,
                    stride_on=self.stride_on,
                    shortcut=self.shortcut,
                    activation=self.activation,
                    dropout=self.block_dropout,
                    drop_path=next(rates),
                    name=f"stage_{stage + 1}_block_{i + 1}",
                )(x, train)
            x = self._after_stage(x, stage + 1, unit, train=train)
            self.sow("intermediates", f"stage_{stage + 1}_map", x)
            maps.append(x)
        features = jnp.mean(self._merge(maps, unit, train=train).astype(jnp.float32), axis=(1, 2))
        return layers.classify(self, features, train=train)

    def _unit(self) -> Callable[..., layers.ConvNorm]:
        return functools.partial(
            layers.ConvNorm,
            norm=self.norm,
            activation=self.activation,
            grouped_conv=self.grouped_conv,
            dtype=self.dtype,
        )

    def _check(self, shape: tuple[int, ...]) -> None:
        checks.check_fields(self, _CHOICES)
        halvings = len(self.depths) - 1
        checks.check_stem(self, shape, {"standard": 4 << halvings, "small": 1 << halvings})

    # What a ResNeXt does otherwise.

    def _groups(self) -> int:
        return 1

    def _inner_width(self) -> int:
        return self.width

    def _after_stage(self, x: jax.Array, stage: int, unit: Callable, *, train: bool) -> jax.Array:
        return x

    def _merge(self, maps: list[jax.Array], unit: Callable, *, train: bool) -> jax.Array:
        return maps[-1]


class ResidualBlock(nn.Module):
    """act(shortcut(x) + F(x)) (He et al. 2016, equations 1 and 2): [B, H, W, C] -> [B, H / stride, W / stride, F]."""

    kind: str
    inner: int
    features: int
    stride: int
    groups: int
    unit: Callable[..., layers.ConvNorm]
    stride_on: str
    shortcut: str
    activation: str
    dropout: float
    drop_path: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dropout = layers.Dropout(self.dropout)
        if self.kind == "basic":
            y = self.unit(self.inner, 3, stride=self.stride, groups=self.groups, name="conv_1")(x, train=train)
            y = dropout(y, train=train)
            y = self.unit(self.features, 3, activation="linear", name="conv_2")(y, train=train)
        else:
            first, second = (self.stride, 1) if self.stride_on == "1x1" else (1, self.stride)
            y = self.unit(self.inner, 1, stride=first, name="conv_1")(x, train=train)
            y = self.unit(self.inner, 3, stride=second, groups=self.groups, name="conv_2")(y, train=train)
            y = dropout(y, train=train)
            y = self.unit(self.features, 1, activation="linear", name="conv_3")(y, train=train)
        y = layers.DropPath(self.drop_path)(y, train=train)
        return layers.activation(self.activation)(self._skip(x, train) + y)

    def _skip(self, x: jax.Array, train: bool) -> jax.Array:
        changes = self.stride > 1 or x.shape[-1] != self.features
        if self.shortcut == "all" or (changes and self.shortcut == "projection"):
            project = self.unit(self.features, 1, stride=self.stride, activation="linear", name="shortcut")
            return project(x, train=train)
        if not changes:
            return x
        x = convolutions.strided(x, self.stride)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.features - x.shape[-1])))


PRESETS = {
    f"resnet{layer_count}": Preset(ResNet, {"block": block, "depths": depths}, "He et al. 2016, arXiv 1512.03385")
    for layer_count, block, depths in (
        (18, "basic", (2, 2, 2, 2)),
        (34, "basic", (3, 4, 6, 3)),
        (50, "bottleneck", (3, 4, 6, 3)),
        (101, "bottleneck", (3, 4, 23, 3)),
        (152, "bottleneck", (3, 8, 36, 3)),
    )
}
