"""ResNet v2 as BiT has it (Kolesnikov et al. 2020, arXiv 1912.11370).

Pre-activation blocks (He et al. 2016, arXiv 1603.05027), group normalisation (Wu & He 2018) and weight standardisation
(Qiao et al. 2019, arXiv 1903.10520): no example sees another, so that the smallest batches will do.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.models import checks, convolutions, layers
from vitcls.models.preset import Preset

_EPSILON = 1e-10  # of weight standardisation, as in the authors' code


class ResNetV2(nn.Module):
    """images float [B, H, W, C], normalised -> logits float32 [B, num_classes].

    Parameters, statistics of norms and logits are float32 whatever `dtype`, the type of the rest. Sown into
    'intermediates': 'stem_map', 'stage_1_map' ... 'stage_N_map' [B, H', W', C'] and 'features' [B, D], normalised.

    Raises ValueError for a field that cannot work and for images smaller than the total stride.
    """

    num_classes: int
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage; every stage but the first halves the map
    width: int = 64  # channels of the stem and inside the first stage's blocks; each stage doubles them
    stem: str = "standard"  # 7x7 with stride 2, then 3x3 max pooling; 'small': 3x3, stride 1, no pooling
    norm: str = "group"
    activation: str = "relu"
    dropout: float = 0.0  # before the classifier
    drop_path: float = 0.0  # of the last block; grows linearly from 0
    grouped_conv: str = "auto"  # the form of convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each block in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self)
        halvings = len(self.depths) - 1
        checks.check_stem(self, images.shape, {"standard": 4 << halvings, "small": 1 << halvings})
        conv = functools.partial(StandardizedConv, grouped_conv=self.grouped_conv, dtype=self.dtype)
        x = images.astype(self.dtype)
        if self.stem == "small":
            x = conv(self.width, 3, name="stem")(x)
        else:
            x = conv(self.width, 7, stride=2, name="stem")(x)
            # What is pooled is no activation yet: the zeros around it win over what is negative, as in BiT.
            x = layers.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 2)
        self.sow("intermediates", "stem_map", x)
        block = layers.checkpointed(PreActivationBlock, self.remat)
        rates = iter(layers.linear_rates(self.drop_path, sum(self.depths)))
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                x = block(
                    inner=self.width << stage,
                    stride=2 if stage and not i else 1,
                    project=not i,
                    norm=self.norm,
                    activation=self.activation,
                    drop_path=next(rates),
                    grouped_conv=self.grouped_conv,
                    dtype=self.dtype,
                    name=f"stage_{stage + 1}_block_{i + 1}",
                )(x, train)
            self.sow("intermediates", f"stage_{stage + 1}_map", x)
        x = layers.normalize(x, self.norm, train=train, dtype=self.dtype, name="head_norm")
        x = layers.activation(self.activation)(x)
        return layers.classify(self, jnp.mean(x.astype(jnp.float32), axis=(1, 2)), train=train)


class PreActivationBlock(nn.Module):
    """shortcut + W3 a(W2 a(W1 a(x))), with a(x) = act(norm(x)): [B, H, W, C] -> [B, H / stride, W / stride, 4 inner].

    The shortcut is x, or with `project` a 1x1 convolution of a(x) (He et al. 2016, arXiv 1603.05027, figure 4 (e)).
    """

    inner: int
    stride: int
    project: bool
    norm: str
    activation: str
    drop_path: float
    grouped_conv: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(StandardizedConv, grouped_conv=self.grouped_conv, dtype=self.dtype)

        def activate(x: jax.Array, n: int) -> jax.Array:
            x = layers.normalize(x, self.norm, train=train, dtype=self.dtype, name=f"norm_{n}")
            return layers.activation(self.activation)(x)

        y = activate(x, 1)
        if self.project:
            x = conv(4 * self.inner, 1, stride=self.stride, name="shortcut")(y)
        y = conv(self.inner, 1, name="conv_1")(y)
        y = conv(self.inner, 3, stride=self.stride, name="conv_2")(activate(y, 2))
        y = conv(4 * self.inner, 1, name="conv_3")(activate(y, 3))
        return x + layers.DropPath(self.drop_path)(y, train=train)


class StandardizedConv(nn.Module):
    """A convolution [B, H, W, C] -> [B, H', W', features] without bias, half the kernel of zeros on every side.

    Of its kernel w it uses (w - mean) / deviation, both over the inputs of each output (Qiao et al. 2019, equation 5).
    """

    features: int
    kernel_size: int
    stride: int = 1
    grouped_conv: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = convolutions.conv(
            self.features,
            self.kernel_size,
            stride=self.stride,
            grouped_conv=self.grouped_conv,
            dtype=self.dtype,
        )
        if self.is_initializing():
            return conv(x)  # which draws the kernel; it is kept as it is
        return nn.map_variables(lambda conv, x: conv(x), "params", _standardize)(conv, x)


def _standardize(params: dict) -> dict:
    """Kernels [h, w, C, F] with the mean 0 and the deviation 1 over h, w and C."""
    return jax.tree.map(lambda kernel: jax.nn.standardize(kernel, (0, 1, 2), epsilon=_EPSILON), params)


PRESETS = {
    f"resnetv2_{layer_count}x{factor}_bit": Preset(
        ResNetV2, {"depths": depths, "width": 64 * factor}, "Kolesnikov et al. 2020, arXiv 1912.11370"
    )
    for layer_count, factor, depths in (
        (50, 1, (3, 4, 6, 3)),
        (50, 3, (3, 4, 6, 3)),
        (101, 1, (3, 4, 23, 3)),
        (101, 3, (3, 4, 23, 3)),
        (152, 2, (3, 8, 36, 3)),
        (152, 4, (3, 8, 36, 3)),
    )
}
