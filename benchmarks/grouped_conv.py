"""XLA's convolutions against shifted products: single layers, and a training step of ResNeXt-50.

    python -m benchmarks.grouped_conv [--out=DIR] [--repeats=5] [--step]
    python -m benchmarks.grouped_conv --dtype=bfloat16 --scale=16 --calls=50 --step --image_size=224    # a GPU

The form that trains the fastest on a platform belongs into forms.FASTEST_GROUPED_CONV. `--step` adds the training
step, `--calls` shares a dispatch between layers that take no longer than one.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import jax

from benchmarks import harness, workload
from vitcls import cli
from vitcls.core import sharding
from vitcls.models import convolutions

FORMS = ("xla", "shifted", "mixed", "merged", "dense")


class Layer(NamedTuple):
    """A convolution of square images."""

    batch: int
    side: int
    channels: int
    features: int
    groups: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        images = f"{self.batch}x{self.side}x{self.side}x{self.channels}"
        groups = f"{self.groups} groups" if self.groups > 1 else "1 group"
        return f"{images} to {self.features}, {groups}, {self.kernel}x{self.kernel} stride {self.stride}"


LAYERS = (
    Layer(16, 16, 128, 128, groups=32, kernel=3, stride=1),
    Layer(16, 16, 256, 256, groups=32, kernel=3, stride=2),
    Layer(16, 8, 256, 256, groups=32, kernel=3, stride=1),
    Layer(16, 4, 512, 512, groups=32, kernel=3, stride=1),
    Layer(16, 2, 1024, 1024, groups=32, kernel=3, stride=1),
    Layer(16, 16, 256, 256, groups=8, kernel=5, stride=1),
    Layer(32, 32, 24, 24, groups=4, kernel=3, stride=1),
    Layer(32, 32, 64, 64, groups=4, kernel=3, stride=1),
    # Depthwise.
    Layer(16, 16, 96, 96, groups=96, kernel=3, stride=1),
    Layer(16, 16, 144, 144, groups=144, kernel=3, stride=2),
    Layer(16, 16, 96, 96, groups=96, kernel=7, stride=1),
    # Ungrouped: on maps smaller than the kernel, in many places, and in between.
    Layer(16, 2, 512, 512, groups=1, kernel=3, stride=1),
    Layer(16, 4, 512, 512, groups=1, kernel=3, stride=2),
    Layer(16, 4, 512, 512, groups=1, kernel=3, stride=1),
    Layer(128, 8, 256, 256, groups=1, kernel=3, stride=1),
    Layer(128, 16, 128, 128, groups=1, kernel=3, stride=1),
    Layer(128, 32, 64, 64, groups=1, kernel=3, stride=1),
    Layer(128, 32, 3, 64, groups=1, kernel=3, stride=1),
    Layer(32, 64, 3, 64, groups=1, kernel=7, stride=2),
)


def layer_calls(form: str, shape: Layer, dtype: str, calls: int) -> dict[str, Callable]:
    """Calls of one layer: forward, and forward and backward."""
    layer = convolutions.GroupedConv(shape.features, shape.kernel, shape.groups, shape.stride, form=form, dtype=dtype)
    images = jax.random.normal(jax.random.key(0), (shape.batch, shape.side, shape.side, shape.channels), dtype)
    variables = layer.init(jax.random.key(1), images[:1])
    return harness.forward_and_backward(layer.apply, (variables, images), calls)


def step_call(form: str, batch: int, image_size: int, dtype: str) -> workload.Trainer:
    """Training steps of ResNeXt-50 32x4d; 'shifted' is for its grouped convolutions alone, 'cpu' for all."""
    overrides = (f"model.grouped_conv={form}", "optimizer.name=sgd")
    config = workload.make_config("resnext50_32x4d", batch, dtype=dtype, overrides=overrides)
    info = workload.make_info("resnext50_32x4d", image_size=image_size)
    return workload.Trainer(config, info, sharding.all_devices("data"))


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--scale", type=int, default=1, help="times as many images in every batch")
    parser.add_argument("--calls", type=int, default=1, help="calls of a layer in one program")
    parser.add_argument("--step", action="store_true", help="the training step of ResNeXt-50 too; minutes on a CPU")
    parser.add_argument("--image_size", type=int, default=64, help="of the step, pixels")
    flags = parser.parse_args(argv)

    rows = []

    def compare(what: str, turns: dict[str, Callable], calls: int = 1) -> None:
        timings = harness.alternate(turns, repeats=flags.repeats)
        row: harness.Row = {"what": what, "dtype": flags.dtype}
        for form, timing in timings.items():
            row |= {f"{form} ms": 1e3 * timing.median / calls, f"{form} fastest..slowest": timing.spread(1e3 / calls)}
        row |= {f"xla / {form}": harness.ratio(timings["xla"], timings[form]) for form in timings if form != "xla"}
        rows.append(row)

    for layer in LAYERS:
        layer = layer._replace(batch=layer.batch * flags.scale)
        calls = {form: layer_calls(form, layer, flags.dtype, flags.calls) for form in FORMS}
        for direction, forms in (("forward", ("xla", "shifted", "merged")), ("forward + backward", FORMS)):
            compare(f"{layer}: {direction}", {form: calls[form][direction] for form in forms}, flags.calls)
    if flags.step:
        size, batch = flags.image_size, 16 * flags.scale
        turns = {form: step_call(form, batch, size, flags.dtype) for form in ("xla", "shifted", "merged", "cpu")}
        compare(f"ResNeXt-50 32x4d training step, {batch}x{size}x{size}x3", turns)
    harness.publish("grouped_conv", rows, flags.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
