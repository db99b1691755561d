"""The middle of the improved ViT's feed-forward network as kernels with a written gradient (Pallas, for NVIDIA GPUs).

    h = gelu(u + b)     l = h + gelu(depthwise3x3(h) + c)     y = l * gate(mean of l over the tokens)

of u [B, N, M], the product of the first layer, on a grid of N tokens: `vit.FeedForward` with `local_conv`, with
`squeeze_excite` or with both. Its plain form is the oracle and the fallback of these kernels. Without a convolution its
weights are 0: what is multiplied in vain takes no bytes.

An image of all channels does not stay on a multiprocessor until its gate is known, so the gate divides each direction
into two kernels; its own products, [B, M] by [M, R] and back, are XLA's: inside a kernel every program would read their
weights anew. Only u is kept for the backward pass; h and l are computed again where they are needed, since a step waits
for memory more than for arithmetic. With T the bytes of u,

    forward     means of l: reads u        y: reads u, writes y                                               3 T
    backward    gradient of the gate: reads u, dy        those of u and the weights: reads u, dy, writes du   5 T

where XLA's fusions, which end at each convolution and each sum over tokens, move 9 T and 13 T (benchmarks/compiled.py).

A program has one block of channels, which a depthwise convolution never mixes, and walks down the rows of tokens of one
image after the other. The tokens of a row are separate vectors of channels, so that a neighbour is another register of
the same thread.
"""

import contextvars
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from vitcls.core import rng
from vitcls.models import attention

_WARP = 32  # threads
_CHANNELS, _IMAGES = 256, 8  # of a program, at most
_TAPS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))
_Grid = tuple[int, int]  # rows and columns of tokens
_Row = list[jax.Array]  # float32 [C] for each of its tokens


class Weights(NamedTuple):
    """Of the middle; computed with in float32."""

    bias: jax.Array  # [M], b
    taps: jax.Array  # [9, M], the kernel of the convolution, row by row
    conv_bias: jax.Array  # [M], c


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def local_detail(
    grid: _Grid,
    gate: Callable[[Any, jax.Array], jax.Array] | None,
    product: jax.Array,
    weights: Weights,
    gate_params: Any = None,
) -> jax.Array:
    """y [B, N, M] of u = `product` [B, N, M], in its dtype; what the kernels compute is float32.

    `gate(gate_params, means)` makes factors [B, M] of the means over the tokens, float32 [B, M]; without one y is l.
    """
    return _forward(grid, gate, product, weights, gate_params)[0]


def _forward(grid: _Grid, gate: Callable, product: jax.Array, weights: Weights, gate_params: Any):
    means, factors = None, jnp.ones((product.shape[0], product.shape[2]), jnp.float32)
    if gate:
        (means,) = _call(_means, grid, ("image",), weights, product)
        factors = gate(gate_params, means)
    (result,) = _call(_result, grid, ("tokens",), weights, product, factors)
    return result, (product, weights, gate_params, means, factors)


def _backward(grid: _Grid, gate: Callable, saved: tuple, gradient: jax.Array):
    product, weights, gate_params, means, factors = saved
    of_params, of_means = None, jnp.zeros_like(factors)
    if gate:
        (of_factors,) = _call(_factors_gradient, grid, ("image",), weights, product, gradient)
        _, pull = jax.vjp(gate, gate_params, means)
        of_params, of_means = pull(of_factors.astype(factors.dtype))
    arrays = (product, gradient, factors, of_means)
    of_product, of_weights = _call(_gradient, grid, ("tokens", "weights"), weights, *arrays)
    summed = jnp.sum(of_weights, axis=0)
    parts = (summed[0], summed[1:-1], summed[-1])
    of_weights = Weights(*(part.astype(like.dtype) for part, like in zip(parts, weights, strict=True)))
    return of_product, of_weights, of_params


local_detail.defvjp(_forward, _backward)


def lacks(compute_capability: str, *, has_middle: bool, activation: str, class_token: bool, mlp_dim: int) -> list[str]:
    """What the kernels need of a device and a ViT, and these do not have, in words; [] where they can be used."""
    needs = {
        "an NVIDIA GPU, Ampere or later": attention.nvidia_version(compute_capability) >= 8,
        "local_conv=True, or squeeze_excite of the hidden layer": has_middle,
        "activation='gelu'": activation == "gelu",
        "an aggregation without class token": not class_token,
        f"an mlp_dim that is a multiple of {_WARP}": mlp_dim % _WARP == 0,
    }
    return [need for need, met in needs.items() if not met]


def try_kernels(dtype: str) -> list[jax.Array]:
    """All kernels on the default device, which may refuse them."""

    def loss(product, weights):
        return jnp.sum(local_detail((2, 2), lambda _, means: means, product, weights).astype(jnp.float32))

    weights = Weights(*(jnp.ones(shape) for shape in ((_CHANNELS,), (len(_TAPS), _CHANNELS), (_CHANNELS,))))
    return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.ones((2, 4, _CHANNELS), dtype), weights))


def _call(kernel: Callable, grid: _Grid, outputs: tuple[str, ...], weights: Weights, *arrays: jax.Array) -> list:
    """Launches a kernel on arrays of examples, on each device for those that it has.

    `outputs` are 'image' for float32 [B, M], 'tokens' for an array like the first, and 'weights' for float32
    [programs, 11, M], the sums over the images of each. On other platforms the kernel is interpreted.
    """
    rows = jnp.concatenate([weights.bias[None], weights.taps, weights.conv_bias[None]]).astype(jnp.float32)
    launch = functools.partial(_launch, kernel, grid, outputs)

    def on_device(*arguments):
        interpreted = functools.partial(launch, interpret=True)
        return jax.lax.platform_dependent(*arguments, cuda=launch, default=interpreted)

    mesh = rng.batch_mesh()
    if mesh is None:
        return on_device(rows, *arrays)
    spread = PartitionSpec(rng.BATCH_AXIS)
    specs = (PartitionSpec(), *(spread for _ in arrays))
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=spread, check_vma=False)(rows, *arrays)


def _launch(
    kernel: Callable, grid: _Grid, outputs: tuple[str, ...], *arrays: jax.Array, interpret: bool = False
) -> list:
    batch, tokens, width = arrays[1].shape
    of_thread = 2 if grid[1] <= 8 else 1  # channels, for which its registers suffice
    images, channels = math.gcd(batch, _IMAGES), math.gcd(width, _CHANNELS)
    blocks = {
        "image": pl.BlockSpec((images, channels), lambda i, j: (i, j)),
        "tokens": pl.BlockSpec((images, tokens, channels), lambda i, j: (i, 0, j)),
        "weights": pl.BlockSpec((1, len(_TAPS) + 2, channels), lambda i, j: (i, 0, j)),
    }
    shapes = {
        "image": jax.ShapeDtypeStruct((batch, width), jnp.float32),
        "tokens": jax.ShapeDtypeStruct(arrays[1].shape, arrays[1].dtype),
        "weights": jax.ShapeDtypeStruct((batch // images, len(_TAPS) + 2, width), jnp.float32),
    }
    of_weights = pl.BlockSpec((len(_TAPS) + 2, channels), lambda i, j: (0, j))
    call = pl.pallas_call(
        functools.partial(kernel, grid),
        grid=(batch // images, width // channels),
        in_specs=[of_weights, *(blocks["image" if x.ndim == 2 else "tokens"] for x in arrays[1:])],
        out_specs=[blocks[output] for output in outputs],
        out_shape=[shapes[output] for output in outputs],
        compiler_params=triton.CompilerParams(num_warps=max(1, channels // (of_thread * _WARP))),
        interpret=interpret,
        name=f"local_detail{kernel.__name__}",
    )
    before = _compiled.set(not interpret)
    try:
        return call(*arrays)
    finally:
        _compiled.reset(before)


def _means(grid: _Grid, weights, product, means) -> None:
    def one(image, _):
        zero = jnp.zeros(product.shape[-1], jnp.float32)
        total = _walk(product, image, weights, grid, lambda row, local, total: total + sum(local), zero)
        means[image, :] = total / math.prod(grid)
        return 0

    jax.lax.fori_loop(0, product.shape[0], one, 0)


def _result(grid: _Grid, weights, product, factors, result) -> None:
    def one(image, _):
        factor = factors[image, :].astype(jnp.float32)

        def visit(row, local, _):
            for column, value in enumerate(local):
                result[image, row * grid[1] + column, :] = (value * factor).astype(result.dtype)
            return 0

        return _walk(product, image, weights, grid, visit, 0)

    jax.lax.fori_loop(0, product.shape[0], one, 0)


def _factors_gradient(grid: _Grid, weights, product, gradient, of_factors) -> None:
    def one(image, _):
        def visit(row, local, total):
            return total + sum(x * y for x, y in zip(local, _load(gradient, image, row, grid), strict=True))

        zero = jnp.zeros(product.shape[-1], jnp.float32)
        of_factors[image, :] = _walk(product, image, weights, grid, visit, zero)
        return 0

    jax.lax.fori_loop(0, product.shape[0], one, 0)


def _walk(product, image, weights, grid: _Grid, visit: Callable, carry):
    """carry = visit(row, l of the row, carry), row after row of an image."""
    bias, taps, conv_bias = weights[0, :], [weights[1 + i, :] for i in range(len(_TAPS))], weights[len(_TAPS) + 1, :]

    def step(row, state):
        above, here, carry = state
        below, _ = _hidden(product, image, row + 1, grid, bias)
        local = [h + _gelu(x + conv_bias)[0] for h, x in zip(here, _convolve((above, here, below), taps), strict=True)]
        return here, below, visit(row, local, carry)

    first, _ = _hidden(product, image, 0, grid, bias)
    outside = [jnp.zeros_like(bias)] * grid[1]
    return jax.lax.fori_loop(0, grid[0], step, (outside, first, carry))[-1]


def _gradient(grid: _Grid, weights, product, gradient, factors, of_means, of_product, of_weights) -> None:
    """Step t of an image convolves row t, and ends row t - 1, for which the rows around it must be known."""
    bias, taps, conv_bias = weights[0, :], [weights[1 + i, :] for i in range(len(_TAPS))], weights[len(_TAPS) + 1, :]
    outside = [jnp.zeros_like(bias)] * grid[1]

    def one(image, sums):
        factor, of_mean = factors[image, :].astype(jnp.float32), of_means[image, :] / math.prod(grid)

        def step(row, state):
            h_above, h, slopes, dl_above, slopes_above, dx_2_above, dx_above, sums = state
            h_below, slopes_below = _hidden(product, image, row + 1, grid, bias)
            inside = row < grid[0]
            dl = [jnp.where(inside, dy * factor + of_mean, 0) for dy in _load(gradient, image, row, grid)]
            convolved = _convolve((h_above, h, h_below), taps)
            dx = [d * _gelu(x + conv_bias)[1] for d, x in zip(dl, convolved, strict=True)]
            back = _convolve((dx_2_above, dx_above, dx), taps[::-1])
            du = [(d + x) * slope for d, x, slope in zip(dl_above, back, slopes_above, strict=True)]

            @pl.when(row > 0)
            def _():
                for column, value in enumerate(du):
                    place = (row - 1) * grid[1] + column
                    of_product[image, place, :] = value.astype(of_product.dtype)

            new = (sum(du), *_taps_gradient((h_above, h, h_below), dx), sum(dx))
            sums = [total + more for total, more in zip(sums, new, strict=True)]
            return h, h_below, slopes_below, dl, slopes, dx_above, dx, sums

        first, slopes = _hidden(product, image, 0, grid, bias)
        start = (outside, first, slopes, outside, outside, outside, outside, sums)
        return jax.lax.fori_loop(0, grid[0] + 1, step, start)[-1]

    sums = [jnp.zeros_like(bias)] * (len(_TAPS) + 2)
    for i, total in enumerate(jax.lax.fori_loop(0, product.shape[0], one, sums)):
        of_weights[0, i, :] = total


def _load(ref, image, row, grid: _Grid) -> _Row:
    """The tokens of a row; those of the last one for what is below."""
    first = jnp.minimum(row, grid[0] - 1) * grid[1]
    return [ref[image, first + column, :].astype(jnp.float32) for column in range(grid[1])]


def _hidden(product, image, row, grid: _Grid, bias: jax.Array) -> tuple[_Row, _Row]:
    """h and the slopes of its activation; h is 0 below the last row."""
    both = [_gelu(u + bias) for u in _load(product, image, row, grid)]
    return [jnp.where(row < grid[0], h, 0) for h, _ in both], [slope for _, slope in both]


def _convolve(rows: tuple[_Row, _Row, _Row], taps: list[jax.Array]) -> _Row:
    """The 3x3 convolution of the middle one of three rows, with zeros on its left and right."""
    columns = range(len(rows[1]))
    return [
        _dot((rows[1 + i][j + k], tap) for (i, k), tap in zip(_TAPS, taps, strict=True) if j + k in columns)
        for j in columns
    ]


def _taps_gradient(rows: tuple[_Row, _Row, _Row], gradient: _Row) -> _Row:
    """That of the nine taps, of a row's gradient and the three rows that it was made of."""
    columns = range(len(gradient))
    return [_dot((rows[1 + i][j + k], gradient[j]) for j in columns if j + k in columns) for i, k in _TAPS]


def _dot(pairs: Iterable[tuple[jax.Array, jax.Array]]) -> jax.Array | float:
    """The sum of products; 0 for none, as of a grid of one column."""
    return functools.reduce(lambda total, pair: _fma(*pair, total), pairs, 0.0)


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x Phi(x) and its slope, with the normal distribution Phi by Hastings' formula (Abramowitz & Stegun, 7.1.26).

    It is within 1e-7 of that of `layers.gelu`, and has the exponential that the slope needs besides.
    """
    exponential = jnp.exp2(x * x * (-0.5 * math.log2(math.e)))
    t = 1 / _fma(jnp.abs(x), 0.3275911 * math.sqrt(0.5), 1.0)
    series = functools.reduce(lambda total, coefficient: _fma(total, t, coefficient), _HASTINGS[1:], _HASTINGS[0])
    tail = series * t * exponential  # Phi(-|x|)
    phi = jnp.where(x > 0, 1 - tail, tail)
    return x * phi, _fma(x * exponential, 1 / math.sqrt(2 * math.pi), phi)


_HASTINGS = tuple(0.5 * a for a in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))
_compiled = contextvars.ContextVar("compiled", default=False)  # whether a kernel is traced for a GPU


def _fma(x: jax.Array, y: jax.Array | float, z: jax.Array | float) -> jax.Array:
    """x y + z, float32 [C], as one instruction: of a product and a sum Triton makes two."""
    if not _compiled.get():
        return x * y + z
    arguments = [jnp.broadcast_to(jnp.float32(each), _shape(x, y)) for each in (x, y, z)]
    (result,) = triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=arguments,
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)],
    )
    return result


def _shape(*arrays: jax.Array | float) -> tuple[int, ...]:
    return jnp.broadcast_shapes(*map(jnp.shape, arrays))
