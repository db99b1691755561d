"""The network of airbench: 94 % of CIFAR-10 in about ten epochs (Jordan 2024, arXiv 2404.00498)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcls.core import rng
from vitcls.models import checks, convolutions, layers
from vitcls.models.preset import Preset

_WHITENING_EPSILON = 5e-4  # added to the variance of each direction of a patch (Jordan 2024, section 3.2)


class Airbench(nn.Module):
    """Whitened 2x2 patches, then groups of two 3x3 convolutions: images float [B, H, W, C], normalised -> logits.

    Each group halves the map; the maximum over the last one is classified, logits float32 [B, num_classes] times
    `logit_scale` (Jordan 2024, appendix A). Convolutions start as the identity of their first channels (section 3.3).
    The scales of norms stay at 1 and their biases learn 64 times as fast where the optimizer's multipliers say so,
    as configs/sprint_cifar10.py does. Sown into 'intermediates': 'stem_map', 'group_1_map' ... 'group_N_map' and
    'features' [B, widths[-1]].

    Raises ValueError for a field that cannot work and for images that the groups would halve to nothing.
    """

    num_classes: int
    widths: tuple[int, ...] = (64, 256, 256)  # of each group
    logit_scale: float = 1 / 9
    norm: str = "batch"
    activation: str = "gelu"
    dropout: float = 0.0  # before the classifier
    grouped_conv: str = "auto"  # the form of convolutions; see convolutions.GroupedConv
    remat: str = "none"  # 'block': recompute each group in the backward pass; 'dots': all but products
    dtype: str = "float32"  # 'bfloat16'

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        checks.check_fields(self)
        checks.check_size(images.shape, (1 << len(self.widths)) + 1)
        group = layers.checkpointed(Group, self.remat)
        x = WhitenedPatches(name="whitening")(images, train)
        x = layers.activation(self.activation)(x.astype(self.dtype))
        self.sow("intermediates", "stem_map", x)
        for i, width in enumerate(self.widths, start=1):
            x = group(width, self.norm, self.activation, self.grouped_conv, self.dtype, name=f"group_{i}")(x, train)
            self.sow("intermediates", f"group_{i}_map", x)
        return self.logit_scale * layers.classify(self, jnp.max(x, axis=(1, 2)), train=train)


class WhitenedPatches(nn.Module):
    """Uncorrelated directions of 2x2 patches at variance 1, and their negatives: [B, H, W, C] -> [B, H-1, W-1, 8C].

    Jordan computes the directions from the training images. For natural images they are nearly the sums and
    differences of a patch's pixels and of its colours (Ohta et al. 1980), so these are taken, and their variances are
    those of the batch, or running means of them: nothing depends on the data beforehand. In float32.
    """

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images.astype(jnp.float32)
        rows = [jax.lax.slice_in_dim(x, start, start + x.shape[1] - 1, axis=1) for start in (0, 1)]
        pixels = [jax.lax.slice_in_dim(row, i, i + x.shape[2] - 1, axis=2) for row in rows for i in (0, 1)]
        # Exactly, since the variances of the directions differ by four orders of magnitude.
        with layers.precise_products("float32"):
            x = jnp.concatenate(pixels, axis=-1) @ patch_directions(x.shape[-1]).T
        x = nn.BatchNorm(
            momentum=0.9,
            epsilon=_WHITENING_EPSILON,
            use_scale=False,
            use_bias=False,
            axis_name=rng.mapped_axis(),
            name="norm",
        )(x, use_running_average=not train)
        bias = self.param("bias", nn.initializers.zeros, (2 * x.shape[-1],))
        return jnp.concatenate([x, -x], axis=-1) + bias[None, None, None]


def patch_directions(channels: int) -> np.ndarray:
    """Orthonormal rows float32 [4C, 4C]: directions of the patch (y0x0, y0x1, y1x0, y1x1), the channel changing first.

    Along each axis the sum and the difference; of three channels brightness, red against blue, and green against both.
    """
    axis = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    colors = np.eye(channels)
    if channels == 3:
        colors = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]) / np.sqrt([[3], [2], [6]])
    return np.kron(np.kron(axis, axis), colors).astype(np.float32)


class Group(nn.Module):
    """Convolution, 2x2 max pooling, norm, activation; convolution, norm, activation. [B, H, W, C] -> [B, H/2, W/2, W].

    An odd last row or column is left out, as by the pooling of PyTorch.
    """

    width: int
    norm: str
    activation: str
    grouped_conv: str
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in (1, 2):
            x = convolutions.GroupedConv(
                self.width,
                3,
                groups=1,
                padding=1,
                form=self.grouped_conv,
                dtype=self.dtype,
                kernel_init=identity_of_first_channels,
                name=f"conv_{i}",
            )(x)
            x = layers.max_pool(x, 2, 2) if i == 1 else x
            x = layers.normalize(x, self.norm, train=train, dtype=self.dtype, name=f"norm_{i}")
            x = layers.activation(self.activation)(x)
        return x


def identity_of_first_channels(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """A kernel [h, w, inputs, outputs] whose first outputs are its inputs; the other outputs start as in PyTorch."""
    height, width, inputs, outputs = shape
    kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)
    count = min(inputs, outputs)
    identity = (
        jnp.zeros((height, width, inputs, count), dtype)
        .at[height // 2, width // 2]
        .set(jnp.eye(inputs, count, dtype=dtype))
    )
    return kernel.at[..., :count].set(identity)


PRESETS = {"airbench94": Preset(Airbench, {}, "Jordan 2024, arXiv 2404.00498", (32, 32, 3), 10)}
