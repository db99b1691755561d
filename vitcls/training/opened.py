"""A trained run with its data and its model on the devices, for whoever asks what it predicts."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from vitcls import data
from vitcls.attribution.explainer import Explainer, make_explainer
from vitcls.attribution.network import Network
from vitcls.core import sharding
from vitcls.core.errors import RunError, UserError
from vitcls.core.progress import show_progress
from vitcls.core.sharding import Partition
from vitcls.data import groups
from vitcls.data.sources.folder import FileImages
from vitcls.metrics.unknown import Outputs
from vitcls.training import build, run_dir
from vitcls.training.evaluator import Evaluator, make_evaluator, split_batches


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of a run, and the data of the run."""

    trained: run_dir.Workdir
    model: Any
    step: int
    variables: Any  # on the devices
    dataset: data.Dataset
    files: data.Dataset  # the same as it was read: not decoded
    partition: Partition
    evaluator: Evaluator

    def batches(self, split: str) -> data.EvaluationBatches:
        """Those of a split in order; raises UserError where the run has no such split."""
        return split_batches(self.dataset, split, self.partition, self.trained.config)

    def batches_of(self, split: data.Split) -> data.EvaluationBatches:
        """Those of images, of the run's or others, which do not stay on the devices."""
        return data.EvaluationBatches(
            split,
            image_shape=self.trained.info.image_shape,
            partition=self.partition,
            batch_size=self.partition.round_up(self.trained.config.batch_size),
            keep=False,
        )

    def groups(self, said: str, split: str) -> list[str]:
        """The group of each image of a split, by a CSV file or 'coarse'; raises UserError where they are not of it."""
        labels = getattr(self.dataset, split).labels
        if said == "coarse":
            return groups.coarse(labels, self.trained.info.class_names)
        return groups.read(said, len(labels), self._file_of(split))

    def _file_of(self, split: str) -> Callable[[int], str] | None:
        """Gives the file of an image by its place, relative to the root of the data; None where images are no files."""
        images = getattr(self.files, split).images
        return (lambda i: os.fsdecode(images.names[i])) if isinstance(images, FileImages) else None

    def outputs(self, split: data.Split) -> Outputs:
        """Logits and features of images, of the run's or others; raises UserError for a task without a classifier."""
        self.require_classifier()
        batches = self.batches_of(split)
        watched = show_progress(batches, len(batches), "batches of images")
        parts = [self.partition.to_host(self._outputs_step(self.variables, batch)) for batch in watched]
        return Outputs(*(np.concatenate(part)[: len(split.labels)] for part in zip(*parts, strict=True)))

    @functools.cached_property
    def forward(self) -> Callable:
        """forward(variables, images float32 [B, H, W, C] in [0, 1]) -> logits float32 [B, K], pure and not compiled.

        Raises UserError for a task without a classifier.
        """
        return self._network.forward

    @functools.cached_property
    def explainer(self) -> Explainer:
        """For the images of this run; raises UserError for a task without a classifier."""
        return make_explainer(self._network, self.variables, self.trained.info.image_shape)

    @functools.cached_property
    def _network(self) -> Network:
        self.require_classifier()
        return build.make_explained(self.trained.config, self.model, self.trained.info)

    def require_classifier(self) -> None:
        """Raises UserError for a task that predicts by what it remembers."""
        if self.evaluator.bank_step is not None:
            name = self.trained.config.task.name
            raise UserError(f"a run of config.task.name='{name}' has no classifier of its own")

    @functools.cached_property
    def _outputs_step(self) -> Callable:
        step = build.make_outputs_step(self.trained.config, self.model, self.trained.info)
        return self.partition.compile_evaluation(step)

    @functools.cached_property
    def bank(self) -> Any:
        """What the task predicts by, besides the model."""
        return self.evaluator.remember(self.variables)

    def predictions(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels int32 [N] and probabilities float32 [N, K] of a split; raises RunError where they are not finite."""
        batches = self.batches(split)
        watched = show_progress(batches, len(batches), f"batches of the {split} split")
        return batches.labels, self.probabilities(watched, len(batches.labels))

    def classes(self, batches: Iterable[dict], count: int) -> np.ndarray:
        """The most probable class of the first `count` images of batches, int32 [N]."""
        return self.probabilities(batches, count).argmax(axis=-1).astype(np.int32)

    def probabilities(self, batches: Iterable[dict], count: int) -> np.ndarray:
        """Those of the first `count` images of batches, float32 [N, K]; raises RunError where they are not finite."""
        probabilities = np.empty((count, self.trained.info.num_classes), np.float32)
        self.evaluator(self.variables, batches, probabilities, self.bank)
        if not np.isfinite(probabilities).all():
            raise RunError("the model gives probabilities that are not finite; use an earlier --checkpoint")
        return probabilities


def open_with_data(
    path: os.PathLike | str, *, splits: tuple[str, ...], checkpoint: str = "", data_dir: str = ""
) -> Opened:
    """Opens the run in a workdir with those splits of its data.

    Raises UserError where there is no such workdir or checkpoint, or the data are not what they were.
    """
    trained = run_dir.open_workdir(path)
    config = trained.config
    model = build.make_model(config, trained.info)
    step, variables = trained.restore(model, checkpoint or config.report.checkpoint)
    place = run_dir.data_dir(trained.path, config, data_dir)
    dataset = data.load(config.dataset, data_dir=place, max_value=trained.info.max_value)
    now = _kind_of(dataset.class_names, dataset.image_shape, dataset.num_examples)
    then = _kind_of(trained.info.class_names, trained.info.image_shape, trained.info.num_examples)
    if now != then:
        raise UserError(
            f"the data of '{config.dataset.name}' are not those of the training: {now[1]} now, {then[1]} then; "
            "give the original with --data_dir"
        )
    remembers = build.make_task(config, trained.info).remember is not None
    files = dataset
    if data.choose_pipeline(dataset, config.dataset) == "resident":
        dataset = data.decode(dataset, (*splits, "train") if remembers else splits)
    partition = sharding.all_devices("data")
    evaluator = make_evaluator(config, model, trained.info, dataset, partition)
    return Opened(trained, model, step, partition.replicate(variables), dataset, files, partition, evaluator)


def _kind_of(names: tuple[str, ...], shape: tuple[int, ...], num_examples: dict[str, int]) -> tuple[tuple, str]:
    """What must not change between training and evaluation: the names of the classes, and the rest in words."""
    counts = ", ".join(f"{count:,} {split}" for split, count in num_examples.items())
    return names, f"{len(names)} classes of {'x'.join(map(str, shape))}, {counts} images"
