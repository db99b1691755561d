"""XLA's convolutions against shifted products: single layers, and a training step of ResNeXt-50.

    python -m benchmarks.grouped_conv [--out=DIR] [--repeats=5] [--step]

The fastest form on a platform belongs into convolutions.FORM_BY_PLATFORM. `--step` adds the training step.
"""

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import harness, workload
from vitcls import cli, partition
from vitcls.models import convolutions

FORMS = ("xla", "shifted", "mixed")


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


def layer_calls(form: str, shape: Layer) -> dict[str, Callable]:
    """Calls of one layer, float32: forward, and forward and backward."""
    layer = convolutions.GroupedConv(shape.features, shape.kernel, shape.groups, shape.stride, form=form)
    images = jax.random.normal(jax.random.key(0), (shape.batch, shape.side, shape.side, shape.channels))
    variables = layer.init(jax.random.key(1), images[:1])
    forward = jax.jit(layer.apply)
    gradients = jax.jit(jax.value_and_grad(lambda v, x: jnp.sum(jnp.sin(layer.apply(v, x))), argnums=(0, 1)))
    return {
        "forward": functools.partial(forward, variables, images),
        "forward + backward": functools.partial(gradients, variables, images),
    }


def step_call(form: str) -> Callable:
    """A training step of ResNeXt-50 32x4d, 16 images of 64x64."""
    overrides = (f"model.grouped_conv={form}", "optimizer.name=sgd")
    config = workload.make_config("resnext50_32x4d", 16, overrides=overrides)
    info = workload.make_info("resnext50_32x4d", image_size=64)
    return workload.Trainer(config, info, partition.all_devices("data"))


def main(argv: list[str]) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--step", action="store_true", help="the training step of ResNeXt-50 too; minutes on a CPU")
    flags = parser.parse_args(argv)

    rows = []

    def compare(what: str, calls: dict[str, Callable]) -> None:
        timings = harness.alternate(calls, repeats=flags.repeats)
        row: harness.Row = {"what": what}
        for form, timing in timings.items():
            row |= {f"{form} ms": 1e3 * timing.median, f"{form} fastest..slowest": timing.spread()}
        for form in FORMS[1:]:
            row |= {f"xla / {form}": harness.ratio(timings["xla"], timings[form])} if form in timings else {}
        rows.append(row)

    for layer in LAYERS:
        calls = {form: layer_calls(form, layer) for form in FORMS}
        compare(f"{layer}: forward", {form: calls[form]["forward"] for form in ("xla", "shifted")})
        compare(f"{layer}: forward + backward", {form: calls[form]["forward + backward"] for form in FORMS})
    if flags.step:
        calls = {form: step_call(form) for form in ("xla", "shifted")}
        compare("ResNeXt-50 32x4d training step, 16x64x64x3", calls)
    harness.publish("grouped_conv", rows, flags.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
