"""Label image files with a trained workdir.

    vitcls predict --workdir=DIR [--checkpoint=last|best|STEP] [--coverage=C] [--accuracy=A] [--json] FILE...

Prints the five most probable classes of each file, and of each file below a directory but hidden ones, with the
probabilities of `vitcls calibrate` where the run has been calibrated. --coverage=0.95 prints the set of classes that
was promised to hold the truth of 95 % of images, --accuracy=0.95 an answer only where 95 % of the answers were promised
to be right. Files that cannot be read are named on stderr, and the exit code is then 2, after all others are done.
"""

import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from vitcls import cli
from vitcls.core import cluster
from vitcls.core.errors import RunError, UserError
from vitcls.data import images as image_files
from vitcls.metrics.promises import are_answered
from vitcls.training import build, calibration, novelty, run_dir
from vitcls.training.calibration import AnswerPromise, SetPromise

_BATCH = 32
_logger = logging.getLogger("vitcls")
TOP = 5


def make_classifier(trained: run_dir.Workdir, checkpoint: str = "") -> Callable[[np.ndarray], np.ndarray]:
    """Returns classify(images uint8 [n, H, W, C] of the model's size) -> probabilities float32 [n, K].

    Raises UserError for a run without a classifier; the function raises RunError where the model has diverged.
    """
    config, info = trained.config, trained.info
    require_classifier(trained)
    model = build.make_model(config, info)
    step, variables = trained.restore(model, checkpoint or config.report.checkpoint)
    scale = scaling_of(trained, step)
    variables = jax.device_put(variables)
    eval_step = jax.jit(build.make_eval_step(config, model, info))

    size = 1

    def classify_few(images: np.ndarray) -> np.ndarray:
        nonlocal size  # which never shrinks, as each is compiled
        size = max(size, 1 << (len(images) - 1).bit_length())
        batch = {
            "image": np.zeros((size, *info.image_shape), np.uint8),
            "label": np.zeros(size, np.int32),
            "mask": np.zeros(size, np.float32),
        }
        batch["image"][: len(images)] = images
        probabilities = jax.device_get(eval_step(variables, jax.device_put(batch))[1])[: len(images)]
        if not np.isfinite(probabilities).all():
            raise RunError("the model gives probabilities that are not finite; use an earlier --checkpoint")
        return probabilities

    def classify(images: np.ndarray) -> np.ndarray:
        few = [classify_few(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
        probabilities = np.concatenate([np.zeros((0, info.num_classes), np.float32), *few])
        return scale(probabilities).astype(np.float32) if len(probabilities) else probabilities

    return classify


def require_classifier(trained: run_dir.Workdir) -> None:
    """Raises UserError for a run of a task that predicts by what it remembers."""
    config = trained.config
    if build.make_task(config, trained.info).remember is not None:
        raise UserError(
            f"a run of config.task.name='{config.task.name}' has no classifier; evaluate it, which compares "
            "images with those of the training"
        )


def scaling_of(trained: run_dir.Workdir, step: int) -> Callable[[np.ndarray], np.ndarray]:
    """That of calibration.json where it is of this checkpoint; else the probabilities as they are."""
    found = calibration.read(trained.path)
    if found is not None and found.checkpoint_step == step:
        return found.scaling
    if found is not None:
        _logger.warning(
            "the calibration is of the checkpoint %d, so that %d gives its probabilities as they are; run vitcls "
            "calibrate again",
            found.checkpoint_step,
            step,
        )
    return lambda probabilities: probabilities


def make_judge(trained: run_dir.Workdir, checkpoint: str = "") -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns judge(images uint8 [n, H, W, C], n up to 32) -> bool [n], unlike anything seen; None without a threshold.

    By what `vitcls unknown` has kept, where it is of this checkpoint.
    """
    kept = novelty.read(trained.path)
    if kept is None:
        return None
    model = build.make_model(trained.config, trained.info)
    step, variables = trained.restore(model, checkpoint or trained.config.report.checkpoint)
    if step != kept.checkpoint_step:
        _logger.warning(
            "what is unknown was measured at step %d, not %d; run vitcls unknown again", kept.checkpoint_step, step
        )
        return None
    outputs_step = jax.jit(build.make_outputs_step(trained.config, model, trained.info))
    variables = jax.device_put(variables)

    def judge(images: np.ndarray) -> np.ndarray:
        padded = np.zeros((_BATCH, *trained.info.image_shape), np.uint8)
        padded[: len(images)] = images
        outputs = jax.device_get(outputs_step(variables, {"image": padded}))
        return kept.unknown(type(outputs)(*(rows[: len(images)] for rows in outputs)))

    return judge


class Guess(NamedTuple):
    """What is said of one image."""

    probabilities: np.ndarray  # float32 [K]
    unknown: bool | None = None  # unlike anything seen; None where that was not measured


def predict(
    trained: run_dir.Workdir, files: list[pathlib.Path], *, checkpoint: str = ""
) -> Iterator[tuple[pathlib.Path, Guess | str]]:
    """Yields (file, Guess) for each file in order, or (file, why it cannot be read)."""
    classify, judge = make_classifier(trained, checkpoint), make_judge(trained, checkpoint)
    for group, images in _read_ahead(files, _BATCH, trained):
        readable = [image for image in images if not isinstance(image, str)]
        rows = iter(classify(np.stack(readable)) if readable else ())
        strange = iter(judge(np.stack(readable)).tolist() if readable and judge else [None] * len(readable))
        for file, image in zip(group, images, strict=True):
            yield file, image if isinstance(image, str) else Guess(next(rows), next(strange))


def read_all(files: list[pathlib.Path], trained: run_dir.Workdir) -> np.ndarray:
    """All files as the model was trained to see them, uint8 [N, H, W, C]; raises UserError that names an unreadable."""
    outcomes = []
    for group, images in _read_ahead(files, _BATCH, trained):
        outcomes += zip(group, images, strict=True)
    bad = [f"{file} {image}" for file, image in outcomes if isinstance(image, str)]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; {len(bad)} of {len(files)} files could not be read")
    return np.stack([image for _, image in outcomes]) if files else np.zeros((0, *trained.info.image_shape), np.uint8)


def _read_ahead(
    files: list[pathlib.Path], batch_size: int, trained: run_dir.Workdir
) -> Iterator[tuple[list[pathlib.Path], list[np.ndarray | str]]]:
    """Yields batches of files with their images, or why a file is unreadable; threads read the next ones meanwhile."""

    def outcome(file: pathlib.Path) -> np.ndarray | str:
        try:
            return read(file, trained.info.image_shape, trained.decoding)
        except OSError as error:
            return error.strerror or str(error)
        except image_files.BadImage as error:
            return str(error)

    groups = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    if not groups:
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = pool.map(outcome, groups[0])
        for group, following in zip(groups, [*groups[1:], []], strict=True):
            images, waiting = waiting, pool.map(outcome, following)
            yield group, list(images)


def read(file: pathlib.Path, image_shape: tuple[int, int, int], decoding: image_files.Decoding) -> np.ndarray:
    """One file as the model was trained to see it, uint8 [H, W, C]; raises OSError or BadImage."""
    size, channels = image_shape[:2], image_shape[2]
    encoded = file.read_bytes()
    image_files.examine(encoded)
    if not decoding.max_value and image_files.is_deep(encoded):
        _logger.warning(
            "%s has more than 8 bits, which no training image has: 65535 counts as white (of floats 1, 255 or 65535); "
            "convert it to 8 bits if that is wrong",
            file,
        )
    return image_files.decode(encoded, size=size, channels=channels, decoding=decoding)


def _promise(trained: run_dir.Workdir, flags) -> SetPromise | AnswerPromise | None:
    """What the flags ask to be kept; raises UserError where the run has not promised it."""
    if flags.coverage is None and flags.accuracy is None:
        return None
    if None not in (flags.coverage, flags.accuracy):
        raise UserError("--coverage and --accuracy are two promises; ask for one of them")
    made = calibration.read_for(trained.path, trained.find_step(flags.checkpoint or trained.config.report.checkpoint))
    return made.set_promise(flags.coverage) if flags.accuracy is None else made.answer_promise(flags.accuracy)


def said(
    probabilities: np.ndarray, class_names: Sequence[str], promise: SetPromise | AnswerPromise | None = None
) -> dict[str, Any]:
    """What is said of an image: the top classes, or the set, or an answer if there is one."""

    def entries(classes: Iterable[int]) -> list[dict[str, Any]]:
        return [{"class": class_names[k], "probability": float(probabilities[k])} for k in classes]

    order = np.argsort(-probabilities, kind="stable")
    if isinstance(promise, SetPromise):
        inside = promise.sets(probabilities[None])[0]
        return {"set": entries(k for k in order if inside[k]), "coverage": promise.coverage}
    top = {"top": entries(order[:TOP])}
    if isinstance(promise, AnswerPromise):
        answered = are_answered(probabilities.max(), promise.threshold)
        top |= {"answered": bool(answered), "accuracy": promise.accuracy}
    return top


def _lines(words: dict[str, Any]) -> list[str]:
    strange = ["  unlike anything seen in training"] if words.get("unknown") else []
    rows = [f"  {entry['probability']:7.2%}  {entry['class']}" for entry in words.get("set", words.get("top"))]
    if "set" in words:
        return [*strange, f"  one of {len(rows)}, for {words['coverage']:g} of images:", *rows]
    if words.get("answered") is False:
        return [*strange, f"  no answer: {words['accuracy']:g} right is not promised of an image like this", *rows]
    return [*strange, *rows]


def files_of(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The paths, each directory as the files below it by their names; raises UserError for one without files."""
    files = []
    for path in paths:
        if not os.path.isdir(path):  # of a name that is too long, too
            files.append(path)
            continue
        below = sorted(file for file in path.rglob("*") if file.is_symlink() or file.is_file())  # of links each is read
        shown = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not shown:
            raise UserError(f"{path} holds no files; give image files, or a directory of them")
        files += shown
    return files


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("predict"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument("--coverage", type=float, metavar="C", help="of the sets of classes, as calibrate promised")
    parser.add_argument("--accuracy", type=float, metavar="A", help="of the answers, as calibrate promised")
    parser.add_argument("--json", action="store_true", help="one JSON object per file")
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE", help="or a directory of files")
    flags = parser.parse_args(argv)
    processes = cluster.find(None, None, None)
    if processes and processes.process_id:  # the first of them does it all
        return
    cli.use_cache()
    trained, files = run_dir.open_workdir(flags.workdir), files_of(flags.files)
    promise = _promise(trained, flags)
    unreadable = 0
    for file, outcome in predict(trained, files, checkpoint=flags.checkpoint):
        if isinstance(outcome, str):
            unreadable += 1
            print(f"{file}: {outcome}", file=sys.stderr)
            continue
        words = said(outcome.probabilities, trained.info.class_names, promise)
        if outcome.unknown is not None:
            words["unknown"] = outcome.unknown
        if flags.json:
            print(json.dumps({"file": str(file), **words}))
        else:
            print("\n".join([str(file), *_lines(words)]))
    if unreadable:
        raise UserError(f"{unreadable} of {len(files)} files could not be read; they are named above")


if __name__ == "__main__":
    sys.exit(cli.run(main))
