"""What several tests of layers need: random arrays, a convolution written out, and how near two arrays are."""

import numpy as np


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same_pads(length, size, stride):
    """TensorFlow's 'SAME': ceil(length / stride) places, and the odd zero goes behind."""
    zeros = max((-(-length // stride) - 1) * stride + size - length, 0)
    return zeros // 2, zeros - zeros // 2


def literal_grouped_conv(x, kernel, groups, stride, padding, cotangent_seed):
    """concat_g(W_g * x_g) group by group in float64, and the gradients of its product with a random cotangent.

    Returns the output, the cotangent and the gradients of input and kernel.
    """
    size = kernel.shape[0]
    if padding == "SAME":
        pads = [same_pads(length, size, stride) for length in x.shape[1:3]]
    else:
        pads = [(0, 0) if padding == "VALID" else (padding, padding)] * 2
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = ((length - size) // stride + 1 for length in padded.shape[1:3])
    cotangent = normal(cotangent_seed, len(x), height, width, kernel.shape[-1])
    outputs, padded_grad, kernel_grad = [], np.zeros_like(padded), np.zeros_like(kernel)
    for inputs, outs in zip(
        np.split(np.arange(x.shape[-1]), groups), np.split(np.arange(kernel.shape[-1]), groups), strict=True
    ):
        y = np.zeros((len(x), height, width, len(outs)))
        for row in range(size):
            for column in range(size):
                place = np.ix_(
                    range(len(x)),
                    range(row, row + stride * height, stride),
                    range(column, column + stride * width, stride),
                    inputs,
                )
                weights = kernel[row, column][:, outs]
                y += padded[place] @ weights
                padded_grad[place] += cotangent[..., outs] @ weights.T
                kernel_grad[row, column][:, outs] = np.einsum("bhwi,bhwo->io", padded[place], cotangent[..., outs])
        outputs.append(y)
    (top, bottom), (left, right) = pads
    inside = padded_grad[:, top : padded.shape[1] - bottom, left : padded.shape[2] - right]
    return np.concatenate(outputs, axis=-1), cotangent, inside, kernel_grad


def assert_near(got, expected, tolerance=1e-5):
    """Within `tolerance` of the largest value expected."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())
