"""Make the probabilities of a run honest, and promise what its answers are worth.

vitcls calibrate --workdir=DIR [--method=auto|none|temperature|vector|isotonic] [--coverage=0.9,0.95]
    [--accuracy=0.95,0.99] [--sets=raps|aps] [--checkpoint=last|best|STEP] [--data_dir=DIR]
    [--groups=FILE.csv|coarse]

Half of the validation split fits the probabilities, the other half carries the promises; the test split checks both.
DIR/calibration.json is what `vitcls predict` and `vitcls evaluate --calibrated` use; DIR/calibrate has the figures.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls import cli
from vitcls.core.errors import UserError
from vitcls.metrics import promises, scaling
from vitcls.metrics.calibration_scores import MEANINGS, calibration_scores
from vitcls.metrics.promises import Regularization, TooFew, percent
from vitcls.metrics.resampling import estimate
from vitcls.report import findings
from vitcls.report.findings import Plot, Table, Text, ends, ends_of, interval
from vitcls.report.part import Part
from vitcls.training import calibration, places
from vitcls.training.calibration import AnswerPromise, Calibration, SetPromise
from vitcls.training.files import CALIBRATION_FILE
from vitcls.training.opened import open_with_data

COVERAGES = (0.8, 0.9, 0.95, 0.99)
ACCURACIES = (0.9, 0.95, 0.98, 0.99)
PART = "calibrate"  # of the workdir
Predictions = tuple[np.ndarray, np.ndarray]  # labels int [N], probabilities [N, K]


def calibrate(
    path: os.PathLike | str,
    *,
    method: str = "auto",
    coverages: Sequence[float] = (),
    accuracies: Sequence[float] = (),
    sets: str = "raps",
    groups: str = "",
    checkpoint: str = "",
    data_dir: str = "",
) -> dict[str, Any]:
    """Fits, promises and checks; writes calibration.json and calibrate/ in the workdir, and returns its metrics.json.

    Args:
      coverages: of the sets; COVERAGES where left out, and then what cannot be promised is left out.
      accuracies: of the answers; ACCURACIES likewise.

    Raises UserError where there is no such workdir, checkpoint or validation split, or none of what is asked for can be
    promised, before anything is written.
    """
    opened = open_with_data(path, splits=("validation", "test"), checkpoint=checkpoint, data_dir=data_dir)
    grouping = np.array(opened.groups(groups, "test")) if groups else None
    where = opened.trained.path
    with Part(where / PART) as made:
        labels, probabilities = opened.predictions("validation")
        if len(labels) < 2:
            raise UserError("one validation image is too few to calibrate by; set config.dataset.validation higher")
        half = np.random.default_rng(0).permutation(len(labels)) % 2 == 0
        fitting, held = (labels[half], probabilities[half]), (labels[~half], probabilities[~half])
        best, losses = scaling.choose(*fitting)
        chosen = best if method == "auto" else method
        scale = scaling.METHODS[chosen].fit(*fitting)
        fitting, held = ((labels, scale(p)) for labels, p in (fitting, held))
        holding, refused_sets = _promise_sets(fitting, held, coverages or COVERAGES, plain=sets == "aps")
        answers, refused_answers = _promise_answers(held, accuracies or ACCURACIES)
        for asked, promised, refused in ((coverages, holding, refused_sets), (accuracies, answers, refused_answers)):
            if asked and not promised:
                raise UserError(f"{'; '.join(refused.values())}; nothing is replaced")
        fitted = Calibration(opened.step, scale, tuple(holding), tuple(answers), len(held[0]))

        labels, before = opened.predictions("test")
        test = labels, scale(before)
        metrics = {
            "dataset": opened.trained.info.name,
            "checkpoint_step": opened.step,
            "method": chosen,
            "validation_losses": losses,
            "fitted_on": len(fitting[0]),
            "held_out": len(held[0]),
            "num_examples": len(labels),
            "before": calibration_scores(labels, before),
            "after": calibration_scores(*test),
            "sets": [_checked_sets(promise, *test, grouping) for promise in holding],
            "refused_sets": refused_sets,
            "answers": [_checked_answers(promise, *test) for promise in answers],
            "refused_answers": refused_answers,
            "units": MEANINGS | {"coverage": "fraction of images"},
        }
        _write(made, metrics, before, test, opened.trained.info.class_names)
        calibration.write(where, fitted)
    for part in (PART, CALIBRATION_FILE):
        places.publish(path, where, part)
    return metrics


def _promise_sets(
    fitting: Predictions, held: Predictions, coverages: Sequence[float], *, plain: bool
) -> tuple[list[SetPromise], dict[str, str]]:
    promised, refused = [], {}
    labels, probabilities = held
    for coverage in coverages:
        shape = Regularization() if plain else promises.choose_regularization(*fitting, coverage)
        scores = promises.class_scores(probabilities, shape)[np.arange(len(labels)), labels]
        try:
            threshold = promises.set_threshold(scores, coverage)
        except TooFew as error:
            refused[f"{coverage:g}"] = str(error)
        else:
            promised.append(SetPromise(coverage, threshold, *shape))
    return promised, refused


def _promise_answers(held: Predictions, accuracies: Sequence[float]) -> tuple[list[AnswerPromise], dict[str, str]]:
    promised, refused = [], {}
    for accuracy in accuracies:
        try:
            threshold = promises.answer_threshold(*_surest(*held), accuracy).threshold
        except TooFew as error:
            refused[f"{accuracy:g}"] = str(error)
        else:
            promised.append(AnswerPromise(accuracy, threshold))
    return promised, refused


def _surest(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The confidence of each prediction, and whether it is right."""
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == labels


def _checked_sets(
    promise: SetPromise, labels: np.ndarray, probabilities: np.ndarray, grouping: np.ndarray | None
) -> dict[str, Any]:
    """What the sets of a promise are worth on the test images, over all, by class, and by group if there are any."""
    sets = promise.sets(probabilities)
    covered = sets[np.arange(len(labels)), labels]
    found, sizes = promises.proportion(covered), sets.sum(axis=1)
    names = [] if grouping is None else sorted(set(grouping.tolist()))
    return {
        "coverage": promise.coverage,
        "method": "raps" if promise.penalty else "aps",
        "test_coverage": found,
        "kept": found["high"] >= promise.coverage,
        "mean_size": estimate({"size": sizes}, lambda means: means["size"]),
        "single": promises.proportion(sizes == 1),
        "per_class": [promises.proportion(covered[labels == k]) for k in range(probabilities.shape[1])],
        "per_group": {name: promises.proportion(covered[grouping == name]) for name in names},
    }


def _checked_answers(promise: AnswerPromise, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    confidence, right = _surest(labels, probabilities)
    given = promises.are_answered(confidence, promise.threshold)
    found = promises.proportion(right[given])
    return {
        "accuracy": promise.accuracy,
        "threshold": promise.threshold,
        "answered": promises.proportion(given),
        "test_accuracy": found,
        "kept": found["high"] is None or found["high"] >= promise.accuracy,
    }


def _write(
    made: Part,
    metrics: dict[str, Any],
    before: np.ndarray,
    test: Predictions,
    class_names: Sequence[str],
) -> None:
    from vitcls.report import calibration_plots

    labels, after = test
    findings.write(
        made,
        title=f"Calibration on {metrics['dataset']}",
        lead=f"Step {metrics['checkpoint_step']:,}; fitted on {metrics['fitted_on']:,} validation images, promised by "
        f"{metrics['held_out']:,} others, checked on {metrics['num_examples']:,} test images.",
        metrics=metrics,
        blocks=[
            _scores_table(metrics),
            Text(
                f"Chosen by the loss on validation images that were not fitted on: {metrics['method']} ("
                + ", ".join(f"{name} {loss:.4f}" for name, loss in metrics["validation_losses"].items())
                + " nats)."
            ),
            Plot(
                "reliability",
                "Reliability",
                "Accuracy in bins of confidence, before and after; on the diagonal confidence is honest.",
                lambda: calibration_plots.reliability(labels, before, after),
            ),
            _sets_table(metrics),
            *([_coverage_plot(metrics, class_names)] if metrics["sets"] else []),
            *([_groups_table(metrics)] if any(row["per_group"] for row in metrics["sets"]) else []),
            _answers_table(metrics),
            Plot(
                "risk_coverage",
                "Risk and coverage",
                "The share of wrong answers when only the surest images are answered.",
                lambda: calibration_plots.risk_coverage({"before": (labels, before), "after": (labels, after)}),
            ),
        ],
    )


def _coverage_plot(metrics: dict[str, Any], class_names: Sequence[str]) -> Plot:
    from vitcls.report import calibration_plots

    return Plot(
        "coverage",
        "Coverage by class",
        "How many images of each class have a set that holds the truth; the promise is over all images.",
        lambda: calibration_plots.coverage(metrics["sets"], class_names),
    )


def _scores_table(metrics: dict[str, Any]) -> Table:
    rows = [
        [name, *(interval(metrics[when][name], "{:.4f}") for when in ("before", "after")), meaning]
        for name, meaning in metrics["units"].items()
        if name in metrics["before"]
    ]
    when = ("before", "after")
    values = [[name, *ends(*(metrics[each][name] for each in when))] for name in metrics["before"]]
    head = ["Score", "Before [95 % interval]", "After [95 % interval]", "What it is"]
    return Table("Before and after", head, rows, "scores", [["score", *ends_of(*when)], *values])


def _sets_table(metrics: dict[str, Any]) -> Table:
    rows = [
        [
            percent(row["coverage"]),
            row["method"],
            interval(row["test_coverage"], "{:.2%}"),
            "yes" if row["kept"] else "no",
            interval(row["mean_size"], "{:.2f}"),
            interval(row["single"], "{:.1%}"),
        ]
        for row in metrics["sets"]
    ]
    rows += [
        [percent(float(coverage)), "refused", why, "", "", ""] for coverage, why in metrics["refused_sets"].items()
    ]
    head = ["Sets that hold the truth of", "Method", "Test images [95 % interval]", "Kept", "Mean size", "One class"]
    columns = ["coverage", "method", "kept", *ends_of("test_coverage", "mean_size", "single"), "refused"]
    values = [
        [row["coverage"], row["method"], row["kept"], *ends(row["test_coverage"], row["mean_size"], row["single"]), ""]
        for row in metrics["sets"]
    ]
    values += [[coverage, *[""] * 11, why] for coverage, why in metrics["refused_sets"].items()]
    return Table("Sets", head, rows, "sets", [columns, *values])


def _groups_table(metrics: dict[str, Any]) -> Table:
    sets = metrics["sets"]
    names = list(sets[0]["per_group"])
    head = ["Group", *(f"Sets for {percent(row['coverage'])} [95 % interval]" for row in sets)]
    rows = [[name, *(interval(row["per_group"][name], "{:.2%}") for row in sets)] for name in names]
    columns = ["group", *ends_of(*(f"sets_{row['coverage']:g}" for row in sets))]
    values = [[name, *ends(*(row["per_group"][name] for row in sets))] for name in names]
    return Table("Coverage by group", head, rows, "groups", [columns, *values])


def _answers_table(metrics: dict[str, Any]) -> Table:
    rows = [
        [
            percent(row["accuracy"]),
            f"{row['threshold']:.4f}",
            interval(row["answered"], "{:.1%}"),
            interval(row["test_accuracy"], "{:.2%}"),
            "yes" if row["kept"] else "no",
        ]
        for row in metrics["answers"]
    ]
    rows += [[percent(float(a)), "refused", why, "", ""] for a, why in metrics["refused_answers"].items()]
    head = ["Answers that are right", "From confidence", "Test images answered", "Of them right", "Kept"]
    columns = ["accuracy", "threshold", "kept", *ends_of("answered", "test_accuracy"), "refused"]
    values = [
        [row["accuracy"], row["threshold"], row["kept"], *ends(row["answered"], row["test_accuracy"]), ""]
        for row in metrics["answers"]
    ]
    values += [[accuracy, *[""] * 8, why] for accuracy, why in metrics["refused_answers"].items()]
    title = f"Answers or none, with a certainty of {promises.CERTAINTY:.0%}"
    return Table(title, head, rows, "answers", [columns, *values])


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("calibrate"), description=__doc__.splitlines()[0])
    cli.add_run_arguments(parser)
    parser.add_argument("--method", choices=("auto", *scaling.METHODS), default="auto", help="default: the best of all")
    parser.add_argument("--coverage", default="", metavar="C,C", help=f"of sets; default: {_listed(COVERAGES)}")
    parser.add_argument("--accuracy", default="", metavar="A,A", help=f"of answers; default: {_listed(ACCURACIES)}")
    parser.add_argument("--sets", choices=("raps", "aps"), default="raps", help="default: raps")
    parser.add_argument("--data_dir", default="", help="where the data are now, if they have moved")
    cli.add_groups_argument(parser)
    flags = parser.parse_args(argv)
    coverages, accuracies = _shares(flags.coverage, "coverage"), _shares(flags.accuracy, "accuracy")
    cli.start_jax()
    metrics = calibrate(
        flags.workdir,
        method=flags.method,
        coverages=coverages,
        accuracies=accuracies,
        sets=flags.sets,
        groups=flags.groups,
        checkpoint=flags.checkpoint,
        data_dir=flags.data_dir,
    )
    print("\n".join(_lines(metrics)))
    print(f"report: {os.path.join(flags.workdir, PART, 'index.html')}")


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _shares(text: str, flag: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        shares = (0.0,)
    if not all(map(promises.can_be_asked, shares)):
        raise UserError(f"--{flag}={text} must be numbers from 0.5 to below 1, such as 0.9,0.95")
    return tuple(dict.fromkeys(shares))


def _lines(metrics: dict[str, Any]) -> list[str]:
    """What it came to, a line each."""
    before, after = metrics["before"], metrics["after"]
    lines = [
        f"{metrics['method']}: ECE {interval(before['ece'], '{:.2%}')} -> {interval(after['ece'], '{:.2%}')}, loss "
        f"{interval(before['loss'], '{:.4f}')} -> {interval(after['loss'], '{:.4f}')} on {metrics['num_examples']:,} "
        "test images"
    ]
    for row in metrics["sets"]:
        kept = "" if row["kept"] else ", NOT KEPT"
        lines.append(
            f"sets for {percent(row['coverage'])}: hold the truth of {interval(row['test_coverage'], '{:.2%}')}, "
            f"{interval(row['mean_size'], '{:.2f}')} classes in the mean{kept}"
        )
    for row in metrics["answers"]:
        kept = "" if row["kept"] else ", NOT KEPT"
        lines.append(
            f"answers for {percent(row['accuracy'])}: {interval(row['answered'], '{:.1%}')} of the images, of them "
            f"right {interval(row['test_accuracy'], '{:.2%}')}{kept}"
        )
    refused = [*metrics["refused_sets"].values(), *metrics["refused_answers"].values()]
    return lines + [f"refused: {why}" for why in refused]


if __name__ == "__main__":
    sys.exit(cli.run(main))
