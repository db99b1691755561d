"""Images per second of the input pipelines on real images, alone and under training.

    python -m benchmarks.input_pipeline --dataset=cifar10 --sizes=32,64 --model=improved_vit_tiny

Training on the images of a pipeline takes turns with training on one batch that stays on the devices: what the first
takes longer is waiting for input. The slower of host (the pipeline alone) and devices (the constant batch) limits. A
stream fills its buffer while the others have their turns: a call that is not timed empties it ahead of its own.
"""

import sys
import time

import jax
import numpy as np

from benchmarks import harness, workload
from benchmarks.sources import DATA_DIR_HELP
from vitcls import cli, data
from vitcls.core import sharding


def rate_alone(batches: data.TrainBatches, batch: int, length: int, seconds: float = 3.0) -> float:
    """Images per second that come out of a pipeline when nothing else runs, gathered on the devices."""
    gather = jax.jit(lambda given, step: jax.vmap(batches.batch_fn(given, step, length))(np.arange(length)))
    step = 0

    def one_call() -> None:
        nonlocal step
        jax.block_until_ready(gather(batches.host_inputs(step, length), np.int32(step)))
        step += length

    one_call()
    one_call()
    start, first = time.perf_counter(), step
    while time.perf_counter() - start < seconds:
        one_call()
    return (step - first) * batch / (time.perf_counter() - start)


def compare(size: int, args) -> list[harness.Row]:
    """Rows of both pipelines at one image size."""
    overrides = [*workload.dataset_overrides(args.dataset, args.data_dir), f"dataset.image_size={size}"]
    overrides += [f"steps_per_call={args.steps_per_call}", "dataset.validation=0.0", *args.override]
    config = workload.make_config(args.model, args.batch, dtype=args.dtype, overrides=tuple(overrides))
    dataset = data.load(config.dataset)
    info = data.describe(dataset, config.dataset)
    partition = sharding.all_devices("data")

    def batches(pipeline: str) -> data.TrainBatches:
        block = config.dataset.copy_and_resolve_references()
        block.pipeline = pipeline
        return data.train_batches(dataset, block, partition=partition, batch_size=args.batch, seed=0)

    pipelines, alone, failures = {}, {}, []
    for name in ("resident", "streaming"):
        source = batches(name)
        try:
            alone[name] = rate_alone(source, args.batch, args.steps_per_call)
            pipelines[name] = source
        except ImportError as error:  # streaming needs TensorFlow
            failures.append(
                {"data": info.name, "image size": info.image_shape[0], "pipeline": name, "error": str(error)}
            )
    constant = workload.ConstantBatch(partition, info, args.batch)
    trainers = {
        name: workload.Trainer(config, info, partition, source, calls=args.calls)
        for name, source in ({"constant": constant} | pipelines).items()
    }
    before = {name: trainers[name] for name in pipelines if name == "streaming"}
    timings = harness.alternate(trainers, repeats=args.repeats, before=before)
    images = trainers["constant"].images_per_call
    on_devices = images / timings["constant"].median
    rows = []
    for name in pipelines:
        slower = harness.ratio(timings[name], timings["constant"])
        rows.append(
            {
                "data": info.name,
                "image size": info.image_shape[0],
                "pipeline": name,
                "alone images/s": alone[name],
                "constant batch images/s": on_devices,
                "training images/s": images / timings[name].median,
                "fastest..slowest ms": timings[name].spread(),
                "training / constant": slower,
                "waiting for input %": max(0.0, 100 * (1 - 1 / slower)),
                "limit": "devices" if alone[name] > on_devices else "host",
            }
        )
    return rows + failures


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--dataset", default="cifar10", help="as config.dataset.name")
    flags.add_argument("--data_dir", default="", help=f"as config.dataset.data_dir, or {DATA_DIR_HELP}")
    flags.add_argument("--sizes", type=harness.integers, default="0", help="pixels; 0 is the size of the data")
    flags.add_argument("--model", default="improved_vit_tiny")
    flags.add_argument("--batch", type=int, default=32)
    flags.add_argument("--steps_per_call", type=int, default=1)
    flags.add_argument("--calls", type=int, default=5, help="dispatches in one timed call")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--override", action="append", default=[], help="config key=value")
    args = flags.parse_args(argv)
    rows = []
    for size in args.sizes:
        rows += compare(size, args)
        jax.clear_caches()
    harness.publish("input_pipeline", rows, args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
