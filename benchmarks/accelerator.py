"""Everything that waits for an accelerator, in one command: correctness, benchmarks, memory, then real training.

    python -m benchmarks.accelerator --out=results [--data_dir=DIR] [--only=throughput,attention] [--list]

Every part is a command of its own, which is printed before it runs, and a part that fails does not stop the others.
The tables are under --out, one of all trainings and their means among them, and so are the workdirs of the trainings.
A training that was stopped goes on where it was when this command is given again (its seconds are then not in the
table), and one that has ended is not repeated. The goals are for one NVIDIA H200 in bfloat16.
"""

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

from benchmarks import harness, workload
from vitcls import cli
from vitcls.core import errors

SEEDS, SPRINT_SEEDS = (0, 1, 2), range(20)
CORRECTNESS = (
    "tests/training/test_steps.py",
    "tests/models/test_vit.py",
    "tests/models/test_layers.py",
    "tests/data/test_augment.py",
)
MEANS = ("test accuracy %", "seconds of training", "seconds of the command")
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

    def bench(name: str, module: str, *arguments: str, goal: str, folder: str = "") -> None:
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, f"--out={out / (folder or name)}"]
        found.append(Part(name, command, goal))

    def train(name: str, config: str, dataset: str, seeds: Iterable[int], goal: str) -> None:
        for seed in seeds:
            workdir = out / f"{name}_{seed}"
            words = [f"--config=configs/{config}", f"--workdir={workdir}", f"--config.seed={seed}"]
            words += [f"--config.{key}={value}" for key, value in workload.dataset_fields(dataset, data_dir).items()]
            found.append(Part(name, [sys.executable, "-m", "vitcls.main", *words], goal, workdir))

    bf16, data = "--dtype=bfloat16", f"--data_dir={data_dir}"
    tests = [sys.executable, "-m", "pytest", "-q", "-W", "default", *CORRECTNESS]
    found.append(Part("correctness", tests, "all pass on the device"))
    bench("attention", "attention", bf16, "--calls=50", goal="the presets take the winner")
    layers = ("--scale=16", "--calls=20", "--step", "--image_size=224")
    bench("grouped_conv", "grouped_conv", bf16, *layers, goal="FASTEST_GROUPED_CONV takes the winner")
    for model, batch, images in SPEEDS:
        arguments = (f"--model={model}", f"--batch={batch}", bf16, "--calls=10")
        bench("throughput", "throughput", *arguments, goal=f"{images:,} images/s", folder=f"throughput_{model}")
    for model in ("vit_small_patch4", *(model for model, *_ in SPEEDS[1:])):
        arguments = (f"--model={model}", "--batch=256", bf16, "--peers=timm,timm_compiled")
        bench("versus", "versus", *arguments, goal="at least 1.0 times timm_compiled", folder=f"versus_{model}")
    bench("augmentation", "augmentation", "--batch=512", bf16, "--calls=10", goal="RandAugment, mixup: less than 3 %")
    bench("interruptions", "interruptions", bf16, goal="evaluation within 2 s, its host part within 1 s")
    pipeline = ("--model=improved_vit_small", "--batch=512", "--steps_per_call=10", "--sizes=32,64", bf16, data)
    bench("input_pipeline", "input_pipeline", *pipeline, goal="resident within 2 % of a constant batch")
    large = ("--model=vit_large_patch16", "--batch=256", "--memory_limit_gib=40", "--repeats=2", bf16)
    large += ("--override=model.remat=block", "--override=optimizer.accumulate=8")
    bench("memory", "throughput", *large, goal="ViT-L/16 at 224 trains with batch 256 within 40 GiB")
    epoch = ("--epoch", "--batch=512", "--repeats=3", "--peers=torch", bf16, data)
    bench("epoch", "versus", *epoch, goal="faster than a DataLoader loop")
    bench("startup", "startup", "--config=configs/vit_digits.py", goal="imports within their limits")
    bench("scaling", "scaling", "--devices=1", "--batch=256", bf16, goal="with more devices: --devices=1,2,4,8 by hand")
    train("vit_cifar100", "vit_cifar100.py", "cifar100", SEEDS, "gate 81 %, goal 83 %, within 10 minutes")
    train("vit_cifar100_muon", "vit_cifar100.py:muon", "cifar100", SEEDS, "the challenger")
    train("resnext_cifar10", "resnext_cifar10.py", "cifar10", SEEDS[:1], "gate 96 %, goal 97 %")
    train("sprint_cifar10", "sprint_cifar10.py", "cifar10", SPRINT_SEEDS, "94 % on average in few seconds of training")
    bench("zoo", "throughput", "--sweep", "--batch=64", bf16, goal="a row for every model")
    return found


class Trainings:
    """The table of all trainings in `out`, which is there after each of them, those of earlier commands included."""

    def __init__(self, out: pathlib.Path):
        self._out = out
        table = out / "trainings.json"
        rows = json.loads(table.read_text(encoding="utf-8"))["rows"] if table.is_file() else []
        self._rows = [row for row in rows if isinstance(row["seed"], int)]  # and not 'mean of 3'

    def __contains__(self, part: Part) -> bool:
        return str(part.workdir) in {row["workdir"] for row in self._rows}

    def add(self, part: Part, wall_seconds: float | None) -> None:
        self._rows.append(trained_row(part, wall_seconds))
        about = harness.in_child("benchmarks.harness", [])  # this process leaves the devices to the parts
        harness.publish("trainings", with_means(self._rows), str(self._out), about=about)


def trained_row(part: Part, wall_seconds: float | None) -> harness.Row:
    """What a training that has ended came to; `wall_seconds` is None where it was stopped and went on."""
    results = json.loads((part.workdir / "report" / "metrics.json").read_text(encoding="utf-8"))
    seed = json.loads((part.workdir / "config.json").read_text(encoding="utf-8"))["seed"]
    return {
        "training": part.name,
        "seed": seed,
        "test accuracy %": 100 * results["accuracy"],
        "seconds of training": results["train_seconds"],
        "seconds of the command": wall_seconds,
        "goal": part.goal,
        "workdir": str(part.workdir),
        "run": harness.RUN,
    }


def with_means(rows: list[harness.Row]) -> list[harness.Row]:
    """The rows, and after those of each training their means, and the deviation of the accuracy between seeds."""
    shown = []
    for name in dict.fromkeys(row["training"] for row in rows):
        runs = [row for row in rows if row["training"] == name]
        means = {
            key: statistics.fmean(row[key] for row in runs)
            for key in MEANS
            if all(row[key] is not None for row in runs)
        }
        deviation = statistics.stdev(row["test accuracy %"] for row in runs) if len(runs) > 1 else None
        shown += [*runs, {"training": name, "seed": f"mean of {len(runs)}"} | means | {"deviation": deviation}]
    return shown


def _environment() -> dict[str, str]:
    """Of a part: tests run on the accelerator, and each benchmark is a run of its own."""
    kept = {name: value for name, value in os.environ.items() if name != harness.RUN_VARIABLE}
    return kept | {"VITCLS_TEST_PLATFORM": "default"}


def main(argv: list[str]) -> int:
    flags = cli.Parser(description=__doc__)
    flags.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    flags.add_argument("--data_dir", default="", help=workload.DATA_DIR_HELP)
    flags.add_argument("--only", default="", help="names of parts, with commas between; all without")
    flags.add_argument("--list", action="store_true", help="print the commands and stop")
    args = flags.parse_args(argv)
    chosen = parts(args.out, args.data_dir)
    wanted = set(filter(None, args.only.split(",")))
    for name in wanted - {part.name for part in chosen}:
        raise errors.unknown("part", name, {part.name for part in chosen})
    trainings = Trainings(args.out)
    failed = []
    for part in chosen:
        if wanted and part.name not in wanted:
            continue
        print(f"\n== {part.name}: {part.goal}\n$ {shlex.join(part.command)}", flush=True)
        if args.list:
            continue
        if part in trainings:
            print(f"-- {part.name}: it has been run, see {args.out / 'trainings.md'}", flush=True)
            continue
        in_one_go = part.workdir and not part.workdir.exists()
        start = time.monotonic()
        code = subprocess.run(part.command, env=_environment()).returncode
        seconds = time.monotonic() - start
        print(f"-- {part.name}: exit code {code} after {seconds:.0f} s", flush=True)
        failed += [part.name] * (code != 0)
        if part.workdir and code == 0:
            trainings.add(part, seconds if in_one_go else None)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(cli.run(main))
