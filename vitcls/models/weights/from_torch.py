"""Weights that are named as in PyTorch's state dicts -> the variables of our models.

The names are torchvision's and timm's, which agree for ResNet, ResNeXt, DenseNet and Inception v3. EfficientNet and
MobileNet v3 have timm's alone: the networks here are those of its 'tf_' models, which pad and normalise as the authors
do and torchvision does not; with padding='even' MobileNet v3 is that of timm's other models.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from vitcls import models
from vitcls.core import errors
from vitcls.core.errors import UserError
from vitcls.models import (
    alexnet,
    convnext,
    densenet,
    efficientnet,
    inception,
    mobilenet,
    resnet,
    resnetv2,
    resnext,
    vgg,
    vit,
)
from vitcls.models.weights.arrays import Arrays
from vitcls.models.weights.matching import Rule, collect, require_fields, shapes_of

# Fields by which the networks of PyTorch differ from ours, with weights of the same names and shapes.
_NEEDED = ((inception.InceptionV3, "count_padding", True), (mobilenet.MobileNetV2, "padding", "even"))
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
TORCHVISION_POSITIONS = "encoder.pos_embedding"  # of a ViT; timm has another name
_LEFT_OUT = re.compile(r"aux\d\.|AuxLogits\.|.*\.num_batches_tracked$")  # auxiliary classifiers, counts of batches

# The path of a module or a weight of ours, its name in PyTorch, and, for a weight, what is done to the array first, and
# what undoes that.
_View = Callable[[np.ndarray], np.ndarray]
_Names = Iterator[tuple[str, str] | tuple[str, str, _View, _View]]


def from_torch(
    name: str,
    weights: Arrays,
    *,
    num_classes: int = 1000,
    image_shape: tuple[int, int, int] | None = None,
    head: bool = True,
    **fields: Any,
) -> dict:
    """The variables of `models.create(name, num_classes, **fields)`: nested dicts of C-contiguous arrays.

    `weights` has convolutions as OIHW and matrices as [out, in]. `image_shape` [H, W, C], by default the model's native
    one, says how many channels there are and, to a ViT, for which size its positions were learned. Without `head` the
    classifier is left out.

    Raises UserError for a model that has no names there, for one whose fields are not those of PyTorch's network, such
    as an Inception v3 without count_padding, whose poolings are others, and, all at once, for weights that are missing,
    do not fit or are too many.
    """
    model = models.create(name, num_classes, **fields)
    known = names_for(name, model, weights)
    return collect(
        name,
        shapes_of(name, model, image_shape),
        functools.partial(_rule, name, known),
        weights,
        _LEFT_OUT,
        head=head,
    )


def fields_for(name: str) -> dict[str, Any]:
    """Those of the model `name` that PyTorch's network needs to be other than ours are by default."""
    return {field: value for family, field, value in _NEEDED if issubclass(models.preset(name).module, family)}


def names_for(name: str, model: nn.Module, weights: Container[str] = (), publisher: str = "") -> dict[str, tuple]:
    """Our path of a module or a weight -> its name in PyTorch, what is done to the array first, and what undoes it.

    Of several who have names for a family, those of `publisher`, or whose names `weights` has. The first is that of the
    stem. Raises UserError where there are none.
    """
    if type(model) not in _FAMILIES:
        raise UserError(f"{name} cannot take weights of PyTorch: no names are known for it")
    require_fields(name, model, _NEEDED, "PyTorch")
    families = _FAMILIES[type(model)]
    if publisher:
        if publisher not in families:
            raise errors.unknown(f"publisher of {name}", publisher, families)
        families = {publisher: families[publisher]}
    options = [{path: (key, *view) for path, key, *view in names(model)} for names in families.values()]

    def found(known: dict[str, tuple]) -> int:
        return sum(key in weights or f"{key}.weight" in weights for key, *_ in known.values())

    return max(options, key=found)


def _rule(name: str, known: Mapping[str, tuple], path: str) -> Rule:
    """What the weight at `path` is made of."""
    _, _, ours = path.partition("/")
    module, _, kind = ours.rpartition("/")
    if ours not in known and module not in known:
        raise UserError(f"{name} cannot take weights of PyTorch: no name is known for '{path}'")
    key, *views = known[ours] if ours in known else (f"{known[module][0]}.{LEAVES[kind]}",)
    return Rule((key,), lambda shape, value: _in_our_layout(value, shape, *views[:1]))


def _in_our_layout(value: np.ndarray, shape: tuple[int, ...], view: Callable = np.asarray) -> np.ndarray | None:
    """An array of PyTorch as ours of this shape; None where it does not fit.

    Matrices become [in, out], convolutions HWIO, or, where ours is a matrix over flattened patches or maps, [HWI, O].
    """
    try:
        value = view(value)
    except (IndexError, ValueError):
        return None
    value = value.transpose({2: (1, 0), 4: (2, 3, 1, 0)}.get(value.ndim, range(value.ndim)))
    fits = value.shape[-1:] == shape[-1:] and value.size == math.prod(shape)
    return value.reshape(shape) if fits else None


def _flattened(side: int) -> tuple[_View, _View]:
    """A matrix over a flattened map [C, side, side] as the convolution that it is, and back."""

    def flat(kernel: np.ndarray) -> np.ndarray:  # [side side C, out] -> [out, C side side]
        return kernel.reshape(side, side, -1, kernel.shape[-1]).transpose(3, 2, 0, 1).reshape(kernel.shape[-1], -1)

    return lambda value: value.reshape(len(value), -1, side, side), flat


# A matrix [out, in] as the 1x1 convolution that it is there, and back from ours, [in, out].
_POINTWISE: tuple = (lambda value: value[:, :, 0, 0], lambda kernel: kernel.T[:, :, None, None])
# A ViT's positions: of the class token, and of the grid, which follow each other in one array [1, 1 + h w, D].
_CLASS_POSITION: tuple = (lambda value: value[:, :1], lambda value: value.reshape(1, 1, value.shape[-1]))
_GRID_POSITIONS: tuple = (lambda value: value[:, 1:], lambda value: value.reshape(1, -1, value.shape[-1]))


def _resnet(model: resnet.ResNet) -> _Names:
    yield "stem/conv", "conv1"
    yield "stem/norm", "bn1"
    for stage, depth in enumerate(model.depths, start=1):
        for i in range(depth):
            ours, theirs = f"stage_{stage}_block_{i + 1}", f"layer{stage}.{i}"
            for n in (1, 2, 3):
                yield f"{ours}/conv_{n}/conv", f"{theirs}.conv{n}"
                yield f"{ours}/conv_{n}/norm", f"{theirs}.bn{n}"
            yield f"{ours}/shortcut/conv", f"{theirs}.downsample.0"
            yield f"{ours}/shortcut/norm", f"{theirs}.downsample.1"
    yield "head", "fc"


def _resnetv2(model: resnetv2.ResNetV2) -> _Names:
    yield "stem/conv", "stem.conv"
    for stage, depth in enumerate(model.depths, start=1):
        for i in range(depth):
            ours, theirs = f"stage_{stage}_block_{i + 1}", f"stages.{stage - 1}.blocks.{i}"
            for n in (1, 2, 3):
                yield f"{ours}/norm_{n}", f"{theirs}.norm{n}"
                yield f"{ours}/conv_{n}/conv", f"{theirs}.conv{n}"
            yield f"{ours}/shortcut/conv", f"{theirs}.downsample.conv"
    yield "head_norm", "norm"
    yield "head", "head.fc"
    yield "head/kernel", "head.fc.weight", *_POINTWISE


def _vgg(model: vgg.VGG) -> _Names:
    n = 0
    for stage, depth in enumerate(model.depths, start=1):
        for i in range(1, depth + 1):
            yield f"stage_{stage}/conv_{i}/conv", f"features.{n}"
            yield f"stage_{stage}/conv_{i}/norm", f"features.{n + 1}"
            n += 2 if model.norm == "none" else 3  # beside the activation
        n += 1  # the pooling
    yield "hidden_1", "classifier.0"
    yield "hidden_1/kernel", "classifier.0.weight", *_flattened(1 if model.stem == "small" else 7)
    yield "hidden_2", "classifier.3"
    yield "head", "classifier.6"


def _vgg_timm(model: vgg.VGG) -> _Names:
    theirs = {"hidden_1": "pre_logits.fc1", "hidden_2": "pre_logits.fc2", "head": "head.fc"}
    for ours, key, *view in _vgg(model):
        if not ours.startswith("hidden_1/"):  # a convolution there, with nothing to be unflattened
            yield (ours, theirs.get(ours, key), *view)


def _alexnet(model: alexnet.AlexNet) -> _Names:
    for i, n in enumerate((0, 3, 6, 8, 10), start=1):
        yield f"conv_{i}/conv", f"features.{n}"
    yield "hidden_1", "classifier.1"
    yield "hidden_1/kernel", "classifier.1.weight", *_flattened(3 if model.stem == "small" else 6)
    yield "hidden_2", "classifier.4"
    yield "head", "classifier.6"


def _googlenet(model: inception.GoogLeNet) -> _Names:
    units = {f"stem_{i}": f"conv{i}" for i in (1, 2, 3)}
    branches = {"1x1_1": "1", "3x3_1": "2.0", "3x3_2": "2.1", "5x5_1": "3.0", "5x5_2": "3.1", "pool_2": "4.1"}
    for module in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        units |= {f"inception_{module}/{ours}": f"inception{module}.branch{n}" for ours, n in branches.items()}
    yield from _conv_bn(units)


def _inception_v3(model: inception.InceptionV3) -> _Names:
    figure_5 = "1x1_1 5x5_1 5x5_2 3x3_1 3x3_2 3x3_3 pool_2", "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool"
    first_shrink = "3x3_1 3x3_twice_1 3x3_twice_2 3x3_twice_3", "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3"
    figure_6 = (
        "1x1_1 7x7_1 7x7_2 7x7_3 7x7_twice_1 7x7_twice_2 7x7_twice_3 7x7_twice_4 7x7_twice_5 pool_2",
        "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    )
    second_shrink = "3x3_1 3x3_2 7x7_1 7x7_2 7x7_3 7x7_4", "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"
    figure_7 = (
        "1x1_1 3x3_1 3x3_2_left 3x3_2_right 3x3_twice_1 3x3_twice_2 3x3_twice_3_left 3x3_twice_3_right pool_2",
        "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool",
    )
    modules = dict.fromkeys(("5b", "5c", "5d"), figure_5) | {"6a": first_shrink}
    modules |= dict.fromkeys(("6b", "6c", "6d", "6e"), figure_6) | {"7a": second_shrink}
    modules |= dict.fromkeys(("7b", "7c"), figure_7)
    units = {
        f"stem_{i}": f"Conv2d_{n}" for i, n in enumerate(("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3"), start=1)
    }
    for i, (module, names) in enumerate(modules.items(), start=1):
        pairs = zip(*(side.split() for side in names), strict=True)
        units |= {f"mixed_{i}/{ours}": f"Mixed_{module}.branch{theirs}" for ours, theirs in pairs}
    yield from _conv_bn(units)


def _conv_bn(units: Mapping[str, str]) -> _Names:
    """Convolutions with their norms, by our name, and the classifier: what both Inceptions are made of."""
    for ours, theirs in units.items():
        yield f"{ours}/conv", f"{theirs}.conv"
        yield f"{ours}/norm", f"{theirs}.bn"
    yield "head", "fc"


def _densenet(model: densenet.DenseNet) -> _Names:
    yield "stem", "features.conv0"
    yield "stem_norm", "features.norm0"
    for stage, depth in enumerate(model.depths, start=1):
        for i in range(1, depth + 1):
            ours, theirs = f"stage_{stage}_layer_{i}", f"features.denseblock{stage}.denselayer{i}"
            for n in (1, 2):
                yield f"{ours}/norm_{n}", f"{theirs}.norm{n}"
                yield f"{ours}/conv_{n}", f"{theirs}.conv{n}"
        yield f"transition_{stage + 1}_norm", f"features.transition{stage}.norm"
        yield f"transition_{stage + 1}", f"features.transition{stage}.conv"
    yield "head_norm", "features.norm5"
    yield "head", "classifier"


def _convnext(model: convnext.ConvNeXt) -> _Names:
    yield "stem", "features.0.0"
    yield "stem_norm", "features.0.1"
    for stage, depth in enumerate(model.depths, start=1):
        yield f"downsample_{stage}_norm", f"features.{2 * stage - 2}.0"
        yield f"downsample_{stage}", f"features.{2 * stage - 2}.1"
        for i in range(depth):
            ours, theirs = f"stage_{stage}_block_{i + 1}", f"features.{2 * stage - 1}.{i}"
            for part, n in (("depthwise", 0), ("norm", 2), ("expand", 3), ("project", 5)):
                yield f"{ours}/{part}", f"{theirs}.block.{n}"
            yield f"{ours}/layer_scale/scale", f"{theirs}.layer_scale", np.ravel, lambda value: value[:, None, None]
    yield "head_norm", "classifier.0"
    yield "head", "classifier.2"


def _convnext_timm(model: convnext.ConvNeXt) -> _Names:
    yield "stem", "stem.0"
    yield "stem_norm", "stem.1"
    for stage, depth in enumerate(model.depths, start=1):
        yield f"downsample_{stage}_norm", f"stages.{stage - 1}.downsample.0"
        yield f"downsample_{stage}", f"stages.{stage - 1}.downsample.1"
        for i in range(depth):
            ours, theirs = f"stage_{stage}_block_{i + 1}", f"stages.{stage - 1}.blocks.{i}"
            for part, key in (
                ("depthwise", "conv_dw"),
                ("norm", "norm"),
                ("expand", "mlp.fc1"),
                ("project", "mlp.fc2"),
            ):
                yield f"{ours}/{part}", f"{theirs}.{key}"
            yield f"{ours}/layer_scale/scale", f"{theirs}.gamma"
    yield "head_norm", "head.norm"
    yield "head", "head.fc"


def _inverted_residuals(model: efficientnet.EfficientNet | mobilenet.MobileNetV2 | mobilenet.MobileNetV3) -> _Names:
    yield "stem/conv", "conv_stem"
    yield "stem/norm", "bn1"
    for stage, i in itertools.product(range(7), range(20)):  # more than any of these networks has
        ours, theirs = f"stage_{stage + 1}_block_{i + 1}", f"blocks.{stage}.{i}"
        units = (
            {"depthwise": "dw", "project": "pw"}
            if stage == 0
            else {"expand": "pw", "depthwise": "dw", "project": "pwl"}
        )
        for n, (unit, conv) in enumerate(units.items(), start=1):
            yield f"{ours}/{unit}/conv", f"{theirs}.conv_{conv}"
            yield f"{ours}/{unit}/norm", f"{theirs}.bn{n}"
        for part in ("reduce", "expand"):
            yield f"{ours}/squeeze_excite/{part}", f"{theirs}.se.conv_{part}"
    if isinstance(model, efficientnet.EfficientNet | mobilenet.MobileNetV2):
        yield "last/conv", "conv_head"
        yield "last/norm", "bn2"
    else:
        stages = {"large": 6, "small": 5}[model.size]
        yield "last/conv", f"blocks.{stages}.0.conv"
        yield "last/norm", f"blocks.{stages}.0.bn1"
        yield "hidden", "conv_head"
    yield "head", "classifier"


def _mobilenet_v2(model: mobilenet.MobileNetV2) -> _Names:
    yield "stem/conv", "features.0.0"
    yield "stem/norm", "features.0.1"
    n = 1
    for stage, depth in enumerate(model.depths, start=1):
        for i in range(1, depth + 1):
            ours, theirs = f"stage_{stage}_block_{i}", f"features.{n}.conv"
            units = ("depthwise",) if stage == 1 else ("expand", "depthwise")
            for m, unit in enumerate(units):
                yield f"{ours}/{unit}/conv", f"{theirs}.{m}.0"
                yield f"{ours}/{unit}/norm", f"{theirs}.{m}.1"
            yield f"{ours}/project/conv", f"{theirs}.{len(units)}"
            yield f"{ours}/project/norm", f"{theirs}.{len(units) + 1}"
            n += 1
    yield "last/conv", f"features.{n}.0"
    yield "last/norm", f"features.{n}.1"
    yield "head", "classifier.1"


def _vit(model: vit.VisionTransformer) -> _Names:
    yield "stem", "patch_embed.proj"
    yield "class_token", "cls_token"
    yield "class_position_embedding", "pos_embed", *_CLASS_POSITION
    yield "position_embedding", "pos_embed", *_GRID_POSITIONS
    for i in range(model.depth):
        ours, theirs = f"block_{i}", f"blocks.{i}"
        yield f"{ours}/attention_norm", f"{theirs}.norm1"
        yield f"{ours}/attention/qkv", f"{theirs}.attn.qkv"
        yield f"{ours}/attention/project", f"{theirs}.attn.proj"
        yield f"{ours}/feed_forward_norm", f"{theirs}.norm2"
        yield f"{ours}/feed_forward/expand", f"{theirs}.mlp.fc1"
        yield f"{ours}/feed_forward/project", f"{theirs}.mlp.fc2"
    yield "norm", "norm"
    yield "head", "head"


def _vit_torchvision(model: vit.VisionTransformer) -> _Names:
    yield "stem", "conv_proj"
    yield "class_token", "class_token"
    yield "class_position_embedding", TORCHVISION_POSITIONS, *_CLASS_POSITION
    yield "position_embedding", TORCHVISION_POSITIONS, *_GRID_POSITIONS
    for i in range(model.depth):
        ours, theirs = f"block_{i}", f"encoder.layers.encoder_layer_{i}"
        yield f"{ours}/attention_norm", f"{theirs}.ln_1"
        yield f"{ours}/attention/qkv/kernel", f"{theirs}.self_attention.in_proj_weight"
        yield f"{ours}/attention/qkv/bias", f"{theirs}.self_attention.in_proj_bias"
        yield f"{ours}/attention/project", f"{theirs}.self_attention.out_proj"
        yield f"{ours}/feed_forward_norm", f"{theirs}.ln_2"
        yield f"{ours}/feed_forward/expand", f"{theirs}.mlp.0"
        yield f"{ours}/feed_forward/project", f"{theirs}.mlp.3"
    yield "norm", "encoder.ln"
    yield "head", "heads.head"


# Who has names for a family -> those names. Where nothing else is said timm's are torchvision's.
_FAMILIES: dict[type[nn.Module], dict[str, Callable[[Any], _Names]]] = {
    resnet.ResNet: {"torchvision": _resnet},
    resnext.ResNeXt: {"torchvision": _resnet},
    resnetv2.ResNetV2: {"timm": _resnetv2},
    vgg.VGG: {"torchvision": _vgg, "timm": _vgg_timm},
    alexnet.AlexNet: {"torchvision": _alexnet},
    inception.GoogLeNet: {"torchvision": _googlenet},
    inception.InceptionV3: {"torchvision": _inception_v3},
    densenet.DenseNet: {"torchvision": _densenet},
    convnext.ConvNeXt: {"torchvision": _convnext, "timm": _convnext_timm},
    efficientnet.EfficientNet: {"timm": _inverted_residuals},
    mobilenet.MobileNetV2: {"torchvision": _mobilenet_v2, "timm": _inverted_residuals},
    mobilenet.MobileNetV3: {"timm": _inverted_residuals},
    vit.VisionTransformer: {"timm": _vit, "torchvision": _vit_torchvision},
}
