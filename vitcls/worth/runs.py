"""The runs of the table: every method with every share of the training images."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from vitcls import config as configs
from vitcls import data
from vitcls.core import sharding
from vitcls.core.errors import UserError
from vitcls.experiment.table import Row, Run
from vitcls.models.weights import hub
from vitcls.probe import features, network
from vitcls.probe.run import check_size, with_features
from vitcls.training import build, initial

LEARNED = ("from_scratch", "fine_tuned")  # methods that are trained step by step
METHODS = {"hog_svm": "HOG + SVM", "from_scratch": "From scratch", "probe": "Probe", "fine_tuned": "Fine-tuned"}
_BATCH = 16  # images: of few photos and few steps, small batches learn more


def plan(config: ConfigDict, weights: str, shares: Sequence[float], steps: int, directory: pathlib.Path) -> list[Run]:
    """The runs, cheap methods and small shares first; the series of a row is its method.

    All that are trained take as many steps, with mean and std of the weights and images that are streamed, so that one
    compiled program serves all of a method. Raises UserError for weights and data that cannot be used.
    """
    config = config.copy_and_resolve_references()
    if config.dataset.fraction != 1:
        raise UserError(
            f"config.dataset.fraction={config.dataset.fraction:g} is not for this command, whose shares of the "
            "training images are those of --shares"
        )
    config.init.weights = weights if hub.is_name(weights) else os.path.abspath(os.path.expanduser(weights))
    config.report.timing = False
    config.batch_size = min(config.batch_size, _BATCH)
    start = initial.look(configs.resolve(config), None)
    dataset = data.load(config.dataset)
    config, start = initial.with_preprocessing(config, start, dataset.image_shape[-1])
    config = config.copy_and_resolve_references()
    if not isinstance(dataset.train.images, np.ndarray):
        config.dataset.pipeline = "streaming"
    made = {name: _config(name, config, steps) for name in METHODS}
    info, partition = data.describe(dataset, config.dataset), sharding.all_devices("data")
    for name in METHODS.keys() - LEARNED:  # says now what cannot work
        check_size(made[name], dataset)
        features.make_extractor(configs.resolve(made[name]), info, start, partition)
    tuned = configs.resolve(made["fine_tuned"])
    initial.read(tuned, info, build.make_model(tuned, info), start)
    names = sorted(METHODS, key=LEARNED.__contains__)
    runs = [_run(name, made[name], share, directory) for name in names for share in sorted(shares)]
    if network.has_head(configs.resolve(made["probe"]), info):
        _go_on_from_probes(runs)
    return runs


def _go_on_from_probes(runs: Sequence[Run]) -> None:
    """Fine-tuning starts from the probe of the same images (LP-FT: Kumar et al. 2022, arXiv 2202.10054).

    A random classifier would bend the features before it has learned anything itself.
    """
    probes = {run.row.x: run.workdir for run in runs if run.row.series == "probe"}
    for run in runs:
        if run.row.series == "fine_tuned":
            run.row.config.init.update(weights=os.path.abspath(probes[run.row.x]), head="keep")


def _config(method: str, config: ConfigDict, steps: int) -> ConfigDict:
    """That of a method with all images."""
    if method == "hog_svm":
        made = with_features(config, "hog")
        made.probe.classifier = "svm"
        return made
    if method == "probe":
        made = with_features(config, config.init.weights)
        made.probe.classifier = "linear"
        return made
    made = config.copy_and_resolve_references()
    made.update(total=f"{steps} steps", log_every="10%", eval_every="25%", checkpoint_every="50%")
    made.early_stopping.patience = 0
    made.checkpoint.keep = 1
    made.report.checkpoint = "best"
    if method == "from_scratch":
        made.init.update(weights="", train="all", layer_decay=1.0, freeze_norm=False)
    return made


def _run(method: str, config: ConfigDict, share: float, directory: pathlib.Path) -> Run:
    config = config.copy_and_resolve_references()
    config.dataset.fraction = share
    name = f"{method}-{100 * share:g}"
    return Run(Row(name, config, x=share, series=method), config.seed, directory / "runs" / name)
