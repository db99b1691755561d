"""Compare finished runs on the same test images: which is better, how surely, and where they differ.

    vitcls compare DIR DIR... [--out=DIR]

Prints Markdown tables; with --out they are written too, as compare.md, compare.json and index.html with its plots.
Runs whose configs differ in the seed only are one group. docs/comparing.md says what each number means.
"""

import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vitcls import cli, data
from vitcls.core import buckets
from vitcls.core.errors import UserError
from vitcls.metrics import METRICS, comparison
from vitcls.metrics.resampling import LEVEL, RESAMPLES
from vitcls.report import comparison as pages
from vitcls.report.part import Part
from vitcls.report.write import check_out
from vitcls.training import metrics_log, run_dir, seed_groups
from vitcls.training.predictions import Predictions, check_same_images, read_predictions

_logger = logging.getLogger("vitcls")
Members = dict[str, list[int]]  # of each group, which runs
_MANY = 10_000_000  # probabilities, whose resampling takes seconds


def compare(workdirs: Sequence[os.PathLike | str], out: os.PathLike | str = "") -> dict[str, Any]:
    """Compares the last evaluations of trained workdirs; returns what compare.json holds, and writes it to `out`.

    Raises UserError, before anything is written, where a workdir is not finished or is given twice, the images are
    not the same, or `out` holds something else than a comparison.
    """
    runs = _read(workdirs)
    if not out:
        return _compared(runs)[0]
    check_out(pathlib.Path(out), pages.FILES, "a comparison")
    with Part(out) as made:
        result, order = _compared(runs)
        _write(made, result, runs, order)
    return result


def _compared(runs: Sequence[Predictions]) -> tuple[dict[str, Any], Members]:
    """What compare.json holds, and the runs of each group in its order."""
    configs = [seed_groups.flat_config(run.run.config) for run in runs]
    members = seed_groups.group_seeds([run.run.name for run in runs], configs)
    labels, scores = runs[0].labels, [_score(run) for run in runs]
    groups = {name: [scores[i] for i in indices] for name, indices in members.items()}
    result = comparison.compare(groups)
    order = {group["name"]: members[group["name"]] for group in result["groups"]}
    result = {
        "dataset": runs[0].report["dataset"],
        "split": runs[0].report["split"],
        "num_examples": len(labels),
        "num_classes": runs[0].run.info.num_classes,
        "level": LEVEL,
        "resamples": RESAMPLES,
        **result,
        "config_differences": seed_groups.config_differences([configs[indices[0]] for indices in order.values()]),
        "runs": [_row(runs[i], name, scores[i]) for name, indices in order.items() for i in indices],
        "disagreements": comparison.disagreements({name: groups[name] for name in order}, labels),
    }
    return result, order


def _write(made: Part, result: dict[str, Any], runs: Sequence[Predictions], order: Members) -> None:
    names, curves = runs[0].run.info.class_names, _curves(runs, order)
    images = _images(runs) if result["disagreements"] else ""
    pages.write(made, result, class_names=names, curves=curves, images=images)


def _read(workdirs: Sequence[os.PathLike | str]) -> list[Predictions]:
    if len(workdirs) < 2:
        raise UserError("there is nothing to compare; give at least two workdirs")
    resolved = [os.path.realpath(path) for path in workdirs]
    for path, place in zip(workdirs, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UserError(f"the workdir {path} is given twice; give each once")
    runs = [read_predictions(run_dir.open_workdir(path)) for path in workdirs]
    check_same_images(runs)
    return runs


def _score(run: Predictions) -> comparison.Scores:
    if run.labels.size * run.run.info.num_classes > _MANY:
        _logger.info("resampling the predictions of %s", run.run.path)
    return comparison.score(run.labels, run.probabilities())


def _row(run: Predictions, group: str, scores: comparison.Scores) -> dict[str, Any]:
    return {
        "workdir": run.run.name,
        "group": group,
        "seed": run.run.config.seed,
        "checkpoint_step": run.report["checkpoint_step"],
        "metrics": scores.metrics,
    }


def _curves(runs: Sequence[Predictions], order: Members) -> dict[str, dict[str, list]]:
    """The metric that chose the checkpoints (accuracy where they differ) and the loss, by epoch: see `curves` there."""
    chosen = {run.run.config.checkpoint.metric for run in runs}
    first = chosen.pop() if len(chosen) == 1 else "eval/accuracy"
    names = dict.fromkeys([first.removeprefix("eval/"), "loss"])
    return {
        name: {group: [_curve(runs[i], name) for i in indices] for group, indices in order.items()}
        for name in names
        if name in METRICS
    }


def _curve(run: Predictions, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, values) of a metric on the validation split."""
    from vitcls.report.plots import series

    steps, values = series(metrics_log.read_history(run.run.path), f"eval/{name}")
    return steps * run.run.config.batch_size / run.run.info.num_examples["train"], values


def _images(runs: Sequence[Predictions]) -> Callable[[np.ndarray], np.ndarray] | str:
    """Reads images of the split, from the first run whose data are still there; else why there are none."""
    reason = ""
    for predictions in runs:
        run = predictions.run
        try:
            place = run_dir.data_dir(run.path, run.config)
            dataset = data.load(run.config.dataset, data_dir=place, max_value=run.info.max_value)
        except UserError as error:
            reason = reason or f"the data cannot be read: {cli.one_line(error)}"
            continue
        examples = getattr(dataset, predictions.report["split"])
        if examples is None or not np.array_equal(examples.labels, predictions.labels):
            reason = reason or "the data are no longer those of the evaluation."
            continue
        shape = run.info.image_shape
        return lambda ids: np.stack([data.read_image(examples, int(i), shape) for i in ids])
    return reason


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("compare"), description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="directories of finished runs, at least two")
    cli.add_import_argument(parser)
    parser.add_argument("--out", default="", metavar="DIR", help="where the comparison is written; default: nowhere")
    flags = parser.parse_args(argv)
    buckets.check_local(flags.out, "--out")
    result = compare(flags.workdirs, flags.out)
    print(pages.to_markdown(result), end="")
    if flags.out:
        _logger.info("comparison: %s", os.path.join(flags.out, "index.html"))


if __name__ == "__main__":
    sys.exit(cli.run(main))
