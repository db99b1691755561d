"""Parts that models share."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcls import errors
from vitcls.rng import example_keys

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function `name`; raises UserError where there is none."""
    if name not in ACTIVATIONS:
        raise errors.unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask for an example depends on its place in the global batch alone.

    So the mask is the same however the batch is laid out over devices. `shared_axes` are the axes, besides the batch,
    along which one decision holds.
    """

    rate: float
    shared_axes: tuple[int, ...] = ()
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not train or self.rate == 0.0:
            return x
        shape = [1 if axis in self.shared_axes else size for axis, size in enumerate(x.shape)][1:]
        keys = example_keys(self.make_rng("dropout"), x.shape[0], self.axis_name)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, shape))(keys)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros((), x.dtype)).astype(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops the whole residual branch of an example with probability `rate`.

    What is kept is divided by 1 - rate, so that the expectation is the branch itself.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return Dropout(self.rate, tuple(range(1, x.ndim)), self.axis_name)(x, train=train)


class LayerScale(nn.Module):
    """Multiplies each channel of a residual branch by a learned factor (Touvron et al. 2021, CaiT, equation 5)."""

    init_value: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(self.init_value), (x.shape[-1],))
        return x * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class SqueezeExcite(nn.Module):
    """Scales the channels of [B, N, C] or [B, H, W, C] by a gate made of their means (Hu et al. 2018, section 3)."""

    reduced_channels: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        mean = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True)
        hidden = jax.nn.relu(nn.Dense(self.reduced_channels, dtype=self.dtype, name="reduce")(mean))
        return x * jax.nn.sigmoid(nn.Dense(channels, dtype=self.dtype, name="expand")(hidden))


class DepthwiseConv3x3(nn.Module):
    """A 3x3 convolution of each channel by itself on [B, H, W, C], padded with zeros, as nine shifted products.

    The parameters are those of `nn.Conv(C, (3, 3), feature_group_count=C)`, and so is their start. XLA's CPU backend
    takes ten times as long for the gradient of that form ([64, 8, 8, 768]: 749 ms against 72 ms on 2 cores).
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width, channels = x.shape[1:]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 1, channels)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,)).astype(self.dtype)
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [
            padded[:, row : row + height, column : column + width] * kernel[row, column][None, None]
            for row in range(3)
            for column in range(3)
        ]
        return sum(shifted) + bias[None, None, None, :]


class GeneralizedMean(nn.Module):
    """(mean_i max(x_i, eps)^p)^(1/p) over the tokens of [B, N, C], with one learned p >= 1 (Radenović et al. 2019).

    p = 1 + softplus(parameter) starts at 3. Features below eps, the negative ones too, count as eps, as in the
    original. In float32, by logarithms: x^p itself underflows where all tokens of a channel are at eps.
    """

    eps: float = 1e-4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = float(np.log(np.expm1(2.0)))
        power = 1.0 + jax.nn.softplus(self.param("power", nn.initializers.constant(start), ()))
        log_x = jnp.log(jnp.maximum(x.astype(jnp.float32), self.eps))
        log_mean = jax.nn.logsumexp(power * log_x, axis=1) - np.log(x.shape[1])
        return jnp.exp(log_mean / power)


class AttentionPool(nn.Module):
    """sum_i softmax_i(q . h_i / sqrt(C)) h_i over the tokens of [B, N, C], with one learned query; weights float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        query = self.param("query", nn.initializers.normal(0.02), (x.shape[-1],))
        scores = jnp.einsum("bnc,c->bn", x.astype(jnp.float32), query) / np.sqrt(x.shape[-1])
        return jnp.einsum("bn,bnc->bc", jax.nn.softmax(scores, axis=-1), x.astype(jnp.float32))


def sincos_position_embedding(height: int, width: int, dim: int) -> jax.Array:
    """Fixed 2-D embeddings [height * width, dim]: sin and cos of row and column at dim / 4 frequencies.

    Each axis as in Vaswani et al. 2017, section 3.5. `dim` must be a multiple of 4.
    """
    if dim % 4:
        raise errors.UserError(f"config.model.hidden_dim={dim} must be a multiple of 4 for 'sincos2d' positions")
    frequencies = 1e-4 ** (np.arange(dim // 4) / (dim // 4))
    rows, columns = np.divmod(np.arange(height * width), width)
    angles = [np.outer(places, frequencies) for places in (columns, rows)]
    return jnp.asarray(np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1), jnp.float32)


def interpolate_position_embedding(embedding: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes learned positions [h, w, C] to [height, width, C], bicubic (Dosovitskiy et al. 2021, section 3.2)."""
    if embedding.shape[:2] == (height, width):
        return embedding
    return jax.image.resize(embedding, (height, width, embedding.shape[-1]), "bicubic")
