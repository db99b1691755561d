"""Export a run as one file, after it was checked in a process of its own.

vitcls export --workdir=DIR --format=stablehlo|safetensors --out=PATH [--checkpoint=last|best|STEP] [--data_dir=DIR]
vitcls export --workdir=DIR --table

stablehlo is a zip with a program, bytes in and probabilities out, for CPUs, NVIDIA and AMD GPUs and TPUs and batches of
any size; calibration.json is inside if there is one. safetensors has the weights by the names of torchvision or timm.
Either carries the classes, the config, the metrics and the SHA-256 of its checkpoint. --table says what each costs.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np

import vitcls
from vitcls import cli, data
from vitcls.core.errors import RunError, UserError
from vitcls.export import artefact, program, verify
from vitcls.metrics.scaling import Scaling
from vitcls.models.weights.hub import sha256_of
from vitcls.models.weights.to_torch import to_torch
from vitcls.training import calibration, checkpoint
from vitcls.training.files import CALIBRATION_FILE, CHECKPOINTS
from vitcls.training.opened import Opened, open_with_data

FORMATS = {"stablehlo": ".zip", "safetensors": ".safetensors"}  # and how the name of such a file must end
TOLERANCE = 5e-4  # of probabilities, whose logarithms a calibration may multiply
_CHECKED = 1_000  # test images


class Passport(NamedTuple):
    """How an exported file compares with its run, on the same test images."""

    images: int
    largest_difference: float  # of probabilities
    accuracy_run: float
    accuracy: float
    bytes: int
    seconds: dict[str, float]  # by batch size


def export(
    path: os.PathLike | str, format: str, out: pathlib.Path, *, checkpoint: str = "", data_dir: str = ""
) -> Passport:
    """Exports a run to the file `out`, and returns how it compares with the run.

    Raises UserError, before anything is written, where the run or the file cannot be, RunError where the file in a
    process of its own does not answer as the run does; then nothing is written either.
    """
    if not out.name.endswith(FORMATS[format]):
        raise UserError(f"--out={out} must end in {FORMATS[format]} for --format={format}")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}")
    opened = open_with_data(path, splits=("test",), checkpoint=checkpoint, data_dir=data_dir)
    scale = _scale(opened) if format == "stablehlo" else None
    content = _CONTENT[format](opened, scale)
    images, labels, expected = _expected(opened, scale)
    passport = _checked(content, FORMATS[format], images, labels, expected)
    artefact.write(out, content)
    return passport


def _scale(opened: Opened) -> Scaling | None:
    """That of the workdir's calibration, if there is one of this checkpoint."""
    if not (opened.trained.path / CALIBRATION_FILE).exists():
        return None
    return calibration.read_for(opened.trained.path, opened.step).scaling


def _about(opened: Opened, scale: Scaling | None) -> dict[str, Any]:
    """What an exported file says of itself."""
    trained = opened.trained
    report = trained.path / "report" / "metrics.json"
    metrics = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    manifest = trained.path / CHECKPOINTS / str(opened.step) / checkpoint.MANIFEST
    return {
        "vitcls": vitcls.__version__,
        "image_shape": list(trained.info.image_shape),
        "classes": list(trained.info.class_names),
        "decoding": dataclasses.asdict(trained.decoding),
        "calibration": type(scale).__name__.lower() if scale else None,
        "checkpoint": {"step": opened.step, "sha256": sha256_of(manifest)},
        "metrics": {key: value for key, value in metrics.items() if isinstance(value, str | int | float)},
        "config": json.loads(trained.config.to_json_best_effort()),
    }


def _program(opened: Opened, scale: Scaling | None) -> bytes:
    answer = program.make_answer(opened, scale)
    return artefact.pack_program(program.compiled(answer, opened.trained.info.image_shape), _about(opened, scale))


def _weights(opened: Opened, scale: Scaling | None) -> bytes:
    config = opened.trained.config
    fields = {key: value for key, value in config.model.items() if key != "name"}
    arrays = to_torch(config.model.name, opened.partition.to_host(opened.variables), **fields)
    # PyTorch's norms count batches, and load_state_dict(strict=True) asks for that.
    norms = [name.removesuffix("running_mean") for name in arrays if name.endswith("running_mean")]
    arrays |= {f"{norm}num_batches_tracked": np.array(0, np.int64) for norm in norms}
    about = {key: json.dumps(value) for key, value in _about(opened, scale).items() if key != "config"}
    files = {"config": opened.trained.path / "config.json", "dataset": opened.trained.path / "dataset.json"}
    return artefact.pack_safetensors(
        arrays, about | {key: file.read_text(encoding="utf-8") for key, file in files.items()}
    )


_CONTENT = {"stablehlo": _program, "safetensors": _weights}


def _expected(opened: Opened, scale: Scaling | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some test images uint8 [N, H, W, C], their labels, and the probabilities that the run gives them."""
    labels, probabilities = opened.predictions("test")
    if scale is not None:
        probabilities = scale(probabilities).astype(np.float32)
    rows = np.sort(np.random.default_rng(0).permutation(len(labels))[:_CHECKED])
    split = opened.dataset.test.take(rows)
    images = data.pixels(split, opened.trained.info.image_shape)
    return images, labels[rows], probabilities[rows]


def _checked(content: bytes, ending: str, images: np.ndarray, labels: np.ndarray, expected: np.ndarray) -> Passport:
    """What the file answers in a fresh process, beside what the run does; raises RunError where they differ."""
    with tempfile.TemporaryDirectory(prefix="vitcls-export-") as folder:
        place = pathlib.Path(folder)
        (place / f"file{ending}").write_bytes(content)
        np.save(place / "images.npy", images)
        files = (str(place / name) for name in (f"file{ending}", "images.npy", "answers.npy"))
        command = [sys.executable, "-m", verify.__name__, *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or "no word").splitlines()[-1]
            raise RunError(f"the exported file cannot be used in a process of its own, and is not written: {said}")
        answers, seconds = np.load(place / "answers.npy"), json.loads(done.stdout)
    difference = np.abs(answers - expected).max(axis=1)
    if not difference.max() <= TOLERANCE:  # also where it is no number
        raise RunError(
            "the exported file answers otherwise than the run, and is not written: the probabilities of "
            f"{np.sum(~(difference <= TOLERANCE)):,} of {len(labels):,} test images differ by more than "
            f"{TOLERANCE:g}, at most by {difference.max():.2g}"
        )
    accuracies = (float(np.mean(found.argmax(axis=1) == labels)) for found in (expected, answers))
    return Passport(len(labels), float(difference.max()), *accuracies, len(content), seconds)


def table(path: os.PathLike | str, *, checkpoint: str = "", data_dir: str = "") -> list[tuple[str, Passport | str]]:
    """Each format with its passport, or why there is none; nothing is kept."""
    rows: list[tuple[str, Passport | str]] = []
    with tempfile.TemporaryDirectory(prefix="vitcls-export-") as folder:
        for name, ending in FORMATS.items():
            try:
                out = pathlib.Path(folder) / f"file{ending}"
                rows.append((name, export(path, name, out, checkpoint=checkpoint, data_dir=data_dir)))
            except (UserError, RunError) as error:
                rows.append((name, cli.one_line(error)))
    if all(isinstance(found, str) for _, found in rows):
        raise UserError(rows[0][1])
    return rows


def _words(passport: Passport) -> str:
    times = ", ".join(f"{1e3 * seconds:.1f} ms for a batch of {size}" for size, seconds in passport.seconds.items())
    return (
        f"{passport.bytes / 1e6:.1f} MB; accuracy {passport.accuracy:.2%}, of the run {passport.accuracy_run:.2%} "
        f"({passport.images:,} test images); probabilities differ by at most {passport.largest_difference:.1g}; {times}"
    )


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("export"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument("--format", choices=tuple(FORMATS), help="what the file is")
    parser.add_argument("--out", metavar="PATH", help=f"the file; its name ends in {' or '.join(FORMATS.values())}")
    parser.add_argument("--table", action="store_true", help="say what each format costs, and keep none")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="where the data are now, if they have moved")
    flags = parser.parse_args(argv)
    given = {"checkpoint": flags.checkpoint, "data_dir": flags.data_dir}
    if flags.table == bool(flags.format or flags.out) or bool(flags.format) != bool(flags.out):
        raise UserError("give --format and --out, or --table alone")
    cli.start_jax()
    if flags.table:
        for name, found in table(flags.workdir, **given):
            print(f"{name:<12} {found if isinstance(found, str) else _words(found)}")
        return
    out = pathlib.Path(flags.out).expanduser()
    print(_words(export(flags.workdir, flags.format, out, **given)))
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
