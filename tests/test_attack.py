"""vitcls attack: the figures and the page, what is refused, and a model on which attacks cannot be trusted."""

import csv
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from vitcls import attack, cli
from vitcls.training import opened

FAST = ["--steps=4", "--queries=8", "--images=20"]


def call(arguments, capsys):
    capsys.readouterr()
    code = cli.run(attack.main, arguments)
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def attacked(trained, tmp_path_factory):
    path = shutil.copytree(trained, tmp_path_factory.mktemp("attacked") / "run")
    assert cli.run(attack.main, [f"--workdir={path}", "--eps=25.5/255,0.4", *FAST]) == 0
    return path


def test_accuracy_falls_with_eps_and_the_worst_is_no_better_than_any(attacked):
    found = json.loads((attacked / "attack" / "metrics.json").read_text())
    assert [point["eps"] for point in found["curve"]] == [0, 0.1, 0.4]
    assert all(each["passed"] for each in found["checks"]) and len(found["checks"]) == 6
    for name in attack.ATTACKS:
        values = [point["attacks"][name]["value"] for point in found["curve"]]
        assert values == sorted(values, reverse=True) and values[0] == found["clean_accuracy"]["value"]
    for point in found["curve"]:
        assert point["worst"]["low"] <= point["worst"]["value"] <= min(a["value"] for a in point["attacks"].values())
    assert found["robust_accuracy"] == found["curve"][-1]["worst"]
    assert (attacked / "attack" / "accuracy.png").exists() and (attacked / "attack" / "index.html").exists()
    with open(attacked / "attack" / "accuracy.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["worst_value"]) == found["robust_accuracy"]["value"]


def test_checks_are_of_more_images_than_are_attacked(attacked, tmp_path, capsys):
    """Of one image luck would decide, and a model that is as it should be would be refused, or a bad one pass."""
    path = shutil.copytree(attacked, tmp_path / "run")
    code, out, err = call([f"--workdir={path}", "--attack=fgsm", "--eps=0.1", *FAST, "--images=1"], capsys)
    found = json.loads((path / "attack" / "metrics.json").read_text())
    right = json.loads((path / "report" / "metrics.json").read_text())["accuracy"] * 24
    assert code == 0 and found["num_examples"] == 1 and found["checked_images"] == round(right) > 1
    assert f"6 checks passed on {round(right)} images" in out
    assert err == f"checking on {round(right)} images whether attacks can be trusted\n"


def test_where_a_check_fails_there_is_no_robust_accuracy(trained, tmp_path, capsys, monkeypatch):
    """The model sees its images rounded, so that nothing has a slope."""
    make = opened.build.make_explained

    def rounded(*run):
        network = make(*run)
        return network._replace(forward=lambda v, images: network.forward(v, jax.numpy.round(4 * images) / 4))

    monkeypatch.setattr(opened.build, "make_explained", rounded)
    path = shutil.copytree(trained, tmp_path / "run")
    code, out, err = call([f"--workdir={path}", *FAST], capsys)
    assert code == 1 and not out and len(err.splitlines()) == 2  # one before the checks
    assert "no robust accuracy is given" in err and "'slopes'" in err and "--steps=4 may be too few for PGD" in err
    found = json.loads((path / "attack" / "metrics.json").read_text())
    assert "curve" not in found and "robust_accuracy" not in found
    assert not (path / "attack" / "accuracy.csv").exists() and (path / "attack" / "checks.csv").exists()
    assert "no robust accuracy" in (path / "attack" / "index.html").read_text()


def test_the_forward_pass_of_an_opened_run_is_that_of_its_predictions(trained):
    run = opened.open_with_data(trained, splits=("test",))
    images = run.dataset.test.images.astype(np.float32) / 255
    logits = np.asarray(jax.jit(run.forward)(run.variables, images))
    np.testing.assert_allclose(logits, run.outputs(run.dataset.test).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attack=pdg"], "attack 'pdg' is not known; did you mean 'pgd'?"),
        (["--norm=l1"], "--norm"),
        (["--eps=0"], "--eps=0 must be numbers above 0"),
        (["--eps=8/2/3"], "--eps=8/2/3 must be numbers above 0"),
        (["--eps=1,nan,2"], "must be numbers above 0"),
        (["--eps=8/0"], "--eps=8/0 must be numbers above 0"),
        (["--eps=much"], "--eps=much must be numbers above 0"),
        (["--eps=8"], "eps 8 is further than images in [0, 1] are from each other, 1 by linf; of 255"),
        (["--eps=8,20", "--norm=l2"], "eps 20 is further than images in [0, 1] are from each other, 13.86 by l2"),
        (["--eps=0.1,-0.2"], "must be numbers above 0"),
        (["--images=-1"], "--images=-1 must be at least 0"),
        (["--steps=0"], "--steps=0 must be at least 1"),
        (["--queries=none"], "--queries"),
        (["--checkpoint=7"], "7"),
        (["--epsilon=1"], "--epsilon"),
    ],
)
def test_mistakes_are_one_line(trained, flags, words, capsys):
    code, out, err = call([f"--workdir={trained}", *flags], capsys)
    assert code == 2 and not out and words in err and len(err.splitlines()) == 1
    assert not (trained / "attack").exists()


def test_a_workdir_that_is_none_is_one_line(tmp_path, capsys):
    code, _, err = call([f"--workdir={tmp_path}"], capsys)
    assert code == 2 and len(err.splitlines()) == 1


def test_features_without_a_classifier_are_refused(trained, capsys, monkeypatch):
    run = opened.open_with_data(trained, splits=("test",))
    evaluator = dataclasses.replace(run.evaluator, bank_step=lambda variables, batch: batch)
    remembering = dataclasses.replace(run, evaluator=evaluator)
    monkeypatch.setattr(attack, "open_with_data", lambda *a, **k: remembering)
    code, _, err = call([f"--workdir={trained}"], capsys)
    assert code == 2 and "has no classifier of its own" in err and len(err.splitlines()) == 1
