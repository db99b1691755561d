"""What interrupts training: the evaluation of 10,000 images with all metrics, and the saving of a checkpoint.

    python -m benchmarks.interruptions --model=improved_vit_small --dtype=bfloat16

Goals: evaluation under 2 s on an accelerator after compilation, its host part (ROC curves of 100 classes, the rest of
the report's numbers) under 1 s; a checkpoint holds training up no longer than the copy of the state to the host.
"""

import sys
import tempfile

import jax
import numpy as np

from benchmarks import harness, workload
from vitcls import cli, data, metrics
from vitcls.core import sharding
from vitcls.models import summary
from vitcls.training import announce, checkpoint
from vitcls.training.evaluator import make_evaluator


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--model", default="improved_vit_small")
    flags.add_argument("--images", type=int, default=10_000)
    flags.add_argument("--batch", type=int, default=500)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = flags.parse_args(argv)
    config = workload.make_config(args.model, args.batch, dtype=args.dtype)
    info = workload.make_info(args.model, num_classes=100)
    partition = sharding.all_devices("data")
    trainer = workload.Trainer(config, info, partition)
    random = np.random.default_rng(0)
    labels = random.integers(0, 100, args.images, np.int32)
    split = data.Split(random.integers(0, 256, (args.images, *info.image_shape), np.uint8), labels)
    batches = data.EvaluationBatches(
        split, image_shape=info.image_shape, partition=partition, batch_size=partition.round_up(args.batch)
    )
    evaluator = make_evaluator(config, trainer.training.model, info, partition)
    variables = trainer.state.variables

    def on_devices() -> np.ndarray:
        probabilities = np.empty((args.images, info.num_classes), np.float32)
        evaluator(variables, batches, probabilities)
        return probabilities

    def on_host() -> None:
        metrics.classification_report(metrics.evidence_of(labels, probabilities), info.class_names)

    probabilities = on_devices()
    evaluation = harness.alternate(
        {
            "devices": on_devices,
            "host": on_host,
            "roc": lambda: metrics.roc_curves(labels, probabilities) and None,
        },
        repeats=args.repeats,
    )

    state = trainer.state
    with (
        tempfile.TemporaryDirectory() as directory,
        checkpoint.Checkpoints(directory, keep=1, metric="eval/loss") as manager,
    ):
        saved = iter(range(1_000_000))

        def save() -> None:
            manager.save(next(saved), {"state": state}, record={}, metrics=None)

        def copy() -> None:
            jax.device_get(jax.tree.map(jax.numpy.copy, state))

        # The first turn lets the writing of the last save end, so that it disturbs neither the copy nor the next save.
        stalls = harness.alternate({"wait": manager.wait, "copy": copy, "save": save}, repeats=args.repeats)

    size = f"{args.images:,} images, 100 classes"
    rows = [
        ("evaluation on the devices", size, evaluation["devices"]),
        ("all metrics on the host", size, evaluation["host"]),
        ("of which the ROC curves", size, evaluation["roc"]),
        ("a checkpoint holds training up", announce.mebibytes(summary.count_bytes(state)), stalls["save"]),
        ("copy of the state to the host", announce.mebibytes(summary.count_bytes(state)), stalls["copy"]),
    ]
    rows = [
        {"what": what, "of": of, "seconds": timing.median, "fastest..slowest": timing.spread(1)}
        for what, of, timing in rows
    ]
    harness.publish("interruptions", rows, args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
