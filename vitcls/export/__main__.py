"""Export a run as one file, after it was checked in a process of its own.

vitcls export --workdir=DIR --format=FORMAT --out=PATH [--quantize=float16|bfloat16|int8] [--prune=0.5]
vitcls export --workdir=DIR --table

FORMAT is stablehlo (JAX), saved_model (TensorFlow, a directory), tflite (LiteRT) or onnx (onnxruntime), each a program
of bytes in and probabilities out for batches of any size, with calibration.json inside if there is one; or safetensors,
the weights by the names of torchvision or timm. All carry the classes, the config, the metrics and the SHA-256 of their
checkpoint. --table says what each costs in every precision that it has.
"""

import os
import pathlib
import sys
import tempfile

from vitcls import cli
from vitcls.core import buckets
from vitcls.core.errors import RunError, UserError
from vitcls.export.check import Passport
from vitcls.export.compress import PRECISIONS
from vitcls.export.make import FORMATS, check_request, make
from vitcls.export.source import Source, open_source
from vitcls.export.verify import BATCHES


def export(
    path: os.PathLike | str,
    format: str,
    out: pathlib.Path,
    *,
    precision: str = "float32",
    prune: float = 0.0,
    checkpoint: str = "",
    data_dir: str = "",
) -> Passport:
    """Exports the run in a workdir to `out`, and returns how it compares with the run; see `make`."""
    check_request(format, precision, out)
    return make(open_source(path, prune=prune, checkpoint=checkpoint, data_dir=data_dir), format, precision, out)


def table(source: Source) -> list[tuple[str, str, Passport | str]]:
    """Each format and precision with its passport, or why there is none; nothing is kept."""
    rows: list[tuple[str, str, Passport | str]] = []
    with tempfile.TemporaryDirectory(prefix="vitcls-export-") as folder:
        for name, kind in FORMATS.items():
            for precision in kind.precisions:
                try:
                    found = make(source, name, precision, pathlib.Path(folder, f"file{kind.ending}"))
                except (UserError, RunError) as error:
                    found = cli.one_line(error)
                rows.append((name, precision, found))
                if isinstance(found, str) and precision == "float32":
                    break  # what is missing is missing for all of them
    if all(isinstance(found, str) for *_, found in rows):
        raise UserError(rows[0][2])
    return rows


def _table_lines(rows: list[tuple[str, str, Passport | str]], pruned: bool) -> list[str]:
    """Aligned; a file that cannot be has the reason in its row."""
    same = "same class as pruned" if pruned else "same class"
    heads = ("format", "weights", "MB", "accuracy", "of the run", same, *(f"ms, batch of {n}" for n in BATCHES))
    cells = [heads, *((*row[:2], *_cells(row[2])) for row in rows)]
    whole = [row for row in cells if len(row) == len(heads)]
    widths = [max(len(row[i]) for row in whole) for i in range(len(heads))]
    widths[:2] = (max(len(row[i]) for row in cells) for i in (0, 1))
    return ["  ".join(_aligned(row, widths)).rstrip() for row in cells]


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Words to the left, numbers to the right."""
    numbers = (
        row[2:] if len(row) < len(widths) else [cell.rjust(n) for cell, n in zip(row[2:], widths[2:], strict=True)]
    )
    return [row[0].ljust(widths[0]), row[1].ljust(widths[1]), *numbers]


def _cells(found: Passport | str) -> tuple[str, ...]:
    if isinstance(found, str):
        return (found,)
    shares = (f"{share:.2%}" for share in (found.accuracy, found.accuracy_run, found.agreement))
    return f"{found.bytes / 1e6:.2f}", *shares, *(f"{1e3 * found.seconds[str(size)]:.2f}" for size in BATCHES)


def _words(passport: Passport, pruned: bool) -> str:
    others = "from those of the pruned network " if pruned else ""
    times = ", ".join(f"{1e3 * seconds:.2f} ms for a batch of {size}" for size, seconds in passport.seconds.items())
    return (
        f"{passport.bytes / 1e6:.2f} MB; accuracy {passport.accuracy:.2%}, of the run {passport.accuracy_run:.2%} "
        f"({passport.images:,} test images); probabilities differ {others}by at most "
        f"{passport.largest_difference:.1g}, the class for {passport.agreement:.2%} is the same; {times}"
    )


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("export"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument("--format", choices=tuple(FORMATS), help="what the file is")
    endings = ", ".join(kind.ending for kind in FORMATS.values() if kind.ending)
    parser.add_argument(
        "--out",
        metavar="PATH",
        help=f"the file, whose name ends in {endings}; a directory otherwise; what is there is replaced",
    )
    parser.add_argument("--quantize", choices=PRECISIONS[1:], default="float32", help="store the weights in fewer bits")
    parser.add_argument(
        "--prune", type=float, default=0.0, metavar="P", help="set the smallest P of the weights of each kernel to 0"
    )
    parser.add_argument("--table", action="store_true", help="say what each format costs, and keep none")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="where the data are now, if they have moved")
    flags = parser.parse_args(argv)
    if flags.table == bool(flags.format or flags.out) or bool(flags.format) != bool(flags.out):
        raise UserError("give --format and --out, or --table alone")
    buckets.check_local(flags.out or "", "--out")
    if flags.table and flags.quantize != "float32":
        raise UserError("--table has every precision; leave --quantize out")
    given = {"prune": flags.prune, "checkpoint": flags.checkpoint, "data_dir": flags.data_dir}
    cli.start_jax()
    with cli.sigterm_raises():
        if flags.table:
            print(*_table_lines(table(open_source(flags.workdir, **given)), flags.prune > 0), sep="\n")
            return
        out = pathlib.Path(flags.out).expanduser()
        print(_words(export(flags.workdir, flags.format, out, precision=flags.quantize, **given), flags.prune > 0))
        print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
