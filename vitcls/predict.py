"""Label image files with a trained workdir.

    python -m vitcls.predict --workdir=DIR [--checkpoint=last|best|STEP] [--json] FILE...

Prints the five most probable classes of each file. Files that cannot be read are named on stderr, and the exit code
is then 2, after all others are done.
"""

import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from vitcls import cli
from vitcls.core import cluster
from vitcls.core.errors import RunError, UserError
from vitcls.data import images as image_files
from vitcls.training import build, run_dir

_BATCH = 32
_logger = logging.getLogger("vitcls")
TOP = 5


def predict(
    trained: run_dir.Workdir, files: list[pathlib.Path], *, checkpoint: str = ""
) -> Iterator[tuple[pathlib.Path, np.ndarray | str]]:
    """Yields (file, probabilities float32 [K]) for each file in order, or (file, why it cannot be read)."""
    config, info = trained.config, trained.info
    decoding = image_files.Decoding(info.max_value, config.dataset.eval_crop)
    if build.make_task(config, info).remember is not None:
        raise UserError(
            f"a run of config.task.name='{config.task.name}' has no classifier; evaluate it, which compares "
            "images with those of the training"
        )
    model = build.make_model(config, info)
    _, variables = trained.restore(model, checkpoint or config.report.checkpoint)
    variables = jax.device_put(variables)
    eval_step = jax.jit(build.make_eval_step(config, model, info))
    batch_size = min(_BATCH, len(files))
    for group, images in _read_ahead(files, batch_size, lambda file: read(file, info.image_shape, decoding)):
        if all(isinstance(image, str) for image in images):
            yield from zip(group, images, strict=True)
            continue
        batch = {
            "image": np.zeros((batch_size, *info.image_shape), np.uint8),
            "label": np.zeros(batch_size, np.int32),
            "mask": np.zeros(batch_size, np.float32),
        }
        for i, image in enumerate(images):
            if not isinstance(image, str):
                batch["image"][i] = image
        probabilities = jax.device_get(eval_step(variables, jax.device_put(batch))[1])
        if not np.isfinite(probabilities[: len(group)]).all():
            raise RunError("the model gives probabilities that are not finite; use an earlier --checkpoint")
        for file, image, row in zip(group, images, probabilities, strict=False):
            yield file, image if isinstance(image, str) else row


def _read_ahead(
    files: list[pathlib.Path], batch_size: int, read: Callable[[pathlib.Path], np.ndarray]
) -> Iterator[tuple[list[pathlib.Path], list[np.ndarray | str]]]:
    """Yields so many files at a time and their images, or why not; threads read the next ones meanwhile."""

    def outcome(file: pathlib.Path) -> np.ndarray | str:
        try:
            return read(file)
        except OSError as error:
            return error.strerror or str(error)
        except image_files.BadImage as error:
            return str(error)

    groups = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
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


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("predict"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per file")
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    flags = parser.parse_args(argv)
    processes = cluster.find(None, None, None)
    if processes and processes.process_id:  # the first of them does it all
        return
    cli.use_cache()
    trained = run_dir.open_workdir(flags.workdir)
    unreadable = 0
    for file, outcome in predict(trained, flags.files, checkpoint=flags.checkpoint):
        if isinstance(outcome, str):
            unreadable += 1
            print(f"{file}: {outcome}", file=sys.stderr)
            continue
        top = [(trained.info.class_names[k], float(outcome[k])) for k in np.argsort(-outcome)[:TOP]]
        if flags.json:
            print(json.dumps({"file": str(file), "top": [{"class": name, "probability": p} for name, p in top]}))
        else:
            print(file, *(f"  {p:7.2%}  {name}" for name, p in top), sep="\n")
    if unreadable:
        raise UserError(f"{unreadable} of {len(flags.files)} files could not be read; they are named above")


if __name__ == "__main__":
    sys.exit(cli.run(main))
