"""Convolutions in several forms, of which the trainer takes the fastest: what benchmarks/grouped_conv.py measures."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vitcls.core import errors

GROUPED_CONV_FORMS = ("auto", "xla", "shifted", "mixed", "merged", "dense", "cpu")


def strided(x: jax.Array, stride: int) -> jax.Array:
    """Every `stride`-th row and column of [B, H, W, C]; as a slice also where B is symbolic, of which indexing would
    make a gather that not every runtime has.
    """
    if stride == 1:
        return x
    for axis in (1, 2):
        x = jax.lax.slice_in_dim(x, 0, None, stride, axis)
    return x


def conv(
    features: int,
    kernel_size: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: str | int | None = None,
    groups: int = 1,
    use_bias: bool = False,
    grouped_conv: str = "auto",
    dtype: str = "float32",
    name: str = "conv",
) -> nn.Module:
    """A convolution [B, H, W, C] -> [B, H', W', features], grouped or not; weights start as in He et al. 2015.

    `padding` None puts half the kernel on every side, for odd kernels, as PyTorch's models do. 'SAME' is TensorFlow's,
    which for an even image and stride 2 pads right and below only.
    """
    if kernel_size == 1 and groups == 1 and padding in (None, 0, "SAME", "VALID"):
        return PointwiseConv(features, stride, use_bias, dtype, name=name)
    if isinstance(kernel_size, int):
        padding = kernel_size // 2 if padding is None else padding
        # The others are for grouped convolutions: what is best for them need not be so for one group.
        form = grouped_conv if groups > 1 or grouped_conv == "cpu" else "xla"
        return GroupedConv(features, kernel_size, groups, stride, padding, use_bias, form, dtype, name=name)
    if not isinstance(padding, str):
        padding = [(side // 2 if padding is None else padding,) * 2 for side in kernel_size]
    return nn.Conv(
        features,
        kernel_size,
        strides=stride,
        padding=padding,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


class PointwiseConv(nn.Module):
    """A 1x1 convolution without padding as the matrix product that it is: [B, H, W, C] -> [B, H', W', features].

    The parameters are those of `nn.Conv`. XLA's CPU backend takes four to six times as long for the gradient of that
    form (64x32x32x32 to 128 channels: 404 ms against 93 ms), and other backends make a matrix product of it anyway.
    """

    features: int
    stride: int = 1
    use_bias: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.he_normal(), (1, 1, x.shape[-1], self.features))
        y = strided(x, self.stride).astype(self.dtype) @ kernel[0, 0].astype(self.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)[None, None, None]
        return y


class GroupedConv(nn.Module):
    """y = concat_g(W_g * x_g), the grouped convolution of the improved ResNeXt50 (section 3), [B, H, W, C] -> NHWC.

    One group makes it an ordinary convolution, one channel in a group a depthwise one. The parameters are those of
    `nn.Conv` with `feature_group_count=groups`, whichever form computes the same sum:

        'xla'      one grouped convolution of XLA
        'shifted'  a product of shifted images and slices of the kernel for each place in the kernel; batched matrix
                   products over the groups, or, with one channel in a group (depthwise), products of elements
        'mixed'    XLA's, with the gradients of 'shifted': that of the kernel, as a convolution, has a window as large
                   as the image
        'merged'   neighbouring groups as one of at least 64 channels, whose kernel has zeros between them: tensor cores
                   stand idle over 4 channels. Not for depthwise ones
        'dense'    all groups as one in this way
        'cpu'      what benchmarks/grouped_conv.py found the fastest for training on a CPU. For groups 'shifted', or
                   'dense' for at most 128 channels in at least 4,096 places that are at most 2^20 numbers; with one
                   group 'shifted' where the result is smaller than the kernel and so mostly made of padding, 'mixed'
                   where a kernel of at most 7x7, with at least 128 pairs of channels, is used in at least 16,384
                   places, else 'xla'
        'auto'     'xla', which the trainer replaces by the platform's: `forms.for_device`

    `padding` is 'SAME', 'VALID' or the zeros on every side.
    """

    features: int
    kernel_size: int
    groups: int
    stride: int = 1
    padding: str | int = "SAME"
    use_bias: bool = False
    form: str = "auto"
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.form not in GROUPED_CONV_FORMS:
            raise ValueError(errors.not_known("grouped_conv", self.form, GROUPED_CONV_FORMS))
        channels, size = x.shape[-1], self.kernel_size
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                f"{channels} channels to {self.features} cannot be divided into {self.groups} groups of a convolution"
            )
        kernel = self.param("kernel", self.kernel_init, (size, size, channels // self.groups, self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        padding = [(self.padding,) * 2] * 2 if isinstance(self.padding, int) else self.padding
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (self.stride, self.stride), padding)
        padding = tuple(map(tuple, padding))
        y = _CONVOLUTIONS[self._form(x.shape, padding)](x, kernel, self.groups, self.stride, padding)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)[None, None, None]
        return y

    def _form(self, shape: tuple[int, ...], padding: "_Padding") -> str:
        """The form for images of this shape [B, H, W, C], one of `_CONVOLUTIONS`."""
        if self.form != "cpu":
            return "xla" if self.form == "auto" else self.form
        height, width = _result_shape(shape[1:3], self.kernel_size, self.stride, padding)
        if self.groups > 1:
            channels, places = max(shape[-1], self.features), shape[0] * height * width
            small = channels <= _FEW_CHANNELS and places >= _SOME_PLACES and channels * places <= _FEW_NUMBERS
            return "dense" if small and self.groups < shape[-1] else "shifted"
        if min(height, width) < self.kernel_size and any(map(any, padding)):
            return "shifted"
        many_places = shape[0] * height * width >= _MANY_PLACES
        wide = shape[-1] * self.features >= _WIDE
        return "mixed" if many_places and wide and self.kernel_size <= _LARGEST_KERNEL else "xla"


_Padding = tuple[tuple[int, int], tuple[int, int]]  # zeros above and below, left and right
_FEW_CHANNELS, _SOME_PLACES, _FEW_NUMBERS = 128, 2**12, 2**20  # where 'dense' is not slower than 'shifted'
_MANY_PLACES, _WIDE, _LARGEST_KERNEL = 2**14, 128, 7  # where 'mixed' is not slower than 'xla' in a step on a CPU


def _xla_conv(x: jax.Array, kernel: jax.Array, groups: int, stride: int, padding: _Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _mixed_conv(x: jax.Array, kernel: jax.Array, groups: int, stride: int, padding: _Padding) -> jax.Array:
    return _xla_conv(x, kernel, groups, stride, padding)


def _mixed_forward(x: jax.Array, kernel: jax.Array, groups: int, stride: int, padding: _Padding):
    return _xla_conv(x, kernel, groups, stride, padding), (x, kernel)


def _mixed_backward(groups: int, stride: int, padding: _Padding, saved, gradient: jax.Array):
    x, kernel = saved
    _, pull = jax.vjp(lambda x, kernel: _shifted_conv(x, kernel, groups, stride, padding), x, kernel)
    return pull(gradient)


_mixed_conv.defvjp(_mixed_forward, _mixed_backward)


def _result_shape(image: Sequence[int], size: int, stride: int, padding: _Padding) -> tuple[int, int]:
    height, width = ((length + sum(pads) - size) // stride + 1 for length, pads in zip(image, padding, strict=True))
    return height, width


def _shifted_conv(x: jax.Array, kernel: jax.Array, groups: int, stride: int, padding: _Padding) -> jax.Array:
    """The sum over the kernel's places of shifted images times slices of the kernel."""
    size, _, inputs, features = kernel.shape
    height, width = _result_shape(x.shape[1:3], size, stride, padding)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, *image = padded.shape[:3]

    def shifted(x: jax.Array, row: int, column: int, axis: int) -> jax.Array:
        x = jax.lax.slice_in_dim(x, row, row + (height - 1) * stride + 1, stride, axis)
        return jax.lax.slice_in_dim(x, column, column + (width - 1) * stride + 1, stride, axis + 1)

    places = [(row, column) for row in range(size) for column in range(size)]
    if inputs == 1 and features == groups:
        return sum(shifted(padded, *place, axis=1) * kernel[place][None, None] for place in places)
    # Groups first, so that each place of the kernel is one product of [G, B * H * W, C / G] and [G, C / G, F / G].
    x = jax.lax.optimization_barrier(jnp.moveaxis(padded.reshape(batch, *image, groups, inputs), 3, 0))
    kernel = jnp.moveaxis(kernel.reshape(size, size, inputs, groups, features // groups), 3, 2)
    y = sum(shifted(x, *place, axis=2).reshape(groups, -1, inputs) @ kernel[place] for place in places)
    y = jax.lax.optimization_barrier(y)
    return jnp.moveaxis(y.reshape(groups, batch, height, width, -1), 0, 3).reshape(batch, height, width, features)


def _merged_conv(x: jax.Array, kernel: jax.Array, groups: int, stride: int, padding: _Padding) -> jax.Array:
    """XLA's convolution with fewer groups, of enough channels for tensor cores."""
    inputs = kernel.shape[2]
    enough = (merged for merged in range(1, groups + 1) if groups % merged == 0 and merged * inputs >= _MERGED_CHANNELS)
    merged = next(enough, groups)
    if merged == 1 or inputs == 1:
        return _xla_conv(x, kernel, groups, stride, padding)
    return _xla_conv(x, _merge(kernel, groups, merged), groups // merged, stride, padding)


def _dense_conv(x: jax.Array, kernel: jax.Array, groups: int, stride: int, padding: _Padding) -> jax.Array:
    return _xla_conv(x, _merge(kernel, groups, groups), 1, stride, padding)


def _merge(kernel: jax.Array, groups: int, merged: int) -> jax.Array:
    """The kernel [k, k, C / G, F] of `groups` groups as [k, k, merged * C / G, F] of fewer: block diagonal, so that
    block i of the channels meets features i only.
    """
    size, _, inputs, features = kernel.shape
    blocks = kernel.reshape(size, size, inputs, groups // merged, merged, -1)
    blocks = jnp.einsum("hwigmf,nm->hwnigmf", blocks, jnp.eye(merged, dtype=kernel.dtype))
    return blocks.reshape(size, size, merged * inputs, features)


_MERGED_CHANNELS = 64
_CONVOLUTIONS = {
    "xla": _xla_conv,
    "shifted": _shifted_conv,
    "mixed": _mixed_conv,
    "merged": _merged_conv,
    "dense": _dense_conv,
}
