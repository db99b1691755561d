"""Smaller weights: rounded to fewer bits, or set to 0 where they are small."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.core.errors import UserError
from vitcls.optim.masks import map_with_path
from vitcls.optim.pruning import magnitude_masks, masked

PyTree = Any
PRECISIONS = ("float32", "float16", "bfloat16", "int8")


class Quantized(NamedTuple):
    """Whole numbers, and what one of them is worth in each output channel."""

    values: np.ndarray  # int8 [..., C], of -127 to 127
    scale: np.ndarray  # float32 [C]


def pruned(variables: PyTree, fraction: float) -> PyTree:
    """The variables with the smallest `fraction` of each kernel at 0."""
    params = variables["params"]
    return {**variables, "params": jax.tree.map(np.asarray, masked(params, magnitude_masks(params, fraction)))}


def round_weights(variables: PyTree, precision: str) -> PyTree:
    """The parameters of two and more dimensions as float16 or bfloat16, or kernels as `Quantized`; the rest as it is.

    Raises UserError for a weight that float16 cannot hold.
    """
    if precision == "float32":
        return variables
    rounded = map_with_path(lambda path, leaf: _rounded(path, np.asarray(leaf), precision), variables["params"])
    return {**variables, "params": rounded}


def _rounded(path: str, leaf: np.ndarray, precision: str) -> np.ndarray | Quantized:
    if leaf.ndim < 2 or (precision == "int8" and path.rpartition("/")[2] != "kernel"):
        return leaf
    if precision == "int8":
        return quantize(leaf)
    with np.errstate(over="ignore"):
        found = leaf.astype(jnp.dtype(precision))
    if not np.isfinite(found).all():
        raise UserError(f"{path} has weights too large for {precision}; take --quantize=bfloat16")
    return found


def quantize(kernel: np.ndarray) -> Quantized:
    """A kernel [..., C], each output channel in 255 steps that lie evenly around 0."""
    largest = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return Quantized(np.rint(kernel / scale).astype(np.int8), scale)


def restore(variables: PyTree) -> PyTree:
    """What `round_weights` has made, as float32 again; inside of a program, which so holds the smaller ones."""

    def restored(leaf):
        if isinstance(leaf, Quantized):
            scale = jnp.asarray(leaf.scale).reshape((1,) * (leaf.values.ndim - 1) + (-1,))
            return jnp.asarray(leaf.values).astype(jnp.float32) * scale
        return jnp.asarray(leaf).astype(jnp.float32) if leaf.dtype in (jnp.float16, jnp.bfloat16) else leaf

    return jax.tree.map(restored, variables, is_leaf=lambda leaf: isinstance(leaf, Quantized))
