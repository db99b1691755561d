"""A training step on a CPU as one device and as two virtual ones with half of the batch each, in one process by turns.

    python -m benchmarks.cpu_devices
    python -m benchmarks.cpu_devices --model=vit_tiny_patch4 --batch=64 --override model.hidden_dim=128

XLA's CPU backend runs chains of small operations on one core. What it says belongs into vitcls/training/cpu_devices.py.
"""

import sys

from benchmarks import harness
from vitcls import cli

_VIT = ("model.depth=3", "model.num_heads=4", "model.aggregation=mean")
CASES = (  # (model, pixels of a side, batch, overrides)
    ("lenet5", 32, 128, ()),
    ("mnist_cnn", 28, 128, ()),
    ("mnist_cnn_enhanced", 28, 64, ()),
    ("vit_tiny_patch4", 32, 64, (*_VIT, "model.hidden_dim=64", "model.mlp_dim=128")),
    ("vit_tiny_patch4", 32, 64, (*_VIT, "model.hidden_dim=128", "model.mlp_dim=256")),
    ("vit_tiny_patch4", 32, 64, (*_VIT, "model.hidden_dim=192", "model.mlp_dim=768")),
    ("vit_tiny_patch16", 64, 32, ()),
    ("airbench94", 32, 64, ()),
    ("resnet18", 32, 32, ("model.stem=small",)),
)


def describe(model: str, size: int, batch: int, overrides: tuple[str, ...], repeats: int) -> harness.Row:
    """One row: both steps, by turns."""
    import jax

    from benchmarks import workload
    from vitcls.core import sharding

    config = workload.make_config(model, batch, overrides=overrides)
    info = workload.make_info(model, image_size=size)
    devices = jax.devices("cpu")
    calls = {count: workload.Trainer(config, info, sharding.over(devices[:count], "data"), calls=4) for count in (1, 2)}
    timings = harness.alternate(calls, repeats=repeats)
    row: harness.Row = {"model": model, "image size": size, "batch": batch, "fields": ", ".join(overrides)}
    for count, name in ((1, "one device"), (2, "two")):
        row[f"{name} ms"] = 1e3 * timings[count].median / calls[count].steps_per_call
        row[f"{name} fastest..slowest"] = timings[count].spread(1e3 / calls[count].steps_per_call)
    return row | {"one / two": harness.ratio(timings[1], timings[2])}


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--model", default="", help="one of your own in place of the table's")
    flags.add_argument("--image_size", type=int, default=0)
    flags.add_argument("--batch", type=int, default=64)
    flags.add_argument("--override", action="append", default=[], help="config key=value")
    args = flags.parse_args(argv)
    cases = ((args.model, args.image_size, args.batch, tuple(args.override)),) if args.model else CASES
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    harness.publish("cpu_devices", [describe(*case, args.repeats) for case in cases], args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
