"""What no attack can do: bounds of a network's logits over all images of a box.

Interval bound propagation (Gowal et al. 2018, arXiv 1810.12715): each operation maps the box that holds its inputs to
one that holds its outputs. It costs two passes, and the bounds are loose where a network was not trained for them
(`vitcls.tasks.certified`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from vitcls.attacks.ball import Forward


class Unbounded(ValueError):
    """A network has an operation that no rule here bounds, such as those of attention and layer normalisation."""


class Interval(NamedTuple):
    """All arrays between two, both of one shape and float."""

    low: jax.Array
    high: jax.Array
    # Of a product with a matrix and what was added since: the half widths [B, D] of its inputs, and the matrix [D, K].
    product: tuple[jax.Array, jax.Array] | None = None


def logits(forward: Forward, low: jax.Array, high: jax.Array) -> Interval:
    """Bounds of `forward` over all images between two, float32 [B, H, W, C] each; up to the rounding of float32.

    What `forward` closes over, such as the parameters, may be traced and differentiated.

    Raises Unbounded for a network with an operation that is neither monotonous nor a product with a constant.
    """
    program = jax.make_jaxpr(forward)(low)
    (found,) = _evaluate(program.jaxpr, program.consts, [Interval(low, high)])
    return found if isinstance(found, Interval) else Interval(found, found)


def check(forward: Callable[[Any, jax.Array], jax.Array], variables: Any, images: jax.ShapeDtypeStruct) -> None:
    """Raises Unbounded where `forward(variables, images)` cannot be bounded, by the shapes of both alone."""
    jax.eval_shape(lambda variables, x: logits(lambda y: forward(variables, y), x, x)[:2], variables, images)


def largest_gaps(found: Interval, labels: jax.Array) -> jax.Array:
    """The most by which each logit can exceed that of the label, [B, K]; 0 for the label itself.

    Through the last matrix, so that two logits are not taken at their worst by different images of the box (section 3.2
    of the paper). An image whose gaps are all below 0 but that of the label keeps its class in the whole box.
    """
    own = jax.nn.one_hot(labels, found.low.shape[-1], dtype=found.low.dtype)
    if found.product is None:
        gaps = found.high - jnp.sum(found.low * own, axis=-1, keepdims=True)
    else:
        widths, matrix = found.product
        middle = _middle(found)
        spread = jnp.abs(matrix.T[None] - (own @ matrix.T)[:, None])  # [B, K, D]
        gaps = middle - jnp.sum(middle * own, axis=-1, keepdims=True) + jnp.sum(spread * widths[:, None], axis=-1)
    return gaps * (1 - own)


# Those that give more for more, in all of their inputs, so that the ends of a box go to the ends of the result.
_INCREASING = {
    "add", "add_any", "broadcast_in_dim", "ceil", "clamp", "concatenate", "convert_element_type", "copy", "cumsum",
    "erf", "exp", "expm1", "floor", "log", "log1p", "logistic", "max", "min", "pad", "reduce_max", "reduce_min",
    "reduce_precision", "reduce_sum", "reduce_window_max", "reduce_window_sum", "reshape", "rev", "round", "slice",
    "sqrt", "squeeze", "tanh", "transpose",
}  # fmt: skip
_INNER = ("jaxpr", "call_jaxpr")  # where operations that stand for others have those


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a program of which some inputs are intervals."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else known[variable]

    for equation in jaxpr.eqns:
        values = [read(variable) for variable in equation.invars]
        inner = next((equation.params[name] for name in _INNER if name in equation.params), None)
        if not any(isinstance(value, Interval) for value in values):
            found = _apply(equation, values)
        elif isinstance(inner, ClosedJaxpr):
            found = _evaluate(inner.jaxpr, inner.consts, values)
        elif isinstance(inner, Jaxpr):
            found = _evaluate(inner, (), values)
        else:
            found = [_bound(equation, values)]
        known.update(zip(equation.outvars, found, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(equation, values: Sequence[Any]) -> list[Any]:
    found = equation.primitive.bind(*values, **equation.primitive.get_bind_params(equation.params))
    return list(found) if equation.primitive.multiple_results else [found]


def _bound(equation, values: Sequence[Any]) -> Interval:
    """One operation on at least one interval."""
    name = equation.primitive.name

    def ends(*chosen):
        return _apply(equation, chosen)[0]

    if name == "convert_element_type" and not jnp.issubdtype(equation.params["new_dtype"], jnp.floating):
        raise Unbounded("numbers that it makes whole have no bounds")  # bytes begin again at 0
    if name in _INCREASING:
        return _kept_product(name, values, Interval(ends(*map(_low, values)), ends(*map(_high, values))))
    if name in ("neg", "erfc"):  # which fall
        return Interval(ends(values[0].high), ends(values[0].low))
    if name == "sub":
        return Interval(ends(_low(values[0]), _high(values[1])), ends(_high(values[0]), _low(values[1])))
    if name == "stop_gradient":
        return values[0]
    if name in ("mul", "div") and not (name == "div" and isinstance(values[1], Interval)):
        corners = [ends(a, b) for a in _ends(values[0]) for b in _ends(values[1])]
        return Interval(functools.reduce(jnp.minimum, corners), functools.reduce(jnp.maximum, corners))
    if name in ("dot_general", "conv_general_dilated") and not all(isinstance(value, Interval) for value in values):
        middle, reach = ends(*map(_middle, values)), ends(*map(_half_width, values))
        return Interval(middle - reach, middle + reach, _product(equation, *values))
    raise Unbounded(f"its operation '{name}' has no bounds")


def _product(equation, box: Any, matrix: Any) -> tuple[jax.Array, jax.Array] | None:
    """What `largest_gaps` asks of a product [B, D] x [D, K], None of another."""
    if equation.params["dimension_numbers"] != (((1,), (0,)), ((), ())) or not isinstance(box, Interval):
        return None
    return (_half_width(box), matrix) if matrix.ndim == 2 == box.low.ndim else None


def _kept_product(name: str, values: Sequence[Any], found: Interval) -> Interval:
    """A bias moves all images of a box alike."""
    boxes = [value for value in values if isinstance(value, Interval)]
    if name != "add" or len(boxes) != 1 or found.low.shape != boxes[0].low.shape:
        return found
    return found._replace(product=boxes[0].product)


def _low(value: Any) -> Any:
    return value.low if isinstance(value, Interval) else value


def _high(value: Any) -> Any:
    return value.high if isinstance(value, Interval) else value


def _middle(value: Any) -> Any:
    return (value.low + value.high) / 2 if isinstance(value, Interval) else value


def _half_width(value: Any) -> Any:
    """Of a constant what half a width is multiplied by."""
    return (value.high - value.low) / 2 if isinstance(value, Interval) else jnp.abs(value)


def _ends(value: Any) -> tuple[Any, ...]:
    return value[:2] if isinstance(value, Interval) else (value,)
