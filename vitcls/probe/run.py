"""A probe in a workdir: features, classifier, report."""

import functools
import logging
import os
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from vitcls import config as configs
from vitcls import data, metrics, report
from vitcls.core import errors, sharding
from vitcls.core.errors import UserError
from vitcls.core.progress import show_progress
from vitcls.models.weights import hub
from vitcls.probe import classifiers, features, few_shot, network
from vitcls.probe.classifiers import CLASSIFIERS, Examples
from vitcls.report.part import Part
from vitcls.training import facts, initial, places, run_dir
from vitcls.training.files import CONFIG_FILE

_logger = logging.getLogger("vitcls")
_OF_TRAINING = ("Objective", "Checkpoint", "Test-time augmentation")  # facts that a probe has not


def with_features(config: configs.ConfigDict, name: str) -> configs.ConfigDict:
    """The config with the features `name`: one of features.CLASSICAL, a workdir or a file of weights.

    Of a workdir the model is that of its run. Features are of the images as they are, without test-time augmentation.
    Raises UserError for what is none of them.
    """
    config, name = config.copy_and_resolve_references(), os.path.expanduser(name)
    classical = name in features.CLASSICAL
    config.probe.features, config.init.weights = (name, "") if classical else ("network", name)
    config.test_time_augmentation = "none"
    if classical:
        return config
    if os.path.isdir(name):
        with config.unlocked():
            config.model = run_dir.open_workdir(name).config.model
    elif not os.path.exists(name) and not hub.is_name(name):
        known = [*features.CLASSICAL, "a workdir", "a file of weights", "timm/MODEL.TAG"]
        raise errors.unknown("--features", name, known)
    return config


def probe(config: configs.ConfigDict, path: os.PathLike | str, *, data_dir: str = "") -> dict[str, Any]:
    """Fits `config.probe.classifier` to `config.probe.features` of the config's data; returns the metrics.

    The workdir `path` gets what a training leaves: config.json, dataset.json, the report and, of a network whose
    classifier is one layer, a checkpoint. Raises UserError, before anything is written, for what cannot work.
    """
    with places.opened(path) as place:
        prepared = prepare(config, place.path, data_dir)
        config, source, dataset, info, start = prepared
        with place.hold(), Part(place.path / "report") as made:
            record = start and start.record
            begin = functools.partial(run_dir.begin, place.path, config, info, place=source, initial=record)
            if (place.path / CONFIG_FILE).exists():  # of another run perhaps, which is refused before the work
                begin()
            partition = sharding.all_devices("data")
            extractor = features.make_extractor(config, info, start, partition)
            splits, seconds = _examples(config, dataset, extractor, partition)
            begin()
            return _fit_and_report(made, prepared, place.path, splits, seconds, extractor.variables)


class Prepared(NamedTuple):
    """What a probe is made of, checked."""

    config: configs.ConfigDict
    data_dir: str  # where the data are now
    dataset: data.Dataset
    info: data.DatasetInfo
    start: initial.Start | None  # the weights of a network


def prepare(config: configs.ConfigDict, path: pathlib.Path, data_dir: str) -> Prepared:
    """Checks a config and loads its data; raises UserError for what cannot work."""
    config = configs.resolve(config)
    configs.validate(config)
    if config.probe.classifier not in CLASSIFIERS:
        raise errors.unknown("--classifier", config.probe.classifier, CLASSIFIERS)
    source = run_dir.data_dir(path, config, data_dir)
    start = initial.look(config, None)  # whose file is needed each time
    dataset = data.load(config.dataset, data_dir=source, max_value=run_dir.max_value(path))
    if dataset.validation is None:
        raise UserError("a probe chooses its setting on a validation split; set config.dataset.validation above 0")
    check_size(config, dataset)
    few_shot.check_shots(config.probe.shots, dataset.train.labels, dataset.class_names)
    config, start = initial.with_preprocessing(config, start, dataset.image_shape[-1])
    return Prepared(config, source, dataset, data.describe(dataset, config.dataset), start)


def check_size(config: configs.ConfigDict, dataset: data.Dataset) -> None:
    """Raises UserError where the images are not of the size of those of the run whose features are asked for."""
    if not os.path.isdir(config.init.weights):
        return
    expected = run_dir.open_workdir(config.init.weights).info.image_shape
    if dataset.image_shape != expected:
        ours, theirs = ("x".join(map(str, shape)) for shape in (dataset.image_shape, expected))
        raise UserError(
            f"the run in {config.init.weights} knows images of {theirs}, and those of '{dataset.name}' are {ours}; set "
            f"config.dataset.image_size='{expected[:2]}'"
        )


def _examples(config, dataset: data.Dataset, extractor, partition) -> tuple[dict[str, Examples], float]:
    """The splits as features: train, validation, and that of the report; and the seconds of the first two."""
    splits, seconds = {}, 0.0
    for name in dict.fromkeys(("train", "validation", config.report.split)):
        split = getattr(dataset, name)
        found = features.features_of(extractor, split, dataset.image_shape, partition, config.batch_size)
        splits[name] = Examples(found.rows, split.labels)
        seconds += found.seconds if name in ("train", "validation") else 0.0
        count, width = (f"{size:,}" for size in found.rows.shape)
        how = "from the cache" if found.cached else f"in {found.seconds:.1f} s"
        _logger.info("features  %s %s images, %s numbers each, %s", count, name, width, how)
    return splits, seconds


def _fit_and_report(
    made: Part,
    prepared: Prepared,
    path: pathlib.Path,
    splits: dict[str, Examples],
    feature_seconds: float,
    variables: dict[str, np.ndarray] | None,
) -> dict[str, Any]:
    config, _, dataset, info, _ = prepared
    name, examples = config.probe.classifier, getattr(dataset, config.report.split)
    train, validation, tested = splits["train"], splits["validation"], splits[config.report.split]
    since = time.perf_counter()
    fitted = classifiers.fit(name, train, validation)
    seconds = time.perf_counter() - since
    _logger.info("fitted    %s, %s by the validation split, in %.1f s", name, fitted.choice, seconds)
    if variables is not None and fitted.head and network.has_head(config, info):
        network.keep(path, config, variables, fitted.head)
    probabilities = fitted.predict(tested.features)
    few = [
        few_shot.few_shot(name, shots, train, validation, tested, config.seed)
        for shots in show_progress(config.probe.shots, len(config.probe.shots), "few-shot")
    ]
    evidence = metrics.evidence_of(tested.labels, probabilities)
    results = {
        "dataset": info.name,
        "split": config.report.split,
        "checkpoint_step": 0,  # of no training
        **metrics.classification_report(evidence, info.class_names),
        "few_shot": few,
        "feature_seconds": feature_seconds,
        "train_seconds": seconds,
        "learned_weights": {},
    }
    report.write(
        made,
        metrics=results,
        labels=tested.labels,
        probabilities=probabilities,
        roc=evidence.roc,
        class_names=info.class_names,
        images=lambda indices: np.stack([data.read_image(examples, int(i), info.image_shape) for i in indices]),
        history=None,
        facts=_facts(config, info, train, fitted),
        first=_drawing(few),
    )
    return results


def _drawing(few: list[dict[str, Any]]) -> dict[str, tuple]:
    """The plot of few-shot accuracies, if there are any."""
    from vitcls.report.learning_curves import learning_curves

    if not few:
        return {}
    line = [(row["shots"], row["accuracy"], row["low"], row["high"]) for row in few]
    values = ", ".join(f"{row['accuracy']:.1%} with {row['shots']}" for row in few)
    caption = (
        f"With so many training images of each class, the mean of {few_shot.DRAWS} draws and its interval: {values}."
    )
    return {"few_shot": ("Few-shot accuracy", caption, lambda: learning_curves({"": line}, "images of each class"))}


def _facts(config, info: data.DatasetInfo, train: Examples, fitted: classifiers.Fitted) -> dict[str, Any]:
    """Rows for the page."""
    name, model = config.probe.features, config.model.name
    short, whole = (model, f"{model} of {config.init.weights}") if name == "network" else (name, name)
    rows = {
        "Model": f"{config.probe.classifier} on {short}",
        "Features": f"{whole}, {train.features.shape[1]:,} numbers",
        "Classifier": f"{config.probe.classifier}, {fitted.choice} by the validation split",
    }
    kept = facts.facts(config, info, step=0).items()
    return rows | {key: value for key, value in kept if key not in (*rows, *_OF_TRAINING)}
