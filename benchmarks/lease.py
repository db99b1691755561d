"""All that waits for an accelerator, the most valuable first, within the minutes of a lease.

    python -m benchmarks.lease --minutes=8 --out=results [--data_dir=DIR] [--wheels=DIR] [--only=NAME,...] [--list]

Every part is a command of its own, which is printed before it runs, and a part that fails does not stop the others.
What is written is there as soon as it is known: tables under --out, one line for each part in lease.json, and at the
end all of it, without checkpoints, in lease.tar.gz. Given again, the command goes on: a part that has ended is not
repeated, a training goes on where it was. On a bare machine with jax, flax, optax and orbax, `--wheels` names a folder
with wheels of what is missing (ml_collections, tensorboardX, ...); nothing but streaming input needs TensorFlow.
`--tiny` rehearses everything on a CPU with small shapes. The goals are for one NVIDIA H200 in bfloat16.
"""

import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks import harness
from benchmarks.sources import DATA_DIR_HELP, dataset_fields
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
SPEEDS = (  # model, batch, images per second of training that are hoped for, forms to compare
    ("vit_small_patch16", 256, 8_000, ("model.attention=auto", "model.attention=xla")),
    ("improved_vit_small", 1024, 25_000, ("model.attention=auto", "model.attention=xla")),
    ("resnet50", 256, 3_500, ("",)),
    ("vit_base_patch16", 256, 2_100, ("model.attention=auto",)),
    ("convnext_tiny", 256, 3_000, ("model.grouped_conv=xla", "model.grouped_conv=shifted")),
    ("resnext50_32x4d", 256, 2_500, ("model.grouped_conv=xla", "model.grouped_conv=merged")),
)
_LEFT_OUT = ("checkpoints", "cache")  # of the archive


class Part(NamedTuple):
    """A command and what is hoped of it."""

    name: str
    command: list[str]
    goal: str
    workdir: pathlib.Path | None = None  # of a training

    @property
    def key(self) -> str:
        """What tells it from every other part."""
        return self.workdir.name if self.workdir else self.name


def parts(out: pathlib.Path, data_dir: str, *, tiny: bool = False) -> list[Part]:
    """All parts in the order of their worth; with `tiny`, of shapes for a rehearsal."""
    found = []

    def bench(name: str, module: str, *arguments: str, goal: str) -> None:
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, f"--out={out / name}"]
        found.append(Part(name, command, goal))

    def train(name: str, config: str, dataset: str, seeds: Iterable[int], goal: str) -> None:
        for seed in seeds:
            workdir = out / f"{name}_{seed}"
            words = [f"--config=configs/{config}", f"--workdir={workdir}", f"--config.seed={seed}"]
            words += [f"--config.{key}={value}" for key, value in dataset_fields(dataset, data_dir).items()]
            words += ["--config.total=2 steps", "--config.batch_size=64", "--config.steps_per_call=1"] if tiny else []
            found.append(Part(name, [sys.executable, "-m", "vitcls.main", *words], goal, workdir))

    bf16, data = "--dtype=bfloat16", f"--data_dir={data_dir}"
    few, size = ("--repeats=1",), ("--image_size=32",)
    calls = "--calls=1" if tiny else "--calls=10"
    short = few if tiny else ("--repeats=3",)
    bench(
        "attention", "attention", bf16, calls, *short, *(("--batch=2",) if tiny else ()), goal="cuDNN's is the faster"
    )
    bench("agreement", "agreement", *(("--model=lenet5", "--batch=2") if tiny else ()), goal="the CPU's numbers")
    for model, batch, images, forms in SPEEDS:
        for form in forms:
            small = (*size, "--batch=4", *few) if tiny else (f"--batch={batch}", *short)
            override = (f"--override={form}",) if form else ()
            name = f"throughput_{model}" + (f"_{form.partition('=')[2]}" if form else "")
            bench(name, "throughput", f"--model={model}", *small, bf16, calls, *override, goal=f"{images:,} images/s")
    for model, *_ in SPEEDS:
        if model.startswith("improved"):
            model = "vit_small_patch4"
        small = (*size, "--batch=2", *few) if tiny else ("--batch=256", *short)
        peers = "--peers=timm,timm_compiled"
        bench(f"versus_{model}", "versus", f"--model={model}", *small, bf16, peers, goal="at least timm_compiled's")
    small = ("--batch=8", *few) if tiny else ("--batch=512", calls)
    bench("augmentation", "augmentation", *small, bf16, goal="RandAugment, mixup: less than 3 %")
    pipeline = ("--model=improved_vit_tiny" if tiny else "--model=improved_vit_small", "--sizes=32", bf16, data)
    pipeline += ("--batch=16", "--steps_per_call=1", *few) if tiny else ("--batch=512", "--steps_per_call=10")
    bench("input_pipeline", "input_pipeline", *pipeline, goal="resident within 2 % of a constant batch")
    train("sprint_cifar10", "sprint_cifar10.py", "cifar10", SPRINT_SEEDS[: 1 if tiny else 3], "94 % in few seconds")
    train("vit_cifar100", "vit_cifar100.py", "cifar100", SEEDS[:1], "gate 81 %, goal 83 %, within 10 minutes")
    if tiny:
        return found

    tests = [sys.executable, "-m", "pytest", "-q", "-W", "default", *CORRECTNESS]
    found.append(Part("correctness", tests, "all pass on the device"))
    layers = ("--scale=16", "--calls=20", "--step", "--image_size=224")
    bench("grouped_conv", "grouped_conv", bf16, *layers, goal="FASTEST_GROUPED_CONV takes the winner")
    bench("interruptions", "interruptions", bf16, goal="evaluation within 2 s, its host part within 1 s")
    large = ("--model=vit_large_patch16", "--batch=256", "--memory_limit_gib=40", "--repeats=2", bf16)
    large += ("--override=model.remat=block", "--override=optimizer.accumulate=8")
    bench("memory", "throughput", *large, goal="ViT-L/16 at 224 trains with batch 256 within 40 GiB")
    epoch = ("--epoch", "--batch=512", "--repeats=3", "--peers=torch", bf16, data)
    bench("epoch", "versus", *epoch, goal="faster than a DataLoader loop")
    bench("startup", "startup", "--config=configs/vit_digits.py", goal="imports within their limits")
    bench("scaling", "scaling", "--devices=1", "--batch=256", bf16, goal="with more devices: --devices=1,2,4,8 by hand")
    train("vit_cifar100", "vit_cifar100.py", "cifar100", SEEDS[1:], "gate 81 %, goal 83 %, within 10 minutes")
    train("vit_cifar100_muon", "vit_cifar100.py:muon", "cifar100", SEEDS, "the challenger")
    train("resnext_cifar10", "resnext_cifar10.py", "cifar10", SEEDS[:1], "gate 96 %, goal 97 %")
    train("sprint_cifar10", "sprint_cifar10.py", "cifar10", SPRINT_SEEDS[3:], "94 % on average in few seconds")
    bench("zoo", "throughput", "--sweep", "--batch=64", bf16, goal="a row for every model")
    return found


class Trainings:
    """The table of all trainings in `out`, which is there after each of them, those of earlier commands included."""

    def __init__(self, out: pathlib.Path, environment: dict[str, str] | None = None):
        self._out, self._environment = out, environment
        table = out / "trainings.json"
        rows = json.loads(table.read_text(encoding="utf-8"))["rows"] if table.is_file() else []
        self._rows = [row for row in rows if isinstance(row["seed"], int)]  # and not 'mean of 3'

    def __contains__(self, part: Part) -> bool:
        return str(part.workdir) in {row["workdir"] for row in self._rows}

    def add(self, part: Part, wall_seconds: float | None) -> None:
        self._rows.append(trained_row(part, wall_seconds))
        # This process leaves the devices to the parts.
        about = harness.in_child("benchmarks.harness", [], environment=self._environment)
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


def _environment(out: pathlib.Path, wheels: str) -> dict[str, str]:
    """Of a part: tests run on the accelerator, each benchmark is a run of its own, compiled programs are shared."""
    kept = {name: value for name, value in os.environ.items() if name != harness.RUN_VARIABLE}
    kept.setdefault("VITCLS_CACHE_DIR", str((out / "cache").absolute()))
    path = [os.getcwd(), *map(str, sorted(pathlib.Path(wheels).glob("*.whl")) if wheels else [])]
    path += filter(None, [os.environ.get("PYTHONPATH", "")])
    return kept | {"VITCLS_TEST_PLATFORM": "default", "PYTHONPATH": os.pathsep.join(path)}


class Log:
    """lease.json: what has become of each part, written after each."""

    def __init__(self, out: pathlib.Path):
        self._file = out / "lease.json"
        self.rows = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else []

    def __contains__(self, part: Part) -> bool:
        return any(row["part"] == part.key and row["ended"] for row in self.rows)

    def add(self, part: Part, code: int | None, seconds: float) -> None:
        """`code` is None for a part that was stopped, because the time was over."""
        row = {"part": part.key, "goal": part.goal, "ended": code == 0, "exit code": code, "seconds": round(seconds, 1)}
        self.rows = [other for other in self.rows if other["part"] != part.key] + [row]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def run_part(part: Part, environment: dict[str, str], seconds_left: float) -> tuple[int | None, float]:
    """Runs a command for so long at most; returns its exit code, None if it was stopped, and its seconds.

    A training is asked to stop first, so that it saves.
    """
    start = time.monotonic()
    process = subprocess.Popen(part.command, env=environment)
    try:
        code = process.wait(timeout=max(seconds_left, 1))
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(timeout=_SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        code = None
    return code, time.monotonic() - start


_SECONDS_TO_SAVE = 15
_LEAST = 20  # seconds that are worth beginning a part with


def archive(out: pathlib.Path) -> pathlib.Path:
    """All results in one file."""
    file = out / "lease.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for path in sorted(out.rglob("*")):
            inside = path.relative_to(out)
            if path.is_file() and path != file and not set(inside.parts) & set(_LEFT_OUT):
                tar.add(path, arcname=str(inside))
    return file


def main(argv: list[str]) -> int:
    flags = cli.Parser(description=__doc__.splitlines()[0])
    flags.add_argument("--minutes", type=float, default=float("inf"), help="after which it stops; default: all of it")
    flags.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    flags.add_argument("--data_dir", default="", help=DATA_DIR_HELP)
    flags.add_argument("--wheels", default="", help="a folder with wheels of pure Python that this machine lacks")
    flags.add_argument("--only", default="", help="names of parts, with commas between; all without")
    flags.add_argument("--tiny", action="store_true", help="a rehearsal with small shapes")
    flags.add_argument("--list", action="store_true", help="print the commands and stop")
    args = flags.parse_args(argv)
    chosen = parts(args.out, args.data_dir, tiny=args.tiny)
    wanted = set(filter(None, args.only.split(",")))
    for name in wanted - {part.name for part in chosen}:
        raise errors.unknown("part", name, {part.name for part in chosen})
    chosen = [part for part in chosen if part.name in wanted or not wanted]
    if args.list:
        print("\n".join(f"== {part.key}: {part.goal}\n$ {shlex.join(part.command)}" for part in chosen))
        return 0
    return run_all(chosen, args.out, _environment(args.out, args.wheels), time.monotonic() + 60 * args.minutes)


def run_all(chosen: list[Part], out: pathlib.Path, environment: dict[str, str], deadline: float) -> int:
    """Runs the parts one after the other until `deadline`, on the monotonic clock; 1 where one failed."""
    log, trainings, failed = Log(out), Trainings(out, environment), []
    for part in chosen:
        left = deadline - time.monotonic() - _SECONDS_TO_SAVE
        if part in log:
            continue
        if left < _LEAST:
            print(f"-- the time is over; the same command goes on with {part.key}", flush=True)
            break
        print(f"\n== {part.key}: {part.goal}\n$ {shlex.join(part.command)}", flush=True)
        in_one_go = part.workdir and not part.workdir.exists()
        code, seconds = run_part(part, environment, left)
        print(f"-- {part.key}: {'stopped' if code is None else f'exit code {code}'} after {seconds:.0f} s", flush=True)
        failed += [part.key] * (code not in (0, None))
        if part.workdir and code == 0:
            trainings.add(part, seconds if in_one_go else None)
        log.add(part, code, seconds)
    print(f"-- {archive(out)}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(cli.run(main))
