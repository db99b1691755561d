"""Evaluation of a split: predictions over the devices, metrics, timings, and the report of them all."""

import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import numpy as np

from vitcls import data, metrics, models, report
from vitcls.core.errors import UserError
from vitcls.core.progress import show_progress
from vitcls.core.sharding import Partition, all_or_none
from vitcls.data import DatasetInfo
from vitcls.data.corruptions import SEVERITIES, corrupt
from vitcls.metrics.scaling import Scaling
from vitcls.models import summary
from vitcls.models.variables import variable_shapes
from vitcls.report.part import Part
from vitcls.training import build, facts, metrics_log

PyTree = Any
_TIMED_SECONDS = 2.0  # for each of the two timings, and never fewer than _TIMED_RUNS calls
_TIMED_RUNS = 5


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A compiled eval_step and the devices it runs on; for a task that remembers, how and what."""

    partition: Partition
    eval_step: Callable
    num_classes: int
    bank_step: Callable | None = None
    bank_batches: Iterable[dict] = ()  # of the training split

    def __call__(
        self, variables, batches: Iterable[dict], probabilities: np.ndarray | None = None, bank: PyTree = None
    ) -> metrics.Sums:
        """metrics.evaluation_sums over all batches, on the host.

        With `probabilities`, float32 [N, K], those of the first N examples are written there. Each batch's are fetched
        while the devices work on the next, and none stay there. `bank` is what `remember` gives, made if left out.
        """
        total, before, rows, start = None, None, None, 0
        bank = self.remember(variables) if bank is None else bank
        for batch in batches:
            jax.block_until_ready(before)  # else all batches of a fast source would wait on the devices
            before = total
            sums, new_rows = self.eval_step(variables, batch, bank)
            total = sums if total is None else metrics.merge(total, sums)
            if probabilities is not None:
                start += 0 if rows is None else self._fetch(rows, probabilities[start:])
                rows = new_rows
        if rows is not None:
            self._fetch(rows, probabilities[start:])
        return self.partition.to_host(total)

    def scores(self, variables, batches: data.EvaluationBatches, names: Collection[str]) -> dict[str, float]:
        """The metrics of these names; predictions are kept only where one of them needs them."""
        labels = probabilities = None
        if any(metrics.METRICS[name].needs_predictions for name in names):
            labels = batches.labels
            probabilities = np.empty((len(labels), self.num_classes), np.float32)
        sums = self(variables, batches, probabilities)
        return metrics.summarize(metrics.Evidence(sums, labels, probabilities), names)

    def remember(self, variables) -> PyTree:
        """The bank that the task predicts by, on the devices; None for a task that needs none."""
        if self.bank_step is None:
            return None
        parts = [self.partition.to_host(self.bank_step(variables, batch)) for batch in self.bank_batches]
        bank = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        kept = bank.pop("mask") > 0
        return self.partition.replicate(jax.tree.map(lambda rows: rows[kept], bank))

    def _fetch(self, rows: jax.Array, place: np.ndarray) -> int:
        """Writes a batch's probabilities at the start of `place`, which may be too short for its padding."""
        host = self.partition.to_host(rows)[: len(place)]
        place[: len(host)] = host
        return len(host)


def make_evaluator(config, model, info: DatasetInfo, dataset: data.Dataset, partition: Partition) -> Evaluator:
    """Compiles (at its first call) the evaluation of `model` over the devices of `partition`."""
    eval_step = partition.compile_evaluation(build.make_eval_step(config, model, info))
    bank_step, size = build.make_bank_step(config, model, info)
    if bank_step is None:
        return Evaluator(partition, eval_step, info.num_classes)
    count = len(dataset.train.labels)
    sample = np.sort(np.random.default_rng(0).permutation(count)[:size])
    remembered = dataclasses.replace(dataset, train=dataset.train.take(sample))
    batches = split_batches(remembered, "train", partition, config)
    return Evaluator(partition, eval_step, info.num_classes, partition.compile_evaluation(bank_step), batches)


def split_batches(dataset: data.Dataset, split: str, partition: Partition, config) -> data.EvaluationBatches:
    """The batches of a split by name; raises UserError where the data set has no such split.

    They stay on the devices if the pipeline of the config is 'resident'.
    """
    examples = getattr(dataset, split)
    if examples is None:
        raise UserError(f"the data set '{dataset.name}' has no {split} split; set config.dataset.validation above 0")
    return data.EvaluationBatches(
        examples,
        image_shape=dataset.image_shape,
        partition=partition,
        batch_size=partition.round_up(config.batch_size),
        keep=data.choose_pipeline(dataset, config.dataset) == "resident",
    )


def write_report(
    path: pathlib.Path,
    config,
    info: DatasetInfo,
    dataset: data.Dataset,
    evaluator: Evaluator,
    model,
    variables,
    *,
    split: str,
    step: int,
    scale: Scaling | None = None,
    patience: float = 0.0,
) -> dict:
    """Evaluates `variables` on a split, writes report/ in the workdir `path` and returns the metrics.

    `scale` makes other probabilities of the model's, for all but the corrupted images. Raises UserError, before any
    work, where report/ cannot be written or another process writes it and does not end within `patience` seconds.
    """
    with contextlib.ExitStack() as held:
        part = path / "report"
        made = all_or_none(lambda: None if jax.process_index() else held.enter_context(Part(part, patience)))
        batches = split_batches(dataset, split, evaluator.partition, config)
        examples = getattr(dataset, split)
        probabilities = np.empty((len(examples.labels), info.num_classes), np.float32)
        bank = evaluator.remember(variables)
        watched = show_progress(batches, len(batches), f"batches of the {split} split")
        sums = evaluator(variables, watched, probabilities, bank)
        corrupted = {
            name: [
                _accuracy(evaluator(variables, corrupt(batches, name, severity), bank=bank)) for severity in SEVERITIES
            ]
            for name in config.report.corruptions
        }
        timings = {}
        if config.report.timing:
            timings["images_per_second"] = measure_throughput(evaluator, variables, batches, bank)
        learned = evaluator.partition.to_host(models.learned_weights(model, variables["params"]))
        if jax.process_index():
            return {}
        if config.report.timing:
            timings["latency_ms"] = measure_latency(config, model, info, evaluator.partition.to_host(bank))

        if scale is not None:
            probabilities = scale(probabilities).astype(np.float32)
            sums |= metrics.evidence_of(examples.labels, probabilities).sums
        evidence = metrics.Evidence(sums, examples.labels, probabilities)
        history = metrics_log.read_history(path)
        results = {"dataset": info.name, "split": split, "checkpoint_step": step}
        results |= {"calibrated": True} if scale else {}
        results |= metrics.classification_report(evidence, info.class_names)
        results |= {
            "parameters": summary.count_parameters(variable_shapes(model, info.image_shape)["params"]),
            "flops_per_image": summary.flops_per_image(model, info.image_shape),
            **timings,
            **({"corrupted_accuracy": corrupted} if corrupted else {}),
            "learned_weights": {name: float(weight) for name, weight in learned.items()},
            "train_seconds": next((e["train/seconds"] for e in reversed(history) if "train/seconds" in e), 0.0),
        }
        report.write(
            made,
            metrics=results,
            labels=examples.labels,
            probabilities=probabilities,
            roc=evidence.roc,
            class_names=info.class_names,
            images=lambda indices: np.stack([data.read_image(examples, int(i), info.image_shape) for i in indices]),
            history=history,
            facts=facts.facts(config, info, step=step) | ({"Probabilities": "calibrated"} if scale else {}),
            curves=list(dict.fromkeys(["loss", "accuracy", *build.make_task(config, info).means])),
        )
        return results


def _accuracy(sums: metrics.Sums) -> float:
    return metrics.summarize(metrics.Evidence(sums), ["accuracy"])["accuracy"]


def measure_latency(config, model, info: DatasetInfo, bank: PyTree = None) -> dict[str, float]:
    """Milliseconds from one image on the host to its probabilities on the host: median and 95th percentile."""
    shapes = variable_shapes(model, info.image_shape)
    variables = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    eval_step, bank = build.make_eval_step(config, model, info), jax.device_put(bank)

    @jax.jit
    def classify(variables, batch, bank):
        return eval_step(variables, batch, bank)[1]

    batch = {
        "image": np.zeros((1, *info.image_shape), np.uint8),
        "label": np.zeros(1, np.int32),
        "mask": np.ones(1, np.float32),
    }
    seconds = _time(lambda: jax.device_get(classify(variables, jax.device_put(batch), bank)), _TIMED_SECONDS)
    return {"median": 1e3 * statistics.median(seconds), "p95": 1e3 * float(np.percentile(seconds, 95))}


def measure_throughput(evaluator: Evaluator, variables, batches: data.EvaluationBatches, bank: PyTree = None) -> float:
    """Images per second of inference on batches that are on the devices already; the median of several runs."""
    batch = next(iter(batches))
    size = batch["mask"].size * (jax.process_count() if evaluator.partition.mapped else 1)
    # Processes take part in the same calls, so they must all make the same number of them.
    at_least = _TIMED_SECONDS if jax.process_count() == 1 else 0.0
    seconds = _time(lambda: jax.block_until_ready(evaluator.eval_step(variables, batch, bank)), at_least)
    return size / statistics.median(seconds)


def _time(call: Callable[[], object], at_least: float) -> list[float]:
    """Seconds of each of several calls, at least `at_least` in total, after a warm-up call."""
    call()
    seconds: list[float] = []
    while len(seconds) < _TIMED_RUNS or (sum(seconds) < at_least and len(seconds) < 100):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds
