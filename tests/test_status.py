"""`vitcls status`: one line for each run, whatever is in its workdir, and quickly."""

import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from vitcls import cli, evaluate, status
from vitcls import config as configs
from vitcls.core.errors import RunError, UserError
from vitcls.train import train_and_evaluate
from vitcls.training import lock, run_dir
from vitcls.training.files import RECORD

ROOT = pathlib.Path(__file__).parents[1]
NOW = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)


def beat(seconds):
    return {"last_beat": (NOW - datetime.timedelta(seconds=seconds)).isoformat(" ", "seconds")}


def make(workdir, lock=None):
    """A workdir of 240 steps at step 120, with a checkpoint of step 80 that is two hours old."""
    checkpoint = workdir / "checkpoints" / "80"
    checkpoint.mkdir(parents=True)
    (workdir / "checkpoints" / "120.orbax-checkpoint-tmp").mkdir()
    committed = int((NOW.timestamp() - 7200) * 1e9)
    (checkpoint / "_CHECKPOINT_METADATA").write_text(json.dumps({"commit_timestamp_nsecs": committed}))
    (workdir / "config.json").write_text(json.dumps({"total": "3 epochs", "batch_size": 10}))
    (workdir / "dataset.json").write_text(json.dumps({"num_examples": {"train": 800}}))
    events = [
        {"step": 80, "train/loss": 2.0, "train/images_per_second": 10.0},
        {"step": 80, "eval/accuracy": 0.5},
        {"step": 120, "train/loss": 1.25, "train/images_per_second": 1234.0},
    ]
    lines = [json.dumps(event) for event in events]
    (workdir / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 160, "train/loss": 0.'])[:-1])
    if lock:
        (workdir / "lock.json").write_text(json.dumps(lock))
    return workdir


def line(workdir):
    return status.table([status.status(workdir, NOW)])[1].removeprefix(str(workdir)).split("  ")


def test_a_run_that_is_alive(tmp_path):
    cells = [cell.strip() for cell in line(make(tmp_path / "run", beat(6))) if cell]
    assert cells == ["120/240", "1.2500", "50.00%", "1,234", "80 (2 h ago)", "alive"]


@pytest.mark.parametrize(
    ("lock", "state"),
    [
        (beat(90), "silent for 1 min"),
        ({"since": "2026-03-01 11:00:00+00:00"}, "silent for 1 h"),  # as 0.1.0 wrote it
        ({"last_beat": "?"}, "silent"),
        (None, "stopped"),
    ],
)
def test_a_run_that_is_not(lock, state, tmp_path):
    assert line(make(tmp_path / "run", lock))[-1].strip() == state


def test_a_run_of_this_machine_that_was_killed_just_now(tmp_path):
    holder = lock.this_process() | beat(2)
    assert status.is_alive(make(tmp_path / "alive", holder | {"last_beat": lock._now()}))
    assert line(make(tmp_path / "run", holder))[-1].strip() == "alive"
    assert line(make(tmp_path / "dead", holder | {"process_start": "1"}))[-1].strip() == "silent for 2 s"
    assert line(make(tmp_path / "other", holder | {"process_start": "1", "machine": "m"}))[-1].strip() == "alive"


def test_a_finished_run_and_its_test_accuracy(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    report = workdir / "report" / "metrics.json"
    made = json.loads(report.read_text()) | {"checkpoint_step": 12}  # other tests evaluate earlier ones here
    run = status.status(workdir, datetime.datetime.now().astimezone())
    assert (run["step"], run["total_steps"], run["checkpoint_step"]) == (12, 12, 12)
    assert 0 <= run["checkpoint_age_seconds"] < 3600
    report.write_text(json.dumps(made | {"split": "test", "accuracy": 0.75}))
    assert line(workdir)[-1].strip() == "finished, test accuracy 75.00%"
    report.write_text(json.dumps(made | {"split": "validation"}))  # of vitcls evaluate
    assert line(workdir)[-1].strip() == "finished"


def test_an_evaluation_finishes_no_run(trained, tmp_path, no_pictures):
    """And that of another checkpoint does not tell how well the run does at its end."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    steps = {name: run_dir.open_workdir(workdir).find_step(name) for name in ("last", "best")}
    assert steps == {"last": 12, "best": 6}
    for end in ("last", "best"):
        (workdir / "config.json").write_text(json.dumps(config | {"report": config["report"] | {"checkpoint": end}}))
        for step in (6, 12):
            accuracy = evaluate.evaluate(workdir, checkpoint=str(step))["accuracy"]
            words = f", test accuracy {accuracy:.2%}" if step == steps[end] else ""
            assert line(workdir)[-1].strip() == f"finished{words}"
    shutil.rmtree(workdir / "checkpoints" / "6")  # as older versions did with the best when a run was resumed
    record = workdir / "checkpoints" / "12" / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"best": 0.99}))
    assert line(workdir)[-1].strip() == f"finished, test accuracy {accuracy:.2%}"
    (workdir / "config.json").write_text(json.dumps(config | {"total": "24 steps"}))
    run = status.status(workdir, NOW)
    assert (run["step"], run["total_steps"], run["state"], run["test_accuracy"]) == (12, 24, "stopped", None)


def test_an_old_run_that_was_stopped_and_evaluated(tmp_path, no_pictures):
    with tarfile.open(ROOT / "tests" / "workdirs" / "resnext_digits.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    evaluate.evaluate(tmp_path / "resnext_digits")
    assert line(tmp_path / "resnext_digits")[-1].strip() == "stopped"


def test_a_run_that_failed_says_why_until_it_goes_on(tiny_config, tmp_path, no_pictures):
    workdir = tmp_path / "run"
    tiny_config.optimizer.learning_rate, tiny_config.nonfinite_limit = 1e30, 1
    tiny_config.optimizer.clip_norm = 0.0
    with pytest.raises(RunError) as error:
        train_and_evaluate(tiny_config, workdir)
    run = status.status(workdir, NOW)
    assert (run["state"], run["failure"]) == ("failed", str(error.value)[:200])
    assert line(workdir)[-1].strip() == f"failed: {run['failure'].partition(';')[0]}"
    other = tiny_config.copy_and_resolve_references()
    other.seed += 1
    with pytest.raises(UserError):  # of a start that is none
        train_and_evaluate(other, workdir)
    assert status.status(workdir, NOW)["state"] == "failed"
    run_dir.begin(workdir, configs.resolve(tiny_config), run_dir.open_workdir(workdir).info)
    assert status.status(workdir, NOW)["state"] != "failed"


def test_what_is_half_made_is_a_line(tmp_path):
    for name in ("lock.json", "config.json"):
        workdir = tmp_path / name
        workdir.mkdir()
        (workdir / name).write_text(json.dumps({"total": "3 epochs"} if name == "config.json" else beat(1)))
        cells = [cell.strip() for cell in line(workdir) if cell]
        assert cells == ["-/-", "-", "-", "-", "-", "begun" if name == "config.json" else "alive"]
    torn = make(tmp_path / "torn")
    for name in ("dataset.json", "metrics.jsonl", "checkpoints/80/_CHECKPOINT_METADATA"):
        (torn / name).write_bytes(b'{"step": \xff')
    assert [cell.strip() for cell in line(torn) if cell] == ["80/-", "-", "-", "-", "80", "stopped"]


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_what_is_no_workdir_is_one_line_and_hides_no_run(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    good = make(tmp_path / "good")
    assert cli.run(status.main, [str(tmp_path / place), str(good), "ftp://a/b"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith(f"{good} ") and len(out.splitlines()) == 2
    what = "is not the workdir of a run: it has no config.json; give the --workdir of vitcls train"
    first, second = err.splitlines()
    assert first == f"error: {tmp_path / place} {what}"
    assert second.startswith("error: --workdir=ftp://a/b cannot be used")
    assert cli.run(status.main, [str(tmp_path / place)]) == 2
    assert capsys.readouterr() == ("", f"error: {tmp_path / place} {what}\n")


@pytest.mark.parametrize(
    "text", [b'{"step": \xff', b'{"total": "3 ep', b"[]", b'{"total": 3}', b'{"total": "1%", "report": 3}', b""]
)
def test_a_config_that_is_none_is_one_line_and_hides_no_run(text, tmp_path, capsys):
    bad, good = make(tmp_path / "bad"), make(tmp_path / "good")
    (bad / "config.json").write_bytes(text)
    assert cli.run(status.main, [str(bad), str(good)]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith(f"{good} ") and len(out.splitlines()) == 2
    assert re.fullmatch(rf"error: config.json of {bad} cannot be used \(.+\); restore it from a copy\n", err)


def test_columns_are_aligned_and_json_is_one_object_a_line(tmp_path, capsys):
    runs = [str(make(tmp_path / name)) for name in ("a", "a_long_name")]
    assert cli.run(status.main, runs) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert len({text.index(" stopped") for text in lines} | {head.index(" state")}) == 1
    assert cli.run(status.main, [*runs, "--json"]) == 0
    objects = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [(run["workdir"], run["step"], run["loss"]) for run in objects] == [
        (runs[0], 120, 1.25),
        (runs[1], 120, 1.25),
    ]


def test_it_is_quick_and_watching_ends_quietly(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    begun = time.monotonic()
    watching = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "vitcls.status", "--watch", str(workdir)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout.readline().startswith("run ")
    assert "finished" in watching.stdout.readline()
    assert time.monotonic() - begun < 5  # 0.2 s on an idle machine; JAX alone takes longer
    watching.send_signal(signal.SIGINT)
    out, err = watching.communicate(timeout=30)
    assert (watching.returncode, out) == (0, "")
    loaded = {text.rpartition("|")[2].strip() for text in err.splitlines()}
    assert not loaded & {"jax", "flax", "orbax", "tensorflow", "tensorboardX"} and "json" in loaded
    assert "Traceback" not in err
