"""Which parameters are decayed, orthogonalised, frozen or trained at another rate: by their paths."""

import re
from collections.abc import Callable
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

PyTree = Any


def decay_mask(params: PyTree) -> PyTree:
    """True for the parameters that weight decay and the L2 term apply to: the kernels of dense and convolution layers.

    Biases, the scales of norms and layers, embeddings and tokens (every parameter not named 'kernel') are left out.
    """
    return map_with_path(lambda path, _: path.rpartition("/")[2] == "kernel", params)


_OUTER_LAYER = re.compile(r"embed|(^|/)(stem|head|classifier)")
_FEW_CHANNELS = 4


def muon_dimension_numbers(params: PyTree) -> PyTree:
    """How Muon sees each parameter as a matrix [inputs, outputs]; None for those that Adam takes.

    Muon gets the 2-D kernels, and the 4-D kernels [height, width, inputs, outputs] with all but the last axis as
    inputs. Adam gets embeddings, stem, head, biases, norms, and convolutions that see at most 4 channels at a time
    (of an image, or depthwise and narrow grouped ones): they are no wide linear maps.
    """

    def dimension_numbers(path: str, param: jax.Array) -> MuonDimensionNumbers | None:
        if path.rpartition("/")[2] != "kernel" or _OUTER_LAYER.search(path):
            return None
        if param.ndim == 2:
            return MuonDimensionNumbers(0, 1)
        if param.ndim == 4 and param.shape[2] > _FEW_CHANNELS:
            return MuonDimensionNumbers((0, 1, 2), 3)
        return None

    return map_with_path(dimension_numbers, params)


def map_with_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps function('/'-joined path, leaf) over a tree."""
    return jax.tree.map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree
    )


def rate_multipliers(pairs: tuple[tuple[str, float], ...], params: PyTree) -> PyTree:
    """The learning-rate multiplier of every parameter, a tree of floats; raises ValueError for what cannot be."""
    compiled = [_compile(pair) for pair in pairs]
    paths = jax.tree.leaves(map_with_path(lambda path, _: path, params))
    for pattern, _ in compiled:
        if not any(map(pattern.search, paths)):
            raise ValueError(
                f"multipliers: '{pattern.pattern}' is found in no parameter's path; paths look like '{paths[0]}'"
            )
    return map_with_path(
        lambda path, _: next((number for pattern, number in compiled if pattern.search(path)), 1.0), params
    )


def _compile(pair: tuple[str, float]) -> tuple[re.Pattern, float]:
    try:
        text, number = pair
        pattern, number = re.compile(text), float(number)
    except re.error as error:
        raise ValueError(f"multipliers: '{text}' is not a regular expression: {error}") from None
    except (TypeError, ValueError):
        raise ValueError(f"multipliers: {pair!r} is not a pair ('regex', number)") from None
    if not 0 <= number <= 1e6:
        raise ValueError(f"multipliers={pair!r} is impossible; it must be a regex and a number in [0, 1e6]")
    return pattern, number
