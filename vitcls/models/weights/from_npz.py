"""Weights of Google's ViT, AugReg and BiT files, named as their own code names them -> the variables of our models."""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np

from vitcls import models
from vitcls.core.errors import UserError
from vitcls.models import resnetv2, vit
from vitcls.models.weights.arrays import Arrays
from vitcls.models.weights.matching import Rule, collect, shapes_of

POSITIONS = "Transformer/posembed_input/pos_embedding"
_LEFT_OUT = re.compile(r"pre_logits/")  # of a model before fine-tuning


def from_npz(
    name: str,
    weights: Arrays,
    *,
    num_classes: int = 1000,
    image_shape: tuple[int, int, int] | None = None,
    head: bool = True,
    **fields: Any,
) -> dict:
    """The variables of `models.create(name, num_classes, **fields)`: nested dicts of C-contiguous arrays.

    `weights` of a ViT are by 'Transformer/encoderblock_0/LayerNorm_0/scale' and so on (Dosovitskiy et al. 2021; Steiner
    et al. 2021, arXiv 2106.10270), of a BiT by 'resnet/block1/unit01/a/standardized_conv2d/kernel' (Kolesnikov et al.
    2020). `image_shape` [H, W, C] says for which size a ViT's positions were learned. Without `head` the classifier is
    left out. Raises UserError as `from_torch` does.
    """
    model = models.create(name, num_classes, **fields)
    rules = rules_for(name, model)
    shapes = shapes_of(name, model, image_shape)
    return collect(name, shapes, functools.partial(_rule, name, rules), weights, _LEFT_OUT, head=head)


def rules_for(name: str, model: nn.Module) -> dict[str, Rule]:
    """Our path of a weight -> what it is made of; the first is of the stem.

    Raises UserError for a model that has no names there.
    """
    if type(model) not in _FAMILIES:
        raise UserError(f"{name} cannot take weights of an .npz file of Google's; a vit_* or a resnetv2_*_bit can")
    return _FAMILIES[type(model)](model)


def _rule(name: str, rules: dict[str, Rule], path: str) -> Rule:
    ours = path.partition("/")[2]
    if ours not in rules:
        raise UserError(f"{name} cannot take weights of an .npz file of Google's: no name is known for '{path}'")
    return rules[ours]


def _resnetv2(model: resnetv2.ResNetV2) -> dict[str, Rule]:
    rules = {
        "stem/conv/kernel": _same("resnet/root_block/standardized_conv2d/kernel"),
        **_norm("head_norm", "resnet"),
        **_both("head", "resnet/head/conv2d"),
    }
    for stage, depth in enumerate(model.depths, start=1):
        for i in range(1, depth + 1):
            ours, theirs = f"stage_{stage}_block_{i}", f"resnet/block{stage}/unit{i:02}"
            units = {"conv_1": "a", "conv_2": "b", "conv_3": "c", "shortcut": "a/proj"}
            for unit, key in units.items():
                rules[f"{ours}/{unit}/conv/kernel"] = _same(f"{theirs}/{key}/standardized_conv2d/kernel")
            for n, key in enumerate("abc", start=1):
                rules |= _norm(f"{ours}/norm_{n}", f"{theirs}/{key}")
    return rules


def _norm(ours: str, theirs: str) -> dict[str, Rule]:
    """Of groups."""
    names = {"scale": "gamma", "bias": "beta"}
    return {f"{ours}/{leaf}": _same(f"{theirs}/group_norm/{key}") for leaf, key in names.items()}


def _vit(model: vit.VisionTransformer) -> dict[str, Rule]:
    rules = {
        **_both("stem", "embedding"),
        "class_token": _same("cls"),
        "class_position_embedding": Rule((POSITIONS,), lambda shape, value: _fitted(shape, value[:, :1])),
        "position_embedding": Rule((POSITIONS,), lambda shape, value: _fitted(shape, value[:, 1:])),
        **_both("head", "head"),
        **_both("norm", "Transformer/encoder_norm", "scale"),
    }
    for i in range(model.depth):
        ours, theirs = f"block_{i}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        rules |= _both(f"{ours}/attention_norm", f"{theirs}/LayerNorm_0", "scale")
        rules |= _both(f"{ours}/feed_forward_norm", f"{theirs}/LayerNorm_2", "scale")
        rules |= _both(f"{ours}/feed_forward/expand", f"{theirs}/MlpBlock_3/Dense_0")
        rules |= _both(f"{ours}/feed_forward/project", f"{theirs}/MlpBlock_3/Dense_1")
        rules |= _both(f"{ours}/attention/project", f"{attention}/out")
        for leaf in ("kernel", "bias"):
            keys = tuple(f"{attention}/{part}/{leaf}" for part in ("query", "key", "value"))
            rules[f"{ours}/attention/qkv/{leaf}"] = Rule(keys, _joined)
    return rules


def _both(ours: str, theirs: str, first: str = "kernel") -> dict[str, Rule]:
    return {f"{ours}/{leaf}": _same(f"{theirs}/{leaf}") for leaf in (first, "bias")}


def _same(key: str) -> Rule:
    return Rule((key,), _fitted)


def _fitted(shape: tuple[int, ...], value: np.ndarray) -> np.ndarray | None:
    """Heads, patches and ones of a shape are only its way to be written: [H, d, D] is [H d, D]."""
    fits = value.size == np.prod(shape) and value.shape[-1:] == shape[-1:]
    return value.reshape(shape) if fits else None


def _joined(shape: tuple[int, ...], *parts: np.ndarray) -> np.ndarray | None:
    """Query, key and value as one matrix [D, 3 D], or bias [3 D]."""
    width = shape[-1] // 3
    if any(part.size * 3 != np.prod(shape) for part in parts):
        return None
    return np.concatenate([part.reshape(*shape[:-1], width) for part in parts], axis=-1)


_FAMILIES: dict[type[nn.Module], Callable[[Any], dict[str, Rule]]] = {
    vit.VisionTransformer: _vit,
    resnetv2.ResNetV2: _resnetv2,
}
