"""A run that is killed and started again ends as if nothing had happened."""

import dataclasses
import datetime
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vitcls import config as configs
from vitcls import data, status
from vitcls.core.errors import RunError, UserError
from vitcls.models.variables import variable_shapes
from vitcls.train import train_and_evaluate
from vitcls.training import build, checkpoint, run_dir
from vitcls.training.lock import LockFile, WorkdirLock
from vitcls.training.metrics_log import MetricWriter, read_history

pytestmark = pytest.mark.usefixtures("no_pictures")
CONFIG = """
import sys
from vitcls import config as configs

def get_config():
    config = configs.from_json(open({path!r}).read())
    if config.dataset.pipeline != "streaming":
        sys.modules["tensorflow"] = None  # which only streaming needs
    return config
"""
UNINTERRUPTED = """
import sys
from vitcls import cli, config, train

def main(workdirs):
    for path in workdirs:
        train.train_and_evaluate(config.from_json(open(path + ".json").read()), path)

sys.exit(cli.run(main))
"""
TIMED = ("train/images_per_second", "train/seconds")


def write(config, directory):
    """Writes the config of a run beside its workdir, which is not there yet; returns the config file."""
    as_json = directory.with_name(f"{directory.name}.json")
    as_json.write_text(configs.to_json(configs.resolve(config)))
    config_file = as_json.with_suffix(".py")
    config_file.write_text(CONFIG.format(path=str(as_json)))
    return config_file


def start(*arguments):
    """Starts Python in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out, err


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def losses(directory):
    return [{k: v for k, v in event.items() if k not in TIMED} for event in read_history(directory)]


def arrays(directory):
    """All arrays of the last checkpoint, as numpy."""
    folder = directory / "checkpoints" / str(checkpoint.latest_whole(directory / "checkpoints", quarantine=False))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(folder / "tree").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        return reader.restore(folder / "tree", args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def assert_same_run(actual, expected):
    assert losses(actual) == losses(expected)
    a, b = arrays(actual), arrays(expected)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    kept, expected_kept = (checkpoint.steps(directory / "checkpoints") for directory in (actual, expected))
    assert kept == expected_kept


@pytest.mark.by_turns
def test_a_killed_run_ends_bit_equal_to_an_uninterrupted_one(tiny_config, tmp_path):
    tiny_config.total = "150 steps"
    tiny_config.log_every = "14 steps"
    tiny_config.eval_every = "50 steps"
    tiny_config.checkpoint_every = "15 steps"
    tiny_config.steps_per_call = 2
    tiny_config.schedule.name = "plateau"
    tiny_config.schedule.patience = 1
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pipelines = ("resident", "streaming")
    for folder in (whole, killed):
        folder.mkdir()
        for pipeline in pipelines:
            tiny_config.dataset.pipeline = pipeline
            write(tiny_config, folder / pipeline)
    uninterrupted = start("-c", UNINTERRUPTED, *(whole / pipeline for pipeline in pipelines))

    for pipeline in pipelines:
        path = killed / pipeline
        checkpoints = path / "checkpoints"
        command = ["-m", "vitcls.main", f"--config={path}.py", f"--workdir={path}"]
        process = start(*command)
        wait_for(lambda folder=checkpoints: len(checkpoint.steps(folder)) >= 2, process)
        process.kill()
        process.communicate()
        stopped = checkpoint.latest_whole(checkpoints, quarantine=False)
        assert 0 < stopped < 150

        if pipeline == "resident":  # a signal is not the pipeline's business
            process, reached = start(*command), stopped
            wait_for(lambda folder=checkpoints, step=reached: (checkpoint.steps(folder) or [0])[-1] > step, process)
            process.send_signal(signal.SIGTERM)
            _, err = finish(process, 128 + signal.SIGTERM)
            stopped = checkpoint.latest_whole(checkpoints, quarantine=False)
            assert f"stopped at step {stopped}, which is saved" in err
            assert reached < stopped < 150

        _, err = finish(start(*command))
        assert f"resumed from step {stopped}" in err
        page = (path / "report" / "index.html").read_text(encoding="utf-8")
        assert f"python {' '.join(command)}<" in page
    finish(uninterrupted)
    for pipeline in pipelines:
        assert_same_run(killed / pipeline, whole / pipeline)


def test_a_run_writes_all_that_it_promises(trained):
    written = json.loads((trained / "report" / "metrics.json").read_text())
    assert set(written) >= {
        *("dataset", "split", "num_examples", "loss", "accuracy", "top5_accuracy", "precision_macro", "recall_macro"),
        *("f1_macro", "auc_ovr_macro", "auc_ovr_macro_hard", "ece", "parameters", "flops_per_image"),
        *("train_seconds", "per_class", "learned_weights"),
    }
    assert not {"latency_ms", "images_per_second"} & {*written, *written["units"]}  # config.report.timing is off
    for name in ("config.json", "dataset.json", "metrics.jsonl", "report/index.html", "checkpoints/12/manifest.json"):
        assert (trained / name).is_file(), name
    assert list(trained.glob("events.out.tfevents.*"))
    events = read_history(trained)
    logged = [event["step"] for event in events if "train/loss" in event]
    evaluated = [event["step"] for event in events if "eval/accuracy" in event]
    assert (logged, evaluated) == ([4, 8, 12], [6, 12])
    rates = [event["train/learning_rate"] for event in events if "train/loss" in event]
    np.testing.assert_allclose(rates, [0.5e-3 * (1 + np.cos(np.pi * step / 12)) for step in (3, 7, 11)], rtol=1e-5)


def test_a_finished_run_is_not_trained_again(trained, tiny_config, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    train_and_evaluate(tiny_config, copy)
    assert losses(copy) == losses(trained)


def test_another_config_does_not_touch_the_run_that_is_there(trained, tiny_config):
    files = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    tiny_config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"optimizer.learning_rate was 0.001, is 0.5; use another --workdir"):
        train_and_evaluate(tiny_config, trained)
    assert files == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


def test_data_and_workdirs_of_other_urls_are_refused(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (lambda url: train_and_evaluate(tiny_config, url), run_dir.open_workdir):
        with pytest.raises(UserError, match="--workdir=file:///tmp/run cannot be used; give a directory, gs://BUCKET"):
            use("file:///tmp/run")
    with pytest.raises(UserError, match=r"config.dataset.data_dir='gs://b/c' is a URL"):
        tiny_config.dataset.data_dir = "gs://b/c"
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_workdir_in_use_is_refused_and_left_alone(tiny_config, tmp_path):
    with WorkdirLock(LockFile(tmp_path / "run")), pytest.raises(UserError, match="is in use by process"):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.by_turns
def test_compilation_is_not_timed_as_training(tiny_config, tmp_path):
    """Under `pmap` too: the first interval of a run is not slower than the others by a compilation."""
    tiny_config.partition.strategy = "pmap"
    tiny_config.eval_every = "0 steps"
    start = time.perf_counter()
    train_and_evaluate(tiny_config, tmp_path / "run")
    whole = time.perf_counter() - start
    trained = read_history(tmp_path / "run")[-1]["train/seconds"]
    assert trained < whole / 5


def test_a_run_of_an_older_version_goes_on(trained, tmp_path):
    """Its files lack what was added since: the defaults are what it ran with."""
    old = tmp_path / "run"
    shutil.copytree(trained, old, ignore=shutil.ignore_patterns("checkpoints"))
    for name, block, key in (("config.json", "dataset", "max_value"), ("dataset.json", None, "max_value")):
        values = json.loads((old / name).read_text())
        del (values[block] if block else values)[key]
        (old / name).write_text(json.dumps(values))
    opened = run_dir.open_workdir(old)
    assert run_dir.max_value(old) == opened.info.max_value == 0
    run_dir.begin(old, opened.config, opened.info)
    assert run_dir.max_value(tmp_path / "none") is None
    changed = dataclasses.replace(opened.info, max_value=4095.0)
    with pytest.raises(UserError, match=r"another dataset.json: max_value was 0.0, is 4095.0"):
        run_dir.begin(old, opened.config, changed)


def test_a_checkpoint_that_a_live_run_removes_while_it_is_read_gives_way_to_the_next(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    opened, read = run_dir.open_workdir(tmp_path / "run"), checkpoint.restore
    model = build.make_model(opened.config, opened.info)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-2:] == [8, 12]

    def as_it_goes(directory, step, template):
        if step == 12:
            shutil.rmtree(directory / "12")
        return read(directory, step, template)

    monkeypatch.setattr(checkpoint, "restore", as_it_goes)
    monkeypatch.setattr(run_dir, "_REMOVAL", 0.01)
    step, variables = opened.restore(model, "last")
    assert step == 8
    jax.tree.map(np.testing.assert_array_equal, variables, opened.restore_variables(model, 8))
    with pytest.raises(UserError, match="checkpoint '12' is not there"):
        opened.restore(model, "12")


def test_a_run_whose_workdir_is_taken_over_writes_nothing_more(tiny_config, tmp_path, monkeypatch):
    check = WorkdirLock.check

    def lost_once_it_has_logged(lock):
        lock.lost = bool(read_history(tmp_path / "run"))
        check(lock)

    monkeypatch.setattr(WorkdirLock, "check", lost_once_it_has_logged)
    tiny_config.update(log_every="2 steps", checkpoint_every="0 steps", eval_every="0 steps")
    with pytest.raises(RunError, match="was taken over by"):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert [event["step"] for event in read_history(tmp_path / "run")] == [2]
    assert not (tmp_path / "run" / "report").exists()


@pytest.mark.by_turns
def test_a_diverging_run_stops_and_names_the_steps(tiny_config, tmp_path):
    tiny_config.optimizer.name = "sgd"
    tiny_config.optimizer.learning_rate = 1e30
    tiny_config.schedule.name = "constant"
    tiny_config.nonfinite_limit = 3
    tiny_config.total = "40 steps"
    with pytest.raises(RunError, match=r"not finite in 3 updates in a row, steps (\d+) to (\d+)") as error:
        train_and_evaluate(tiny_config, tmp_path)
    first, last = map(int, re.search(r"steps (\d+) to (\d+)", str(error.value)).groups())
    assert last - first == 2
    assert 1 <= first <= 5


@pytest.mark.by_turns
def test_early_stopping_ends_the_run_and_it_stays_ended(tiny_config, tmp_path):
    tiny_config.total = "100 steps"
    tiny_config.eval_every = "2 steps"
    tiny_config.augment.crop.probability = tiny_config.augment.mixup.probability = 0.0
    tiny_config.optimizer.learning_rate = tiny_config.optimizer.ema_decay = 0.0  # the average of equals is rounded
    tiny_config.early_stopping.patience = 3
    train_and_evaluate(tiny_config, tmp_path)
    # With no learning no evaluation improves on the first, so the third after it is the last.
    assert [event["step"] for event in read_history(tmp_path) if "eval/loss" in event] == [2, 4, 6, 8]
    accuracy = train_and_evaluate(tiny_config, tmp_path)["accuracy"]
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 8
    seen = status.status(tmp_path, datetime.datetime.now().astimezone())
    assert (seen["state"], seen["step"], seen["test_accuracy"]) == ("finished", 8, accuracy)


@pytest.mark.by_turns
def test_the_best_checkpoint_can_be_reported(tiny_config, tmp_path, monkeypatch):
    """By any metric of the table, here one that needs the predictions."""
    tiny_config.report.checkpoint = "best"
    tiny_config.checkpoint.metric = "eval/auc_ovr_macro"
    tiny_config.eval_every = "2 steps"
    order, sync, save = [], MetricWriter.sync, checkpoint.Checkpoints.save
    monkeypatch.setattr(MetricWriter, "sync", lambda self: (order.append("sync"), sync(self))[1])
    monkeypatch.setattr(
        checkpoint.Checkpoints, "save", lambda self, *args, **rest: (order.append("save"), save(self, *args, **rest))[1]
    )
    results = train_and_evaluate(tiny_config, tmp_path)
    scores = {event["step"]: event[name] for event in read_history(tmp_path) if (name := "eval/auc_ovr_macro") in event}
    assert len(scores) == 6 and {"eval/loss", "eval/accuracy"} <= read_history(tmp_path)[-1].keys()
    assert results["checkpoint_step"] == max(scores, key=scores.get)
    assert run_dir.open_workdir(tmp_path).find_step("best") == results["checkpoint_step"]
    assert status.status(tmp_path, datetime.datetime.now().astimezone())["test_accuracy"] == results["accuracy"]
    assert order == ["sync", "save"] * (len(order) // 2) + ["sync"]  # what a checkpoint knows is on disk before it


def test_a_small_file_is_replaced_and_never_half_written(tmp_path):
    run_dir.write_atomically(tmp_path / "x" / "config.json", "old")
    with open(tmp_path / "x" / "config.json", encoding="utf-8") as reader:
        run_dir.write_atomically(tmp_path / "x" / "config.json", "new")
        assert reader.read() == "old"  # who reads has one or the other
    run_dir.write_atomically(tmp_path / "x" / "config.json", "later", once=True)
    assert (tmp_path / "x" / "config.json").read_text() == "new"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["config.json"]


def test_averages_are_what_is_restored_for_evaluation(tmp_path):
    config = configs.default_config("resnet18")
    config.model.update(depths=(1,), width=8, stem="small")
    config.optimizer.ema_decay = 0.9
    config = configs.resolve(config)
    info = data.DatasetInfo("x", ("a", "b"), (8, 8, 1), (0.5,), (0.5,), {"train": 2}, (1, 1), ())
    model = build.make_model(config, info)
    shapes = variable_shapes(model, info.image_shape)
    filled = lambda tree, value: jax.tree.map(lambda leaf: np.full(leaf.shape, value, leaf.dtype), tree)  # noqa: E731
    state = {
        "params": filled(shapes["params"], 1.0),
        "batch_stats": filled(shapes["batch_stats"], 2.0),
        "ema_params": filled(shapes["params"], 3.0),
        "ema_batch_stats": filled(shapes["batch_stats"], 4.0),
    }
    with checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1, metric="eval/loss") as checkpoints:
        checkpoints.save(5, {"state": state}, record={}, metrics=None)
    restored = run_dir.Workdir(tmp_path, config, info).restore_variables(model, 5)
    assert {float(leaf.max()) for leaf in jax.tree.leaves(restored["params"])} == {3.0}
    assert {float(leaf.max()) for leaf in jax.tree.leaves(restored["batch_stats"])} == {4.0}


@pytest.mark.parametrize("strategy", ["data", "pmap"])
def test_a_dry_run_leaves_nothing(tiny_config, tmp_path, strategy):
    tiny_config.partition.strategy = strategy
    assert train_and_evaluate(tiny_config, tmp_path / "run", dry_run=True) == {}
    assert not (tmp_path / "run").exists()
    tiny_config.loss.class_weights = (1.0,)
    with pytest.raises(UserError, match=r"config.loss.class_weights"):
        train_and_evaluate(tiny_config, tmp_path / "run", dry_run=True)


@pytest.mark.by_turns
def test_a_whole_run_compiles_training_and_evaluation_once_each(tiny_config, tmp_path, caplog):
    tiny_config.total = "13 steps"  # the last call has one step to go, of two
    with jax.log_compiles():
        train_and_evaluate(tiny_config, tmp_path / "run")
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    assert {name: compiled.count(name) for name in ("train_call", "eval_step")} == {"train_call": 1, "eval_step": 1}
    assert read_history(tmp_path / "run")[-1]["step"] == 13


@pytest.mark.by_turns
def test_another_seed_is_another_run_of_the_same_program(tiny_config, tmp_path, caplog):
    runs = []
    for seed in (1, 2):
        tiny_config.seed = seed
        with jax.log_compiles():
            runs.append(train_and_evaluate(tiny_config, tmp_path / str(seed)))
    assert runs[0]["loss"] != runs[1]["loss"]
    found = re.findall(r"Persistent compilation cache (hit|miss) for '(\w+)'", caplog.text)
    assert found.count(("miss", "jit_train_call")) <= 1 and ("hit", "jit_train_call") in found


@pytest.mark.by_turns
def test_chosen_steps_are_traced_and_no_others(tiny_config, tmp_path):
    train_and_evaluate(tiny_config, tmp_path / "run", profile_steps=range(5, 8))
    (trace,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    traced = {int(event["args"]["step_num"]) for event in events if event.get("name") == "train"}
    assert traced == {4, 6}  # the calls of two steps that run them
