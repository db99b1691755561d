"""What is searched: values for config keys."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vitcls import config as configs
from vitcls import config_file
from vitcls.core import errors
from vitcls.core.errors import UserError

COSTS = ("flops_per_image", "latency_ms")  # of which less is better


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values: numbers, words, True or False, tuples of them."""

    values: Sequence[Any]
    only_if: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # other keys of the space: the value they have

    def index(self, value: Any) -> int:
        """The place of a value, which may have been through JSON, where a tuple is a list."""
        return [json.dumps(each) for each in self.values].index(json.dumps(value))


@dataclasses.dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, whole where both are; with `log` every factor is as likely as any other."""

    low: float
    high: float
    log: bool = False
    only_if: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclasses.dataclass(frozen=True)
class Space:
    """Config keys and what they may be, in an order in which each stands after those that its `only_if` names.

    With a `cost` of the report the search has two objectives, and ends in a Pareto front.
    """

    keys: Mapping[str, Choice | Number]
    cost: str = ""  # 'flops_per_image', 'latency_ms'


def load(file: os.PathLike | str, config: ConfigDict) -> Space:
    """The space of 'PATH' or 'PATH:PRESET'; raises UserError for what is wrong with it, or is no key of `config`."""
    space = config_file.call(file, "get_space")
    if not isinstance(space, Space) or not space.keys:
        raise UserError(f"get_space() of {file} does not return a vitcls.tune.Space with keys")
    if space.cost and space.cost not in COSTS:
        raise errors.unknown(f"cost of {file}", space.cost, COSTS)
    for key, values in space.keys.items():
        if not isinstance(key, str) or not isinstance(values, (Choice, Number)):
            raise UserError(f"{file}: {key!r} is {values!r}; keys are text, and what they may be a Choice or a Number")
        _check(key, values, space, os.fspath(file))
        for value in values.values if isinstance(values, Choice) else (values.low, values.high):
            config_file.override(config.copy_and_resolve_references(), key, str(value))
    return space


def _check(key: str, values: Choice | Number, space: Space, file: str) -> None:
    before = list(space.keys)[: list(space.keys).index(key)]
    for other, wanted in values.only_if.items():
        if other not in before:
            raise UserError(f"{file}: '{key}' depends on '{other}', which does not stand before it")
        if isinstance(space.keys[other], Choice) and wanted not in space.keys[other].values:
            raise UserError(f"{file}: '{key}' is for '{other}' of {wanted!r}, which is none of its values")
    if isinstance(values, Choice) and not values.values:
        raise UserError(f"{file}: '{key}' has no values to choose from")
    if not isinstance(values, Number):
        return
    ends = (values.low, values.high)
    if not all(isinstance(end, (int, float)) and math.isfinite(end) for end in ends):
        raise UserError(f"{file}: '{key}' goes from {ends[0]!r} to {ends[1]!r}, which must be two numbers")
    if not (values.low < values.high and (values.low > 0 or not values.log)):
        raise UserError(f"{file}: '{key}' goes from {values.low} to {values.high}; with log=True from above 0")


def apply(config: ConfigDict, values: Mapping[str, Any], *, timing: bool = False) -> ConfigDict:
    """A resolved config with other values; its report is of the validation split, and measures if `timing`.

    Raises UserError where it cannot work.
    """
    config = config.copy_and_resolve_references()
    for key, value in sorted(values.items(), key=lambda item: item[0] not in config_file.NAMES):
        config_file.override(config, key, str(value))
    config.report.update(split="validation", timing=timing)
    config = configs.resolve(config)
    configs.validate(config)
    return config
