"""train_and_evaluate: a training run, to be read from top to bottom."""

import contextlib
import logging
import os
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls import config as configs
from vitcls import data, metrics, optim
from vitcls.core import sharding
from vitcls.core.errors import RunError, Stopped, UserError
from vitcls.core.sharding import Partition
from vitcls.tasks import Task
from vitcls.training import announce, build, checkpoint, files, initial, places, run_dir, steps
from vitcls.training.build import Plan, Training
from vitcls.training.evaluator import Evaluator, make_evaluator, split_batches, write_report
from vitcls.training.lock import WorkdirLock
from vitcls.training.metrics_log import MetricWriter
from vitcls.training.places import Place
from vitcls.training.profiling import Trace
from vitcls.training.progress_bar import ProgressBar
from vitcls.training.run_record import Progress
from vitcls.training.state import NonFinite, TrainState
from vitcls.training.stop_signal import StopSignal

_logger = logging.getLogger("vitcls")
_PATIENCE = 600.0  # seconds that a run waits at its end for another that writes its report


def train_and_evaluate(
    config: configs.ConfigDict,
    path: os.PathLike | str,
    *,
    dry_run: bool = False,
    profile_steps: range = range(0),
    data_dir: str = "",
) -> dict:
    """Trains as `config` says in the workdir `path`, resuming what is there, and writes the report.

    The calls that run `profile_steps` are traced into the workdir's directory profile/. `data_dir` is where the data
    of a run are now, if they have moved since it began; they must be the same.

    Returns the metrics of the report; {} for a dry run, which goes up to the first step by shapes alone and leaves
    nothing behind. Raises UserError before any device work where the config or the data cannot work, RunError where
    the training diverges, Stopped after saving where a signal asked the run to stop.
    """
    with contextlib.ExitStack() as held:
        place = None if dry_run else sharding.all_or_none(lambda: held.enter_context(places.opened(path)))
        path = place and place.path
        prepared = sharding.all_or_none(lambda: prepare(config, path, data_dir, profile_steps))
        config, source, dataset, info, plan, partition, training, start = prepared
        pipeline = data.choose_pipeline(dataset, config.dataset)
        same = configs.flatten(config.to_dict(), "config") | {"config.dataset.pipeline": pipeline}
        sharding.check_same({key: value for key, value in same.items() if key != "config.dataset.data_dir"})
        announce.log_start(config, info, plan, training, partition, pipeline=pipeline, start=start)
        if dry_run:
            announce.log_first_step(config, info, training, partition)
            return {}

        def begin() -> WorkdirLock | None:
            if jax.process_index():
                return None
            lock = held.enter_context(place.hold())
            run_dir.begin(path, config, info, place=source, frozen=training.frozen, initial=start and start.record)
            checkpoint.latest_whole(path / files.CHECKPOINTS, quarantine=True)
            return lock

        lock = sharding.all_or_none(begin)
        share(place, lock)
        evaluator = make_evaluator(config, training.step_model, info, dataset, partition)
        batches = data.train_batches(
            dataset, config.dataset, partition=partition, batch_size=config.batch_size, seed=config.seed
        )
        held.callback(batches.close)
        validation = None
        if dataset.validation is not None:
            validation = split_batches(dataset, "validation", partition, config)
        run = Run(config, place, plan, training, partition, lock, start)
        state, step = fit(run, batches, evaluator, validation, profile_steps)

        variables = state.variables
        if config.report.checkpoint == "best":
            share(place, lock)
            step, best = run_dir.open_workdir(path).restore(training.model, "best")
            variables = partition.replicate(best)
        split = config.report.split
        return write_report(
            *(path, config, info, dataset, evaluator, training.model, variables),
            split=split,
            step=step,
            patience=_PATIENCE,
        )


def share(place: Place, lock: WorkdirLock | None) -> None:
    """Gives every process what process 0, which has the lock, has written: first it sends, then the others fetch."""
    sharding.all_or_none(place.share if lock else lambda: None)
    sharding.all_or_none(lambda: None if lock else place.share())


class Prepared(NamedTuple):
    """What a run is made of, checked, before any device work."""

    config: configs.ConfigDict
    data_dir: str  # where the data are now
    dataset: data.Dataset
    info: data.DatasetInfo
    plan: Plan
    partition: Partition
    training: Training
    start: initial.Start | None  # the weights that do not start at random


def prepare(config: configs.ConfigDict, path: pathlib.Path | None, data_dir: str, profile_steps: range) -> Prepared:
    """Checks a config, loads its data and builds the training functions; raises UserError for what cannot work.

    `path` is a workdir, in which a run may have been begun.
    """
    config = configs.resolve(config)
    configs.validate(config)
    if config.probe.features:
        raise UserError("config.probe is of `vitcls probe`; leave it empty for a training")
    place = run_dir.data_dir(path, config, data_dir)
    max_value = None if path is None else run_dir.max_value(path)
    start = initial.look(config, path)
    dataset = data.load(config.dataset, data_dir=place, max_value=max_value)
    config, start = initial.with_preprocessing(config, start, dataset.image_shape[-1])
    if data.choose_pipeline(dataset, config.dataset) == "resident":
        # Of images that are cropped at random more is kept than the model sees.
        evaluated = ("validation", "test")
        dataset = data.decode(dataset, evaluated if config.dataset.random_resized_crop else ("train", *evaluated))
    info = data.describe(dataset, config.dataset)
    plan = build.make_plan(config, info)
    if profile_steps and profile_steps.start >= plan.total:
        raise UserError(
            f"--profile_steps={profile_steps.start}:{profile_steps.stop} is after the end of the run, which has "
            f"{plan.total:,} steps"
        )
    partition = sharding.all_devices(
        config.partition.strategy,
        min_shard_elements=config.partition.min_shard_elements,
        deterministic=config.deterministic,
    )
    together = build.examples_kept_together(config)
    partition.check_batch_size(config.batch_size, unit=together * config.optimizer.accumulate)
    training = build.make_training(config, info, plan, partition)
    if getattr(dataset, config.report.split) is None:
        raise UserError("config.report.split='validation' needs one; set config.dataset.validation above 0")
    evaluates = dataset.validation is not None and plan.eval_every > 0
    configs.validate_metrics(config, evaluates=evaluates, sums=training.task.eval_sums)
    start = initial.read(config, info, training.model, start)
    return Prepared(config, place, dataset, info, plan, partition, training, start)


class Run(NamedTuple):
    """A run that has a workdir."""

    config: configs.ConfigDict
    place: Place
    plan: Plan
    training: Training
    partition: Partition
    lock: WorkdirLock | None  # of process 0
    start: initial.Start | None


def fit(
    run: Run,
    batches: data.TrainBatches,
    evaluator: Evaluator,
    validation: data.EvaluationBatches | None,
    profile_steps: range,
) -> tuple[TrainState, int]:
    """Trains from the newest whole checkpoint, or from the start, to the end; returns the last state and its step.

    Whatever is due at a step happens in one order: log, evaluate, save. So a checkpoint of step n holds all that was
    known at step n, and what metrics.jsonl says up to n is never said again.
    """
    config, place, plan, training, partition, lock, start = run
    state, sums, progress, step = start_or_resume(config, place.path, training, partition, start)
    watched = configs.watched_metrics(config)
    update = Update(training, batches, partition, config.seed, plan.steps_per_call)

    with (
        checkpoint.Checkpoints(
            place.path / files.CHECKPOINTS,
            keep=config.checkpoint.keep,
            metric=config.checkpoint.metric,
            shared=place.shared,
        ) as checkpoints,
        MetricWriter(place.path, rewind_to=step, active=jax.process_index() == 0) as writer,
        StopSignal() as stop,
        ProgressBar(step, plan.total) as bar,
        Trace(place.path / files.PROFILE, profile_steps) as trace,
    ):
        if step == 0 and start:  # so that the file of the weights is never needed again
            tree = {"state": partition.to_savable(state), "sums": partition.to_savable(sums)}
            checkpoints.save(0, tree, record=progress.to_record(), metrics=None)
        while step < plan.total and not progress.finished:
            before, step = step, min(step + plan.steps_per_call, plan.total)
            trace.begin(before, step)
            with jax.profiler.StepTraceAnnotation("train", step_num=before):
                state, sums, seconds = update(state, sums, before)
            trace.end(step, sums)
            progress = progress.trained(seconds)
            bar.advance(step - before)

            due = _due(before, step, plan.total)
            log_due, eval_due = due(plan.log_every), validation is not None and due(plan.eval_every)
            save_due, stop_code = due(plan.checkpoint_every) or step == plan.total, stop.requested()
            if not (log_due or eval_due or save_due or stop_code):
                continue
            if lock:
                lock.check()

            progress = progress.trained(seconds_until_ready(sums))
            skipped = partition.to_host(state.nonfinite)
            check_finite(skipped, config.nonfinite_limit)
            if log_due:
                event = progress.interval_event(partition.to_host(sums), config.batch_size, training.task.means) | {
                    "train/learning_rate": _learning_rate(training, state, step, partition),
                    "train/epoch": step / plan.steps_per_epoch,
                }
                writer.write(step, event)
                bar.report(step, event)
                sums, progress = new_sums(partition, training.task), progress.next_interval()
            scores = None  # of what may be the best, or a reason to stop: the whole of the pruning is behind it
            if eval_due:
                named = evaluator.scores(state.variables, validation, watched)
                event = {f"eval/{name}": value for name, value in named.items()}
                writer.write(step, event)
                bar.report(step, event)
                state = reduce_on_plateau(config.schedule, state, event, partition)
                if step - int(skipped.total) >= plan.pruned or step == plan.total:
                    scores, progress = event, progress.evaluated(event, config)
                    save_due = save_due or progress.improved or progress.finished
            if save_due or stop_code:
                writer.sync()
                tree = {"state": partition.to_savable(state), "sums": partition.to_savable(sums)}
                checkpoints.save(step, tree, record=progress.to_record(), metrics=scores)
            if stop_code:
                checkpoints.wait()
                raise Stopped(stop_code, f"stopped at step {step:,}, which is saved; the same command goes on from it")
    if progress.finished:
        _logger.info("stopped early at step %s: %s no longer improves", f"{step:,}", config.early_stopping.metric)
    return state, step


def start_or_resume(
    config: configs.ConfigDict,
    path: pathlib.Path,
    training: Training,
    partition: Partition,
    start: initial.Start | None = None,
) -> tuple[TrainState, steps.Sums, Progress, int]:
    """The state, the sums of the open logging interval, the progress and the step to go on from."""
    step = checkpoint.latest_whole(path / files.CHECKPOINTS, quarantine=False)
    given = start.variables if start and step is None else None
    state = partition.init(training.create_state, jax.random.key(config.seed), given)
    sums = new_sums(partition, training.task)
    progress = Progress()
    if step is None:
        return state, sums, progress, 0
    averages = state.ema_batch_stats
    if averages is not None and not checkpoint.has(path / files.CHECKPOINTS, step, "state", "ema_batch_stats"):
        state = state.replace(ema_batch_stats=None)  # 0.1.0 did not average them: the average starts from the newest
    template = {"state": partition.to_savable(state), "sums": partition.to_savable(sums)}
    tree, record = checkpoint.restore(path / files.CHECKPOINTS, step, template)
    _logger.info("resumed from step %s", f"{step:,}")
    state, sums = partition.from_savable(tree["state"]), partition.from_savable(tree["sums"])
    if averages is not None and state.ema_batch_stats is None:
        state = state.replace(ema_batch_stats=jax.tree.map(jnp.copy, state.batch_stats))
    return state, sums, Progress.from_record(record), step


def new_sums(partition: Partition, task: Task) -> steps.Sums:
    """Sums of a logging interval that has just begun, on the devices."""
    return partition.replicate(jax.device_get(steps.zero_sums(task.means.values())))


class Update:
    """Runs `length` steps in one dispatch, by one program for the whole run; those past its end change nothing."""

    def __init__(self, training: Training, batches: data.TrainBatches, partition: Partition, seed: int, length: int):
        self._train_call = steps.make_train_call(training.train_step, batch_fn=batches.batch_fn, length=length)
        self._seed = partition.replicate(np.int32(seed))
        self._frozen = partition.place(training.frozen)
        self._batches = batches
        self._layout = partition
        self._length = length
        self._compiled: Callable | None = None

    def __call__(self, state: TrainState, sums: steps.Sums, step: int) -> tuple[TrainState, steps.Sums, float]:
        """Returns the state and sums after the steps from `step` on, and the seconds they took, without compilation.

        It waits for the call before this one, so that the host is one call ahead of the devices and not more; the
        last call of all is waited for with `seconds_until_ready`.
        """
        start = time.perf_counter()
        batches = self._batches.host_inputs(step, self._length)
        first = self._compiled is None
        if first:
            what = "the training step" if self._length == 1 else f"{self._length} training steps per call"
            _logger.info("compiling %s ...", what)
            compiling_since = time.perf_counter()
            arguments = (state, sums, batches, self._seed, self._frozen)
            self._compiled = self._layout.compile_update(self._train_call, *arguments)
            start = time.perf_counter()
        with jax.transfer_guard("disallow"):
            state, new_sums = self._compiled(state, sums, batches, self._seed, self._frozen)
        if first and self._layout.mapped:
            start = time.perf_counter()
        if first:
            memory = announce.compiled_memory(self._compiled)
            _logger.info("compiled in %.1f s%s", start - compiling_since, memory)
        seconds_until_ready(sums)
        return state, new_sums, time.perf_counter() - start


def seconds_until_ready(sums: steps.Sums) -> float:
    """Waits for the call that makes `sums`."""
    start = time.perf_counter()
    jax.block_until_ready(sums)
    return time.perf_counter() - start


def _due(before: int, step: int, total: int) -> Callable[[int], bool]:
    """Returns a test: did what has the period `every` fall due in (before, step], or at the end?"""
    return lambda every: every > 0 and (step // every > before // every or step == total)


def _learning_rate(training: Training, state: TrainState, step: int, partition: Partition) -> float:
    """The learning rate of the newest update, that of step - 1."""
    scale = 1.0 if state.plateau is None else float(partition.to_host(state.plateau.scale))
    return float(training.schedule(step - 1)) * scale


def reduce_on_plateau(schedule_config, state: TrainState, scores: dict[str, float], partition: Partition) -> TrainState:
    """Tells the 'plateau' schedule of an evaluation."""
    if state.plateau is None:
        return state
    metric = schedule_config.metric
    plateau = optim.plateau_update(
        schedule_config, partition.to_host(state.plateau), scores[metric], metrics.higher_is_better(metric)
    )
    return state.replace(plateau=partition.replicate(jax.device_get(plateau)))


def check_finite(skipped: NonFinite, limit: int) -> None:
    """Raises RunError once `limit` updates in a row were skipped."""
    if skipped.streak >= limit:
        last = int(skipped.last_step)
        raise RunError(
            f"the loss or a gradient was not finite in {limit} updates in a row, steps {last - limit + 1} to {last}; "
            "lower config.optimizer.learning_rate, lengthen config.schedule.warmup or set config.optimizer.clip_norm"
        )
