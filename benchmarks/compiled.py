"""The training step of a model as it is compiled for an H100 or a TPU slice, without one: kernels, bytes, memory.

    python -m benchmarks.compiled --device=h100 --model=vit_small_patch16 --batch=256
    python -m benchmarks.compiled --device=v5e:4x4 --strategy=fsdp --model=vit_base_patch16 --batch=1024 --out=DIR
    python -m benchmarks.compiled --device=cpu:16 --strategy=fsdp --model=resnet50 --image_size=32

The compilers are found by H100_COMPILER and TPU_COMPILER (benchmarks/compilers.py). For the H100 the ceiling in
images/s is printed by part of the network: what the kernels would take if each moved its bytes at 2.8 TB/s and
multiplied at 600 TFLOP/s. It is not a timing. `--out` writes compiled.json, a list of objects. With several models or
devices, what compiled.json has already is not compiled again.
"""

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

from benchmarks import compilers, harness, program_cost
from vitcls import cli, models
from vitcls.core.errors import UserError

_FILE = "compiled.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """One step to compile; the child process gets it as JSON."""

    device: str
    model: str
    batch: int  # images of the whole step
    strategy: str
    dtype: str
    image_size: int  # 0: the model's own
    overrides: tuple[str, ...]


def compile_step(job: Job) -> tuple[str, Any]:
    """The text of the compiled step and its memory analysis; the process was started in `compilers.environment`."""
    import jax

    from benchmarks import workload
    from vitcls.core import sharding

    overrides = (*job.overrides, f"partition.strategy={job.strategy}")
    config = workload.make_config(job.model, job.batch, dtype=job.dtype, overrides=overrides)
    info = workload.make_info(job.model, image_size=job.image_size)
    devices = compilers.devices(job.device)
    partition = sharding.over(devices, job.strategy, min_shard_elements=config.partition.min_shard_elements)
    partition.check_batch_size(job.batch, unit=config.optimizer.accumulate)
    call, shapes = workload.step_shapes(config, info, partition)
    shardings = (partition.state_shardings(shapes[0]), partition.sharding())
    compiled = jax.jit(call, donate_argnums=0, out_shardings=shardings).lower(*shapes).compile()
    return compiled.as_text(), compiled


def describe(job: Job, text: str, compiled: Any) -> dict[str, Any]:
    """What compiled.json holds of a step."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    kernels = program_cost.kernels(text)
    row = dataclasses.asdict(job) | {
        "tflop_per_chip": cost.get("flops", 0.0) / 1e12,
        "gigabytes_per_chip": cost.get("bytes accessed", 0.0) / 1e9,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "kernels": sum(kernel.times for kernel in kernels),
        "collectives": program_cost.collectives(text),
        "collective_bytes": program_cost.collective_bytes(text),
        "ceiling_images_per_second": None,
    }
    chip = program_cost.CHIPS.get(job.device)
    if chip is None:
        return row
    seconds = sum(kernel.seconds(chip) for kernel in kernels)
    return row | {
        "tflop_per_chip": sum(kernel.flops * kernel.times for kernel in kernels) / 1e12,
        "gigabytes_per_chip": sum(kernel.moved * kernel.times for kernel in kernels) / 1e9,
        "ceiling_images_per_second": job.batch / seconds,
        "milliseconds_by_part": _milliseconds(program_cost.by_part(kernels, chip)),
        "milliseconds_by_kind": _milliseconds(program_cost.by_kind(kernels, chip)),
    }


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * value, 4) for name, value in seconds.items()}


def in_words(row: dict[str, Any]) -> str:
    """A row for people."""
    moved = row["collective_bytes"]
    counted = (f"{count} {kind} ({moved.get(kind, 0) / 1e6:,.1f} MB)" for kind, count in row["collectives"].items())
    collectives = ", ".join(counted) or "no collectives"
    lines = [
        f"{row['model']}, batch {row['batch']:,}, on {row['device']} ({row['strategy']}, {row['dtype']})",
        f"  {row['kernels']:,} kernels, {row['tflop_per_chip']:.2f} TFLOP, {row['gigabytes_per_chip']:.1f} GB a chip",
        f"  {row['temporaries_gib']:.2f} GiB of temporaries, {row['arguments_gib']:.2f} of arguments; {collectives}",
    ]
    if row["ceiling_images_per_second"]:
        total = sum(row["milliseconds_by_kind"].values())
        lines.append(f"  ceiling {row['ceiling_images_per_second']:,.0f} images/s, {total:.2f} ms a step")
        for title in ("part", "kind"):
            lines.append(f"    by {title}:")
            shown = list(row[f"milliseconds_by_{title}"].items())[:16]
            lines += [f"      {name:<40}{value:>9.2f} ms" for name, value in shown]
    return "\n".join(lines)


def job_fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Job)]


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in job_fields()])


def is_too_large(row: dict[str, Any]) -> bool:
    """Whether a step does not fit a chip of 16 GiB, which the compiler of TPUs refuses."""
    return row.get("error") == harness.OUT_OF_MEMORY or row.get("temporaries_gib", 0) + row.get("arguments_gib", 0) > 16


def compile_jobs(jobs: list[Job], out: str, *, keep_programs: bool = False) -> list[dict[str, Any]]:
    """The rows of all jobs, each compiled in a process of its own; with `out` they are kept, and none is made twice."""
    file = pathlib.Path(out, _FILE) if out else None
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else []
    # Rows of before collectives had bytes are made anew.
    rows = {_key(row): row for row in done if "error" not in row and "collective_bytes" in row}
    for job in jobs:
        asked = json.loads(json.dumps(dataclasses.asdict(job)))
        if _key(asked) not in rows:
            arguments = ["--job", json.dumps(asked), *(["--programs", out] if keep_programs and out else [])]
            result = harness.in_child("benchmarks.compiled", arguments, environment=compilers.environment(job.device))
            rows[_key(asked)] = asked | result
            if file:
                temporary = file.with_suffix(".tmp")
                temporary.write_text(json.dumps(list(rows.values()), indent=2) + "\n", encoding="utf-8")
                os.replace(temporary, file)
        row = rows[_key(asked)]
        print(f"{job.model} on {job.device}: {row['error']}" if "error" in row else in_words(row), flush=True)
    return [rows[_key(json.loads(json.dumps(dataclasses.asdict(job))))] for job in jobs]


def main(argv: list[str]) -> int:
    flags = cli.Parser(description=__doc__.splitlines()[0])
    flags.add_argument("--device", action="append", help="'h100', a TPU slice such as 'v5e:2x2', or 'cpu:16'")
    flags.add_argument("--model", action="append", help="may be given several times")
    flags.add_argument("--batch", type=int, default=256, help="images of the whole step")
    flags.add_argument("--strategy", choices=("data", "fsdp"), default="data")
    flags.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    flags.add_argument("--image_size", type=int, default=0, help="default: the model's own")
    flags.add_argument("--override", action="append", default=[], help="config key=value")
    flags.add_argument("--out", default="", help="directory for compiled.json")
    flags.add_argument("--keep_programs", action="store_true", help="write the text of the programs there too")
    flags.add_argument("--job", help="for the child process")
    flags.add_argument("--programs", default="", help="for the child process")
    args = flags.parse_args(argv)
    if args.job:
        fields = json.loads(args.job)
        job = Job(**fields | {"overrides": tuple(fields["overrides"])})
        text, compiled = compile_step(job)
        if args.programs:
            name = f"{job.model}-{job.device.replace(':', '-')}-{job.strategy}-{job.batch}.hlo"
            pathlib.Path(args.programs, name).write_text(text, encoding="utf-8")
        print(json.dumps(describe(job, text, compiled)))
        return 0
    if not args.device:
        raise UserError("--device is missing: 'h100', or a TPU slice such as 'v5e:2x2'")
    names = args.model or ["vit_small_patch16"]
    for name in names:
        models.preset(name)
    for device in args.device:
        compilers.environment(device)
    jobs = [
        Job(device, name, args.batch, args.strategy, args.dtype, args.image_size, tuple(args.override))
        for device in args.device
        for name in names
    ]
    rows = compile_jobs(jobs, args.out, keep_programs=args.keep_programs)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(cli.run(main))
