"""The inverted residual block, which MobileNet v2 and v3 and EfficientNet are made of."""

from collections.abc import Callable, Iterable

import flax.linen as nn
import jax

from vitcls.models import layers


class InvertedResidual(nn.Module):
    """1x1 to `expanded` channels, depthwise, squeeze-and-excite, 1x1 to `features` (Sandler et al. 2018, section 3.3).

    [B, H, W, C] -> [B, H / stride, W / stride, features]; x is added where the shape stays. Where `expanded` is C the
    first convolution is left out. `unit` makes a layers.ConvNorm with the network's norm and activation.
    """

    expanded: int
    features: int
    kernel_size: int
    stride: int
    unit: Callable[..., layers.ConvNorm]
    activation: str
    last_activation: str = "linear"  # of the last convolution
    squeeze_excite: int = 0  # channels of the gate's hidden layer; 0 for no gate
    gate_activation: str = "relu"  # of that hidden layer
    gate: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid
    drop_path: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = x
        if self.expanded != x.shape[-1]:
            y = self.unit(self.expanded, 1, activation=self.activation, name="expand")(y, train=train)
        y = self.unit(
            self.expanded,
            self.kernel_size,
            stride=self.stride,
            groups=self.expanded,
            activation=self.activation,
            name="depthwise",
        )(y, train=train)
        if self.squeeze_excite:
            y = layers.SqueezeExcite(
                self.squeeze_excite, self.dtype, self.gate_activation, self.gate, name="squeeze_excite"
            )(y)
        y = self.unit(self.features, 1, activation=self.last_activation, name="project")(y, train=train)
        if y.shape != x.shape:
            return y
        return x + layers.DropPath(self.drop_path)(y, train=train)


def strides_for(stem: str, strides: Iterable[int]) -> list[int]:
    """The strides of the stages; with a small stem the first that halves the map does not."""
    strides = list(strides)
    if stem == "small" and 2 in strides:
        strides[strides.index(2)] = 1
    return strides
