"""VGG (Simonyan & Zisserman 2015, arXiv 1409.1556, table 1)."""

import flax.linen as nn
import jax

from vitcls.models import checks, layers
from vitcls.models.preset import Preset


class VGG(nn.Module):
    """images float [B, H, W, C], normalised -> logits float32 [B, num_classes].

    Parameters, statistics of norms and logits are float32 whatever `dtype`, the type of the rest. With a norm the
    convolutions keep their biases, as the published weights do. Sown into 'intermediates': 'stage_1_map' ...
    'stage_5_map' (before pooling) and 'features' [B, head_width].

    Raises ValueError for a field that cannot work and for images that the stages would halve to nothing.
    """

    num_classes: int
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)  # 3x3 convolutions of each stage, which ends in 2x2 max pooling
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    head_width: int = 4096  # of the two hidden layers of the classifier
    stem: str = "standard"  # 'small': the classifier sees the mean of the last map, not 7x7 parts of it
    norm: str = "none"  # 'batch'
    activation: str = "relu"
    dropout: float = 0.5  # of the classifier's hidden layers
    grouped_conv: str = "auto"  # the form of convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each stage in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self)
        checks.check_same_length(self, "depths", "widths")
        smallest = 1 << len(self.depths)
        checks.check_stem(self, images.shape, {"standard": smallest, "small": smallest})

        stage = layers.checkpointed(Stage, self.remat)
        x = images.astype(self.dtype)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True), start=1):
            x = stage(
                depth,
                width,
                self.norm,
                self.activation,
                self.grouped_conv,
                self.dtype,
                name=f"stage_{i}",
            )(x, train)
            self.sow("intermediates", f"stage_{i}_map", x)
            x = layers.max_pool(x, 2, 2)
        return layers.classify_flat(self, x, side=1 if self.stem == "small" else 7, train=train)


class Stage(nn.Module):
    """`depth` 3x3 convolutions, each with norm and activation: [B, H, W, C] -> [B, H, W, width]."""

    depth: int
    width: int
    norm: str
    activation: str
    grouped_conv: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(1, self.depth + 1):
            x = layers.ConvNorm(
                self.width,
                3,
                use_bias=True,
                norm=self.norm,
                activation=self.activation,
                grouped_conv=self.grouped_conv,
                dtype=self.dtype,
                name=f"conv_{i}",
            )(x, train=train)
        return x


_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # columns A, B, D, E
PRESETS = {
    f"vgg{layer_count}{suffix}": Preset(
        VGG, {"depths": depths, "norm": norm}, "Simonyan & Zisserman 2015, arXiv 1409.1556"
    )
    for layer_count, depths in _DEPTHS.items()
    for suffix, norm in (("", "none"), ("_bn", "batch"))
}
