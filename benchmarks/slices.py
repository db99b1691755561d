"""What a training step sends and holds on TPU v5e slices, by its compiled program, and the efficiency that links allow.

    python -m benchmarks.slices --out=DIR
    python -m benchmarks.slices --device=v5e:2x4 --model=resnet50:128 --strategy=data --out=DIR

No TPU is used, and nothing is timed. `--model` is a name and the images of one chip. TPU_COMPILER says where the
compiler is (benchmarks/compilers.py). A program takes minutes; `--out` keeps it, and the command goes on where it was.

With C the FLOPs of the model's products for a chip's images, forward and backward, S the bytes that it sends
(`program_cost.wire_bytes`), U the utilisation of `--utilisation`:

    t_compute = C / (U * peak)        t_links = S / (links * bandwidth of a link)
    efficiency = t_compute / (t_compute + t_links)       if nothing overlaps
                 t_compute / max(t_compute, t_links)     if everything does
"""

import datetime
import importlib.metadata
import math
import sys
from typing import Any

from benchmarks import compiled, compilers, harness, program_cost
from vitcls import cli, models
from vitcls.core.errors import UserError

# Cloud TPU's page of v5e: 197 TFLOP/s of bfloat16, 16 GB, and 1,600 Gbit/s out of the 4 ports of a chip.
PEAK = 197e12  # FLOP/s
LINK = 1600e9 / 8 / 4  # bytes/s, each way
_TORUS = 16  # an axis of this length, and none that is shorter, closes to a ring


def sides(device: str) -> list[int]:
    """'v5e:2x4' -> [2, 4]; raises UserError for what is no slice of v5e."""
    kind, _, shape = device.partition(":")
    numbers = shape.split("x")
    if kind != "v5e" or len(numbers) != 2 or not all(number.isdigit() and int(number) for number in numbers):
        raise UserError(f"--device={device} must be a slice of v5e, such as v5e:2x4")
    return [int(number) for number in numbers]


def links(device: str) -> int:
    """Links of the chip that has fewest, a corner: two along an axis that closes to a ring, else one."""
    return sum(2 if side >= _TORUS else 1 for side in sides(device) if side > 1)


def efficiency(flops: float, sent: float, device: str, utilisation: float) -> tuple[float, float, float, float]:
    """(seconds of compute, seconds of links, efficiency without overlap, with full overlap), see above."""
    compute = flops / (utilisation * PEAK)
    wire = sent / (links(device) * LINK)
    return compute, wire, compute / (compute + wire), compute / max(compute, wire)


def describe(row: dict[str, Any], flops_per_image: float, utilisation: float) -> harness.Row:
    """A row of the table, out of one of compiled.json and the model's FLOPs of a training step."""
    shown = {"model": row["model"], "strategy": row["strategy"], "slice": row["device"].partition(":")[2]}
    chips = math.prod(sides(row["device"]))
    images = shown["images a chip"] = row["batch"] // chips
    if "error" in row:
        return shown | {"error": row["error"]}
    moved = row["collective_bytes"]
    sent = program_cost.wire_bytes(moved, chips)
    compute, wire, alone, hidden = efficiency(images * flops_per_image, sent, row["device"], utilisation)
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")
    return shown | {
        **{f"{kind} MB": moved.get(kind, 0) / 1e6 for kind in kinds},
        "other MB": sum(count for kind, count in moved.items() if kind not in kinds) / 1e6,
        "sent MB": sent / 1e6,
        "memory GiB": row["temporaries_gib"] + row["arguments_gib"],
        "TFLOP": images * flops_per_image / 1e12,
        "compute ms": 1e3 * compute,
        "links ms": 1e3 * wire,
        "efficiency %": 100 * alone,
        "overlapped %": 100 * hidden,
    }


def jobs(devices: list[str], chosen: list[str], strategies: list[str]) -> list[compiled.Job]:
    """Every model on every slice; raises UserError for one that is not known."""
    found = []
    for text in chosen:
        name, _, images = text.partition(":")
        models.preset(name)
        if not images.isdigit() or not int(images):
            raise UserError(f"--model={text} must be a name and the images of one chip, such as resnet50:128")
        for strategy in strategies:
            for device in devices:
                batch = int(images) * math.prod(sides(device))
                found.append(compiled.Job(device, name, batch, strategy, "bfloat16", 0, ()))
    return found


def _flops_per_image(model: str) -> float:
    from benchmarks import workload

    return workload.train_flops_per_image(workload.make_config(model, 1), workload.make_info(model))


def main(argv: list[str]) -> int:
    flags = cli.Parser(description=__doc__.splitlines()[0])
    flags.add_argument("--device", action="append", help="v5e:2x4, v5e:8x8 and v5e:16x16 if none is given")
    flags.add_argument("--model", action="append", help="NAME:IMAGES, may be given several times")
    flags.add_argument("--strategy", action="append", choices=("data", "fsdp"))
    flags.add_argument("--utilisation", type=float, default=0.5, help="of the peak, by the products of the model")
    flags.add_argument("--out", default="", help="directory for compiled.json, and for the table")
    args = flags.parse_args(argv)
    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation={args.utilisation} must be in (0, 1]")
    devices = args.device or ["v5e:2x4", "v5e:8x8", "v5e:16x16"]
    chosen = args.model or ["vit_base_patch16:128", "vit_large_patch16:64", "resnet50:128"]
    asked = jobs(devices, chosen, args.strategy or ["data", "fsdp"])
    compilers.environment(devices[0])
    rows = compiled.compile_jobs(asked, args.out)
    flops = {job.model: _flops_per_image(job.model) for job in asked}
    table = [describe(row, flops[row["model"]], args.utilisation) for row in rows]
    about = {"date": f"{datetime.date.today()}", "versions": f"jax {importlib.metadata.version('jax')}"}
    harness.publish("slices", table, args.out, about=about)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(cli.run(main))
