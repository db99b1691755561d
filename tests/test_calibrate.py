"""vitcls calibrate: what it writes, who uses it, and what it refuses."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import vitcls
from vitcls import calibrate, cli, compare, evaluate, predict


@pytest.fixture(scope="module")
def calibrated(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(trained, path)
    groups = tmp_path_factory.mktemp("groups") / "groups.csv"
    groups.write_text("index,group\n" + "".join(f"{i},{'odd' if i % 2 else 'even'}\n" for i in range(24)))
    flags = ["--method=temperature", "--coverage=0.5,0.95", f"--groups={groups}"]
    assert cli.run(calibrate.main, [f"--workdir={path}", *flags]) == 0
    evaluate.evaluate(path)
    return path


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def call(command, arguments, capsys):
    capsys.readouterr()
    code = cli.run(command.main, arguments)
    return code, *capsys.readouterr()


def test_the_figures_are_those_of_the_predictions(calibrated):
    """Recomputed from what evaluate keeps, before and after."""
    found = json.loads((calibrated / "calibrate" / "metrics.json").read_text())
    with np.load(calibrated / "report" / "predictions.npz") as file:
        kept = dict(file)
    log_p = np.log(kept["probabilities"][np.arange(len(kept["labels"])), kept["labels"]].astype(np.float64))
    assert found["before"]["loss"]["value"] == pytest.approx(-log_p.mean(), rel=1e-4)
    assert found["fitted_on"] + found["held_out"] == 10 and found["num_examples"] == len(kept["labels"])
    (sets,) = found["sets"]
    assert sets["coverage"] == 0.5 and len(sets["per_class"]) == 3
    by_group = [sets["per_group"][name]["value"] for name in ("even", "odd")]
    assert np.mean(by_group) == pytest.approx(sets["test_coverage"]["value"])
    assert found["refused_sets"]["0.95"] == "5 held-out examples cannot promise sets for 95%; that takes 59"
    assert set(found["refused_answers"]) == {"0.9", "0.95", "0.98", "0.99"}
    scores = list(csv.DictReader((calibrated / "calibrate" / "scores.csv").read_text().splitlines()))
    assert {row["score"] for row in scores} >= {"loss", "brier", "ece", "ece_equal_mass", "ece_classwise", "aurc"}
    page = (calibrated / "calibrate" / "index.html").read_text()
    assert page.count("data:image/png;base64") == 3 and "<script" not in page


@pytest.mark.by_turns
def test_a_calibrated_report_says_so_and_is_not_compared_with_another(calibrated, tmp_path, capsys):
    run, plain = (shutil.copytree(calibrated, tmp_path / name) for name in ("run", "plain"))
    assert evaluate.evaluate(run, calibrated=True)["calibrated"] and "calibrated" not in evaluate.evaluate(plain)
    assert cli.run(compare.main, [str(plain), str(run), f"--out={tmp_path}/out"]) == 2
    assert f"the report of {run} is of calibrated probabilities and that of {plain} is not" in capsys.readouterr().err
    assert "calibrated" not in evaluate.evaluate(run)


@pytest.mark.by_turns
def test_predict_and_evaluate_use_it(calibrated, trained, photo, capsys):
    temperature = json.loads((calibrated / "calibration.json").read_text())["scaling"]["temperature"]
    before = vitcls.open_run(trained).predict([photo]).astype(np.float64)
    expected = before ** (1 / temperature)
    np.testing.assert_allclose(vitcls.open_run(calibrated).predict([photo]), expected / expected.sum(), rtol=1e-4)
    assert call(evaluate, [f"--workdir={calibrated}", "--calibrated"], capsys)[0] == 0
    report = json.loads((calibrated / "report" / "metrics.json").read_text())
    found = json.loads((calibrated / "calibrate" / "metrics.json").read_text())
    assert report["loss"] == pytest.approx(found["after"]["loss"]["value"], rel=1e-5)
    assert report["ece"] == pytest.approx(found["after"]["ece"]["value"], abs=1e-6)
    assert "calibrated" in (calibrated / "report" / "index.html").read_text()


def test_predict_prints_the_set_that_was_promised(calibrated, photo, capsys):
    code, out, _ = call(predict, [f"--workdir={calibrated}", "--coverage=0.5", "--json", photo], capsys)
    said = json.loads(out)
    assert code == 0 and 1 <= len(said["set"]) <= 3 and said["coverage"] == 0.5
    p = [entry["probability"] for entry in said["set"]]
    assert p == sorted(p, reverse=True)
    code, out, _ = call(predict, [f"--workdir={calibrated}", "--coverage=0.5", photo], capsys)
    assert out.splitlines()[1] == f"  one of {len(p)}, for 0.5 of images:" and len(out.splitlines()) == 2 + len(p)


def test_predict_gives_no_answer_where_none_is_promised(calibrated, photo, capsys):
    file = calibrated / "calibration.json"
    made = json.loads(file.read_text())
    for threshold, answered in ((0.0, True), (1.1, False)):
        made["answers"] = [{"accuracy": 0.9, "threshold": threshold}]
        file.write_text(json.dumps(made))
        code, out, _ = call(predict, [f"--workdir={calibrated}", "--accuracy=0.9", "--json", photo], capsys)
        assert code == 0 and json.loads(out)["answered"] is answered
    code, _, err = call(predict, [f"--workdir={calibrated}", "--accuracy=0.95", photo], capsys)
    assert code == 2 and "run vitcls calibrate --coverage=0.5 --accuracy=0.9,0.95; it says how many images" in err
    _, out, _ = call(predict, [f"--workdir={calibrated}", "--accuracy=0.9", photo], capsys)
    assert "  no answer: 0.9 right is not promised of an image like this" in out.splitlines()


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        (calibrate, ["--coverage=1.5"], "--coverage=1.5 must be numbers from 0.5 to below 1"),
        (calibrate, ["--accuracy=a"], "--accuracy=a must be numbers"),
        (calibrate, ["--method=platt"], "--method"),
        (calibrate, ["--checkpoint=5"], "checkpoint '5' is not there"),
        (calibrate, ["--data_dir=x"], "the images of 'synthetic' are in no directory; leave it out"),
        (
            predict,
            ["--coverage=0.97", "x.png"],
            "does not promise --coverage=0.97; it promises 0.5. To have it too, run vitcls calibrate "
            "--coverage=0.5,0.97",
        ),
        (predict, ["--coverage=1", "x.png"], "it promises 0.5. A promise is from 0.5 to below 1"),
        (predict, ["--coverage=0.5", "--accuracy=0.9", "x.png"], "are two promises"),
        (predict, ["--coverage=0.5", "--checkpoint=8", "x.png"], "is of the checkpoint 12, not 8"),
    ],
)
def test_mistakes_are_one_line(calibrated, command, flags, words, capsys):
    code, _, err = call(command, [f"--workdir={calibrated}", *flags], capsys)
    assert code == 2 and words in err and len(err.splitlines()) == 1


def test_each_promise_that_is_refused_has_its_line_and_each_asked_for_one_row(calibrated, tmp_path, capsys):
    copy = shutil.copytree(calibrated, tmp_path / "copy")
    before = (copy / "calibration.json").read_text()
    for flag, needed in (("--coverage=0.995", "takes 598"), ("--accuracy=0.995,0.9", "takes 1,196 of them")):
        code, _, err = call(calibrate, [f"--workdir={copy}", flag], capsys)
        assert code == 2 and needed in err and err.endswith("; nothing is replaced\n") and len(err.splitlines()) == 1
    assert (copy / "calibration.json").read_text() == before
    code, out, _ = call(calibrate, [f"--workdir={copy}", "--coverage=0.5,0.995,0.5"], capsys)
    refused = [line for line in out.splitlines() if line.startswith("refused: ")]
    assert code == 0 and len(refused) == 5 and out.count("sets for 50%") == 1
    assert "cannot promise sets for 99.5%; that takes 598" in refused[0]
    assert "99% of the answers are right; that takes 597 of them" in refused[4]
    with open(copy / "calibrate" / "sets.csv", encoding="utf-8") as file:
        kept, no = csv.DictReader(file)
    assert 0 <= float(kept["test_coverage_low"]) <= float(kept["mean_size_value"]) <= float(kept["mean_size_high"]) <= 3
    assert no["coverage"] == "0.995" and "takes 598" in no["refused"]
    assert call(calibrate, [f"--workdir={copy}"], capsys)[0] == 0  # of which none can be promised
    assert "Coverage by class" not in (copy / "calibrate" / "index.html").read_text()


def test_what_is_not_there_or_damaged_is_said(calibrated, trained, photo, tmp_path, capsys):
    code, _, err = call(predict, [f"--workdir={trained}", "--coverage=0.9", photo], capsys)
    assert code == 2 and "has no calibration.json; run vitcls calibrate" in err
    path = tmp_path / "run"
    shutil.copytree(calibrated, path)
    code, _, err = call(predict, [f"--workdir={path}", "--checkpoint=8", photo], capsys)
    assert code == 0 and "the calibration is of the checkpoint 12, so that 8 gives its probabilities as they are" in err
    for text in ("{", '{"scaling": {"method": "magic"}}', '{"scaling": {"method": "none"}, "sets": [{"a": 1}]}', "[]"):
        (path / "calibration.json").write_text(text)
        code, _, err = call(predict, [f"--workdir={path}", photo], capsys)
        assert code == 2 and "cannot be used" in err and len(err.splitlines()) == 1
