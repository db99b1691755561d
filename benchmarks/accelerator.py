"""Everything that waits for an accelerator, in one command: correctness, benchmarks, memory, then real training.

    python -m benchmarks.accelerator --out=results [--data_dir=DIR] [--only=throughput,attention] [--list]

Every part is a command of its own, which is printed before it runs, and a part that fails does not stop the others.
The tables are under --out, one of all trainings and their means among them, and so are the workdirs of the trainings,
which go on where they were when this command is given again. The goals are for one NVIDIA H200 in bfloat16.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks import harness
from vitcls import cli, errors

SEEDS, SPRINT_SEEDS = (0, 1, 2), range(20)
CORRECTNESS = (
    "tests/test_steps.py",
    "tests/models/test_vit.py",
    "tests/models/test_layers.py",
    "tests/data/test_augment.py",
)
SPEEDS = (  # model, batch, images per second of training that are hoped for
    ("improved_vit_small", 1024, 25_000),
    ("vit_small_patch16", 256, 8_000),
    ("vit_base_patch16", 256, 2_100),
    ("resnet50", 256, 3_500),
    ("resnext50_32x4d", 256, 2_500),
)


class Part(NamedTuple):
    """A command and what is hoped of it."""

    name: str
    command: list[str]
    goal: str
    workdir: pathlib.Path | None = None  # of a training


def parts(out: pathlib.Path, data_dir: str) -> list[Part]:
    """All parts in the order of their worth."""
    found = []

    def bench(name: str, module: str, arguments: str, goal: str, *, folder: str = "") -> None:
        words = [*shlex.split(arguments), f"--out={out / (folder or name)}"]
        found.append(Part(name, [sys.executable, "-m", f"benchmarks.{module}", *words], goal))

    def train(name: str, config: str, seeds: Iterable[int], goal: str) -> None:
        for seed in seeds:
            workdir = out / f"{name}_{seed}"
            words = [f"--config=configs/{config}", f"--workdir={workdir}", f"--config.seed={seed}"]
            words.append(f"--config.dataset.data_dir={data_dir}")
            found.append(Part(name, [sys.executable, "-m", "vitcls.main", *words], goal, workdir))

    bf16, data = "--dtype=bfloat16", f"--data_dir={data_dir}"
    found.append(Part("correctness", [sys.executable, "-m", "pytest", "-q", *CORRECTNESS], "all pass on the device"))
    bench("attention", "attention", bf16, "the presets take the winner")
    bench("grouped_conv", "grouped_conv", "--step", "FORM_BY_PLATFORM takes the winner")
    for model, batch, goal in SPEEDS:
        arguments = f"--model={model} --batch={batch} {bf16} --calls=10"
        bench("throughput", "throughput", arguments, f"{goal:,} images/s", folder=f"throughput_{model}")
    for model in ("vit_small_patch4", *(model for model, *_ in SPEEDS[1:])):
        arguments = f"--model={model} --batch=256 {bf16}"
        bench("versus", "versus", arguments, "at least 1.0 times timm with torch.compile", folder=f"versus_{model}")
    bench("augmentation", "augmentation", f"--batch=512 {bf16} --calls=10", "RandAugment and mixup add less than 3 %")
    bench("interruptions", "interruptions", bf16, "evaluation within 2 s, its host part within 1 s")
    pipeline = f"--model=improved_vit_small --batch=512 --steps_per_call=10 --sizes=32,64 {bf16} {data}"
    bench("input_pipeline", "input_pipeline", pipeline, "resident within 2 % of a constant batch")
    large = "--model=vit_large_patch16 --batch=256 --memory_limit_gib=40 --repeats=2"
    large += f" --override model.remat=True --override optimizer.accumulate=8 {bf16}"
    bench("memory", "throughput", large, "ViT-L/16 at 224 trains with batch 256 within 40 GiB")
    bench("epoch", "versus", f"--epoch --batch=512 --repeats=3 {bf16} {data}", "faster than a DataLoader loop")
    bench("startup", "startup", "--config=configs/vit_digits.py", "imports within their limits")
    bench("scaling", "scaling", f"--devices=1 --batch=256 {bf16}", "with more devices: --devices=1,2,4,8 by hand")
    train("vit_cifar100", "vit_cifar100.py", SEEDS, "gate 81 %, goal 83 %, within 10 minutes")
    train("vit_cifar100_muon", "vit_cifar100.py:muon", SEEDS, "the challenger")
    train("resnext_cifar10", "resnext_cifar10.py", SEEDS[:1], "gate 96 %, goal 97 %")
    train("sprint_cifar10", "sprint_cifar10.py", SPRINT_SEEDS, "94 % on average in few seconds of training")
    bench("zoo", "throughput", f"--sweep --batch=64 {bf16}", "a row for every model")
    return found


def trained_row(part: Part, wall_seconds: float) -> harness.Row:
    """What a training that has ended came to."""
    results = json.loads((part.workdir / "report" / "metrics.json").read_text())
    seed = json.loads((part.workdir / "config.json").read_text())["seed"]
    return {
        "training": part.name,
        "seed": seed,
        "test accuracy %": 100 * results["accuracy"],
        "seconds of training": results["train_seconds"],
        "seconds of the command": wall_seconds,
        "goal": part.goal,
    }


def with_means(rows: list[harness.Row]) -> list[harness.Row]:
    """The rows, and after those of each training their means, and the deviation of the accuracy between seeds."""
    shown = []
    for name in dict.fromkeys(row["training"] for row in rows):
        runs = [row for row in rows if row["training"] == name]
        means = {key: statistics.fmean(row[key] for row in runs) for key in runs[0] if isinstance(runs[0][key], float)}
        deviation = statistics.stdev(row["test accuracy %"] for row in runs) if len(runs) > 1 else None
        shown += [*runs, {"training": name, "seed": f"mean of {len(runs)}"} | means | {"deviation": deviation}]
    return shown


def main(argv: list[str]) -> int:
    flags = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    flags.add_argument("--data_dir", default="", help="where TFDS keeps cifar10 and cifar100")
    flags.add_argument("--only", default="", help="names of parts, with commas between; all without")
    flags.add_argument("--list", action="store_true", help="print the commands and stop")
    args = flags.parse_args(argv)
    chosen = parts(args.out, args.data_dir)
    wanted = set(filter(None, args.only.split(",")))
    for name in wanted - {part.name for part in chosen}:
        raise errors.unknown("part", name, {part.name for part in chosen})
    failed, trained = [], []
    for part in chosen:
        if wanted and part.name not in wanted:
            continue
        print(f"\n== {part.name}: {part.goal}\n$ {shlex.join(part.command)}", flush=True)
        if args.list:
            continue
        start = time.monotonic()
        code = subprocess.run(part.command, env=os.environ | {"VITCLS_TEST_PLATFORM": "default"}).returncode
        seconds = time.monotonic() - start
        print(f"-- {part.name}: exit code {code} after {seconds:.0f} s", flush=True)
        failed += [part.name] * (code != 0)
        if part.workdir and code == 0:
            trained.append(trained_row(part, seconds))
    if trained:
        harness.publish("trainings", with_means(trained), str(args.out / "trainings"))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(cli.run(main))
