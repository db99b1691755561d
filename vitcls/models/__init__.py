"""The registry of models: names that users know -> Linen modules with the fields of a preset."""

import typing
from typing import Any

import flax.linen as nn
import jax
from ml_collections import config_dict

from vitcls.core import errors
from vitcls.core.registry import Registry
from vitcls.models import (
    airbench,
    alexnet,
    convnext,
    densenet,
    efficientnet,
    inception,
    mobilenet,
    resnet,
    resnetv2,
    resnext,
    small,
    vgg,
    vit,
)
from vitcls.models.preset import Preset

_FAMILIES = (
    vit,
    resnext,
    resnet,
    resnetv2,
    convnext,
    vgg,
    densenet,
    inception,
    efficientnet,
    mobilenet,
    alexnet,
    small,
    airbench,
)
_NOT_CONFIGURED = ("num_classes", "parent", "name")


class _Models(Registry):
    """name -> Preset, a module and what differs from the defaults of its fields, which are the keys of config.model."""

    def add(self, name: str, entry: Preset) -> None:
        """Adds a model from elsewhere; raises ValueError where the name is taken."""
        if name in self:
            raise ValueError(f"{self.key}.name='{name}' is taken by {self[name].module.__name__}")
        self._entries[name] = entry


MODELS = _Models(
    "config.model",
    {name: preset for family in _FAMILIES for name, preset in family.PRESETS.items()},
    separate=True,
)
add = MODELS.add


def names() -> list[str]:
    """The names of all models."""
    return sorted(MODELS)


def create(name: str, num_classes: int, **overrides: Any) -> nn.Module:
    """Builds the model `name`; `overrides` replace fields of its preset, and None means "as the preset says".

    Raises UserError for an unknown model or field, naming the nearest that is known.
    """
    known = fields(name)
    for field in overrides:
        if field not in known:
            raise errors.unknown(f"field of {name}", field, known)
    chosen = {field: value for field, value in overrides.items() if value is not None}
    return MODELS[name].module(num_classes=num_classes, **known | chosen)


def preset(name: str) -> Preset:
    """What is known of the model `name`: its paper, native image shape and number of classes; raises UserError."""
    return MODELS[name]


def learned_weights(model: nn.Module, params: dict) -> dict[str, jax.Array]:
    """What a model has learned that can be read as it is, such as its fusion weights: name -> scalar; {} for most.

    Under `pmap`, where `params` have a leading axis of devices, so have these.
    """
    return model.learned_weights(params) if hasattr(model, "learned_weights") else {}


def fields(name: str) -> dict[str, Any]:
    """Every field of the model `name` that a config may set, with the preset's value; plain JSON values."""
    chosen = preset(name)
    defaults = {field.name: field.default for field in _configured_fields(chosen.module)}
    return defaults | chosen.fields


def field_placeholders(name: str) -> dict[str, config_dict.FieldReference]:
    """For a config: field -> a value that is None until set, and then of the field's type."""
    return {
        field.name: config_dict.placeholder(typing.get_origin(field.type) or field.type)
        for field in _configured_fields(preset(name).module)
    }


def _configured_fields(module: type[nn.Module]):
    return [field for field in module.__dataclass_fields__.values() if field.name not in _NOT_CONFIGURED]
