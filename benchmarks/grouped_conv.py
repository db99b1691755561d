"""XLA's grouped convolution against shifted products: single layers, and a training step of ResNeXt-50.

    python -m benchmarks.grouped_conv [--out=DIR] [--repeats=5] [--step]

The faster form on a platform belongs into layers.FORM_BY_PLATFORM. `--step` adds the training step at 64x64, batch 16.
"""

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from benchmarks import harness
from vitcls import cli, models
from vitcls.models import layers

# channels, groups, kernel, stride, side of the image, batch
LAYERS = (
    (128, 32, 3, 1, 16, 16),
    (256, 32, 3, 2, 16, 16),
    (256, 32, 3, 1, 8, 16),
    (512, 32, 3, 1, 4, 16),
    (1024, 32, 3, 1, 2, 16),
    (256, 8, 5, 1, 16, 16),
    (512, 1, 3, 1, 2, 16),  # ungrouped, on maps smaller than the kernel
    (512, 1, 3, 2, 4, 16),
    (512, 1, 3, 1, 4, 16),
    (96, 96, 3, 1, 16, 16),  # depthwise
    (144, 144, 3, 2, 16, 16),
    (96, 96, 7, 1, 16, 16),
)
FORMS = ("xla", "shifted")


def layer_calls(form: str, channels: int, groups: int, kernel: int, stride: int, side: int, batch: int):
    """Calls of one layer, float32: forward, and forward and backward."""
    layer = layers.GroupedConv(channels, kernel, groups, stride, form=form)
    images = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
    variables = layer.init(jax.random.key(1), images)
    forward = jax.jit(layer.apply)
    gradients = jax.jit(jax.value_and_grad(lambda v, x: jnp.sum(jnp.sin(layer.apply(v, x))), argnums=(0, 1)))
    return {
        "forward": functools.partial(forward, variables, images),
        "forward + backward": functools.partial(gradients, variables, images),
    }


def step_call(form: str, *, side: int = 64, batch: int = 16):
    """A step of ResNeXt-50 32x4d with SGD, 1000 classes, float32."""
    model = models.create("resnext50_32x4d", 1000, grouped_conv=form)
    images = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
    labels = jnp.arange(batch)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), images)
    optimizer = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(params, batch_stats, opt_state):
        def loss(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    params = variables["params"]
    arguments = (params, variables["batch_stats"], optimizer.init(params))
    return lambda: step(*arguments)


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
        rows.append(row | {"xla / shifted": harness.ratio(timings["xla"], timings["shifted"])})

    for shape in LAYERS:
        channels, groups, kernel, stride, side, batch = shape
        name = f"{batch}x{side}x{side}x{channels}, {groups} groups, {kernel}x{kernel} stride {stride}"
        calls = {form: layer_calls(form, *shape) for form in FORMS}
        for direction in ("forward", "forward + backward"):
            compare(f"{name}: {direction}", {form: calls[form][direction] for form in FORMS})
    if flags.step:
        compare("ResNeXt-50 32x4d training step, 16x64x64x3", {form: step_call(form) for form in FORMS})
    harness.publish("grouped_conv", rows, flags.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
