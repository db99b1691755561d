"""What breaks a run: its test images corrupted, hidden, moved, turned, scaled, made coarse.

vitcls robustness --workdir=DIR [--against=DIR2] [--only=NAME,NAME...] [--images=N] [--data_dir=DIR]
    [--checkpoint=last|best|STEP]

Writes DIR/robustness: accuracy under 19 corruptions in five severities and along seven curves, the share of answers
that stay as they were, the mean corruption error, and with --against what the other run makes of the same.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vitcls import cli
from vitcls.core import errors
from vitcls.core.errors import UserError
from vitcls.core.progress import show_progress
from vitcls.data.corruptions import CORRUPTIONS, SEVERITIES, VALIDATION, applies_to, corrupt, perturb
from vitcls.data.corruptions.curves import CURVES, levels_of
from vitcls.data.corruptions.files import CorruptedFiles, is_corrupted
from vitcls.metrics import robustness as rates
from vitcls.metrics.promises import proportion
from vitcls.metrics.resampling import estimate
from vitcls.report import findings
from vitcls.report.findings import Plot, Table, Text, ends, interval
from vitcls.report.part import Part
from vitcls.training import places
from vitcls.training.opened import Opened, open_with_data

PART = "robustness"  # of the workdir
NAMES = (*CORRUPTIONS, *CURVES)


class Answers(NamedTuple):
    """The classes that a run gives the same images, as they are and as they were changed."""

    labels: np.ndarray  # int32 [N]
    clean: np.ndarray  # int32 [N]
    changed: dict[str, np.ndarray]  # int32 [levels, N]

    def wrong(self, names: Iterable[str]) -> np.ndarray:
        """bool [names, levels, N]."""
        return np.stack([self.changed[name] for name in names]) != self.labels


def robustness(
    path: os.PathLike | str,
    *,
    against: str = "",
    only: Sequence[str] = (),
    images: int = 0,
    checkpoint: str = "",
    data_dirs: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures it, writes robustness/ and returns its metrics.json.

    Args:
      against: the workdir of another run on the same test images.
      only: names of corruptions and curves; all that can be done to the images where left out.
      images: how many of the test images, drawn at random; 0 for all.
      data_dirs: where the data of the run are now; and a directory of CIFAR-10-C or CIFAR-100-C, whose files then
        take the place of the corruptions.
    Raises UserError, before anything is written, where one of them is not there or not of the same images.
    """
    kept = [place for place in data_dirs if is_corrupted(place)]
    places_of_data = [place for place in data_dirs if place not in kept]
    if len(kept) > 1 or len(places_of_data) > 1:
        raise UserError("--data_dir is given once for the data of the run and once for a directory of CIFAR-10-C")
    data_dir = places_of_data[0] if places_of_data else ""
    opened, rows = _open(path, images, checkpoint, data_dir)
    shape = opened.trained.info.image_shape
    files = CorruptedFiles(kept[0], opened.dataset.test, rows, shape) if kept else None
    names = _names(opened, only, files)
    other = _open(against, images, "", data_dir)[0] if against else None
    if other is not None:
        _check_same(opened, other)
    levels = _levels(names, [run for run in (opened, other) if run is not None])
    where = opened.trained.path
    with Part(where / PART) as made:
        answers = _answers(opened, levels, files, "robustness")
        others = _answers(other, levels, files, f"robustness of {against}") if other is not None else None

        metrics = {
            "dataset": opened.trained.info.name,
            "checkpoint_step": opened.step,
            "num_examples": len(answers.labels),
            "source": f"files in {kept[0]}" if kept else "made here",
            **_found(answers, levels),
        }
        if others is not None:
            metrics["against"] = {
                "workdir": str(against),
                "checkpoint_step": other.step,
                **_compared(answers, others, levels),
            }
        _write(made, metrics, lambda: _examples(opened, levels, files))
    places.publish(path, where, PART)
    return metrics


def _open(path: os.PathLike | str, images: int, checkpoint: str, data_dir: str) -> tuple[Opened, np.ndarray]:
    """A run with some of its test images, and their places in the split, int64 [N], in order."""
    opened = open_with_data(path, splits=("test",), checkpoint=checkpoint, data_dir=data_dir)
    count = len(opened.dataset.test.labels)
    rows = np.sort(np.random.default_rng(0).permutation(count)[: images or count])
    dataset = dataclasses.replace(opened.dataset, test=opened.dataset.test.take(rows))
    return dataclasses.replace(opened, dataset=dataset), rows


def _names(opened: Opened, only: Sequence[str], files: CorruptedFiles | None) -> list[str]:
    """What is measured, in the order of the tables."""
    for name in only:
        if name not in NAMES:
            raise errors.unknown("--only", name, NAMES)
    shape = opened.trained.info.image_shape
    possible = [name for name in CORRUPTIONS if (name in files.names if files else applies_to(name, shape))]
    possible += CURVES
    for name in only:
        if name not in possible:
            why = "has no file" if files else "needs images with colours"
            raise UserError(f"--only={name} {why}")
    return [name for name in possible if name in only or not only]


def _check_same(opened: Opened, other: Opened) -> None:
    same = opened.trained.info.class_names == other.trained.info.class_names
    if not same or not np.array_equal(opened.dataset.test.labels, other.dataset.test.labels):
        raise UserError(
            f"the runs have different test images: '{opened.trained.info.name}' and '{other.trained.info.name}', or "
            "other classes or another order; --against takes a run on the same ones"
        )


def _levels(names: Sequence[str], runs: Sequence[Opened]) -> dict[str, tuple[float, ...]]:
    """The levels of each that are measured; raises UserError where none changes the images of all runs."""
    sides = [max(run.trained.info.image_shape[:2]) for run in runs]
    levels = {name: SEVERITIES if name in CORRUPTIONS else levels_of(name, sides) for name in names}
    levels = {name: row for name, row in levels.items() if row}
    if not levels:
        raise UserError(f"--only={','.join(names)} moves nothing in images of {min(sides)} pixels; give others")
    return levels


def _answers(opened: Opened, levels: dict[str, tuple[float, ...]], files: CorruptedFiles | None, what: str) -> Answers:
    batches = opened.batches("test")
    jobs = [(name, level) for name, row in levels.items() for level in row]
    count = len(batches.labels)
    clean = opened.classes(batches, count)
    changed: dict[str, list[np.ndarray]] = {name: [] for name in levels}
    for name, level in show_progress(jobs, len(jobs), what):
        changed[name].append(opened.classes(_changed(opened, batches, files, name, level), count))
    return Answers(batches.labels, clean, {name: np.stack(rows) for name, rows in changed.items()})


def _changed(opened: Opened, batches: Iterable[dict], files: CorruptedFiles | None, name: str, level: Any) -> Iterable:
    if name in CURVES:
        curve = CURVES[name]
        return perturb(batches, f"{name} {level}", curve.apply, lambda h, w: curve.prepare(level, h, w))
    return corrupt(batches, name, level) if files is None else opened.batches_of(files.split(name, level))


def _found(answers: Answers, levels: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """The figures of one run."""
    labels, clean, changed = answers
    corruptions = [name for name in CORRUPTIONS if name in changed]
    common = [name for name in corruptions if name not in VALIDATION]
    found: dict[str, Any] = {"clean": proportion(clean == labels)}
    found["corruptions"] = {
        name: {
            "accuracy": [proportion(row == labels) for row in changed[name]],
            "consistency": [proportion(row == clean) for row in changed[name]],
            "mean_error": estimate({"wrong": answers.wrong([name])}, lambda e: rates.mean_error(e["wrong"])),
        }
        for name in corruptions
    }
    found["mean_error"] = (
        estimate({"wrong": answers.wrong(common)}, lambda e: rates.mean_error(e["wrong"])) if common else None
    )
    found["curves"] = {
        name: [
            {"level": level, "accuracy": proportion(row == labels), "consistency": proportion(row == clean)}
            for level, row in zip(levels[name], changed[name], strict=True)
        ]
        for name in CURVES
        if name in changed
    }
    return found


def _compared(ours: Answers, theirs: Answers, levels: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """The figures of the other run, and what is ours less theirs."""
    labels = ours.labels

    def difference(mine: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
        wrong = {"mine": mine != labels, "other": other != labels}
        return estimate(wrong, lambda e: rates.mean_error(e["other"]) - rates.mean_error(e["mine"]))

    found = _found(theirs, levels)
    found["difference"] = {"clean": difference(ours.clean, theirs.clean)} | {
        name: [difference(a, b) for a, b in zip(ours.changed[name], theirs.changed[name], strict=True)]
        for name in ours.changed
    }
    common = [name for name in CORRUPTIONS if name in ours.changed and name not in VALIDATION]
    if common:
        wrong = {"mine": ours.wrong(common), "other": theirs.wrong(common)}
        wrong |= {"clean": ours.clean != labels, "other_clean": theirs.clean != labels}
        found["mce"] = estimate(wrong, lambda e: rates.mean_corruption_error(e["mine"], e["other"]))
        found["relative_mce"] = estimate(
            wrong,
            lambda e: rates.relative_corruption_error(e["mine"], e["clean"], e["other"], e["other_clean"]),
        )
    return found


def _write(made: Part, metrics: dict[str, Any], examples: Callable[[], dict]) -> None:
    def drawn(name: str) -> Callable:
        from vitcls.report import robustness_plots

        return getattr(robustness_plots, name)

    against = metrics.get("against")
    blocks = [Text(line) for line in _lines(metrics)]
    if metrics["corruptions"]:
        blocks += [
            Plot("corruptions", "Corruptions", "Mean accuracy over five severities.", lambda: drawn("means")(metrics)),
            _corruption_table(metrics),
            Plot(
                "severities",
                "By severity",
                "Accuracy from the clean images on.",
                lambda: drawn("severities")(metrics),
            ),
        ]
    if metrics["curves"]:
        blocks += [
            Plot(
                "curves",
                "By degrees",
                "Accuracy, and the share of images that get the class they got unchanged; bands are 95 % intervals.",
                lambda: drawn("curves")(metrics),
            ),
            _curve_table(metrics),
        ]
    blocks.append(
        Plot(
            "examples",
            "What the images became",
            "A test image, and what was done to it.",
            lambda: drawn("examples")(examples()),
        )
    )
    findings.write(
        made,
        title=f"What breaks it: {metrics['dataset']}",
        lead=f"{metrics['num_examples']:,} test images; step {metrics['checkpoint_step']:,}"
        + (f"; against {against['workdir']}" if against else ""),
        metrics=metrics,
        blocks=blocks,
    )


def _examples(
    opened: Opened, levels: dict[str, tuple[float, ...]], files: CorruptedFiles | None
) -> dict[str, list[np.ndarray]]:
    """The first image uint8 [H, W, C] as it is, and as it became at each level; by the programs that there are."""
    first = next(iter(opened.batches("test")))

    def image_of(batches: Iterable[dict]) -> np.ndarray:
        return opened.partition.to_host(next(iter(batches))["image"])[0]

    return {
        name: [image_of([first]), *(image_of(_changed(opened, [first], files, name, level)) for level in row)]
        for name, row in levels.items()
    }


def _lines(metrics: dict[str, Any]) -> list[str]:
    """What it came to."""
    lines = [f"{interval(metrics['clean'], '{:.2%}')} of the images are right as they are."]
    if metrics["mean_error"] is not None:
        names = [name for name in metrics["corruptions"] if name not in VALIDATION]
        of = f"{len(names)} corruptions" if len(names) > 1 else names[0]
        lines[0] += f" The mean error over {of} and five severities is {interval(metrics['mean_error'], '{:.2%}')}."
    errors = {name: found["mean_error"] for name, found in metrics["corruptions"].items()}
    if errors:
        hardest = max(errors, key=lambda name: errors[name]["value"])
        is_it = f"{hardest} is the hardest: " if len(errors) > 1 else f"{hardest}: "
        lines.append(f"{is_it}{interval(errors[hardest], '{:.2%}')} of its images are wrong.")
    for name, points in metrics["curves"].items():
        worst = min(points, key=lambda point: point["accuracy"]["value"])
        lines.append(
            f"{name}: {interval(worst['accuracy'], '{:.2%}')} are right at {worst['level']:g}, the worst "
            f"{CURVES[name].meaning}."
        )
    against = metrics.get("against")
    if against:
        more = interval(against["difference"]["clean"], "{:+.2%}")
        lines.append(f"Against {against['workdir']}: of the images as they are, {more} more are right.")
    if against and "mce" in against:
        count = sum(name not in VALIDATION for name in metrics["corruptions"])
        lines[-1] += (
            f" mCE over {count} of 15 corruptions {interval(against['mce'], '{:.1%}')}, relative mCE "
            f"{interval(against['relative_mce'], '{:.1%}')}; below 100 % this run makes fewer errors than that one."
        )
    return lines


def _corruption_table(metrics: dict[str, Any]) -> Table:
    against = metrics.get("against")
    head = [
        "Corruption",
        "Mean error",
        *(["Mean error there"] if against else []),
        *(f"Severity {s}" for s in SEVERITIES),
    ]
    rows, values = [], []
    for name, found in metrics["corruptions"].items():
        means = [found["mean_error"], *([against["corruptions"][name]["mean_error"]] if against else [])]
        mark = " (validation)" if name in VALIDATION else ""
        rows.append([name + mark, *(interval(row, "{:.1%}") for row in (*means, *found["accuracy"]))])
        columns = [found["accuracy"], found["consistency"]]
        columns += [against["corruptions"][name]["accuracy"], against["difference"][name]] if against else []
        for severity, figures in zip(SEVERITIES, zip(*columns, strict=True), strict=True):
            values.append([name, severity, *ends(*figures)])
    values.insert(0, ["corruption", "severity", *_columns(against)])
    return Table("Accuracy under corruptions", head, rows, "corruptions", values)


def _curve_table(metrics: dict[str, Any]) -> Table:
    against = metrics.get("against")
    head = ["Change", "Level", "Accuracy", "Same answer", *(["Accuracy there", "Difference"] if against else [])]
    rows, values = [], []
    for name, points in metrics["curves"].items():
        for i, point in enumerate(points):
            found = [point["accuracy"], point["consistency"]]
            if against:
                found += [against["curves"][name][i]["accuracy"], against["difference"][name][i]]
            rows.append([name, f"{point['level']:g}", *(interval(row, "{:.1%}") for row in found)])
            values.append([name, point["level"], *ends(*found)])
    return Table("By degrees", head, rows, "curves", [["change", "level", *_columns(against)], *values])


def _columns(against: dict[str, Any] | None) -> list[str]:
    names = ["accuracy", "consistency", *(["accuracy_there", "difference"] if against else [])]
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("robustness"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument("--against", default="", metavar="DIR", help="the workdir of another run on the same images")
    parser.add_argument("--only", default="", metavar="NAMES", help=f"some of: {', '.join(NAMES)}")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="test images, drawn at random; default: all")
    parser.add_argument(
        "--data_dir",
        action="append",
        default=[],
        metavar="DIR",
        help="where the data of the run are now, if they have moved; or a directory of CIFAR-10-C or CIFAR-100-C",
    )
    flags = parser.parse_args(argv)
    if flags.images < 0:
        raise UserError(f"--images={flags.images} must be at least 1, or 0 for all")
    cli.start_jax()
    metrics = robustness(
        flags.workdir,
        against=flags.against,
        only=[name for name in flags.only.split(",") if name],
        images=flags.images,
        checkpoint=flags.checkpoint,
        data_dirs=flags.data_dir,
    )
    print("\n".join(_lines(metrics)))
    print(f"report: {os.path.join(flags.workdir, PART, 'index.html')}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
