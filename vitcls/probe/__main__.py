"""Classify features that are computed once: pixels, HOG, colours, or those of a run or of published weights.

vitcls probe --features=pixels|hog|color|WORKDIR|WEIGHTS --classifier=linear|knn|svm|centroid --config=FILE[:PRESET]
    --workdir=DIR [--shots=1,5,10,25] [--data_dir=DIR] [--config.KEY=VALUE ...]

The config says which images there are and how they are read; of WEIGHTS it names the model. Writes the report that a
training writes, so that `vitcls compare` takes it. --shots measures how few images of each class are enough.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls import cli, config_file, data, metrics, report
from vitcls.core.errors import UserError
from vitcls.probe import features
from vitcls.probe.classifiers import CLASSIFIERS, Examples
from vitcls.train import prepare
from vitcls.training import facts, run_dir
from vitcls.training.files import PROBE_FILE

DRAWS = 10  # of each number of shots


def probe(
    config, path: os.PathLike | str, *, what: str, classifier: str, shots: Sequence[int] = (), data_dir: str = ""
) -> dict[str, Any]:
    """Computes features, fits a classifier, writes the workdir `path` and returns the report's metrics.

    Args:
      config: as `default_config` makes it; what: 'pixels', 'hog', 'color', a workdir or a file of weights.
      classifier: a name of CLASSIFIERS; shots: images of each class that are enough for a classifier each.

    Raises UserError, before anything is written, where the data, the features or the shots are not possible.
    """
    path = pathlib.Path(path)
    config = config.copy_and_resolve_references()
    config.init.weights = what if os.path.isfile(what) else ""
    prepared = prepare(config, None, data_dir, range(0))
    if prepared.dataset.validation is None:
        raise UserError("a probe needs validation images; set config.dataset.validation above 0")
    _check_shots(shots, prepared.dataset)
    extractor = features.make(what, prepared)
    choice = {"features": os.path.abspath(what) if os.path.exists(what) else what, "classifier": classifier}
    _check_workdir(path, choice | {"digest": extractor.digest})
    began = time.perf_counter()
    train, validation, test = (_examples(extractor, prepared, name) for name in ("train", "validation", "test"))
    extracted = time.perf_counter()
    fit, num_classes = CLASSIFIERS[classifier], prepared.info.num_classes
    fitted = fit(train, validation, num_classes)
    done = time.perf_counter()
    numbers = {
        "features": train[0].shape[1],
        "chosen": fitted.chosen,
        "feature_seconds": extracted - began,
        "train_seconds": done - extracted,
        "few_shot": [_few_shot(fit, n, train, validation, test, num_classes) for n in shots],
    }
    run_dir.begin(path, prepared.config, prepared.info, place=prepared.data_dir)
    run_dir.write_atomically(path / PROBE_FILE, json.dumps(choice | {"digest": extractor.digest}, indent=2) + "\n")
    return _report(path, prepared, choice, numbers, test[1], fitted.predict(test[0]))


def _examples(extractor: features.Extractor, prepared, name: str) -> Examples:
    split = getattr(prepared.dataset, name)
    return features.features_of(extractor, split, prepared.info.image_shape), split.labels


def _check_shots(shots: Sequence[int], dataset: data.Dataset) -> None:
    counts = np.bincount(dataset.train.labels, minlength=dataset.num_classes)
    fewest = int(counts.argmin())
    for n in shots:
        if n > counts[fewest]:
            raise UserError(
                f"--shots={n} is more than the {counts[fewest]} training images of class "
                f"'{dataset.class_names[fewest]}'; take at most those"
            )


def _check_workdir(path: pathlib.Path, choice: dict[str, str]) -> None:
    """Raises UserError where the directory holds anything but this probe: a run, or another one."""
    try:
        there = json.loads((path / PROBE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"--workdir={path} holds something else than a probe; name another directory") from None
        return
    if there != choice:
        raise UserError(f"{path} holds a probe of other features or another classifier; use another --workdir")


def _few_shot(
    fit, shots: int, train: Examples, validation: Examples, test: Examples, num_classes: int
) -> dict[str, Any]:
    """The mean accuracy over draws of so many training images of each class, with Student's 95 % interval."""
    from scipy.stats import t

    accuracies = []
    for draw in range(DRAWS):
        rng = np.random.default_rng((shots, draw))
        classes = np.unique(train[1])
        rows = np.concatenate([rng.choice(np.flatnonzero(train[1] == k), shots, replace=False) for k in classes])
        fitted = fit((train[0][rows], train[1][rows]), validation, num_classes)
        accuracies.append(float(np.mean(fitted.predict(test[0]).argmax(axis=1) == test[1])))
    mean = float(np.mean(accuracies))
    half = float(t.ppf(0.975, DRAWS - 1) * np.std(accuracies, ddof=1) / DRAWS**0.5)
    return {"shots": shots, "accuracy": {"value": mean, "low": mean - half, "high": mean + half}, "draws": accuracies}


def _report(
    path: pathlib.Path,
    prepared,
    choice: dict[str, str],
    numbers: dict[str, Any],
    labels: np.ndarray,
    probabilities: np.ndarray,
) -> dict[str, Any]:
    info, test = prepared.info, prepared.dataset.test
    evidence = metrics.evidence_of(labels, probabilities)
    results = {"dataset": info.name, "split": "test", "checkpoint_step": 0}
    results |= metrics.classification_report(evidence, info.class_names) | numbers | {"learned_weights": {}}
    rows = facts.facts(prepared.config, info, step=0)
    for key in ("Objective", "Checkpoint", "Test-time augmentation", "Seed"):
        del rows[key]
    rows["Model"] = f"{choice['classifier']} on {pathlib.Path(choice['features']).name}"
    chosen = ", ".join(f"{key} {value}" for key, value in numbers["chosen"].items())
    rows["Features"] = f"{numbers['features']:,} numbers, computed in {numbers['feature_seconds']:,.1f} s"
    rows["Chosen by the validation images"] = chosen or "nothing"
    for row in numbers["few_shot"]:
        accuracy = row["accuracy"]
        rows[f"{row['shots']} images of each class"] = (
            f"accuracy {accuracy['value']:.2%} [{accuracy['low']:.2%}, {accuracy['high']:.2%}], mean of {DRAWS} draws"
        )
    report.write(
        path / "report",
        metrics=results,
        labels=labels,
        probabilities=probabilities,
        roc=evidence.roc,
        class_names=info.class_names,
        images=lambda places: np.stack([data.read_image(test, int(i), info.image_shape) for i in places]),
        history=[],
        facts=rows,
        curves=(),
    )
    return results


def _parse(argv: list[str]) -> argparse.Namespace:
    rest, overrides = config_file.split_arguments(argv)
    parser = cli.Parser(prog=cli.program("probe"), description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, metavar="WHAT", help="pixels, hog, color, a workdir, or weights")
    parser.add_argument("--classifier", required=True, choices=tuple(CLASSIFIERS), help="which of scikit-learn's")
    parser.add_argument("--config", required=True, metavar="FILE[:PRESET]", help="whose images these are")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the report is written")
    parser.add_argument(
        "--shots", default="", metavar="1,5,10", help="images of each class, for classifiers of their own"
    )
    parser.add_argument("--data_dir", default="", metavar="DIR", help="where the data are now, if they have moved")
    flags = parser.parse_args(rest)
    flags.shots = _shots(flags.shots)
    flags.config = config_file.load(flags.config, overrides)
    return flags


def _shots(text: str) -> tuple[int, ...]:
    parts = text.split(",") if text else []
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--shots={text} must be numbers of images, such as 1,5,10")
    return tuple(map(int, parts))


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    cli.start_jax()
    results = probe(
        flags.config,
        flags.workdir,
        what=flags.features,
        classifier=flags.classifier,
        shots=flags.shots,
        data_dir=flags.data_dir,
    )
    for row in results["few_shot"]:
        accuracy = row["accuracy"]
        print(
            f"{row['shots']} images of each class: accuracy {accuracy['value']:.2%} [{accuracy['low']:.2%}, "
            f"{accuracy['high']:.2%}], mean of {DRAWS} draws"
        )
    print(facts.headline(results, flags.workdir))


if __name__ == "__main__":
    sys.exit(cli.run(main))
