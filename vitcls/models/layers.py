"""Parts that models share."""

import contextlib
import functools
import math
from collections.abc import Callable, Collection

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcls.core import errors, rng
from vitcls.models import convolutions


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x / 2 (1 + erf(x / sqrt 2)) (Hendrycks & Gimpel 2016, section 2), of which the backward pass keeps x alone.

    XLA computes erf in fewer operations than erfc, which `jax.nn.gelu` uses; they differ by rounding where x is far
    below 0.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """The slope is Phi(x) + x phi(x), with the normal distribution and its density."""
    wide = x.astype(jnp.float32)
    slope = 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5)))
    slope += wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "hard_swish": jax.nn.hard_swish,
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
NORMS = ("batch", "local_batch", "layer", "group", "none")


def precise_products(dtype: jax.typing.DTypeLike) -> contextlib.AbstractContextManager:
    """A context in which products of float32 are float32; for another `dtype` one that changes nothing.

    By default GPUs round the operands to TF32 and TPUs to bfloat16. What is documented as float32 is made in it.
    """
    return jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext()


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function `name`; raises ValueError where there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(errors.not_known("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask for an example depends on its place in the global batch alone.

    So the mask is the same however the batch is laid out over devices. `shared_axes` are the axes, besides the batch,
    along which one decision holds.
    """

    rate: float
    shared_axes: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not train or self.rate == 0.0:
            return x
        shape = [1 if axis in self.shared_axes else size for axis, size in enumerate(x.shape)][1:]
        keys = rng.example_keys(self.make_rng("dropout"), x.shape[0])
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, shape))(keys)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros((), x.dtype)).astype(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops the whole residual branch of an example with probability `rate`.

    What is kept is divided by 1 - rate, so that the expectation is the branch itself.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return Dropout(self.rate, tuple(range(1, x.ndim)))(x, train=train)


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
    activation: str = "relu"
    gate: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.factors(jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True))

    @nn.compact
    def factors(self, means: jax.Array) -> jax.Array:
        """The gate, [..., C] of means [..., C]."""
        hidden = nn.Dense(self.reduced_channels, dtype=self.dtype, name="reduce")(means)
        hidden = activation(self.activation)(hidden)
        return self.gate(nn.Dense(means.shape[-1], dtype=self.dtype, name="expand")(hidden))


def normalize(
    x: jax.Array,
    kind: str,
    *,
    train: bool,
    epsilon: float = 1e-5,
    dtype: str = "float32",
    name: str = "norm",
) -> jax.Array:
    """Normalises [B, ..., C] with a scale and a shift per channel, which are submodules of the calling module.

    'batch' (Ioffe & Szegedy 2015) uses the statistics of the global batch in training and running means otherwise;
    'local_batch' in training those of each device's examples, so that no device waits for another; 'layer' those of
    each place (Ba et al. 2016), 'group' those of 32 groups of channels of each example, or fewer where 32 do not divide
    them (Wu & He 2018); 'none' returns x.
    """
    match kind:
        case "batch":
            norm = nn.BatchNorm(momentum=0.9, epsilon=epsilon, dtype=dtype, axis_name=rng.mapped_axis(), name=name)
            return norm(x, use_running_average=not train)
        case "local_batch":
            return LocalBatchNorm(0.9, epsilon, dtype, name=name)(x, train=train)
        case "layer":
            norm = nn.LayerNorm(epsilon=epsilon, dtype=dtype, name=name)
        case "group":
            norm = nn.GroupNorm(math.gcd(32, x.shape[-1]), epsilon=epsilon, dtype=dtype, name=name)
        case "none":
            return x
        case _:
            raise ValueError(errors.not_known("norm", kind, NORMS))
    return norm(x)


def keeping_statistics(modules: Collection[tuple[str, ...]]) -> contextlib.AbstractContextManager:
    """A context in which the norms at these paths normalise by their running means, in training too.

    So a network that is partly frozen computes what it computed before, and its statistics stay what they are.
    """

    def interceptor(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        if context.method_name == "__call__" and tuple(context.module.path) in modules:
            if isinstance(context.module, nn.BatchNorm):
                kwargs = kwargs | {"use_running_average": True}
            elif isinstance(context.module, LocalBatchNorm):
                kwargs = kwargs | {"train": False}
        return call(*args, **kwargs)

    return nn.intercept_methods(interceptor) if modules else contextlib.nullcontext()


class LocalBatchNorm(nn.Module):
    """Batch normalisation of [B, ..., C] by the statistics of each device's examples (Goyal et al. 2017, section 3).

    Parameters and running means are those of `nn.BatchNorm`; the latter are of the means over all devices.
    """

    momentum: float
    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        blocks = x.astype(jnp.float32).reshape(rng.batch_blocks() if train else 1, -1, channels)
        mean, var = running_mean.value[None], running_var.value[None]
        if train:
            mean = jnp.mean(blocks, axis=1)
            var = jnp.maximum(0.0, jnp.mean(jnp.square(blocks), axis=1) - jnp.square(mean))
            axis = rng.mapped_axis()
            for running, seen in ((running_mean, mean), (running_var, var)):
                average = jnp.mean(seen, axis=0) if axis is None else jax.lax.pmean(seen[0], axis)
                if not self.is_initializing():
                    running.value = self.momentum * running.value + (1 - self.momentum) * average
        factor = jax.lax.rsqrt(var + self.epsilon) * scale[None]
        y = (blocks - mean[:, None]) * factor[:, None] + bias[None, None]
        return y.reshape(x.shape).astype(self.dtype)


class ConvNorm(nn.Module):
    """Convolution, normalisation, activation: the unit of most convolutional networks. [B, H, W, C] -> NHWC."""

    features: int
    kernel_size: int | tuple[int, int]
    stride: int = 1
    padding: str | int | None = None
    groups: int = 1
    use_bias: bool | None = None  # None: where there is no norm, whose shift would take its place
    norm: str = "batch"
    epsilon: float = 1e-5
    activation: str = "relu"
    grouped_conv: str = "auto"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = convolutions.conv(
            self.features,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            use_bias=self.norm == "none" if self.use_bias is None else self.use_bias,
            grouped_conv=self.grouped_conv,
            dtype=self.dtype,
        )(x)
        x = normalize(x, self.norm, train=train, epsilon=self.epsilon, dtype=self.dtype)
        return activation(self.activation)(x)


def max_pool(x: jax.Array, size: int, stride: int, padding: str | int = 0) -> jax.Array:
    """The maximum of windows of [B, H, W, C]; `padding` is 'CEIL' or the places on every side, which never win.

    'CEIL' lets the last window stand out on the right and below, so that no place is left out. The gradient of equal
    maxima is shared between them. Maxima of shifted slices, one axis after the other: their gradient is additions,
    where that of a window's maximum is a scatter, 6 to 40 times slower on a CPU.
    """
    margins = [(0, 0), *_pool_padding(x, size, stride, padding), (0, 0)]
    x = jnp.pad(x, margins, constant_values=-jnp.inf)
    for axis in (1, 2):
        reach = (x.shape[axis] - size) // stride * stride + 1
        shifted = [jax.lax.slice_in_dim(x, i, i + reach, stride, axis) for i in range(size)]
        x = functools.reduce(jnp.maximum, shifted)
    return x


def avg_pool(x: jax.Array, size: int, stride: int, padding: str | int = 0, *, count_padding: bool = False) -> jax.Array:
    """The mean of windows of [B, H, W, C], over the places inside the image only; `padding` as in `max_pool`.

    With `count_padding` the places around the image count as zeros.
    """
    margins = _pool_padding(x, size, stride, padding)
    return nn.avg_pool(
        x,
        window_shape=(size, size),
        strides=(stride, stride),
        padding=margins if any(map(any, margins)) else "VALID",  # what jax2onnx knows is the name
        count_include_pad=count_padding,
    ).astype(x.dtype)


def _pool_padding(x: jax.Array, size: int, stride: int, padding: str | int) -> list[tuple[int, int]]:
    if padding == "CEIL":
        return [(0, max(size - length, (size - length) % stride)) for length in x.shape[1:3]]
    return [(padding, padding)] * 2


def resize_by_mean(x: jax.Array, height: int, width: int) -> jax.Array:
    """[B, H, W, C] -> [B, height, width, C]: means of windows that tile the image, whatever its size.

    Window i of n over a length L is floor(i L / n) .. ceil((i + 1) L / n), so that an image that is too small is
    repeated (the adaptive average pooling of PyTorch).
    """
    if x.shape[1:3] == (height, width):
        return x
    rows, columns = (jnp.asarray(_windows(a, b), x.dtype) for a, b in zip(x.shape[1:3], (height, width), strict=True))
    return jnp.einsum("yh,bhwc,xw->byxc", rows, x, columns)


def _windows(length: int, count: int) -> np.ndarray:
    """[count, length]; row i has the weights of window i, which sum to 1."""
    starts = [i * length // count for i in range(count)]
    ends = [-(-(i + 1) * length // count) for i in range(count)]
    places = np.arange(length)
    return np.stack([((a <= places) & (places < b)) / (b - a) for a, b in zip(starts, ends, strict=True)])


def local_response_norm(x: jax.Array, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0):
    """x_c / (k + alpha sum_{|c' - c| <= size / 2} x_c'^2)^beta over [..., C] (Krizhevsky et al. 2012, section 3.3)."""
    half = size // 2
    squares = jnp.square(x.astype(jnp.float32))
    window, strides = (1,) * (x.ndim - 1) + (size,), (1,) * x.ndim
    sums = jax.lax.reduce_window(squares, 0.0, jax.lax.add, window, strides, [(0, 0)] * (x.ndim - 1) + [(half, half)])
    return (x * (k + alpha * sums) ** -beta).astype(x.dtype)


def classify(model: nn.Module, features: jax.Array, *, train: bool) -> jax.Array:
    """Sows 'features' [B, D] and maps them, after dropout, to logits float32 [B, num_classes] with the layer 'head'.

    `model` is the calling module, with the fields num_classes and dropout.
    """
    features = features.astype(jnp.float32)
    model.sow("intermediates", "features", features)
    features = Dropout(model.dropout)(features, train=train)
    return head(features, model.num_classes)


def head(features: jax.Array, num_classes: int, **kwargs: nn.initializers.Initializer) -> jax.Array:
    """[B, D] -> logits [B, num_classes], in float32 on every platform, by the layer 'head' of the calling module.

    `kwargs` are those of `nn.Dense` that say how it starts.
    """
    with precise_products("float32"):
        return nn.Dense(num_classes, name="head", **kwargs)(features.astype(jnp.float32))


def classify_flat(model: nn.Module, x: jax.Array, *, side: int, train: bool) -> jax.Array:
    """`classify` of two hidden layers over side x side means of [B, H, W, C], as AlexNet and VGG have it.

    The dropout of the second layer's outputs is that of `classify`. `model` has head_width, activation, dtype besides.
    """
    act = activation(model.activation)
    x = resize_by_mean(x, side, side).reshape(x.shape[0], -1)
    x = act(nn.Dense(model.head_width, dtype=model.dtype, name="hidden_1")(x))
    x = Dropout(model.dropout)(x, train=train)
    x = act(nn.Dense(model.head_width, dtype=model.dtype, name="hidden_2")(x))
    return classify(model, x, train=train)


REMATS = ("none", "block", "dots")


def checkpointed(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """The class of a block, called as block(x, train), of which the backward pass computes again what `remat` says.

    'none': nothing; 'block': all that is inside; 'dots': all but the results of products with parameters, which are
    most of the work and a part of the memory.
    """
    if remat == "none":
        return block
    return nn.remat(block, static_argnums=(2,), policy=_keep_products if remat == "dots" else None)


def _keep_products(primitive, *arguments, **parameters) -> bool:
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)


def linear_rates(last: float, count: int) -> list[float]:
    """Drop-path rates of `count` blocks, from 0 to `last` (Huang et al. 2016, equation 4)."""
    return [last * i / max(count - 1, 1) for i in range(count)]


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` that is not below 90 % of `channels` (Sandler et al. 2018, reference code)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


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
        log_mean = jax.nn.logsumexp(power * log_x, axis=1) - math.log(x.shape[1])
        return jnp.exp(log_mean / power)


class AttentionPool(nn.Module):
    """sum_i softmax_i(q . h_i / sqrt(C)) h_i over the tokens of [B, N, C], with one learned query; in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        query = self.param("query", nn.initializers.normal(0.02), (x.shape[-1],))
        with precise_products("float32"):
            scores = jnp.einsum("bnc,c->bn", x.astype(jnp.float32), query) / math.sqrt(x.shape[-1])
            return jnp.einsum("bn,bnc->bc", jax.nn.softmax(scores, axis=-1), x.astype(jnp.float32))


def sincos_position_embedding(height: int, width: int, dim: int) -> jax.Array:
    """Fixed 2-D embeddings [height * width, dim]: sin and cos of row and column at dim / 4 frequencies.

    Each axis as in Vaswani et al. 2017, section 3.5. `dim` must be a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"hidden_dim={dim} must be a multiple of 4 for 'sincos2d' positions")
    frequencies = 1e-4 ** (np.arange(dim // 4) / (dim // 4))
    rows, columns = np.divmod(np.arange(height * width), width)
    angles = [np.outer(places, frequencies) for places in (columns, rows)]
    return jnp.asarray(np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1), jnp.float32)


def interpolate_position_embedding(embedding: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes learned positions [h, w, C] to [height, width, C], bicubic (Dosovitskiy et al. 2021, section 3.2)."""
    if embedding.shape[:2] == (height, width):
        return embedding
    return jax.image.resize(embedding, (height, width, embedding.shape[-1]), "bicubic")
