"""A run becomes a file of one of several formats, which is kept only if it answers as the run does."""

import json
import logging
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from vitcls import models
from vitcls.core.errors import RunError, UserError
from vitcls.export import artefact, blocks, check, compress, onnx, program, saved_model, tflite, verify
from vitcls.export.check import Passport
from vitcls.export.compress import PRECISIONS
from vitcls.export.source import Source
from vitcls.metrics.scaling import Scaling
from vitcls.models import forms
from vitcls.models.weights import from_torch
from vitcls.models.weights.to_torch import to_torch

PyTree = Any
_logger = logging.getLogger("vitcls")


class Job(NamedTuple):
    """One file to be made."""

    source: Source
    format: str
    precision: str

    @property
    def scale(self) -> Scaling | None:
        """Weights alone know no calibration."""
        return None if self.format == "safetensors" else self.source.scale

    @property
    def by_tools(self) -> bool:
        """Whether the runtime's own tools make the weights smaller."""
        return self.precision in FORMATS[self.format].by_tools

    @property
    def rounding(self) -> str:
        """The precision of weights that JAX answers with: that of the file, or the next coarser where tools round more.

        bfloat16 has three bits less than float16: a file of float16 is to answer no worse than weights of that.
        """
        return "bfloat16" if self.by_tools and self.precision == "float16" else self.precision

    @property
    def stored(self) -> PyTree:
        """The variables as the program holds them; what the runtime's own tools make smaller is float32 here."""
        return compress.round_weights(self.source.variables, "float32" if self.by_tools else self.precision)

    @property
    def about(self) -> dict[str, Any]:
        """With the precision of weights and of activations, which only the runtimes' own tools change."""
        whole = self.precision == "int8" and self.by_tools
        return self.source.about(self.scale, self.precision, "int8" if whole else self.source.dtype)

    @property
    def tools(self) -> dict[str, Any]:
        """What the formats with tools of their own need besides."""
        images = self.source.calibration_images if self.precision == "int8" else None
        return {"precision": self.precision, "calibration": images}


class Format(NamedTuple):
    """A kind of file."""

    ending: str  # of its name; "" for a directory
    precisions: tuple[str, ...]
    by_tools: tuple[str, ...]  # the precisions that its own tools make, of weights in float32
    in_float32: bool  # whatever the run computes in
    write: Callable[[Job, Callable, pathlib.Path], None]


def make(source: Source, format: str, precision: str, out: pathlib.Path) -> Passport:
    """Exports a run to `out`, a file or a directory, and returns how it compares with the run.

    Raises UserError, before anything is written, where the run or the file cannot be, RunError where the file in a
    process of its own does not answer as the run does; then nothing is written either.
    """
    job = Job(source.in_float32 if FORMATS[format].in_float32 else source, format, precision)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            place = pathlib.Path(folder, f"made{FORMATS[format].ending}")
            _logger.info("converting to %s, %s", format, precision)
            _write(job, place)
            expected = job.source.expected(job.scale, job.rounding)
            _logger.info("trying it on %s test images in a process of its own", f"{len(expected.labels):,}")
            passport, wrong = check.compare(place, expected, precision, job.by_tools)
            if wrong:
                wrong += f"; {_blame(job, place, expected.images[: blocks.IMAGES])}"
                raise RunError(f"the exported file answers otherwise than the run, and is not written: {wrong}")
            artefact.keep(place, out)
            return passport
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None


def _write(job: Job, place: pathlib.Path) -> None:
    answer = None
    if job.format != "safetensors":
        answer = program.make_answer(job.source.opened, job.scale, job.stored)
    FORMATS[job.format].write(job, answer, place)


def _blame(job: Job, made: pathlib.Path, images: np.ndarray) -> str:
    """Which block of the network is the first that is not what it should be for some images, in the file as `made`."""
    variables = job.source.variables
    coarse = compress.round_weights(variables, job.rounding)
    of, of_whole = (blocks.make_blocks(job.source.opened, each) for each in (coarse, variables))
    rounded, whole = (np.asarray(jax.jit(each.answer)(images)) for each in (of, of_whole))
    try:
        found = _by_blocks(job, made, images)
    except RunError as error:
        return f"its blocks cannot be looked at alone: {error}"
    allowed = np.full(len(of.names), check.TOLERANCE)
    if job.by_tools:  # as Expected.tolerance; of int8 a block is to blame that loses half of what it says
        allowed += 0.5 if job.precision == "int8" else blocks.relative_difference(of, whole, rounded)
    ours = whole if job.by_tools else rounded
    return blocks.first_difference(of, blocks.relative_difference(of, ours, found), allowed)


def _by_blocks(job: Job, made: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """What each block gives in the runtime of the file, float32 [B, sum of sizes]; of weights alone, in JAX."""
    if job.format == "safetensors":
        theirs = blocks.make_blocks(job.source.opened, verify.read_weights(str(made)).variables)
        return np.asarray(jax.jit(theirs.answer)(images))
    with tempfile.TemporaryDirectory(prefix="vitcls-export-") as folder:
        place = pathlib.Path(folder, f"blocks{FORMATS[job.format].ending}")
        FORMATS[job.format].write(job, blocks.make_blocks(job.source.opened, job.stored).answer, place)
        return check.answers(place, images)[0]


def _stablehlo(job: Job, answer: Callable, place: pathlib.Path) -> None:
    compiled = program.compiled(answer, job.source.opened.trained.info.image_shape)
    place.write_bytes(artefact.pack_program(compiled, job.about))


def _saved_model(job: Job, answer: Callable, place: pathlib.Path) -> None:
    saved_model.write(answer, job.source.opened.trained.info.image_shape, job.about, place)


def _tflite(job: Job, answer: Callable, place: pathlib.Path) -> None:
    tflite.write(answer, job.source.opened.trained.info.image_shape, job.about, place, **job.tools)


def _onnx(job: Job, answer: Callable, place: pathlib.Path) -> None:
    onnx.write(answer, job.source.opened.trained.info.image_shape, job.about, place, **job.tools)


def _weights(job: Job, _: None, place: pathlib.Path) -> None:
    trained = job.source.opened.trained
    fields = {key: value for key, value in trained.config.model.items() if key != "name"}
    name = trained.config.model.name
    arrays = to_torch(name, job.source.variables, **fields)
    usual = models.fields(name) | from_torch.fields_for(name)
    others = [f"{key}={value}" for key, value in fields.items() if _changes_answers(key) and value != usual.get(key)]
    if others:
        _logger.warning("these are weights of %s with %s; build PyTorch's network alike", name, ", ".join(others))
    arrays = compress.round_weights({"params": arrays}, job.precision)["params"]
    # PyTorch's norms count batches, and load_state_dict(strict=True) asks for that.
    norms = [name.removesuffix("running_mean") for name in arrays if name.endswith("running_mean")]
    arrays |= {f"{norm}num_batches_tracked": np.array(0, np.int64) for norm in norms}
    about = {key: json.dumps(value) for key, value in job.about.items() if key != "config"}
    files = {key: (trained.path / f"{key}.json").read_text(encoding="utf-8") for key in ("config", "dataset")}
    place.write_bytes(artefact.pack_safetensors(arrays, about | files))


def _changes_answers(field: str) -> bool:
    """Whether networks of one name that differ in a field may differ in their answers too."""
    return "drop" not in field and field not in (*forms.FIELDS, "dtype", "remat")


FORMATS = {
    "stablehlo": Format(".zip", PRECISIONS, (), False, _stablehlo),
    "saved_model": Format("", PRECISIONS, (), False, _saved_model),
    "tflite": Format(".tflite", ("float32", "float16", "int8"), ("float16", "int8"), True, _tflite),
    "onnx": Format(".onnx", PRECISIONS, ("int8",), True, _onnx),
    "safetensors": Format(".safetensors", ("float32", "float16", "bfloat16"), (), False, _weights),
}


def check_request(format: str, precision: str, out: pathlib.Path) -> None:
    """Raises UserError for a file that cannot be."""
    ending, precisions = FORMATS[format].ending, FORMATS[format].precisions
    if precision not in precisions:
        raise UserError(
            f"--quantize={precision} is not for --format={format}; it has {', '.join(precisions[1:])}, or none"
        )
    if not out.name.endswith(ending):
        raise UserError(f"--out={out} must end in {ending} for --format={format}")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}")
    if not ending and out.exists() and not (out / "saved_model.pb").exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"--out={out} is there already and no SavedModel; name a directory that is new or empty")
    if ending and out.is_dir():
        raise UserError(f"--out={out} is a directory; --format={format} is a file")
