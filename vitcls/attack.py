"""What is left of a run's accuracy when its images are changed so as to be misclassified.

vitcls attack --workdir=DIR [--attack=fgsm,pgd,apgd,square] [--norm=linf|l2] [--eps=8/255] [--images=1000]
    [--steps=40] [--queries=500] [--checkpoint=last|best|STEP] [--data_dir=DIR]

Images may move by eps, of values in [0, 1], before they are normalised. Checks come first; where one says that attacks
fail on this model, no robust accuracy is given, and the exit code is 1. Of a network that was trained for it
(--config.task.name=certified) it also says which share no attack by the linf norm can take. Writes DIR/attack.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vitcls import attacks, cli, data
from vitcls.attacks import bounds
from vitcls.attacks.checks import Check, check
from vitcls.core.errors import RunError, UserError, unknown
from vitcls.core.progress import show_progress
from vitcls.core.sharding import AXIS
from vitcls.metrics.promises import proportion
from vitcls.report import findings
from vitcls.report.findings import Plot, Table, Text, ends, ends_of, interval
from vitcls.report.part import Part
from vitcls.training import places
from vitcls.training.opened import Opened, open_with_data

_logger = logging.getLogger("vitcls")
PART = "attack"  # of the workdir
ATTACKS = ("fgsm", "pgd", "apgd", "square")
_MULTIPLES = (0.25, 0.5, 1, 2)  # of eps, on the curve
_CHECKED = 100  # images, of twice as many
_BATCH = 100  # images at a time, at most
_LABELS = {"fgsm": "FGSM", "pgd": "PGD", "apgd": "APGD", "square": "Square"}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How hard attacks try."""

    norm: str = "linf"
    steps: int = 40  # of PGD and APGD
    queries: int = 500  # of Square

    def attack(self, name: str) -> Any:
        return {
            "fgsm": lambda: attacks.fgsm(self.norm),
            "pgd": lambda: attacks.PGD(self.norm, self.steps),
            "apgd": lambda: attacks.APGD(self.norm, self.steps),
            "square": lambda: attacks.Square(self.norm, self.queries),
        }[name]()


def attack(
    path: os.PathLike | str,
    *,
    names: Sequence[str] = ATTACKS,
    eps: float = 8 / 255,
    curve: Sequence[float] = (),
    budget: Budget = Budget(),
    num_images: int = 1_000,
    checkpoint: str = "",
    data_dir: str = "",
) -> dict[str, Any]:
    """Checks, attacks test images, writes attack/ in the workdir, and returns its metrics.json.

    Args:
      eps: of the checks and of the accuracy that is printed.
      curve: all eps that are tried, `eps` among them; by default multiples of it.
      num_images: of the test split, chosen by a fixed seed; 0 for all.

    Raises:
      UserError: before anything is written, where there is no such workdir, checkpoint or classifier.
      RunError: after the checks are written, where one fails; robust accuracies are then not even measured.
    """
    opened = open_with_data(path, splits=("test",), checkpoint=checkpoint, data_dir=data_dir)
    furthest = attacks.furthest(opened.trained.info.image_shape, budget.norm)
    if (largest := max([eps, *curve])) > furthest:
        raise UserError(
            f"eps {largest:g} is further than images in [0, 1] are from each other, {furthest:.4g} by {budget.norm}; "
            "of 255 levels write --eps=E/255"
        )
    where = opened.trained.path
    with Part(where / PART) as made:
        eps_tried = sorted(set(curve) or {min(eps * multiple, furthest) for multiple in _MULTIPLES})
        images, labels, which = _test_images(opened, num_images)
        runner = _runner(opened)
        right = runner.logits(images).argmax(axis=1) == labels
        checked = _right_ones(opened, runner)
        if not right.any() or not len(checked[1]):
            raise RunError("the model classifies none of the images right, so there is nothing to attack")
        _logger.info("checking on %d images whether attacks can be trusted", len(checked[1]))
        checks = check(runner, *checked, norm=budget.norm, eps=eps, steps=budget.steps, queries=budget.queries)
        metrics = {
            "dataset": opened.trained.info.name,
            "checkpoint_step": opened.step,
            "num_examples": len(labels),
            "norm": budget.norm,
            "eps": eps,
            "steps": {name: budget.attack(name).steps for name in names},
            "clean_accuracy": proportion(right),
            "checked_images": len(checked[1]),
            "checks": [each._asdict() for each in checks],
            "certified": _certified(runner, images, labels, eps_tried, budget.norm),
        }
        failed = [each for each in checks if not each.passed]
        if not failed:
            metrics["curve"] = _curve(runner, images, labels, which, right, names, eps_tried, budget)
            metrics["robust_accuracy"] = next(point["worst"] for point in metrics["curve"] if point["eps"] == eps)
        _write(made, metrics)
    places.publish(path, where, PART)
    if failed:
        raise RunError("; ".join([_refusal(failed, budget.steps), *_certified_lines(metrics)]))
    return metrics


def _test_images(opened: Opened, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images float32 [N, H, W, C] in [0, 1] of the test split, their labels int32 [N] and places in the split [N]."""
    split = opened.dataset.test
    chosen = np.random.default_rng(0).permutation(len(split.labels))
    chosen = np.sort(chosen[:count] if count else chosen).astype(np.int32)
    split = split.take(chosen)
    pixels = data.pixels(split, opened.trained.info.image_shape)
    return pixels.astype(np.float32) / 255, split.labels, chosen


def _right_ones(opened: Opened, runner: attacks.Runner) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for the checks, all classified right: of few images luck would decide, however few are attacked."""
    images, labels, which = _test_images(opened, 2 * _CHECKED)
    right = np.flatnonzero(runner.logits(images).argmax(axis=1) == labels)[:_CHECKED]
    return images[right], labels[right], which[right]


def _runner(opened: Opened) -> attacks.Runner:
    partition = opened.partition
    batch_size = partition.round_up(min(opened.trained.config.batch_size, _BATCH, len(opened.dataset.test.labels)))
    spread = partition.sharding(AXIS)
    return attacks.Runner(
        opened.forward, opened.variables, batch_size=batch_size, put=lambda rows: jax.device_put(rows, spread)
    )


def _curve(
    runner: attacks.Runner,
    images: np.ndarray,
    labels: np.ndarray,
    which: np.ndarray,
    right: np.ndarray,
    names: Sequence[str],
    eps_tried: Sequence[float],
    budget: Budget,
) -> list[dict[str, Any]]:
    """Accuracies by eps, from 0 on.

    What an attack has broken stays broken for all larger eps, in whose balls it lies, and is not attacked again; what
    another attack has broken is, so that each has a curve of its own.
    """
    left = {name: right.copy() for name in names}
    points = [_point(0.0, left)]
    tried = [(eps, name) for eps in eps_tried for name in names]
    for eps, name in show_progress(tried, len(tried), "attacks"):
        rows = np.flatnonzero(left[name])
        left[name][rows] = runner.survives(budget.attack(name), images[rows], labels[rows], which[rows], eps)
        if name == names[-1]:
            points.append(_point(eps, left))
    return points


def _certified(
    runner: attacks.Runner, images: np.ndarray, labels: np.ndarray, eps_tried: Sequence[float], norm: str
) -> list[dict[str, Any]]:
    """By eps, the share of images that no attack at all can have misclassified; empty where bounds show none."""
    try:
        found = [runner.certified(images, labels, eps) for eps in eps_tried if norm == "linf"]
    except bounds.Unbounded:
        found = []
    if not np.any(found):
        return []
    return [{"eps": eps, "accuracy": proportion(own)} for eps, own in zip(eps_tried, found, strict=True)]


def _point(eps: float, left: dict[str, np.ndarray]) -> dict[str, Any]:
    worst = np.all(list(left.values()), axis=0)
    return {"eps": eps, "worst": proportion(worst), "attacks": {name: proportion(own) for name, own in left.items()}}


def _refusal(failed: Sequence[Check], steps: int) -> str:
    names = ", ".join(f"'{each.name}'" for each in failed)
    many = "checks fail" if len(failed) > 1 else "check fails"
    return (
        f"no robust accuracy is given, because attacks cannot be trusted on this model: {names} {many}: "
        + "; ".join(each.words for each in failed)
        + (f"; --steps={steps} may be too few for PGD" if steps < Budget.steps else "")
    )


def _write(made: Part, metrics: dict[str, Any]) -> None:
    def drawn():
        from vitcls.report import attack_plots

        return attack_plots.accuracy_by_eps(metrics["curve"], _LABELS, metrics["certified"])

    if "curve" in metrics:
        caption = "Each image is counted as the worst attack leaves it; what one eps has broken no larger one mends."
        found = [_curve_table(metrics), Plot("accuracy", "Accuracy against eps", caption, drawn)]
    else:
        found = [Text("A check fails: attacks cannot be trusted on this model, and no robust accuracy is given.")]
    findings.write(
        made,
        title=f"Attacks on {metrics['dataset']}",
        lead=f"Step {metrics['checkpoint_step']:,}; {metrics['num_examples']:,} test images, {metrics['norm']} balls "
        f"of {metrics['eps']:.4g}; accuracy as they are {interval(metrics['clean_accuracy'], '{:.2%}')}.",
        metrics=metrics,
        blocks=[*found, *_certified_table(metrics), _checks_table(metrics)],
    )


def _curve_table(metrics: dict[str, Any]) -> Table:
    rows = [
        [
            f"{point['eps']:.4g}",
            interval(point["worst"], "{:.2%}"),
            *(interval(found, "{:.2%}") for found in point["attacks"].values()),
        ]
        for point in metrics["curve"]
    ]
    columns = ["eps", *ends_of("worst", *metrics["steps"])]
    values = [[point["eps"], *ends(point["worst"], *point["attacks"].values())] for point in metrics["curve"]]
    head = ["eps", "Worst of all [95 % interval]", *(f"{_LABELS[name]}, {n:,}" for name, n in metrics["steps"].items())]
    return Table("Accuracy under attack, and the steps of each", head, rows, "accuracy", [columns, *values])


def _certified_table(metrics: dict[str, Any]) -> list[Table]:
    """Where bounds show anything."""
    rows = [[f"{each['eps']:.4g}", interval(each["accuracy"], "{:.2%}")] for each in metrics["certified"]]
    values = [[each["eps"], *ends(each["accuracy"])] for each in metrics["certified"]]
    head = ["eps", "certified", "certified_low", "certified_high"]
    title = "What no attack can take: certified by bounds of the logits over all images within eps"
    return [Table(title, ["eps", "Certified [95 % interval]"], rows, "certified", [head, *values])] if rows else []


def _checks_table(metrics: dict[str, Any]) -> Table:
    rows = [[each["name"], "yes" if each["passed"] else "NO", each["words"]] for each in metrics["checks"]]
    title = f"Can the attacks be trusted? On {metrics['checked_images']:,} images that are classified right"
    return Table(title, ["Check", "Passed", "What was found"], rows, "checks")


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("attack"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument(
        "--attack", default=",".join(ATTACKS), metavar="A,A", help="default: fgsm,pgd,apgd,square, all there are"
    )
    parser.add_argument("--norm", choices=attacks.NORMS, default="linf", help="default: linf")
    parser.add_argument(
        "--eps",
        default="8/255",
        metavar="E",
        help="how far values in [0, 1] may move, or E,E,... for a curve; default: 8/255",
    )
    parser.add_argument(
        "--images", type=int, default=1_000, metavar="N", help="of the test split; 0 for all; default: 1000"
    )
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="of PGD and APGD; default: 40")
    parser.add_argument("--queries", type=int, default=500, metavar="N", help="of Square; default: 500")
    parser.add_argument("--data_dir", default="", help="where the data are now, if they have moved")
    flags = parser.parse_args(argv)
    names, tried = _names(flags.attack), _numbers(flags.eps)
    for flag, least in (("images", 0), ("steps", 1), ("queries", 1)):
        if getattr(flags, flag) < least:
            raise UserError(f"--{flag}={getattr(flags, flag)} must be at least {least}")
    cli.start_jax()
    metrics = attack(
        flags.workdir,
        names=names,
        eps=tried[-1],
        curve=tried if len(tried) > 1 else (),
        budget=Budget(flags.norm, flags.steps, flags.queries),
        num_images=flags.images,
        checkpoint=flags.checkpoint,
        data_dir=flags.data_dir,
    )
    print("\n".join(_lines(metrics)))
    print(f"report: {os.path.join(flags.workdir, PART, 'index.html')}")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in ATTACKS:
            raise unknown("attack", name, ATTACKS)
    return names


def _numbers(text: str) -> list[float]:
    """'8/255', '0.5/255,1/255' or '0.1,0.2', in ascending order."""
    fractions = [part.partition("/") for part in text.split(",")]
    try:
        numbers = sorted({float(over) / float(under if slash else 1) for over, slash, under in fractions})
    except (ValueError, ZeroDivisionError):
        numbers = [0.0]
    if not all(0 < number < np.inf for number in numbers):
        raise UserError(f"--eps={text} must be numbers above 0, such as 8/255 or 0.1,0.2,0.3")
    return numbers


def _lines(metrics: dict[str, Any]) -> list[str]:
    """What it came to, a line for each eps."""
    lines = [f"{len(metrics['checks'])} checks passed on {metrics['checked_images']:,} images"]
    for point in metrics["curve"]:
        each = ", ".join(f"{_LABELS[name]} {own['value']:.2%}" for name, own in point["attacks"].items())
        lines.append(
            f"{metrics['norm']} eps {point['eps']:.4g}: accuracy {interval(point['worst'], '{:.2%}')}"
            + (f" ({each})" if point["eps"] else f" on {metrics['num_examples']:,} test images")
        )
    return lines + _certified_lines(metrics)


def _certified_lines(metrics: dict[str, Any]) -> list[str]:
    return [
        f"{metrics['norm']} eps {each['eps']:.4g}: certified against any attack {interval(each['accuracy'], '{:.2%}')}"
        for each in metrics["certified"]
    ]


if __name__ == "__main__":
    sys.exit(cli.run(main))
