"""Small networks: LeNet-5 and the CNN that Nimma & Uddagiri build from scratch.

The paper of the last is "Advancements in Deep Learning Architectures for Image Recognition and Semantic Segmentation".
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.models import checks, convolutions, layers
from vitcls.models.preset import Preset

_POOLINGS = {"avg": layers.avg_pool, "max": layers.max_pool}


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998, section II.B): images float [B, H, W, C], normalised -> logits float32 [B, K].

    As it is built today: every map of C3 sees all of S2, and the pooling has no weights. Images of 28 to 31 pixels
    get a frame of their own border, up to 32, as the paper's digits have one. Sown into 'intermediates':
    'conv_1_map' ... 'conv_3_map' and 'features' [B, hidden_width].

    Raises ValueError for a field that cannot work and for images below 28 pixels.
    """

    num_classes: int
    widths: tuple[int, ...] = (6, 16, 120)  # C1, C3, C5
    hidden_width: int = 84  # F6
    pooling: str = "avg"  # 'max'
    activation: str = "tanh"  # 'relu'
    norm: str = "none"  # 'batch'
    dropout: float = 0.0  # before the classifier
    grouped_conv: str = "auto"  # the form of convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute the inside of each unit in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self, {"pooling": tuple(_POOLINGS)})
        checks.check_same_length(self, "widths", length=3)
        checks.check_size(images.shape, 28)
        x = _framed(images.astype(self.dtype))
        conv = layers.checkpointed(layers.ConvNorm, self.remat)
        for i, width in enumerate(self.widths, start=1):
            x = conv(
                width,
                5,
                padding="VALID",
                norm=self.norm,
                activation=self.activation,
                grouped_conv=self.grouped_conv,
                dtype=self.dtype,
                name=f"conv_{i}",
            )(x, train)
            self.sow("intermediates", f"conv_{i}_map", x)
            x = _POOLINGS[self.pooling](x, 2, 2) if i < 3 else x
        x = nn.Dense(self.hidden_width, dtype=self.dtype, name="hidden")(x.reshape(x.shape[0], -1))
        return layers.classify(self, layers.activation(self.activation)(x), train=train)


def _framed(images: jax.Array) -> jax.Array:
    """Images [B, H, W, C] with their border repeated up to 32 pixels a side."""
    for axis in (1, 2):
        size = images.shape[axis]
        missing = max(0, 32 - size)
        first, last = (jax.lax.slice_in_dim(images, at, at + 1, axis=axis) for at in (0, size - 1))
        # Not jnp.pad(mode="edge"), which jax2onnx 0.13 exports wrongly.
        parts = [first] * (missing // 2) + [images] + [last] * (missing - missing // 2)
        images = jnp.concatenate(parts, axis)
    return images


class PaperCNN(nn.Module):
    """The CNN of Nimma & Uddagiri: images float [B, H, W, C], normalised -> logits float32 [B, num_classes].

    Table II: stages of 3x3 convolutions with ReLU, each ended by 2x2 max pooling, then Dense(128) and Dense(K). The
    table prints 25,689,600 parameters for Dense(128) on 200,704 inputs; 200,704 x 128 + 128 is 25,690,240, and that
    is what this layer has. The "enhanced components" of section V.A.3 are `residual`, `norm` and `dropout`; the ten
    layers of table III are eight convolutions and the two dense layers, and `kernel_size` is its filter size. Sown
    into 'intermediates': 'stage_1' ... 'stage_N' (maps after pooling) and 'features' [B, hidden_width].

    Raises ValueError for a field that cannot work and for images that the stages would halve to nothing.
    """

    num_classes: int
    depths: tuple[int, ...] = (1, 1)  # convolutions of each stage
    widths: tuple[int, ...] = (32, 64)
    kernel_size: int = 3  # table III tries 3, 5 and 7
    hidden_width: int = 128
    residual: bool = False  # a shortcut around each convolution, of 1x1 where the channels change
    norm: str = "none"  # 'batch', after each convolution
    activation: str = "relu"
    dropout: float = 0.0  # before the classifier
    grouped_conv: str = "auto"  # the form of convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each convolution's block in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self)
        checks.check_same_length(self, "depths", "widths")
        checks.check_size(images.shape, 1 << len(self.depths))
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd")
        block = layers.checkpointed(ConvBlock, self.remat)
        x = images.astype(self.dtype)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True), start=1):
            for i in range(1, depth + 1):
                x = block(
                    width,
                    self.kernel_size,
                    self.residual,
                    self.norm,
                    self.activation,
                    self.grouped_conv,
                    self.dtype,
                    name=f"stage_{stage}_block_{i}",
                )(x, train)
            x = layers.max_pool(x, 2, 2)
            self.sow("intermediates", f"stage_{stage}_map", x)
        x = nn.Dense(self.hidden_width, dtype=self.dtype, name="hidden")(x.reshape(x.shape[0], -1))
        return layers.classify(self, layers.activation(self.activation)(x), train=train)


class ConvBlock(nn.Module):
    """act(norm(conv(x))), or act(x + norm(conv(x))) with a shortcut: [B, H, W, C] -> [B, H, W, width]."""

    width: int
    kernel_size: int
    residual: bool
    norm: str
    activation: str
    grouped_conv: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = layers.ConvNorm(
            self.width,
            self.kernel_size,
            norm=self.norm,
            activation="linear",
            grouped_conv=self.grouped_conv,
            dtype=self.dtype,
            name="conv",
        )(x, train)
        if self.residual:
            if x.shape[-1] != self.width:
                x = convolutions.conv(self.width, 1, dtype=self.dtype, name="shortcut")(x)
            y += x
        return layers.activation(self.activation)(y)


_PAPER = "Advancements in Deep Learning Architectures for Image Recognition, table II"
_ENHANCED = {"depths": (4, 4), "residual": True, "norm": "batch", "dropout": 0.5}
PRESETS = {
    "lenet5": Preset(LeNet5, {}, "LeCun et al. 1998, Proc. IEEE 86(11)", (32, 32, 1), 10),
    "paper_cnn": Preset(PaperCNN, {}, _PAPER, (224, 224, 3), 10),
    "paper_cnn_enhanced": Preset(PaperCNN, _ENHANCED, _PAPER, (224, 224, 3), 10),
    "mnist_cnn": Preset(PaperCNN, {}, _PAPER, (28, 28, 1), 10),
    "mnist_cnn_enhanced": Preset(PaperCNN, _ENHANCED, _PAPER, (28, 28, 1), 10),
}
