"""Weights that are named as in keras.applications -> the variables of our models."""

import functools
import re
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from vitcls import models
from vitcls.core.errors import UserError
from vitcls.models import convnext, densenet, efficientnet, inception, mobilenet, resnet, vgg
from vitcls.models.weights.arrays import Arrays
from vitcls.models.weights.matching import Rule, collect, require_fields, shapes_of

_NORM_LEAVES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
_OTHER_LEAVES = {"kernel": "kernel", "bias": "bias", "scale": "variable"}  # 'scale': of a layer scale
_LEFT_OUT = re.compile(r"normalization(_\d+)?/|seed_generator(_\d+)?/")  # of the images; of dropout
# Fields by which the networks of Keras differ from others with weights of the same names and shapes.
_NEEDED = (
    (resnet.ResNet, "stride_on", "1x1"),
    (inception.InceptionV3, "count_padding", False),
    (mobilenet.MobileNetV2, "padding", "same"),
    (mobilenet.MobileNetV3, "padding", "same"),
)
_NUMBERED = re.compile(r"(conv2d|batch_normalization)(?:_(\d+))?/(.+)")

# The path of a module of ours and the name of its layer in Keras, or the path of a weight, the names of the arrays that
# it is made of, and how it is made of them.
_Names = Iterator[tuple[str, str] | tuple[str, tuple[str, ...], Callable[..., np.ndarray]]]


def from_keras(
    name: str,
    weights: Arrays,
    *,
    num_classes: int = 1000,
    image_shape: tuple[int, int, int] | None = None,
    head: bool = True,
    **fields: Any,
) -> dict:
    """The variables of `models.create(name, num_classes, **fields)`: nested dicts of C-contiguous arrays.

    `weights` has the arrays by 'layer/variable' ('conv1_bn/moving_mean') or by the whole path of a variable in Keras,
    {v.path: v.numpy() for v in model.variables}. Layers that Keras only numbers, which are Inception's, may count from
    any number. What EfficientNet normalises its images with is left out: ours come normalised. `image_shape` [H, W, C],
    by default the model's native one, says how many channels there are. Without `head` the classifier is left out.

    Raises UserError for a model that has no names there, for one whose fields are not those of Keras's network, such as
    a ResNet without stride_on='1x1', which is where Keras halves the maps, and, all at once, for weights that are
    missing, do not fit or are too many.
    """
    model = models.create(name, num_classes, **fields)
    rules = names_for(name, model)
    given = by_layer(weights)
    return collect(
        name,
        shapes_of(name, model, image_shape),
        functools.partial(_rule, name, rules),
        {short: weights[key] for short, key in given.items()},
        _LEFT_OUT,
        head=head,
        label=given.__getitem__,
    )


def names_for(name: str, model: nn.Module) -> dict[str, list]:
    """Our path of a module or a weight -> its layer in Keras, or its arrays and how it is made of them.

    The first is that of the stem.
    """
    if type(model) not in _FAMILIES:
        raise UserError(f"{name} cannot take weights of Keras: no names are known for it")
    require_fields(name, model, _NEEDED, "Keras")
    return {path: rule for path, *rule in _FAMILIES[type(model)](model, name)}


def by_layer(weights: Mapping[str, np.ndarray]) -> dict[str, str]:
    """'layer/variable', as in a fresh session of Keras, -> the key in `weights`."""
    short = {key: re.sub(r"/variable_\d+$", "/variable", "/".join(key.split("/")[-2:])) for key in weights}
    numbered = {key: match for key, path in short.items() if (match := _NUMBERED.fullmatch(path))}
    first: dict[str, int] = {}
    for kind, number, _ in (match.groups("0") for match in numbered.values()):
        first[kind] = min(int(number), first.get(kind, int(number)))
    for key, match in numbered.items():
        kind, number, variable = match.groups("0")
        short[key] = f"{_numbered(kind, int(number) - first[kind])}/{variable}"
    return {path: key for key, path in short.items()}


def _rule(name: str, rules: Mapping[str, list], path: str) -> Rule:
    """What the weight at `path` is made of."""
    _, _, ours = path.partition("/")
    module, _, leaf = ours.rpartition("/")
    if ours not in rules and module not in rules:
        raise UserError(f"{name} cannot take weights of Keras: no name is known for '{path}'")
    leaves = _NORM_LEAVES if "norm" in module.rpartition("/")[2] else _OTHER_LEAVES
    keys, combine = rules[ours] if ours in rules else ((f"{rules[module][0]}/{leaves[leaf]}",), np.asarray)

    def make(shape: tuple[int, ...], *arrays: np.ndarray) -> np.ndarray | None:
        fits = all(_without_ones(array.shape) == _without_ones(shape) for array in arrays)
        return combine(*(array.reshape(shape) for array in arrays)) if fits else None

    return Rule(tuple(keys), make)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    """What layouts agree on: a 1x1 convolution is a matrix, and [k, k, C, 1] is [k, k, 1, C] in the same order."""
    return [size for size in shape if size != 1]


def _numbered(kind: str, number: int) -> str:
    return f"{kind}_{number}" if number else kind


def _vgg(model: vgg.VGG, name: str) -> _Names:
    for stage, depth in enumerate(model.depths, start=1):
        for i in range(1, depth + 1):
            yield f"stage_{stage}/conv_{i}/conv", f"block{stage}_conv{i}"
    yield "hidden_1", "fc1"
    yield "hidden_2", "fc2"
    yield "head", "predictions"


def _resnet(model: resnet.ResNet, name: str) -> _Names:
    units = {"stem": "conv1"}
    for stage, depth in enumerate(model.depths, start=1):
        for i in range(1, depth + 1):
            parts = {"shortcut": 0, "conv_1": 1, "conv_2": 2, "conv_3": 3}
            units |= {f"stage_{stage}_block_{i}/{ours}": f"conv{stage + 1}_block{i}_{n}" for ours, n in parts.items()}
    for ours, theirs in units.items():
        yield f"{ours}/conv", f"{theirs}_conv"
        yield f"{ours}/norm", f"{theirs}_bn"
        # gamma (Wx + bias - mean) / std: the norm takes the convolution's bias.
        yield f"{ours}/norm/mean", (f"{theirs}_bn/moving_mean", f"{theirs}_conv/bias"), np.subtract
    yield "head", "predictions"


def _inception_v3(model: inception.InceptionV3, name: str) -> _Names:
    figure_5 = "1x1_1 5x5_1 5x5_2 3x3_1 3x3_2 3x3_3 pool_2"
    figure_6 = "1x1_1 7x7_1 7x7_2 7x7_3 7x7_twice_1 7x7_twice_2 7x7_twice_3 7x7_twice_4 7x7_twice_5 pool_2"
    figure_7 = "1x1_1 3x3_1 3x3_2_left 3x3_2_right 3x3_twice_1 3x3_twice_2 3x3_twice_3_left 3x3_twice_3_right pool_2"
    first_shrink, second_shrink = "3x3_1 3x3_twice_1 3x3_twice_2 3x3_twice_3", "3x3_1 3x3_2 7x7_1 7x7_2 7x7_3 7x7_4"
    mixed = [figure_5] * 3 + [first_shrink] + [figure_6] * 4 + [second_shrink] + [figure_7] * 2
    units = [f"stem_{i}" for i in range(1, 6)]
    units += [f"mixed_{i}/{unit}" for i, names in enumerate(mixed, start=1) for unit in names.split()]
    for n, ours in enumerate(units):
        theirs = _numbered("batch_normalization", n)
        yield f"{ours}/conv", _numbered("conv2d", n)
        yield f"{ours}/norm", theirs
        yield f"{ours}/norm/scale", (f"{theirs}/beta",), np.ones_like  # there is none
    yield "head", "predictions"


def _densenet(model: densenet.DenseNet, name: str) -> _Names:
    yield "stem", "conv1_conv"
    yield "stem_norm", "conv1_bn"
    for stage, depth in enumerate(model.depths, start=1):
        for i in range(1, depth + 1):
            ours, theirs = f"stage_{stage}_layer_{i}", f"conv{stage + 1}_block{i}"
            for n in (1, 2):
                yield f"{ours}/norm_{n}", f"{theirs}_{n - 1}_bn"
                yield f"{ours}/conv_{n}", f"{theirs}_{n}_conv"
        yield f"transition_{stage}_norm", f"pool{stage}_bn"
        yield f"transition_{stage}", f"pool{stage}_conv"
    yield "head_norm", "bn"
    yield "head", "predictions"


def _efficientnet(model: efficientnet.EfficientNet, name: str) -> _Names:
    yield from _unit("stem", "stem_conv", "stem_bn")
    for stage in range(1, 8):
        for i, letter in enumerate(string.ascii_lowercase, start=1):
            ours, theirs = f"stage_{stage}_block_{i}", f"block{stage}{letter}"
            yield from _unit(f"{ours}/expand", f"{theirs}_expand_conv", f"{theirs}_expand_bn")
            yield from _unit(f"{ours}/depthwise", f"{theirs}_dwconv", f"{theirs}_bn")
            yield from _unit(f"{ours}/project", f"{theirs}_project_conv", f"{theirs}_project_bn")
            for part in ("reduce", "expand"):
                yield f"{ours}/squeeze_excite/{part}", f"{theirs}_se_{part}"
    yield from _unit("last", "top_conv", "top_bn")
    yield "head", "predictions"


def _mobilenet_v1(model: mobilenet.MobileNetV1, name: str) -> _Names:
    yield from _unit("stem", "conv1", "conv1_bn")
    for n, ours in enumerate(_blocks(model.depths), start=1):
        yield from _unit(f"{ours}/depthwise", f"conv_dw_{n}", f"conv_dw_{n}_bn")
        yield from _unit(f"{ours}/pointwise", f"conv_pw_{n}", f"conv_pw_{n}_bn")
    yield "head", "conv_preds"


def _mobilenet_v2(model: mobilenet.MobileNetV2, name: str) -> _Names:
    yield from _unit("stem", "Conv1", "bn_Conv1")
    for n, ours in enumerate(_blocks(model.depths)):
        theirs = f"block_{n}" if n else "expanded_conv"
        for part in ("expand", "depthwise", "project"):
            yield from _unit(f"{ours}/{part}", f"{theirs}_{part}", f"{theirs}_{part}_BN")
    yield from _unit("last", "Conv_1", "Conv_1_bn")
    yield "head", "predictions"


def _mobilenet_v3(model: mobilenet.MobileNetV3, name: str) -> _Names:
    yield from _unit("stem", "conv", "conv_bn")
    for n, ours in enumerate(_blocks({"large": (1, 2, 3, 4, 2, 3), "small": (1, 2, 3, 2, 3)}[model.size])):
        theirs = f"expanded_conv_{n}" if n else "expanded_conv"
        for part in ("expand", "depthwise", "project"):
            yield from _unit(f"{ours}/{part}", f"{theirs}_{part}", f"{theirs}_{part}_bn")
        yield f"{ours}/squeeze_excite/reduce", f"{theirs}_squeeze_excite_conv"
        yield f"{ours}/squeeze_excite/expand", f"{theirs}_squeeze_excite_conv_1"
    yield from _unit("last", "conv_1", "conv_1_bn")
    yield "hidden", "conv_2"
    yield "head", "logits"


def _convnext(model: convnext.ConvNeXt, name: str) -> _Names:
    yield "stem", f"{name}_stem_conv"
    yield "stem_norm", f"{name}_stem_layernorm"
    for stage, depth in enumerate(model.depths):
        yield f"downsample_{stage + 1}_norm", f"{name}_downsampling_layernorm_{stage - 1}"
        yield f"downsample_{stage + 1}", f"{name}_downsampling_conv_{stage - 1}"
        for i in range(depth):
            ours, theirs = f"stage_{stage + 1}_block_{i + 1}", f"{name}_stage_{stage}_block_{i}"
            yield f"{ours}/depthwise", f"{theirs}_depthwise_conv"
            yield f"{ours}/norm", f"{theirs}_layernorm"
            yield f"{ours}/expand", f"{theirs}_pointwise_conv_1"
            yield f"{ours}/project", f"{theirs}_pointwise_conv_2"
            yield f"{ours}/layer_scale", f"{theirs}_layer_scale"
    yield "head_norm", f"{name}_head_layernorm"
    yield "head", f"{name}_head_dense"


def _unit(ours: str, conv: str, norm: str) -> _Names:
    """A `layers.ConvNorm`."""
    yield f"{ours}/conv", conv
    yield f"{ours}/norm", norm


def _blocks(depths: tuple[int, ...]) -> list[str]:
    """The names of our blocks, which Keras numbers through all stages."""
    return [f"stage_{stage}_block_{i}" for stage, depth in enumerate(depths, start=1) for i in range(1, depth + 1)]


_FAMILIES: dict[type[nn.Module], Callable[[Any, str], _Names]] = {
    vgg.VGG: _vgg,
    resnet.ResNet: _resnet,
    inception.InceptionV3: _inception_v3,
    densenet.DenseNet: _densenet,
    efficientnet.EfficientNet: _efficientnet,
    mobilenet.MobileNetV1: _mobilenet_v1,
    mobilenet.MobileNetV2: _mobilenet_v2,
    mobilenet.MobileNetV3: _mobilenet_v3,
    convnext.ConvNeXt: _convnext,
}
