"""The table of all models: parameters, FLOPs and activation memory per image, native size and paper.

vitcls models [NAME ...] [--config.model.FIELD=VALUE ...] [--markdown | --parameters]
"""

import fnmatch
import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from vitcls import cli, config_file, models
from vitcls import config as configs
from vitcls.core.errors import UserError
from vitcls.core.registry import about
from vitcls.models import flops
from vitcls.models.variables import variable_shapes

_HEADER = """# Models

Every model of vitcls, at its native size and with the number of classes of its own task. This page is written by
`vitcls models --markdown`; a test keeps it current.

- *Parameters* leave out running statistics.
- *FLOPs* are those of one forward pass of one image, 2 per multiply-add.
- *Activations* are what one float32 image of a training step leaves for the backward pass, as the model is written,
  before XLA fuses or recomputes anything. `remat` and bfloat16 make it less.

"""


class Row(NamedTuple):
    """One model of the table."""

    name: str
    parameters: int
    flops: float
    activation_bytes: int
    image_shape: tuple[int, int, int]
    num_classes: int
    paper: str


def describe(name: str, fields: Mapping[str, Any] | None = None) -> Row:
    """Traces the model `name` by shapes alone, with other values of some fields; UserError for what cannot be."""
    preset = models.preset(name)
    model = models.create(name, preset.num_classes, **fields or {})
    images = jax.ShapeDtypeStruct((1, *preset.image_shape), "float32")
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda images: model.init(key, images, train=False), images)
    trace = jax.make_jaxpr(lambda variables, images: model.apply(variables, images, train=False))(variables, images)

    def saved_bytes(batch: int) -> int:
        def residuals(params, images):
            def forward(params):
                rest = {name: tree for name, tree in variables.items() if name != "params"}
                stats = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), rest)
                return model.apply(
                    {"params": params, **stats}, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
                )

            return jax.vjp(forward, params, has_aux=True)[1]

        images = jax.ShapeDtypeStruct((batch, *preset.image_shape), "float32")
        leaves = jax.tree.leaves(jax.eval_shape(residuals, variables["params"], images))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    return Row(
        name=name,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])),
        flops=sum(flops.count(trace.jaxpr).values()),
        activation_bytes=saved_bytes(2) - saved_bytes(1),  # so that what the batch shares cancels out
        image_shape=preset.image_shape,
        num_classes=preset.num_classes,
        paper=preset.paper,
    )


_COLUMNS = ("model", "parameters", "GFLOPs", "activations", "images", "classes", "paper")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.parameters:,}",
        f"{row.flops / 1e9:.3f}",
        f"{row.activation_bytes / 2**20:.1f} MiB",
        "x".join(map(str, row.image_shape)),
        f"{row.num_classes:,}",
        row.paper,
    )


def text_table(rows: list[Row]) -> str:
    """The rows under each other, for a terminal."""
    table = [_COLUMNS, *map(_cells, rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(_COLUMNS))]
    lines = []
    for cells in table:
        padded = [
            cell.ljust(width) if i in (0, len(cells) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def markdown_page(rows: list[Row]) -> str:
    """docs/models.md."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| --- " + "| ---: " * 5 + "| --- |"]
    for row in rows:
        name, *rest = _cells(row)
        lines.append("| " + " | ".join([f"`{name}`", *rest]) + " |")
    return _HEADER + "\n".join(lines) + "\n"


def parameters_table(name: str, fields: Mapping[str, Any]) -> str:
    """Every parameter of the model `name` at its native size: path, shape, dtype and count."""
    from clu import parameter_overview

    preset = models.preset(name)
    shapes = variable_shapes(models.create(name, preset.num_classes, **fields), preset.image_shape)
    return parameter_overview.get_parameter_overview(shapes["params"], include_stats=False)


def fields_of(name: str, overrides: list[tuple[str, str | None]]) -> dict[str, Any]:
    """What --config.model.FIELD=VALUE sets of the model `name`."""
    config = configs.default_config(name)
    for key, text in overrides:
        if not key.startswith("model.") or key in config_file.NAMES:
            raise UserError(f"--config.{key} changes no model of the table; only --config.model.FIELD=VALUE does")
        config_file.override(config, key, text)
    return {field: value for field, value in config.model.items() if field != "name" and value is not None}


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("models"), description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="models or patterns such as '*vit*'; default: all")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as docs/models.md has it")
    form.add_argument(
        "--parameters", action="store_true", help="the paths and shapes of all parameters, as optimizer.multipliers see"
    )
    rest, overrides = config_file.split_overrides(argv)
    flags = parser.parse_args(rest)
    names = [name for pattern in flags.names for name in fnmatch.filter(models.names(), pattern)]
    for pattern in flags.names:
        if not fnmatch.filter(models.names(), pattern):
            models.preset(pattern)  # says which is the nearest
    names = list(dict.fromkeys(names)) or models.names()
    rows = []
    for name in names:
        fields = fields_of(name, overrides)
        with about("config.model", fields):
            if flags.parameters:
                print(f"{name}\n{parameters_table(name, fields)}")
            else:
                rows.append(describe(name, fields))
    if rows:
        print((markdown_page if flags.markdown else text_table)(rows), end="")


if __name__ == "__main__":
    sys.exit(cli.run(main))
