"""Label image files with a trained workdir.

    python -m vitcls.predict --workdir=DIR [--checkpoint=last|best|STEP] [--json] FILE...

Prints the five most probable classes of each file. Files that cannot be read are named on stderr, and the exit code
is then 2, after all others are done.
"""

import json
import pathlib
import sys
from collections.abc import Iterator

import jax
import numpy as np

from vitcls import cli, experiment, workdir
from vitcls.data import images as image_files
from vitcls.errors import UserError

_BATCH = 32
TOP = 5


def predict(
    trained: workdir.Workdir, files: list[pathlib.Path], *, checkpoint: str = ""
) -> Iterator[tuple[pathlib.Path, np.ndarray | str]]:
    """Yields (file, probabilities float32 [K]) for each file in order, or (file, why it cannot be read)."""
    config, info = trained.config, trained.info
    decoding = image_files.Decoding(info.max_value, config.dataset.eval_crop)
    model = experiment.make_model(config, info)
    variables = trained.restore_variables(model, trained.find_step(checkpoint or config.report.checkpoint))
    eval_step = jax.jit(experiment.make_eval_step(config, model, info))
    batch_size = min(_BATCH, len(files))
    for start in range(0, len(files), batch_size):
        results: dict[int, np.ndarray | str] = {}
        batch = {
            "image": np.zeros((batch_size, *info.image_shape), np.uint8),
            "label": np.zeros(batch_size, np.int32),
            "mask": np.zeros(batch_size, np.float32),
        }
        group = files[start : start + batch_size]
        for i, file in enumerate(group):
            try:
                batch["image"][i] = read(file, info.image_shape, decoding)
            except OSError as error:
                results[i] = error.strerror or str(error)
            except image_files.BadImage as error:
                results[i] = str(error)
        if len(results) < len(group):
            probabilities = jax.device_get(eval_step(variables, batch)[1])
            results = {i: probabilities[i] for i in range(len(group))} | results
        yield from ((file, results[i]) for i, file in enumerate(group))


def read(file: pathlib.Path, image_shape: tuple[int, int, int], decoding: image_files.Decoding) -> np.ndarray:
    """One file as the model was trained to see it, uint8 [H, W, C]; raises OSError or BadImage."""
    size, channels = image_shape[:2], image_shape[2]
    encoded = file.read_bytes()
    image_files.examine(encoded)
    return image_files.decode(encoded, size=size, channels=channels, decoding=decoding)


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python -m vitcls.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--checkpoint", default="", help="'last', 'best' or a step; default: config.report.checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON object per file")
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    flags = parser.parse_args(argv)
    cli.start_jax()
    trained = workdir.open_workdir(flags.workdir)
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
