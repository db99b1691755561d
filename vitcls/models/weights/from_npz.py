"""Weights of Google's ViT and AugReg files, named as their JAX code names them -> the variables of our models."""

import functools
import re
from typing import Any

import numpy as np

from vitcls import models
from vitcls.core.errors import UserError
from vitcls.models import vit
from vitcls.models.weights.arrays import Arrays
from vitcls.models.weights.matching import Rule, collect, shapes_of

STEM = "embedding/kernel"
HEAD = "head/kernel"
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
    """The variables of the ViT `models.create(name, num_classes, **fields)`: nested dicts of C-contiguous arrays.

    `weights` are by 'Transformer/encoderblock_0/LayerNorm_0/scale' and so on (Dosovitskiy et al. 2021; Steiner et al.
    2021, arXiv 2106.10270). `image_shape` [H, W, C] says for which size the positions were learned. Without `head` the
    classifier is left out. Raises UserError as `from_torch` does.
    """
    model = models.create(name, num_classes, **fields)
    if type(model) is not vit.VisionTransformer:
        raise UserError(f"{name} cannot take weights of a ViT's .npz file; a vit_* model can")
    shapes, rules = shapes_of(name, model, image_shape), _rules(model.depth)
    return collect(name, shapes, functools.partial(_rule, name, rules), weights, _LEFT_OUT, head=head)


def _rule(name: str, rules: dict[str, Rule], path: str) -> Rule:
    ours = path.partition("/")[2]
    if ours not in rules:
        raise UserError(f"{name} cannot take weights of a ViT's .npz file: no name is known for '{path}'")
    return rules[ours]


def _rules(depth: int) -> dict[str, Rule]:
    """What each weight of ours is made of."""
    rules = {
        "class_token": _same("cls"),
        "class_position_embedding": Rule((POSITIONS,), lambda shape, value: _fitted(shape, value[:, :1])),
        "position_embedding": Rule((POSITIONS,), lambda shape, value: _fitted(shape, value[:, 1:])),
        **_both("stem", "embedding"),
        **_both("head", "head"),
        **_both("norm", "Transformer/encoder_norm", "scale"),
    }
    for i in range(depth):
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
