"""Images per second of training and inference, model FLOPs utilisation, memory and compile time of any model.

    python -m benchmarks.throughput --model=improved_vit_small --batch=256 --dtype=bfloat16
    python -m benchmarks.throughput --sweep --image_size=64 --batch=8          # all models
    python -m benchmarks.throughput --model=vit_large_patch16 --batch=256 --dtype=bfloat16 --find_largest_batch

Every row has a process of its own. One that runs out of memory is a row that says so; with --memory_limit_gib it is not
even run, and the row says what the compiled step would have needed. FLOPs utilisation counts the matrix products and
convolutions of three forward passes per trained image, whatever is recomputed, over the peak of the devices.
"""

import dataclasses
import json
import sys
from collections.abc import Callable

from benchmarks import harness
from vitcls import cli

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Job:
    """What one row measures; the child process gets it as JSON."""

    model: str
    batch: int
    image_size: int  # 0: the model's own
    dtype: str
    partition: str
    repeats: int
    calls: int
    overrides: tuple[str, ...]
    peak_tflops: float  # of one device; 0: by its kind, where that is known
    memory_limit_gib: float  # what needs more counts as out of memory; 0: what the device has


def run(job: Job) -> harness.Row:
    """Measures one row in this process."""
    import jax

    from benchmarks import workload
    from vitcls.core import sharding

    overrides = (*job.overrides, f"partition.strategy={job.partition}")
    config = workload.make_config(job.model, job.batch, dtype=job.dtype, overrides=overrides)
    info = workload.make_info(job.model, image_size=job.image_size)
    partition = sharding.all_devices(job.partition, min_shard_elements=config.partition.min_shard_elements)
    partition.check_batch_size(job.batch, unit=config.optimizer.accumulate)
    trainer = workload.Trainer(config, info, partition, calls=job.calls)
    planned = trainer.compiled.memory_analysis()
    needed = planned.argument_size_in_bytes + planned.temp_size_in_bytes + planned.output_size_in_bytes
    needed -= planned.alias_size_in_bytes
    plan = {
        "image size": info.image_shape[0],
        "compile s": trainer.compile_seconds,
        "activations MiB": planned.temp_size_in_bytes / MIB,
        "planned MiB": needed / MIB,
    }
    if job.memory_limit_gib and needed > job.memory_limit_gib * 2**30:
        return plan | {"error": harness.OUT_OF_MEMORY}
    train = harness.measure(trainer, repeats=job.repeats)
    peak_bytes, of = workload.peak_memory_bytes()
    infer = harness.measure(trainer.inference(), repeats=job.repeats)

    speed = trainer.images_per_call / train.median
    peak = job.peak_tflops or workload.peak_tflops(jax.devices()[0].device_kind, job.dtype)
    used = speed * workload.train_flops_per_image(config, info) / jax.device_count() / 1e12
    return plan | {
        "train images/s": speed,
        "step ms": 1e3 * train.median / trainer.steps_per_call,
        "fastest..slowest": train.spread(1e3 / trainer.steps_per_call),
        "inference images/s": job.calls * job.batch / infer.median,
        "model TFLOP/s per device": used,
        "utilisation %": 100 * used / peak if peak else None,
        f"peak MiB ({of})": peak_bytes / MIB,
    }


def measure(job: Job) -> tuple[harness.Row, dict[str, str] | None]:
    """The row of a job, measured in a child process, and what that says of its machine."""
    result = harness.in_child("benchmarks.throughput", ["--job", json.dumps(dataclasses.asdict(job))])
    row = {"model": job.model, "batch": job.batch, "dtype": job.dtype, "partition": job.partition}
    row |= result.get("row") or {"error": result["error"]}
    print(f"  {job.model}, batch {job.batch}: {_summary(row)}", file=sys.stderr)
    return row, result.get("about")


def _summary(row: harness.Row) -> str:
    return row.get("error") or f"{row['train images/s']:.4g} images/s, step {row['step ms']:.4g} ms"


def find_largest_batch(
    job: Job, measure: Callable = measure, *, unit: int = 8
) -> tuple[harness.Row, dict[str, str] | None]:
    """`measure(job)` of the largest batch, in multiples of `unit`, that fits: doubled until it does not, then bisected.

    Where not even the first fits, smaller ones are tried; the row says so where none does. Another error ends the
    search: the row of the largest that fitted says which.
    """
    job = dataclasses.replace(job, batch=-(-job.batch // unit) * unit)
    fits, fails = 0, 0
    best = None
    while not fails or fails - fits > unit:
        batch = (fits + fails) // 2 // unit * unit if fails else max(2 * fits, job.batch)
        row, about = measure(dataclasses.replace(job, batch=batch))
        if row.get("error") == harness.OUT_OF_MEMORY:
            fails = batch
        elif "error" in row:
            return (best[0] | {"search ended by": row["error"]}, best[1]) if best else (row, about)
        else:
            fits, best = batch, (row, about)
    return best or (row, about)


def main(argv: list[str]) -> None:
    from vitcls import models

    flags = harness.parser(__doc__)
    flags.add_argument("--model", action="append", help="name of a model; may be given several times")
    flags.add_argument("--sweep", action="store_true", help="all models")
    flags.add_argument("--batch", type=int, action="append", help="images per step; may be given several times")
    flags.add_argument("--image_size", type=int, default=0, help="pixels; the model's own without")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--partition", choices=("data", "fsdp", "pmap"), default="data")
    flags.add_argument("--calls", type=int, default=1, help="dispatches in one timed call")
    flags.add_argument("--override", action="append", default=[], help="config key=value, such as model.remat=block")
    flags.add_argument("--peak_tflops", type=float, default=0, help="of one device; by its kind without")
    flags.add_argument("--memory_limit_gib", type=float, default=0, help="treat what needs more as out of memory")
    flags.add_argument("--find_largest_batch", action="store_true", help="from --batch on")
    flags.add_argument("--job", help="for the child process")
    args = flags.parse_args(argv)
    if args.job:
        fields = json.loads(args.job)
        row = run(Job(**fields | {"overrides": tuple(fields["overrides"])}))
        print(json.dumps({"row": row, "about": harness.machine()}))
        return

    names = models.names() if args.sweep else args.model or ["improved_vit_small"]
    for name in names:
        models.preset(name)
    jobs = [
        Job(
            model=name,
            batch=batch,
            image_size=args.image_size,
            dtype=args.dtype,
            partition=args.partition,
            repeats=args.repeats,
            calls=args.calls,
            overrides=tuple(args.override),
            peak_tflops=args.peak_tflops,
            memory_limit_gib=args.memory_limit_gib,
        )
        for name in names
        for batch in args.batch or [32]
    ]
    results = [(find_largest_batch if args.find_largest_batch else measure)(job) for job in jobs]
    about = next((about for _, about in results if about), {"run": harness.RUN})
    harness.publish("throughput", [row for row, _ in results], args.out, about=about)


if __name__ == "__main__":
    sys.exit(cli.run(main))
