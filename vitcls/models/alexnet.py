"""AlexNet: the network of 2012 (Krizhevsky et al. 2012) and its one-tower successor (arXiv 1404.5997)."""

import flax.linen as nn
import jax

from vitcls.models import checks, layers
from vitcls.models.preset import Preset


class AlexNet(nn.Module):
    """images float [B, H, W, C], normalised -> logits float32 [B, num_classes].

    The two towers of 2012, which meet in the third convolution only, are two groups of the second, fourth and fifth.
    Parameters and logits are float32 whatever `dtype`. Sown into 'intermediates': 'conv_1_map' ... 'conv_5_map'
    (before pooling) and 'features' [B, head_width].

    Raises ValueError for a field that cannot work and for images that shrink to nothing.
    """

    num_classes: int
    widths: tuple[int, ...] = (64, 192, 384, 256, 256)
    towers: int = 1  # 2 in 2012
    local_response_norm: bool = False  # after the first two convolutions (2012, section 3.3)
    norm: str = "none"  # 'batch'
    head_width: int = 4096  # of the two hidden layers of the classifier
    stem: str = "standard"  # 11x11 with stride 4; 'small': 3x3, stride 1
    activation: str = "relu"  # 'tanh' is what 2012, figure 1 compares with
    dropout: float = 0.5  # of the classifier's hidden layers
    grouped_conv: str = "auto"  # the form of the convolutions of two towers; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute the inside of each unit in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self)
        checks.check_same_length(self, "widths", length=5)
        checks.check_stem(self, images.shape, {"standard": 63, "small": 15})
        respond = layers.local_response_norm if self.local_response_norm else lambda x: x
        x = images.astype(self.dtype)
        conv = layers.checkpointed(layers.ConvNorm, self.remat)
        first = (3, 1, 1, 1) if self.stem == "small" else (11, 4, 2, 1)
        convs = (first, (5, 1, 2, self.towers), (3, 1, 1, 1), (3, 1, 1, self.towers), (3, 1, 1, self.towers))
        for i, (features, (size, stride, padding, groups)) in enumerate(zip(self.widths, convs, strict=True), start=1):
            x = conv(
                features,
                size,
                stride,
                padding,
                groups,
                use_bias=True,
                norm=self.norm,
                activation=self.activation,
                grouped_conv=self.grouped_conv,
                dtype=self.dtype,
                name=f"conv_{i}",
            )(x, train)
            x = respond(x) if i <= 2 else x
            self.sow("intermediates", f"conv_{i}_map", x)
            x = layers.max_pool(x, 3, 2) if i in (1, 2, 5) else x
        return layers.classify_flat(self, x, side=3 if self.stem == "small" else 6, train=train)


PRESETS = {
    "alexnet": Preset(AlexNet, {}, "Krizhevsky 2014, arXiv 1404.5997"),
    "alexnet_2012": Preset(
        AlexNet,
        {"widths": (96, 256, 384, 384, 256), "towers": 2, "local_response_norm": True},
        "Krizhevsky et al. 2012, NeurIPS 25",
    ),
}
