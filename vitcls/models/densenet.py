"""DenseNet (Huang et al. 2017, arXiv 1608.06993)."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.models import checks, convolutions, layers
from vitcls.models.preset import Preset


class DenseNet(nn.Module):
    """images float [B, H, W, C], normalised -> logits float32 [B, num_classes].

    Parameters, statistics of norms and logits are float32 whatever `dtype`, the type of the rest. Sown into
    'intermediates': 'stem_map', 'stage_1_map' ... 'stage_N_map' (maps [B, H', W', C']) and 'features' [B, D].

    Raises ValueError for a field that cannot work and for images smaller than the total stride.
    """

    num_classes: int
    depths: tuple[int, ...] = (6, 12, 24, 16)  # layers of each dense block
    growth_rate: int = 32  # k: channels that a layer adds (section 3)
    stem_width: int = 64  # 2k in the paper
    compression: float = 0.5  # theta: the share of channels that a transition keeps
    bottleneck: int = 4  # a 1x1 convolution to so many times k precedes each 3x3
    stem: str = "standard"  # 7x7 with stride 2, then 3x3 max pooling; 'small': 3x3, stride 1, no pooling
    norm: str = "batch"
    activation: str = "relu"
    layer_dropout: float = 0.0  # after each layer of a dense block (0.2 in the paper without augmentation)
    dropout: float = 0.0  # before the classifier
    grouped_conv: str = "auto"  # the form of convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each layer in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self)
        if not 0 < self.compression <= 1:
            raise ValueError(f"compression={self.compression} is impossible; it must be in (0, 1]")
        halvings = len(self.depths) - 1
        checks.check_stem(self, images.shape, {"standard": 4 << halvings, "small": 1 << halvings})

        act = layers.activation(self.activation)
        normalize = functools.partial(layers.normalize, kind=self.norm, train=train, dtype=self.dtype)
        x = images.astype(self.dtype)
        size, stride = (3, 1) if self.stem == "small" else (7, 2)
        conv = functools.partial(convolutions.conv, grouped_conv=self.grouped_conv, dtype=self.dtype)
        x = conv(self.stem_width, size, stride=stride, name="stem")(x)
        x = act(normalize(x, name="stem_norm"))
        if self.stem == "standard":
            x = layers.max_pool(x, 3, 2, 1)
        self.sow("intermediates", "stem_map", x)

        layer = layers.checkpointed(DenseLayer, self.remat)
        for stage, depth in enumerate(self.depths, start=1):
            if stage > 1:
                x = act(normalize(x, name=f"transition_{stage}_norm"))
                width = int(self.compression * x.shape[-1])
                x = conv(width, 1, name=f"transition_{stage}")(x)
                x = layers.avg_pool(x, 2, 2)
            for i in range(1, depth + 1):
                new = layer(
                    growth_rate=self.growth_rate,
                    bottleneck=self.bottleneck,
                    norm=self.norm,
                    activation=act,
                    dropout=self.layer_dropout,
                    grouped_conv=self.grouped_conv,
                    dtype=self.dtype,
                    name=f"stage_{stage}_layer_{i}",
                )(x, train)
                x = jnp.concatenate([x, new], axis=-1)
            self.sow("intermediates", f"stage_{stage}_map", x)
        x = act(normalize(x, name="head_norm"))
        return layers.classify(self, jnp.mean(x.astype(jnp.float32), axis=(1, 2)), train=train)


class DenseLayer(nn.Module):
    """H_l of equation 2: norm, act, 1x1, norm, act, 3x3; [B, H, W, C] -> the new channels [B, H, W, growth_rate]."""

    growth_rate: int
    bottleneck: int
    norm: str
    activation: Callable[[jax.Array], jax.Array]
    dropout: float
    grouped_conv: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, (features, size) in enumerate(((self.bottleneck * self.growth_rate, 1), (self.growth_rate, 3)), start=1):
            x = layers.normalize(x, self.norm, train=train, dtype=self.dtype, name=f"norm_{i}")
            conv = convolutions.conv(features, size, grouped_conv=self.grouped_conv, dtype=self.dtype, name=f"conv_{i}")
            x = conv(self.activation(x))
        return layers.Dropout(self.dropout)(x, train=train)


PRESETS = {
    f"densenet{layer_count}": Preset(DenseNet, {"depths": depths}, "Huang et al. 2017, arXiv 1608.06993")
    for layer_count, depths in ((121, (6, 12, 24, 16)), (169, (6, 12, 32, 32)), (201, (6, 12, 48, 32)))
}
