"""FLOPs of a traced function, by the part of the model that asks for them; nothing is compiled or run."""

import math
from collections import defaultdict
from collections.abc import Callable

from jax.extend import core

_ELEMENTWISE = {
    "add", "sub", "mul", "div", "neg", "max", "min", "exp", "log", "log1p", "tanh", "logistic", "erf", "erfc", "sqrt",
    "rsqrt", "square", "pow", "integer_pow", "abs", "sign", "select_n",
}  # fmt: skip
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"}


def count(jaxpr: core.Jaxpr, *, products_only: bool = False) -> dict[str, float]:
    """Returns FLOPs by the first module below the model: 2 per multiply-add, 1 per other arithmetic operation.

    Only `dot_general` and `conv_general_dilated` have multiply-adds, and with `products_only` they alone count; moves
    and comparisons are free. What the model does itself, outside of its modules, is filed under 'itself'.
    """
    totals: dict[str, float] = defaultdict(float)
    _add(jaxpr, 1.0, "", totals, _products if products_only else _flops)
    return dict(totals)


def _add(
    jaxpr: core.Jaxpr,
    times: float,
    outer_path: str,
    totals: dict[str, float],
    flops_of: Callable[[core.JaxprEqn], float],
) -> None:
    for equation in jaxpr.eqns:
        path = "/".join(filter(None, (outer_path, str(equation.source_info.name_stack))))
        inner = [
            sub
            for value in equation.params.values()
            for sub in (value if isinstance(value, tuple | list) else (value,))
            if isinstance(sub, core.Jaxpr | core.ClosedJaxpr)
        ]
        for sub in inner:
            repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
            _add(sub.jaxpr if isinstance(sub, core.ClosedJaxpr) else sub, times * repeats, path, totals, flops_of)
        if not inner:
            totals[_part(path)] += times * flops_of(equation)


def _part(path: str) -> str:
    """'VisionTransformer/VisionTransformer._embed/stem/project' -> 'stem'; a name with a dot is a method."""
    names = [name for name in path.split("/")[1:] if "." not in name]
    return names[0] if names else "itself"


def _products(equation: core.JaxprEqn) -> float:
    name, output = equation.primitive.name, equation.outvars[0].aval
    if name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        return 2.0 * math.prod(output.shape) * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_axis = equation.params["dimension_numbers"].rhs_spec[0]
        return 2.0 * math.prod(output.shape) * math.prod(kernel) / kernel[out_axis]
    return 0.0


def _flops(equation: core.JaxprEqn) -> float:
    name, output = equation.primitive.name, equation.outvars[0].aval
    if name in _ELEMENTWISE:
        return float(math.prod(output.shape))
    if name in _REDUCTIONS:
        return float(math.prod(equation.invars[0].aval.shape))
    return _products(equation)
