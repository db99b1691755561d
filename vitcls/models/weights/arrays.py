"""Arrays of a file that are read when they are asked for, whose headers nobody has to trust."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from vitcls.core.errors import UserError

MAX_HEADER_BYTES = 2**24  # the largest real ones have a few hundred kilobytes
MAX_NAMES = 100_000
_MAX_DIMENSIONS = 8


class LazyArray(NamedTuple):
    """An array by its shape and type; `read()` fetches it. `np.asarray` of it does too."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


Arrays = Mapping[str, LazyArray | np.ndarray]


def unusable(path: str, why: str) -> UserError:
    return UserError(f"{path} cannot be used as weights: {why}")


def checked_shape(path: str, name: str, shape: object) -> tuple[int, ...]:
    """A shape that a header claims; raises UserError for what cannot be one."""
    whole = isinstance(shape, list | tuple) and all(type(size) is int and 0 <= size < 2**40 for size in shape)
    if not whole or len(shape) > _MAX_DIMENSIONS:
        raise unusable(path, f"the shape {str(shape)[:60]} of '{name[:60]}' is impossible")
    return tuple(shape)
