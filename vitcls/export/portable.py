"""Programs in operations that older runtimes know."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core

_LIMIT = 3.832506856900711  # beyond it erf is 1 in float32
# erf(x) = x P(x^2) / Q(x^2), the coefficients of XLA and Eigen for float32, highest power first.
_ABOVE = (
    0.00022905065861350646,
    0.0034082910107109506,
    0.050955695062380861,
    0.18520832239976145,
    1.128379143519084,
)
_BELOW = (
    -1.1791602954361697e-7,
    0.000023547966471313185,
    0.0010179625278914885,
    0.014070470171167667,
    0.11098505178285362,
    0.49746925110067538,
    1.0,
)


def without_erf(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """`function` with erf as a fraction of polynomials, exact to float32.

    JAX writes erf as a composite operation of StableHLO that TensorFlow 2.21 cannot read.
    """

    def rewritten(images: jax.Array) -> jax.Array:
        closed = jax.make_jaxpr(function)(images)
        (result,) = _evaluate(closed.jaxpr, closed.consts, [images])
        return result

    return rewritten


def _evaluate(jaxpr: core.Jaxpr, consts: list, inputs: list) -> list:
    """The outputs of a jaxpr; what it calls is written in place."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(variable):
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        given = [read(variable) for variable in equation.invars]
        called = next((equation.params[key] for key in ("jaxpr", "call_jaxpr") if key in equation.params), None)
        if equation.primitive is jax.lax.erf_p:
            outputs = [_erf(*given)]
        elif isinstance(called, core.ClosedJaxpr) and equation.primitive.name not in ("scan", "while", "cond"):
            outputs = _evaluate(called.jaxpr, called.consts, given)
        else:
            outputs = equation.primitive.bind(*given, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(variable) for variable in jaxpr.outvars]


def _erf(x: jax.Array) -> jax.Array:
    wide = jnp.clip(x.astype(jnp.float32), -_LIMIT, _LIMIT)
    above, below = (jnp.polyval(jnp.array(each, jnp.float32), wide * wide) for each in (_ABOVE, _BELOW))
    return (wide * above / below).astype(x.dtype)
