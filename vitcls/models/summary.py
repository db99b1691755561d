"""What a model is made of and costs: parameters, FLOPs, and a table of its parts."""

import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vitcls.models import flops, forms
from vitcls.models.variables import ImageShape, variable_shapes

PyTree = Any


def count_parameters(params: PyTree) -> int:
    """The number of parameters in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def count_bytes(tree: PyTree) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def flops_per_image(model: nn.Module, image_shape: ImageShape, *, products_only: bool = False) -> float:
    """FLOPs of one forward pass of one image, 2 per multiply-add; see `flops.count`."""
    return sum(_flops_by_part(model, image_shape, products_only=products_only).values())


def _flops_by_part(model: nn.Module, image_shape: ImageShape, *, products_only: bool = False) -> dict[str, float]:
    shapes = variable_shapes(model, image_shape)
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    plain = dict.fromkeys(forms.FIELDS, "xla")  # so that no platform or kernel counts otherwise
    model = model.clone(**{field: form for field, form in plain.items() if hasattr(model, field)})
    trace = jax.make_jaxpr(lambda variables, images: model.apply(variables, images, train=False))
    return flops.count(trace(shapes, image).jaxpr, products_only=products_only)


def parameter_table(model: nn.Module, image_shape: ImageShape) -> str:
    """Parameters and forward FLOPs per image of the model's parts, as text; numbered parts are summed."""
    parameters = {part: count_parameters(tree) for part, tree in variable_shapes(model, image_shape)["params"].items()}
    part_flops = _flops_by_part(model, image_shape)
    groups: dict[str, list[str]] = {}
    for part in [*parameters, *(part for part in part_flops if part not in parameters)]:
        groups.setdefault(re.sub(r"_\d+$", "", part), []).append(part)
    rows = [
        (
            f"{group} x {len(parts)}" if len(parts) > 1 else parts[0],
            sum(parameters.get(part, 0) for part in parts),
            sum(part_flops.get(part, 0) for part in parts) / 1e6,
        )
        for group, parts in groups.items()
    ]
    rows = [row for row in rows if row[1] or row[2] >= 0.005]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return "\n".join(
        [f"          {'part':<28}{'parameters':>14}{'MFLOPs/image':>16}"]
        + [f"          {name:<28}{count:>14,}{megaflops:>16,.2f}" for name, count, megaflops in rows]
    )
