"""MobileNet v1 (arXiv 1704.04861), v2 (arXiv 1801.04381) and v3 (arXiv 1905.02244)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.models import checks, layers
from vitcls.models.inverted_residual import InvertedResidual, strides_for
from vitcls.models.preset import Preset

_SMALLEST = {"standard": 32, "small": 8}  # pixels: the total stride


class _MobileNet(nn.Module):
    """What the versions share: images float [B, H, W, C], normalised -> logits float32 [B, num_classes].

    Parameters, statistics of norms and logits are float32 whatever `dtype`, the type of the rest. Padding is 'SAME', as
    the authors' code has it, and the epsilon of norms 1e-3; PyTorch's networks pad evenly and have 1e-5. Sown into
    'intermediates': 'stem_map', 'stage_1_map' ... [B, H', W', C'], 'features'.

    Raises ValueError for a field that cannot work and for images smaller than the total stride.
    """

    num_classes: int
    width_multiplier: float = 1.0  # alpha
    stem: str = "standard"  # 3x3 with stride 2; 'small': stride 1, and the first stage that halves the map does not
    padding: str = "same"  # 'even': that and the epsilon of PyTorch's networks
    norm: str = "batch"
    activation: str = "relu6"
    dropout: float = 0.0  # before the classifier
    grouped_conv: str = "auto"  # the form of depthwise convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each block in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    def _unit(self):
        return functools.partial(
            layers.ConvNorm,
            padding="SAME" if self.padding == "same" else None,
            norm=self.norm,
            epsilon=1e-3 if self.padding == "same" else 1e-5,
            activation=self.activation,
            grouped_conv=self.grouped_conv,
            dtype=self.dtype,
        )

    def _stem(self, images: jax.Array, features: int, train: bool) -> jax.Array:
        checks.check_fields(self, {"padding": ("same", "even")})
        checks.check_stem(self, images.shape, _SMALLEST)
        stride = 1 if self.stem == "small" else 2
        x = self._unit()(features, 3, stride, name="stem")(images.astype(self.dtype), train=train)
        self.sow("intermediates", "stem_map", x)
        return x


class MobileNetV1(_MobileNet):
    """MobileNet (Howard et al. 2017), table 1."""

    depths: tuple[int, ...] = (1, 2, 2, 6, 2)  # separable convolutions of each stage; all but the first halve the map
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_same_length(self, "depths", "widths")
        x = self._stem(images, max(1, int(32 * self.width_multiplier)), train)
        block = layers.checkpointed(SeparableConv, self.remat)
        strides = strides_for(self.stem, [1] + [2] * (len(self.depths) - 1))
        for stage, (depth, width, stride) in enumerate(zip(self.depths, self.widths, strides, strict=True), start=1):
            for i in range(1, depth + 1):
                features = max(1, int(width * self.width_multiplier))
                name = f"stage_{stage}_block_{i}"
                x = block(features, stride if i == 1 else 1, self._unit(), name=name)(x, train)
            self.sow("intermediates", f"stage_{stage}_map", x)
        return layers.classify(self, jnp.mean(x.astype(jnp.float32), axis=(1, 2)), train=train)


class SeparableConv(nn.Module):
    """Depthwise 3x3, then 1x1, each with norm and activation (figure 3): [B, H, W, C] -> NHWC."""

    features: int
    stride: int
    unit: functools.partial

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        x = self.unit(channels, 3, self.stride, groups=channels, name="depthwise")(x, train=train)
        return self.unit(self.features, 1, name="pointwise")(x, train=train)


class MobileNetV2(_MobileNet):
    """MobileNet v2 (Sandler et al. 2018), table 2."""

    depths: tuple[int, ...] = (1, 2, 3, 4, 3, 3, 1)  # n: blocks of each of the seven stages
    widths: tuple[int, ...] = (16, 24, 32, 64, 96, 160, 320)  # c
    expansion: int = 6  # t: of every stage but the first, which does not expand
    linear_bottleneck: bool = True  # no activation after the last convolution of a block (section 6.4 compares)
    dropout: float = 0.2

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_same_length(self, "depths", "widths", length=len(_V2_STRIDES))
        x = self._stem(images, layers.round_channels(32 * self.width_multiplier), train)
        block = layers.checkpointed(InvertedResidual, self.remat)
        strides = strides_for(self.stem, _V2_STRIDES)
        for stage, (depth, width, stride) in enumerate(zip(self.depths, self.widths, strides, strict=True), start=1):
            for i in range(1, depth + 1):
                x = block(
                    expanded=x.shape[-1] * (1 if stage == 1 else self.expansion),
                    features=layers.round_channels(width * self.width_multiplier),
                    kernel_size=3,
                    stride=stride if i == 1 else 1,
                    unit=self._unit(),
                    activation=self.activation,
                    last_activation="linear" if self.linear_bottleneck else self.activation,
                    dtype=self.dtype,
                    name=f"stage_{stage}_block_{i}",
                )(x, train)
            self.sow("intermediates", f"stage_{stage}_map", x)
        last = layers.round_channels(1280 * max(1.0, self.width_multiplier))
        x = self._unit()(last, 1, name="last")(x, train=train)
        return layers.classify(self, jnp.mean(x.astype(jnp.float32), axis=(1, 2)), train=train)


_V2_STRIDES = (1, 2, 2, 2, 1, 2, 1)


class MobileNetV3(_MobileNet):
    """MobileNet v3 (Howard et al. 2019), tables 1 (large) and 2 (small)."""

    size: str = "large"  # 'small'
    activation: str = "hard_swish"  # of the later half; ReLU before
    squeeze_excite: float = 0.25  # width of the gates, of the expanded channels; 0 for none
    dropout: float = 0.2

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self, {"size": tuple(_V3)})
        stages, last = _V3[self.size]
        x = self._stem(images, layers.round_channels(16 * self.width_multiplier), train)
        block = layers.checkpointed(InvertedResidual, self.remat)
        strides = strides_for(self.stem, (stage[0][5] for stage in stages))
        for stage, (blocks, stride) in enumerate(zip(stages, strides, strict=True), start=1):
            for i, (size, expanded, width, gated, late, _) in enumerate(blocks, start=1):
                expanded = layers.round_channels(expanded * self.width_multiplier)
                gate_width = layers.round_channels(self.squeeze_excite * expanded) if self.squeeze_excite else 0
                x = block(
                    expanded=expanded,
                    features=layers.round_channels(width * self.width_multiplier),
                    kernel_size=size,
                    stride=stride if i == 1 else 1,
                    unit=self._unit(),
                    activation=self.activation if late else "relu",
                    squeeze_excite=gate_width if gated else 0,
                    gate=jax.nn.hard_sigmoid,
                    dtype=self.dtype,
                    name=f"stage_{stage}_block_{i}",
                )(x, train)
            self.sow("intermediates", f"stage_{stage}_map", x)
        x = self._unit()(6 * x.shape[-1], 1, name="last")(x, train=train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        hidden = nn.Dense(
            layers.round_channels(last * max(1.0, self.width_multiplier)), dtype=self.dtype, name="hidden"
        )
        return layers.classify(self, layers.activation(self.activation)(hidden(x)), train=train)


# Stages of blocks: kernel, expanded channels, channels, squeeze-and-excite, in the later half, stride.
_V3_LARGE = (
    ((3, 16, 16, False, False, 1),),
    ((3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1)),
    ((5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1)),
    (
        (3, 240, 80, False, True, 2),
        (3, 200, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
    ),
    ((3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1)),
    ((5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1)),
)
_V3_SMALL = (
    ((3, 16, 16, True, False, 2),),
    ((3, 72, 24, False, False, 2), (3, 88, 24, False, False, 1)),
    ((5, 96, 40, True, True, 2), (5, 240, 40, True, True, 1), (5, 240, 40, True, True, 1)),
    ((5, 120, 48, True, True, 1), (5, 144, 48, True, True, 1)),
    ((5, 288, 96, True, True, 2), (5, 576, 96, True, True, 1), (5, 576, 96, True, True, 1)),
)
_V3 = {"large": (_V3_LARGE, 1280), "small": (_V3_SMALL, 1024)}  # and the width of the last hidden layer

PRESETS = {
    "mobilenet_v1": Preset(MobileNetV1, {}, "Howard et al. 2017, arXiv 1704.04861"),
    "mobilenet_v2": Preset(MobileNetV2, {}, "Sandler et al. 2018, arXiv 1801.04381"),
} | {
    f"mobilenet_v3_{size}": Preset(MobileNetV3, {"size": size}, "Howard et al. 2019, arXiv 1905.02244") for size in _V3
}
