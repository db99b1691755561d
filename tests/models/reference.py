"""A second, plain and slow implementation of convolutional classifiers: numpy, float64, loops over kernel places.

Written from the papers and from the definitions of torchvision (for ViT, timm), whose names and layouts the weights
have: images [B, C, H, W], kernels OIHW, matrices [out, in]. A network is a function of `Weights`, images and the number
of classes, and returns logits [B, classes]; the weights that it asks for are drawn as it goes.
"""

import math

import numpy as np
import scipy.special


class Weights(dict):
    """Random weights by name, float32, made when first asked for; none is trivial: no bias is 0 and no norm 1."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.draw = np.random.default_rng(seed)

    def kernel(self, key: str, *shape: int) -> np.ndarray:
        """Of a convolution or matrix, scaled as in He et al. 2015."""
        return self._once(
            key, lambda: self.draw.standard_normal(shape, np.float32) * math.sqrt(2 / math.prod(shape[1:]))
        )

    def shift(self, key: str, *shape: int) -> np.ndarray:
        return self._once(key, lambda: 0.1 * self.draw.standard_normal(shape, np.float32))

    def scale(self, key: str, *shape: int) -> np.ndarray:
        return self._once(key, lambda: self.draw.uniform(0.5, 1.5, shape))

    def variance(self, key: str, *shape: int) -> np.ndarray:
        """Mostly below 1, so that what gates and activations halve still reaches the logits."""
        return self._once(key, lambda: self.draw.uniform(0.4, 1.2, shape))

    def _once(self, key: str, make) -> np.ndarray:
        if key not in self:
            self[key] = np.asarray(make(), np.float32)
        return self[key]


def conv(w, name, x, features, size, stride=1, padding=None, groups=1, bias=False):
    """y = concat_g(W_g * x_g), with half the kernel of zeros on every side unless `padding` says otherwise.

    `size` is that of a square kernel or (height, width). Padding 'same' is TensorFlow's: as many zeros as
    ceil(length / stride) results need, an odd one at the far end.
    """
    sides = (size, size) if isinstance(size, int) else size
    kernel = w.kernel(f"{name}.weight", features, x.shape[1] // groups, *sides)
    if padding == "same":
        needed = [max(0, (math.ceil(length / stride) - 1) * stride + size - length) for length in x.shape[2:]]
        zeros = [(count // 2, count - count // 2) for count in needed]
    else:
        zeros = [(side // 2 if padding is None else padding,) * 2 for side in sides]
    x = np.pad(x, ((0, 0), (0, 0), *zeros))
    parts = zip(np.split(x, groups, axis=1), np.split(kernel, groups), strict=True)
    y = np.concatenate([correlate(part, weights, stride) for part, weights in parts], axis=1)
    return y + w.shift(f"{name}.bias", features)[:, None, None] if bias else y


def correlate(x, kernel, stride):
    height, width = ((length - side) // stride + 1 for length, side in zip(x.shape[2:], kernel.shape[2:], strict=True))
    y = np.zeros((len(x), len(kernel), height * width))
    for row, column in np.ndindex(kernel.shape[2:]):
        seen = x[:, :, row:, column:][:, :, ::stride, ::stride][:, :, :height, :width]
        y += kernel[:, :, row, column].astype(np.float64) @ seen.reshape(*seen.shape[:2], -1)
    return y.reshape(len(x), len(kernel), height, width)


def batch_norm(w, name, x, epsilon=1e-5):
    channels = x.shape[1]
    scale, shift = w.scale(f"{name}.weight", channels), w.shift(f"{name}.bias", channels)
    mean, variance = w.shift(f"{name}.running_mean", channels), w.variance(f"{name}.running_var", channels)
    scale, shift, mean, variance = (v[:, None, None].astype(np.float64) for v in (scale, shift, mean, variance))
    return (x - mean) / np.sqrt(variance + epsilon) * scale + shift


def group_norm(w, name, x, groups=32, epsilon=1e-5):
    """Of 32 groups of channels, or fewer where 32 do not divide them."""
    groups = math.gcd(groups, x.shape[1])
    parts = x.reshape(len(x), groups, -1)
    parts = parts - parts.mean(axis=-1, keepdims=True)
    x = (parts / np.sqrt(np.mean(parts**2, axis=-1, keepdims=True) + epsilon)).reshape(x.shape)
    scale, shift = w.scale(f"{name}.weight", x.shape[1]), w.shift(f"{name}.bias", x.shape[1])
    return x * scale[:, None, None] + shift[:, None, None]


def layer_norm(w, name, x):
    """Over the last axis."""
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x * w.scale(f"{name}.weight", x.shape[-1]) + w.shift(f"{name}.bias", x.shape[-1])


def linear(w, name, x, features):
    kernel = w.kernel(f"{name}.weight", features, x.shape[-1])
    return x @ kernel.T.astype(np.float64) + w.shift(f"{name}.bias", features)


def relu(x):
    return np.maximum(x, 0)


def relu6(x):
    return np.clip(x, 0, 6)


def gelu(x):
    return x * scipy.special.ndtr(x)


def max_pool(x, size, stride, padding=0, ceil=False):
    """With `ceil` a last window may reach over the edge, if it starts inside the image or the padding before it."""
    counts = []
    for length in x.shape[2:]:
        places = (length + 2 * padding - size) / stride
        count = (math.ceil(places) if ceil else math.floor(places)) + 1
        counts.append(count - ((count - 1) * stride >= length + padding))
    y = np.zeros((*x.shape[:2], *counts))
    for row, column in np.ndindex(*counts):
        top, left = row * stride - padding, column * stride - padding
        y[:, :, row, column] = x[:, :, max(top, 0) : top + size, max(left, 0) : left + size].max(axis=(2, 3))
    return y


def mean_pool(x, height, width):
    """[B, C, H, W] -> [B, C, height, width]; window i of n over a length L is floor(i L / n) .. ceil((i + 1) L / n)."""
    y = np.zeros((*x.shape[:2], height, width))
    for row, column in np.ndindex(height, width):
        (top, bottom), (left, right) = (
            (i * length // count, math.ceil((i + 1) * length / count))
            for i, length, count in zip((row, column), x.shape[2:], (height, width), strict=True)
        )
        y[:, :, row, column] = x[:, :, top:bottom, left:right].mean(axis=(2, 3))
    return y


def local_response_norm(x):
    """Krizhevsky et al. 2012, section 3.3: n = 5 neighbours, k = 2, alpha = 1e-4, beta = 0.75."""
    y = np.zeros_like(x)
    for i in range(x.shape[1]):
        neighbours = x[:, max(0, i - 2) : i + 3]
        y[:, i] = x[:, i] / (2 + 1e-4 * np.sum(neighbours**2, axis=1)) ** 0.75
    return y


def resnet(w, x, classes, depths=(3, 4, 6, 3), kind="bottleneck", groups=1, group_width=64):
    """ResNet, or with groups ResNeXt: He et al. 2016 with the stride in the 3x3 convolutions; Xie et al. 2017."""
    x = max_pool(relu(batch_norm(w, "bn1", conv(w, "conv1", x, 64, 7, stride=2))), 3, 2, padding=1)
    for stage, depth in enumerate(depths):
        width, inner = 64 * 2**stage, groups * group_width * 2**stage
        for i in range(depth):
            name, stride = f"layer{stage + 1}.{i}", 2 if stage > 0 and i == 0 else 1
            if kind == "bottleneck":
                units = [(inner, 1, 1, 1), (inner, 3, stride, groups), (4 * width, 1, 1, 1)]
            else:
                units = [(width, 3, stride, 1), (width, 3, 1, 1)]
            y = x
            for n, (features, size, by, parts) in enumerate(units, start=1):
                y = conv(w, f"{name}.conv{n}", y if n == 1 else relu(y), features, size, stride=by, groups=parts)
                y = batch_norm(w, f"{name}.bn{n}", y)
            if x.shape != y.shape:
                x = conv(w, f"{name}.downsample.0", x, y.shape[1], 1, stride=stride)
                x = batch_norm(w, f"{name}.downsample.1", x)
            x = relu(x + y)
    return linear(w, "fc", x.mean(axis=(2, 3)), classes)


def resnetv2(w, x, classes, depths, width):
    """BiT: Kolesnikov et al. 2020, by timm's names; kernels are standardised (Qiao et al. 2019)."""

    def standard_conv(name, x, features, size, stride=1):
        kernel = w.kernel(f"{name}.weight", features, x.shape[1], size, size).astype(np.float64)
        kernel = kernel - kernel.mean(axis=(1, 2, 3), keepdims=True)
        kernel = kernel / np.sqrt(np.mean(kernel**2, axis=(1, 2, 3), keepdims=True) + 1e-10)
        return correlate(np.pad(x, ((0, 0), (0, 0), *((size // 2,) * 2,) * 2)), kernel, stride)

    x = np.pad(standard_conv("stem.conv", x, width, 7, stride=2), ((0, 0), (0, 0), (1, 1), (1, 1)))  # zeros take part
    x = max_pool(x, 3, 2)
    for stage, depth in enumerate(depths):
        for i in range(depth):
            name, stride, inner = f"stages.{stage}.blocks.{i}", 2 if stage > 0 and i == 0 else 1, width << stage
            y = relu(group_norm(w, f"{name}.norm1", x))
            if i == 0:
                x = standard_conv(f"{name}.downsample.conv", y, 4 * inner, 1, stride=stride)
            y = relu(group_norm(w, f"{name}.norm2", standard_conv(f"{name}.conv1", y, inner, 1)))
            y = relu(group_norm(w, f"{name}.norm3", standard_conv(f"{name}.conv2", y, inner, 3, stride=stride)))
            x = x + standard_conv(f"{name}.conv3", y, 4 * inner, 1)
    features = relu(group_norm(w, "norm", x)).mean(axis=(2, 3))
    kernel = w.kernel("head.fc.weight", classes, features.shape[1], 1, 1)[:, :, 0, 0]
    return features @ kernel.T.astype(np.float64) + w.shift("head.fc.bias", classes)


def vgg(w, x, classes, depths, norm, widths=(64, 128, 256, 512, 512), head_width=4096):
    """Simonyan & Zisserman 2015, table 1."""
    n = 0
    for depth, width in zip(depths, widths, strict=True):
        for _ in range(depth):
            x = conv(w, f"features.{n}", x, width, 3, bias=True)
            x = relu(batch_norm(w, f"features.{n + 1}", x) if norm else x)
            n += 3 if norm else 2
        x, n = max_pool(x, 2, 2), n + 1
    x = mean_pool(x, 7, 7).reshape(len(x), -1)
    x = relu(linear(w, "classifier.0", x, head_width))
    x = relu(linear(w, "classifier.3", x, head_width))
    return linear(w, "classifier.6", x, classes)


def alexnet(w, x, classes):
    """One tower: Krizhevsky 2014, arXiv 1404.5997, with torchvision's widths."""
    x = max_pool(relu(conv(w, "features.0", x, 64, 11, stride=4, padding=2, bias=True)), 3, 2)
    x = max_pool(relu(conv(w, "features.3", x, 192, 5, bias=True)), 3, 2)
    x = relu(conv(w, "features.6", x, 384, 3, bias=True))
    x = relu(conv(w, "features.8", x, 256, 3, bias=True))
    x = max_pool(relu(conv(w, "features.10", x, 256, 3, bias=True)), 3, 2)
    return _alexnet_head(w, mean_pool(x, 6, 6), classes, 4096)


def alexnet_2012(w, x, classes, head_width=4096):
    """Krizhevsky et al. 2012, section 3.5: responses are normalised after the first two; layers 2, 4, 5 in halves."""
    x = relu(conv(w, "features.0", x, 96, 11, stride=4, padding=2, bias=True))
    x = max_pool(local_response_norm(x), 3, 2)
    x = relu(conv(w, "features.3", x, 256, 5, groups=2, bias=True))
    x = max_pool(local_response_norm(x), 3, 2)
    x = relu(conv(w, "features.6", x, 384, 3, bias=True))
    x = relu(conv(w, "features.8", x, 384, 3, groups=2, bias=True))
    x = max_pool(relu(conv(w, "features.10", x, 256, 3, groups=2, bias=True)), 3, 2)
    return _alexnet_head(w, mean_pool(x, 6, 6), classes, head_width)


def _alexnet_head(w, x, classes, head_width):
    x = relu(linear(w, "classifier.1", x.reshape(len(x), -1), head_width))
    return linear(w, "classifier.6", relu(linear(w, "classifier.4", x, head_width)), classes)


_INCEPTION = {  # Szegedy et al. 2015, table 1: 1x1, then the 3x3 and the "5x5" branch with their reductions, then pool
    "3a": (64, (96, 128), (16, 32), 32),
    "3b": (128, (128, 192), (32, 96), 64),
    "4a": (192, (96, 208), (16, 48), 64),
    "4b": (160, (112, 224), (24, 64), 64),
    "4c": (128, (128, 256), (24, 64), 64),
    "4d": (112, (144, 288), (32, 64), 64),
    "4e": (256, (160, 320), (32, 128), 128),
    "5a": (256, (160, 320), (32, 128), 128),
    "5b": (384, (192, 384), (48, 128), 128),
}


def googlenet(w, x, classes):
    """Szegedy et al. 2015 as torchvision has it: batch norm, and 3x3 kernels where the paper has 5x5."""

    def unit(name, x, features, size, stride=1):
        return relu(batch_norm(w, f"{name}.bn", conv(w, f"{name}.conv", x, features, size, stride), epsilon=1e-3))

    x = max_pool(unit("conv1", x, 64, 7, stride=2), 3, 2, ceil=True)
    x = max_pool(unit("conv3", unit("conv2", x, 64, 1), 192, 3), 3, 2, ceil=True)
    for place, (single, triple, quintuple, pooled) in _INCEPTION.items():
        name = f"inception{place}"
        if place == "4a":
            x = max_pool(x, 3, 2, ceil=True)
        if place == "5a":
            x = max_pool(x, 2, 2, ceil=True)
        branches = [unit(f"{name}.branch1", x, single, 1)]
        for n, (reduced, features) in ((2, triple), (3, quintuple)):
            branches.append(unit(f"{name}.branch{n}.1", unit(f"{name}.branch{n}.0", x, reduced, 1), features, 3))
        branches.append(unit(f"{name}.branch4.1", max_pool(x, 3, 1, padding=1, ceil=True), pooled, 1))
        x = np.concatenate(branches, axis=1)
    return linear(w, "fc", x.mean(axis=(2, 3)), classes)


def inception_v3(w, x, classes):
    """Szegedy et al. 2016, table 1 and figures 5 to 7, as torchvision has it: zeros around a map count in its means."""

    def unit(name, x, features, size, stride=1, padding=None):
        return relu(batch_norm(w, f"{name}.bn", conv(w, f"{name}.conv", x, features, size, stride, padding), 1e-3))

    def mean_3x3(x):
        zeros = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        return sum(zeros[:, :, i : i + x.shape[2], j : j + x.shape[3]] for i, j in np.ndindex(3, 3)) / 9

    def module(name, x, branches, pooled):
        """`branches`: lists of (name, features, size, ...), whose steps follow each other."""
        joined = []
        for steps in branches:
            y = x
            for step, *arguments in steps:
                y = unit(f"Mixed_{name}.branch{step}", y, *arguments)
            joined.append(y)
        joined.append(unit(f"Mixed_{name}.branch_pool", mean_3x3(x), pooled, 1) if pooled else max_pool(x, 3, 2))
        return np.concatenate(joined, axis=1)

    for name, features, size, stride, padding in (
        ("1a_3x3", 32, 3, 2, 0),
        ("2a_3x3", 32, 3, 1, 0),
        ("2b_3x3", 64, 3, 1, 1),
        ("3b_1x1", 80, 1, 1, 0),
        ("4a_3x3", 192, 3, 1, 0),
    ):
        x = unit(f"Conv2d_{name}", x, features, size, stride, padding)
        x = max_pool(x, 3, 2) if name[:2] in ("2b", "4a") else x
    double = [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3)]
    for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
        five = [("5x5_1", 48, 1), ("5x5_2", 64, 5)]
        x = module(name, x, [[("1x1", 64, 1)], five, [*double, ("3x3dbl_3", 96, 3)]], pooled)
    x = module("6a", x, [[("3x3", 384, 3, 2, 0)], [*double, ("3x3dbl_3", 96, 3, 2, 0)]], None)
    for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        row, column = (1, 7), (7, 1)
        seven = [("7x7_1", c, 1), ("7x7_2", c, row), ("7x7_3", 192, column)]
        twice = [(c, 1), (c, column), (c, row), (c, column), (192, row)]
        twice = [(f"7x7dbl_{n}", *step) for n, step in enumerate(twice, start=1)]
        x = module(name, x, [[("1x1", 192, 1)], seven, twice], 192)
    seven = [("7x7x3_1", 192, 1), ("7x7x3_2", 192, (1, 7)), ("7x7x3_3", 192, (7, 1)), ("7x7x3_4", 192, 3, 2, 0)]
    x = module("7a", x, [[("3x3_1", 192, 1), ("3x3_2", 320, 3, 2, 0)], seven], None)
    for name in ("7b", "7c"):
        # A branch that forks: its first steps, of known names, are made twice.
        three, double = [("3x3_1", 384, 1)], [("3x3dbl_1", 448, 1), ("3x3dbl_2", 384, 3)]
        forks = [
            [*steps, (f"{steps[-1][0][:-1]}{len(steps) + 1}{way}", 384, side)]
            for steps in (three, double)
            for way, side in (("a", (1, 3)), ("b", (3, 1)))
        ]
        x = module(name, x, [[("1x1", 320, 1)], *forks], 192)
    return linear(w, "fc", x.mean(axis=(2, 3)), classes)


def densenet(w, x, classes, depths, growth_rate=32, stem_width=64):
    """Huang et al. 2017."""
    x = relu(batch_norm(w, "features.norm0", conv(w, "features.conv0", x, stem_width, 7, stride=2)))
    x = max_pool(x, 3, 2, padding=1)
    for stage, depth in enumerate(depths, start=1):
        for i in range(1, depth + 1):
            name = f"features.denseblock{stage}.denselayer{i}"
            y = conv(w, f"{name}.conv1", relu(batch_norm(w, f"{name}.norm1", x)), 4 * growth_rate, 1)
            y = conv(w, f"{name}.conv2", relu(batch_norm(w, f"{name}.norm2", y)), growth_rate, 3)
            x = np.concatenate([x, y], axis=1)
        if stage < len(depths):
            name = f"features.transition{stage}"
            x = conv(w, f"{name}.conv", relu(batch_norm(w, f"{name}.norm", x)), x.shape[1] // 2, 1)
            rows, columns = (length // 2 for length in x.shape[2:])
            x = x[:, :, : 2 * rows, : 2 * columns].reshape(*x.shape[:2], rows, 2, columns, 2).mean(axis=(3, 5))
    return linear(w, "classifier", relu(batch_norm(w, "features.norm5", x)).mean(axis=(2, 3)), classes)


def convnext(w, x, classes, depths, widths):
    """Liu et al. 2022."""

    def norm(name, x):
        return np.moveaxis(layer_norm(w, name, np.moveaxis(x, 1, -1)), -1, 1)

    x = norm("features.0.1", conv(w, "features.0.0", x, widths[0], 4, stride=4, padding=0, bias=True))
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage > 0:
            x = norm(f"features.{2 * stage}.0", x)
            x = conv(w, f"features.{2 * stage}.1", x, width, 2, stride=2, padding=0, bias=True)
        for i in range(depth):
            name = f"features.{2 * stage + 1}.{i}"
            y = conv(w, f"{name}.block.0", x, width, 7, groups=width, bias=True)
            y = layer_norm(w, f"{name}.block.2", np.moveaxis(y, 1, -1))
            y = linear(w, f"{name}.block.5", gelu(linear(w, f"{name}.block.3", y, 4 * width)), width)
            x = x + np.moveaxis(y, -1, 1) * w.scale(f"{name}.layer_scale", width, 1, 1)
    x = norm("classifier.0", x.mean(axis=(2, 3), keepdims=True))
    return linear(w, "classifier.2", x[:, :, 0, 0], classes)


def hard_sigmoid(x):
    return np.clip(x + 3, 0, 6) / 6


def hard_swish(x):
    return x * hard_sigmoid(x)


def silu(x):
    return x * scipy.special.expit(x)


def _unit(w, name, number, x, features, size, act, stride=1, groups=1):
    x = conv(w, name, x, features, size, stride, padding="same", groups=groups)
    return act(batch_norm(w, f"{name.rpartition('.')[0]}.bn{number}".removeprefix("."), x, epsilon=1e-3))


def _inverted_residual(w, name, x, size, expanded, features, stride, act, gate=None):
    """Sandler et al. 2018, section 3.3; `gate`: hidden channels, activation and gate of the squeeze-and-excite."""
    first = name.startswith("blocks.0.")  # whose blocks do not expand
    y = x if first else _unit(w, f"{name}.conv_pw", 1, x, expanded, 1, act)
    y = _unit(w, f"{name}.conv_dw", 1 if first else 2, y, expanded, size, act, stride, groups=expanded)
    if gate:
        hidden, gate_act, sigmoid = gate
        z = conv(w, f"{name}.se.conv_reduce", y.mean(axis=(2, 3), keepdims=True), hidden, 1, bias=True)
        y = y * sigmoid(conv(w, f"{name}.se.conv_expand", gate_act(z), expanded, 1, bias=True))
    last, number = ("conv_pw", 2) if first else ("conv_pwl", 3)
    y = _unit(w, f"{name}.{last}", number, y, features, 1, lambda y: y)
    return x + y if x.shape == y.shape else y


def mobilenet_v2(w, x, classes, timm):
    """Sandler et al. 2018, table 2, with the names of timm's mobilenetv2_100 or of torchvision's mobilenet_v2."""
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def unit(conv_name, norm_name, x, features, size, act, stride=1, groups=1):
        x = conv(w, conv_name, x, features, size, stride, padding=size // 2, groups=groups)
        return act(batch_norm(w, norm_name, x, epsilon=1e-5))

    def block(stage, i, n, x, expanded, features, stride):
        theirs = f"blocks.{stage}.{i}" if timm else f"features.{n}.conv"
        expand, depthwise, project = (
            (f"{theirs}.conv_{conv}", f"{theirs}.bn{number}") for conv, number in (("pw", 1), ("dw", 2), ("pwl", 3))
        )
        if timm and stage == 0:
            depthwise, project = (f"{theirs}.conv_dw", f"{theirs}.bn1"), (f"{theirs}.conv_pw", f"{theirs}.bn2")
        if not timm:
            first = 0 if stage == 0 else 1
            expand = f"{theirs}.0.0", f"{theirs}.0.1"
            depthwise = f"{theirs}.{first}.0", f"{theirs}.{first}.1"
            project = f"{theirs}.{first + 1}", f"{theirs}.{first + 2}"
        y = unit(*expand, x, expanded, 1, relu6) if stage else x
        y = unit(*depthwise, y, expanded, 3, relu6, stride, groups=expanded)
        y = unit(*project, y, features, 1, lambda y: y)
        return x + y if x.shape == y.shape else y

    x = unit(*(("conv_stem", "bn1") if timm else ("features.0.0", "features.0.1")), x, 32, 3, relu6, stride=2)
    n = 1
    for stage, (expansion, features, depth, stride) in enumerate(stages):
        for i in range(depth):
            x = block(stage, i, n, x, expansion * x.shape[1], features, 1 if i else stride)
            n += 1
    x = unit(*(("conv_head", "bn2") if timm else (f"features.{n}.0", f"features.{n}.1")), x, 1280, 1, relu6)
    return linear(w, "classifier" if timm else "classifier.1", x.mean(axis=(2, 3)), classes)


def mobilenet_v3_small(w, x, classes):
    """Howard et al. 2019, table 2, with the names and paddings of timm's tf_mobilenetv3_small_100."""
    stages = (  # kernel, expanded, channels, stride, channels of the gate, activation
        [(3, 16, 16, 2, 8, relu)],
        [(3, 72, 24, 2, 0, relu), (3, 88, 24, 1, 0, relu)],
        [(5, 96, 40, 2, 24, hard_swish), (5, 240, 40, 1, 64, hard_swish), (5, 240, 40, 1, 64, hard_swish)],
        [(5, 120, 48, 1, 32, hard_swish), (5, 144, 48, 1, 40, hard_swish)],
        [(5, 288, 96, 2, 72, hard_swish), (5, 576, 96, 1, 144, hard_swish), (5, 576, 96, 1, 144, hard_swish)],
    )
    x = _unit(w, "conv_stem", 1, x, 16, 3, hard_swish, stride=2)
    for stage, blocks in enumerate(stages):
        for i, (size, expanded, features, stride, hidden, act) in enumerate(blocks):
            gate = (hidden, relu, hard_sigmoid) if hidden else None
            x = _inverted_residual(w, f"blocks.{stage}.{i}", x, size, expanded, features, stride, act, gate)
    x = _unit(w, "blocks.5.0.conv", 1, x, 576, 1, hard_swish).mean(axis=(2, 3), keepdims=True)
    x = hard_swish(conv(w, "conv_head", x, 1024, 1, bias=True))
    return linear(w, "classifier", x[:, :, 0, 0], classes)


def efficientnet(w, x, classes, depths=(1, 2, 2, 3, 3, 4, 1)):
    """Tan & Le 2019, table 1, with the names and paddings of timm's tf_efficientnet_b0."""
    stages = (
        (1, 16, 1, 3),
        (6, 24, 2, 3),
        (6, 40, 2, 5),
        (6, 80, 2, 3),
        (6, 112, 1, 5),
        (6, 192, 2, 5),
        (6, 320, 1, 3),
    )
    x = _unit(w, "conv_stem", 1, x, 32, 3, silu, stride=2)
    for stage, (expansion, features, stride, size) in enumerate(stages):
        for i in range(depths[stage]):
            channels = x.shape[1]
            gate = (channels // 4, silu, scipy.special.expit)
            by, name = 1 if i else stride, f"blocks.{stage}.{i}"
            x = _inverted_residual(w, name, x, size, expansion * channels, features, by, silu, gate)
    x = _unit(w, "conv_head", 2, x, 1280, 1, silu)
    return linear(w, "classifier", x.mean(axis=(2, 3)), classes)


def vit(w, x, classes, patch_size, hidden_dim, depth, num_heads, mlp_dim):
    """Dosovitskiy et al. 2021, with timm's names."""
    x = conv(w, "patch_embed.proj", x, hidden_dim, patch_size, stride=patch_size, padding=0, bias=True)
    x = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
    x = np.concatenate([np.repeat(w.shift("cls_token", 1, 1, hidden_dim), len(x), axis=0), x], axis=1)
    x = x + w.shift("pos_embed", 1, x.shape[1], hidden_dim)
    for i in range(depth):
        name = f"blocks.{i}"
        y = linear(w, f"{name}.attn.qkv", layer_norm(w, f"{name}.norm1", x), 3 * hidden_dim)
        query, key, value = np.split(y, 3, axis=-1)
        heads = []
        for head in np.split(np.arange(hidden_dim), num_heads):
            scores = query[..., head] @ key[..., head].swapaxes(1, 2) / math.sqrt(len(head))
            heads.append(scipy.special.softmax(scores, axis=-1) @ value[..., head])
        x = x + linear(w, f"{name}.attn.proj", np.concatenate(heads, axis=-1), hidden_dim)
        y = linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", x), mlp_dim)
        x = x + linear(w, f"{name}.mlp.fc2", gelu(y), hidden_dim)
    return linear(w, "head", layer_norm(w, "norm", x)[:, 0], classes)
