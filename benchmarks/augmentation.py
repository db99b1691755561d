"""What each augmentation adds to a training step.

    python -m benchmarks.augmentation --model=improved_vit_small --batch=512 --dtype=bfloat16

The step with it takes turns with the step without any. The goal on an accelerator is less than 3 % for RandAugment and
for mixup with the ViT preset.
"""

import sys

from benchmarks import harness, workload
from vitcls import cli
from vitcls.core import sharding

KINDS = {
    "crop + flip": ("crop.probability=1.0", "flip.probability=0.5"),
    "randaugment": ("randaugment.probability=1.0",),
    "trivialaugment": ("trivialaugment.probability=1.0",),
    "erase": ("erase.probability=0.25",),
    "mixup": ("mixup.probability=1.0",),
    "cutmix": ("cutmix.probability=1.0",),
    "recipe of vit_cifar100": (
        "crop.probability=1.0",
        "flip.probability=0.5",
        "randaugment.probability=1.0",
        "erase.probability=0.25",
        "mixup.probability=0.5",
        "cutmix.probability=0.5",
    ),
}


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--model", default="improved_vit_small")
    flags.add_argument("--image_size", type=int, default=32)
    flags.add_argument("--batch", type=int, default=32)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--calls", type=int, default=1, help="steps in one timed call")
    args = flags.parse_args(argv)
    info = workload.make_info(args.model, image_size=args.image_size)
    partition = sharding.all_devices("data")

    def trainer(kind: tuple[str, ...]) -> workload.Trainer:
        overrides = tuple(f"augment.{value}" for value in kind)
        config = workload.make_config(args.model, args.batch, dtype=args.dtype, overrides=overrides)
        return workload.Trainer(config, info, partition, calls=args.calls)

    plain = trainer(())
    rows = []
    for name, kind in KINDS.items():
        timings = harness.alternate({"without": plain, "with": trainer(kind)}, repeats=args.repeats)
        rows.append(
            {
                "augmentation": name,
                "step ms": 1e3 * timings["with"].median / args.calls,
                "fastest..slowest": timings["with"].spread(1e3 / args.calls),
                "without ms": 1e3 * timings["without"].median / args.calls,
                "added %": 100 * (harness.ratio(timings["with"], timings["without"]) - 1),
            }
        )
    harness.publish("augmentation", rows, args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
