"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.models import checks, convolutions, layers
from vitcls.models.preset import Preset

_EPSILON = 1e-6


class ConvNeXt(nn.Module):
    """images float [B, H, W, C], normalised -> logits float32 [B, num_classes].

    Parameters, statistics of norms and logits are float32 whatever `dtype`, the type of the rest. Sown into
    'intermediates': 'stem_map', 'stage_1_map' ... 'stage_N_map' [B, H', W', C'] and 'features' [B, D], normalised.

    Raises ValueError for a field that cannot work and for images smaller than the total stride.
    """

    num_classes: int
    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    kernel_size: int = 7  # of the depthwise convolutions (section 2.5)
    expansion: int = 4  # of the inverted bottleneck (section 2.4)
    stem: str = "standard"  # patches of 4x4; 'small': 3x3, stride 1
    norm: str = "layer"  # 'batch' (section 2.6)
    activation: str = "gelu"  # 'relu' (section 2.6)
    layer_scale: float = 1e-6  # the initial scale of each block; 0 for none
    drop_path: float = 0.0  # of the last block; grows linearly from 0
    dropout: float = 0.0  # before the classifier
    grouped_conv: str = "auto"  # the form of depthwise convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each block in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self)
        checks.check_same_length(self, "depths", "widths")
        halvings = len(self.depths) - 1
        checks.check_stem(self, images.shape, {"standard": 4 << halvings, "small": 1 << halvings})

        def normalize(x: jax.Array, name: str) -> jax.Array:
            return layers.normalize(x, self.norm, train=train, epsilon=_EPSILON, dtype=self.dtype, name=name)

        def conv(features: int, size: int, stride: int, padding: int, name: str) -> nn.Module:
            return convolutions.conv(
                features,
                size,
                stride=stride,
                padding=padding,
                use_bias=True,
                grouped_conv=self.grouped_conv,
                dtype=self.dtype,
                name=name,
            )

        size, stride, padding = (3, 1, 1) if self.stem == "small" else (4, 4, 0)
        x = conv(self.widths[0], size, stride, padding, "stem")(images.astype(self.dtype))
        x = normalize(x, "stem_norm")
        self.sow("intermediates", "stem_map", x)
        block = layers.checkpointed(Block, self.remat)
        rates = iter(layers.linear_rates(self.drop_path, sum(self.depths)))
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True), start=1):
            if stage > 1:
                x = normalize(x, f"downsample_{stage}_norm")
                x = conv(width, 2, 2, 0, f"downsample_{stage}")(x)
            for i in range(1, depth + 1):
                x = block(
                    kernel_size=self.kernel_size,
                    expansion=self.expansion,
                    norm=self.norm,
                    activation=self.activation,
                    layer_scale=self.layer_scale,
                    drop_path=next(rates),
                    grouped_conv=self.grouped_conv,
                    dtype=self.dtype,
                    name=f"stage_{stage}_block_{i}",
                )(x, train)
            self.sow("intermediates", f"stage_{stage}_map", x)
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        features = nn.LayerNorm(epsilon=_EPSILON, name="head_norm")(features)
        return layers.classify(self, features, train=train)


class Block(nn.Module):
    """x + scale * W2 act(W1 norm(depthwise(x))) (figure 4): [B, H, W, C] -> [B, H, W, C]."""

    kernel_size: int
    expansion: int
    norm: str
    activation: str
    layer_scale: float
    drop_path: float
    grouped_conv: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        y = convolutions.conv(
            width,
            self.kernel_size,
            groups=width,
            use_bias=True,
            grouped_conv=self.grouped_conv,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        y = layers.normalize(y, self.norm, train=train, epsilon=_EPSILON, dtype=self.dtype)
        y = nn.Dense(self.expansion * width, dtype=self.dtype, name="expand")(y)
        y = nn.Dense(width, dtype=self.dtype, name="project")(layers.activation(self.activation)(y))
        if self.layer_scale:
            y = layers.LayerScale(self.layer_scale, name="layer_scale")(y)
        return x + layers.DropPath(self.drop_path)(y, train=train)


PRESETS = {
    f"convnext_{size}": Preset(ConvNeXt, {"depths": depths, "widths": widths}, "Liu et al. 2022, arXiv 2201.03545")
    for size, depths, widths in (
        ("tiny", (3, 3, 9, 3), (96, 192, 384, 768)),
        ("small", (3, 3, 27, 3), (96, 192, 384, 768)),
        ("base", (3, 3, 27, 3), (128, 256, 512, 1024)),
    )
}
