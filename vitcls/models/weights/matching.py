"""Puts arrays that have others' names where a model of ours has its own, and says all at once what does not fit."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from vitcls import models
from vitcls.core.errors import UserError
from vitcls.models.variables import variable_shapes
from vitcls.models.weights.arrays import Arrays

_LISTED = 8  # names of each kind; the rest are counted
_HEAD = re.compile(r"\w+/head/")


class Rule(NamedTuple):
    """What a weight of ours is made of."""

    keys: tuple[str, ...]
    make: Callable[..., np.ndarray | None]  # (our shape, *arrays) -> the weight, None where it does not fit


class DoesNotFit(UserError):
    """Weights that are not those of a model, in `count` places."""

    def __init__(self, message: str, count: int):
        super().__init__(message)
        self.count = count


class Problems:
    """What is wrong with the weights for a model; `raise_any` says all of it in one line."""

    def __init__(self, name: str):
        self._name = name
        self._missing: list[str] = []
        self._wrong: list[str] = []
        self._unusable: list[str] = []

    def missing(self, key: str, path: str) -> None:
        self._missing.append(f"'{key}', which {self._name} needs for '{path}'")

    def wrong(self, shape: tuple[int, ...], key: str, path: str, expected: tuple[int, ...]) -> None:
        axes = ": its axes are in another order" if sorted(shape) == sorted(expected) else ""
        self._wrong.append(
            f"the shape {shape} of '{key}' does not fit '{path}' of {self._name}, which is {expected}{axes}"
        )

    def no_weights(self, key: str, why: str) -> None:
        self._unusable.append(f"'{key}' {why}")

    def raise_any(self, unused: Iterable[str] = ()) -> None:
        """Raises DoesNotFit where anything is missing, does not fit or is too much."""
        lines, unused = [], list(unused)
        if self._missing:
            lines.append("the weights have no " + _listed(self._missing, ", no "))
        if self._wrong:
            lines.append(_listed(self._wrong, ", "))
        if self._unusable:
            lines.append(_listed(self._unusable, ", "))
        if unused:
            first, *rest = [f"'{key}'" for key in unused]
            others = f"; the others: {_listed(rest, ', ')}" if rest else ""
            lines.append(
                f"{self._name} has no place for {len(unused)} of the weights, the first of them {first}{others}"
            )
        if lines:
            count = sum(map(len, (self._missing, self._wrong, self._unusable, unused)))
            raise DoesNotFit("; ".join(lines), count)


def _listed(items: list[str], separator: str) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return separator.join(items[:_LISTED]) + more


def shapes_of(name: str, model, image_shape: tuple[int, int, int] | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The weights of a model by path, such as 'params/stem/kernel', by shapes alone."""
    shapes = variable_shapes(model, tuple(image_shape or models.preset(name).image_shape))
    return traverse_util.flatten_dict(shapes, sep="/")


def require_fields(name: str, model: nn.Module, needed: Iterable[tuple[type, str, Any]], publisher: str) -> None:
    """Raises UserError where a field of the model is not as a network of its family `needed` it for its weights."""
    for family, field, value in needed:
        if isinstance(model, family) and getattr(model, field) != value:
            raise UserError(f"{name} can take weights of {publisher} with {field}={value!r} only")


def is_head(path: str) -> bool:
    """Whether a weight belongs to the classifier itself."""
    return _HEAD.match(path) is not None


def collect(
    name: str,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    rule: Callable[[str], Rule],
    weights: Arrays,
    left_out: re.Pattern,
    *,
    head: bool = True,
    label: Callable[[str], str] = str,
) -> dict:
    """The variables of a model, nested dicts of C-contiguous arrays; without `head` they lack the classifier.

    `label` is what a name is called in the source.

    Raises DoesNotFit, one line, for all weights that are missing, do not fit, are no numbers or are too many.
    """
    problems, variables = Problems(name), {}
    largest = sum(leaf.size for leaf in shapes.values())  # what has more numbers than the model is not even read
    unused = dict.fromkeys(key for key in weights if not left_out.match(key))
    for path, leaf in shapes.items():
        keys, make = rule(path)
        for key in keys:
            unused.pop(key, None)
        if not head and is_head(path):
            continue
        absent = [key for key in keys if key not in weights]
        for key in absent:
            problems.missing(key, path)
        if absent:
            continue
        given = [weights[key] for key in keys]
        readable = all(math.prod(_shape(array)) <= largest for array in given)
        value = make(leaf.shape, *map(np.asarray, given)) if readable else None
        if value is None:
            sizes = [math.prod(_shape(array)) for array in given]
            worst = next((i for i, size in enumerate(sizes) if size != leaf.size), 0)
            problems.wrong(_shape(given[worst]), keys[worst], path, leaf.shape)
            continue
        if not jax.numpy.issubdtype(value.dtype, np.floating):
            problems.no_weights(keys[0], f"has numbers of type {value.dtype.name}, not floating-point ones")
        elif not np.isfinite(value).all():
            problems.no_weights(keys[0], "has numbers that are not finite")
        variables[path] = np.array(value, leaf.dtype, order="C")  # as what writes plain bytes needs it; a copy
    problems.raise_any(map(label, unused))
    return traverse_util.unflatten_dict(variables, sep="/")


def _shape(array) -> tuple[int, ...]:
    """Without reading an array that is lazy."""
    return tuple(array.shape) if hasattr(array, "shape") else np.shape(array)
