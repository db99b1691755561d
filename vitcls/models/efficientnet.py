"""EfficientNet (Tan & Le 2019, arXiv 1905.11946) and EfficientNet-Lite0, which small devices run well."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.models import checks, layers
from vitcls.models.inverted_residual import InvertedResidual, strides_for
from vitcls.models.preset import Preset


class EfficientNet(nn.Module):
    """images float [B, H, W, C], normalised -> logits float32 [B, num_classes].

    The stages of table 1, made wider and deeper as section 3.3 says. Parameters, statistics of norms and logits are
    float32 whatever `dtype`, the type of the rest; padding is 'SAME', as the authors' code has it. Sown into
    'intermediates': 'stem_map', 'stage_1_map' ... 'stage_7_map' (maps [B, H', W', C']) and 'features' [B, D].

    Raises ValueError for a field that cannot work and for images smaller than the total stride.
    """

    num_classes: int
    width_multiplier: float = 1.0
    depth_multiplier: float = 1.0
    squeeze_excite: float = 0.25  # width of the gates, of a block's input channels; 0 for none
    stem: str = "standard"  # 3x3 with stride 2; 'small': stride 1, and the first stage that halves the map does not
    norm: str = "batch"
    activation: str = "silu"
    dropout: float = 0.2  # before the classifier
    drop_path: float = 0.2  # of a block after the last; grows linearly from 0
    grouped_conv: str = "auto"  # the form of depthwise convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each block in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self)
        checks.check_stem(self, images.shape, {"standard": 32, "small": 8})
        unit = functools.partial(
            layers.ConvNorm,
            padding="SAME",
            norm=self.norm,
            epsilon=1e-3,
            activation=self.activation,
            grouped_conv=self.grouped_conv,
            dtype=self.dtype,
        )

        def width(channels: int) -> int:
            return layers.round_channels(self.width_multiplier * channels)

        x = images.astype(self.dtype)
        x = unit(width(32), 3, stride=1 if self.stem == "small" else 2, name="stem")(x, train=train)
        self.sow("intermediates", "stem_map", x)
        depths = [math.ceil(self.depth_multiplier * depth) for _, _, depth, _, _ in _STAGES]
        strides = strides_for(self.stem, (stride for _, _, _, stride, _ in _STAGES))
        rates = iter(layers.linear_rates(self.drop_path, sum(depths) + 1))
        block = layers.checkpointed(InvertedResidual, self.remat)
        for stage, (expansion, channels, _, _, kernel_size) in enumerate(_STAGES):
            for i in range(depths[stage]):
                x = block(
                    expanded=expansion * x.shape[-1],
                    features=width(channels),
                    kernel_size=kernel_size,
                    stride=1 if i else strides[stage],
                    unit=unit,
                    activation=self.activation,
                    squeeze_excite=max(1, int(self.squeeze_excite * x.shape[-1])) if self.squeeze_excite else 0,
                    gate_activation=self.activation,
                    drop_path=next(rates),
                    dtype=self.dtype,
                    name=f"stage_{stage + 1}_block_{i + 1}",
                )(x, train)
            self.sow("intermediates", f"stage_{stage + 1}_map", x)
        x = unit(width(1280), 1, name="last")(x, train=train)
        return layers.classify(self, jnp.mean(x.astype(jnp.float32), axis=(1, 2)), train=train)


_STAGES = (  # expansion, channels, blocks, stride, kernel
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)

PRESETS = {
    f"efficientnet_b{i}": Preset(
        EfficientNet,
        {"width_multiplier": width, "depth_multiplier": depth, "dropout": dropout},
        "Tan & Le 2019, arXiv 1905.11946",
        (size, size, 3),
    )
    for i, (width, depth, size, dropout) in enumerate(
        ((1.0, 1.0, 224, 0.2), (1.0, 1.1, 240, 0.2), (1.1, 1.2, 260, 0.3), (1.2, 1.4, 300, 0.3))
    )
} | {
    # As B0, whose stem and last convolution Lite never scales, without gates and with an activation that is easily
    # quantised. The larger Lites do not repeat the first and the last stage either.
    "efficientnet_lite0": Preset(
        EfficientNet, {"squeeze_excite": 0.0, "activation": "relu6"}, "Tan & Le 2019 (Google's EfficientNet-Lite, 2020)"
    )
}
