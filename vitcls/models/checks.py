"""Checks that every model makes before its first layer: one clear line for a field or an image that cannot work."""

import math
import typing
from collections.abc import Mapping

import flax.linen as nn

from vitcls.core import errors
from vitcls.models import convolutions, layers

_CHOICES = {
    "activation": tuple(layers.ACTIVATIONS),
    "norm": layers.NORMS,
    "grouped_conv": convolutions.GROUPED_CONV_FORMS,
    "dtype": ("float32", "bfloat16"),
    "remat": layers.REMATS,
}


_MOST_LAYERS, _MOST = 10_000, 2**24


def check_fields(model: nn.Module, choices: Mapping[str, tuple] | None = None) -> None:
    """Raises ValueError for a value that cannot work.

    Text must be among its `choices` (those of fields that models share are known here); fields of whole numbers are at
    least 1 and no more than a network can be made of, those of fractions at least 0, and of these the ones with 'drop'
    in their name are probabilities below 1.
    """
    for field, valid in (_CHOICES | dict(choices or {})).items():
        value = getattr(model, field, valid[0])
        if value not in valid:
            raise ValueError(errors.not_known(f"{field}", str(value), valid))
    for field, declared in model.__dataclass_fields__.items():
        value, fraction = getattr(model, field, None), float in (declared.type, *typing.get_args(declared.type))
        if value == ():
            raise ValueError(f"{field}=() is impossible; it needs an entry for each stage")
        parts = value if isinstance(value, tuple) else (value,)
        for part in parts:
            if isinstance(part, bool) or not isinstance(part, int | float):
                continue
            low, high, expected = 0, math.inf, "at least 0"
            if isinstance(part, int) and not fraction:
                most = _MOST_LAYERS if "depth" in field else _MOST
                low, high, expected = 1, most + 1, f"at least 1, and at most {most:,}"
            elif "drop" in field:
                high, expected = 1, "in [0, 1)"
            if not low <= part < high:
                raise ValueError(f"{field}={value} is impossible; it must be {expected}")


def check_size(shape: tuple[int, ...], smallest: int, advice: str = "") -> None:
    """Raises ValueError for images [B, H, W, C] with a side below `smallest`; `advice`: what else would help."""
    height, width = shape[1:3]
    if min(height, width) < smallest:
        raise ValueError(
            f"images of {height}x{width} pixels are too small for this model, whose smallest is {smallest}x{smallest}; "
            f"make them {smallest}x{smallest} or larger{advice}"
        )


def check_stem(model: nn.Module, shape: tuple[int, ...], smallest: Mapping[str, int]) -> None:
    """Raises ValueError for an unknown `stem` and for images too small for it; `smallest`: stem -> pixels."""
    if model.stem not in smallest:
        raise ValueError(errors.not_known("stem", model.stem, smallest))
    helps = smallest["small"] < smallest[model.stem]
    check_size(shape, smallest[model.stem], ", or stem='small'" if helps else "")


def check_same_length(model: nn.Module, *fields: str, length: int | None = None) -> None:
    """Raises ValueError where fields with one entry for each stage do not have the same number, or not `length`."""
    values = [getattr(model, field) for field in fields]
    expected = len(values[0]) if length is None else length
    if any(len(value) != expected for value in values):
        said = " and ".join(f"{field}={value}" for field, value in zip(fields, values, strict=True))
        raise ValueError(f"{said} must have {expected} entries, one for each stage")
