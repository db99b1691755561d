"""Searches over config keys, by a validation split. A file of configs/spaces/ has `get_space()` -> `Space`."""

from vitcls.tune.space import Choice, Number, Space

__all__ = ["Choice", "Number", "Space"]
