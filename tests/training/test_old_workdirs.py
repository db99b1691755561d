"""Workdirs that vitcls 0.1.0 made continue, and evaluate and predict, as they did (tests/workdirs/README.md)."""

import datetime
import json
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from vitcls import config as configs
from vitcls import evaluate, predict, status
from vitcls.core.errors import UserError
from vitcls.train import train_and_evaluate
from vitcls.training import checkpoint, evaluator, run_dir
from vitcls.training.metrics_log import read_history

pytestmark = pytest.mark.usefixtures("no_pictures")
KEPT = pathlib.Path(__file__).parents[1] / "workdirs"
TIMED = ("train/images_per_second", "train/seconds")


@pytest.fixture(params=["vit_digits", "resnext_digits"])
def old(request, tmp_path):
    """(workdir, what the same version logged and reported later)"""
    with tarfile.open(KEPT / f"{request.param}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param, json.loads((KEPT / f"{request.param}.expected.json").read_text())


def continued(path, **changes):
    """The config of an old workdir, as its config file would give it today, with `changes`."""
    config = configs.from_json((path / "config.json").read_text()).copy_and_resolve_references()
    with config.unlocked():
        config.update(changes)
    return config


@pytest.mark.by_turns
def test_an_old_run_evaluates_predicts_and_continues(old, tmp_path, monkeypatch):
    path, expected = old
    monkeypatch.setattr(evaluator, "_TIMED_SECONDS", 0.0)
    digit = Image.fromarray(np.tri(8, dtype=np.uint8) * 255)
    digit.save(tmp_path / "digit.png")
    opened = run_dir.open_workdir(path)
    ((_, (probabilities, _)),) = predict.predict(opened, [tmp_path / "digit.png"])
    assert probabilities.shape == (10,) and probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert evaluate.evaluate(path, split="validation")["checkpoint_step"] == 20
    now = datetime.datetime.now().astimezone()
    assert status.status(path, now)["state"] == "stopped"

    report = train_and_evaluate(continued(path), path)
    seen = status.status(path, now)
    assert (seen["state"], seen["step"], seen["test_accuracy"]) == ("finished", 40, report["accuracy"])
    later = [{k: v for k, v in e.items() if k not in TIMED} for e in read_history(path) if e["step"] > 20]
    averaged = opened.config.optimizer.ema_decay > 0  # whose statistics 0.1.0 did not average: another evaluation
    for ours, theirs in zip(later, expected["events"], strict=True):
        if "train/loss" in theirs or not averaged:
            # The digits of another number of devices, and of another compiler, differ a little.
            assert ours == pytest.approx(theirs, rel=2e-2, abs=2e-2)
    if not averaged:
        assert report["loss"] == pytest.approx(expected["report"]["loss"], rel=1e-2)
    assert checkpoint.has(path / "checkpoints", 40, "state", "ema_batch_stats")
    assert not checkpoint.has(path / "checkpoints", 20, "state", "ema_batch_stats")


def test_an_old_run_of_another_config_is_still_refused(old):
    path, _ = old
    files = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"holds a run with another config.json: seed was 0, is 1; use another"):
        train_and_evaluate(continued(path, seed=1), path)
    assert files == {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}


def test_a_renamed_key_is_found_under_its_old_name(monkeypatch):
    text = configs.to_json(configs.resolve(configs.default_config("lenet5")))
    values = json.loads(text)
    values["optimizer"]["lr"] = values["optimizer"].pop("learning_rate") * 2
    values["l2"] = 0.25
    del values["loss"]
    monkeypatch.setattr(configs, "_RENAMED", {"optimizer.lr": "optimizer.learning_rate", "l2": "loss.l2", "no": "seed"})
    config = configs.from_json(json.dumps(values))
    assert (config.optimizer.learning_rate, config.loss.l2, config.seed) == (2e-3, 0.25, 0)


@pytest.mark.by_turns
def test_the_data_of_a_run_may_move_but_not_change(tiny_config, tmp_path):
    rng = np.random.default_rng(0)

    def save(folder, count):
        (tmp_path / "first" / folder).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 128, (8, 8, 3), np.uint8) + (64 if folder == "light" else 0)
            Image.fromarray(image).save(tmp_path / "first" / folder / f"{i:02d}.png")

    save("dark", 20)
    save("light", 20)
    tiny_config.dataset.update(name="folder", data_dir=str(tmp_path / "first"), validation=0.2, image_size=8)
    tiny_config.total = "4 steps"
    run = tmp_path / "run"
    train_and_evaluate(tiny_config, run)
    (tmp_path / "first").rename(tmp_path / "second")

    for command in (lambda: train_and_evaluate(tiny_config, run), lambda: evaluate.evaluate(run)):
        with pytest.raises(UserError, match=r"are not in .*first; say where they are with --data_dir=DIR"):
            command()
    with pytest.raises(UserError, match="--data_dir='gs://bucket/x' is a URL"):
        evaluate.evaluate(run, data_dir="gs://bucket/x")
    train_and_evaluate(tiny_config, run, data_dir=str(tmp_path / "second"))
    config_file = (run / "config.json").read_text()
    train_and_evaluate(tiny_config, run)  # the same command goes on
    evaluate.evaluate(run)
    assert (run / "config.json").read_text() == config_file
    (tmp_path / "second").rename(tmp_path / "first")
    train_and_evaluate(tiny_config, run, data_dir=str(tmp_path / "first"))
    train_and_evaluate(tiny_config, run)  # they are back
    (tmp_path / "first").rename(tmp_path / "second")

    changed = tiny_config.copy_and_resolve_references()
    changed.dataset.data_dir = str(tmp_path / "second")
    with pytest.raises(UserError, match=r"data_dir was .*; if the data have moved, leave the config as it was and add"):
        train_and_evaluate(changed, run)

    shutil.copy(tmp_path / "second/dark/00.png", tmp_path / "second/dark/zz.png")
    with pytest.raises(UserError, match=r"holds a run with another dataset.json: "):
        train_and_evaluate(tiny_config, run, data_dir=str(tmp_path / "second"))
    with pytest.raises(UserError, match=r"are not those of the training: 2 classes of 8x8x3, .* images now"):
        evaluate.evaluate(run, data_dir=str(tmp_path / "second"))
