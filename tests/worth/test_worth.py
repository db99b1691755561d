"""`vitcls worth`: the whole command on tiny images, and what it advises."""

import csv
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.models.test_weight_files import safetensors
from vitcls import cli, ledger, main, models
from vitcls.models.variables import init_variables
from vitcls.models.weights.to_torch import to_torch
from vitcls.worth import __main__ as command
from vitcls.worth import pace, results
from vitcls.worth.results import Cell

HERE = pathlib.Path(__file__)
CONFIG = """
from tests.conftest import make_tiny_config

def get_config():
    return make_tiny_config()
"""


@pytest.fixture
def arguments(trained, tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    return [f"--config={tmp_path / 'tiny.py'}", f"--weights={trained}", f"--workdir={tmp_path / 'out'}"]


@pytest.mark.usefixtures("no_pictures")
def test_the_table_has_every_method_and_is_not_made_twice(arguments, tmp_path, capsys):
    arguments += ["--shares=100", "--minutes=0.1"]
    assert cli.run(command.main, arguments) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "worth.json").read_text())
    rows = {row["method"]: row for row in kept["rows"]}
    assert list(rows) == ["hog_svm", "probe", "from_scratch", "fine_tuned"]
    for name, row in rows.items():
        report = json.loads((tmp_path / "out" / "runs" / f"{name}-100" / "report" / "metrics.json").read_text())
        assert row["accuracy"] == pytest.approx(report["accuracy"])
        assert row["low"] <= row["accuracy"] <= row["high"] and row["seconds"] > 0 and row["images"] == 86
    tuned = json.loads((tmp_path / "out" / "runs" / "fine_tuned-100" / "config.json").read_text())["init"]
    assert (tuned["weights"], tuned["head"]) == (str(tmp_path / "out" / "runs" / "probe-100"), "keep")
    assert rows["fine_tuned"]["seconds"] > rows["probe"]["seconds"]
    assert kept["advice"][0] in said and kept["advice"][0].startswith("Use ")
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(name in page for name in ("HOG + SVM", "From scratch", "Probe", "Fine-tuned"))
    with open(tmp_path / "out" / "worth.csv") as file:
        assert [row["method"] for row in csv.DictReader(file)] == list(rows)
    entries = ledger.read("", tmp_path / "out")
    assert cli.run(command.main, arguments) == 0
    assert ledger.read("", tmp_path / "out") == entries
    capsys.readouterr()
    assert json.loads((tmp_path / "out" / "pace.json").read_text()) == {"minutes": 0.1, "steps": pace.LEAST}
    for flag, words in (
        ("--steps=8", "total was '20 steps', is '8 steps'"),
        ("--minutes=9", "for --minutes=0.1; give"),
    ):
        assert cli.run(command.main, [*arguments[:-1], flag]) == 2
        assert words in capsys.readouterr().err


def test_a_table_whose_trainings_have_begun_is_not_paced_anew(arguments, tmp_path, capsys):
    """As one of a version that took 200 steps; the first training is refused before it starts."""
    begun = tmp_path / "out" / "runs" / "from_scratch-100"
    arguments += ["--shares=100"]
    begun.mkdir(parents=True)
    (begun / "config.json").write_text("{")
    assert cli.run(command.main, arguments) == 1
    assert "from_scratch-100" in capsys.readouterr().err
    assert not (tmp_path / "out" / "pace.json").exists() and not (tmp_path / "out" / "pace").exists()


def test_the_steps_fill_the_time_that_is_there():
    """Two short trainings of 8 steps, of 2 s a step and 14 s besides, and of 3 s a step and 26 s besides."""
    costs = [pace.Cost(2.0, 30.0, 8), pace.Cost(3.0, 50.0, 8)]
    assert pace.fitting(costs, 40 + 5 * 90) == (90, 40 + 5 * 90)
    assert pace.fitting(costs, 40 + 5 * 90 - 1) == (89, 40 + 5 * 89)
    assert pace.fitting(costs, 1e6) == (pace.MOST, 40 + 5 * pace.MOST)
    assert pace.fitting(costs, 0.0) == (pace.LEAST, 40 + 5 * pace.LEAST)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--shares=0,50"], "--shares=0,50 must be percentages"),
        (["--shares=a"], "--shares=a must be percentages"),
        (["--steps=1"], "--steps=1 is impossible"),
        (["--minutes=0"], "--minutes=0 is impossible"),
        (["--minutes=5", "--steps=9"], "give one of --minutes=M and --steps=N"),
        (["--workers=0"], "--workers=0 is impossible"),
        (["--weights=nothing.safetensors"], "nothing.safetensors is not there"),
        (["--config.dataset.fraction=0.5"], "config.dataset.fraction=0.5 is not for this command"),
        (["--config.model.hidden_dim=32"], "does not fit"),
        (["--config.dataset.image_size=16"], "knows images of 8x8x3, and those of 'synthetic' are 16x16x3"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, more, words, tmp_path, capsys):
    assert cli.run(command.main, [*arguments, *more]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_the_probes_need_is_looked_for_first(arguments, tmp_path, capsys, monkeypatch):
    other = safetensors(tmp_path / "w.safetensors", {"conv1.weight": np.zeros((4, 3, 3, 3), np.float32)})
    assert cli.run(command.main, [*arguments, f"--weights={other}"]) == 2
    assert "holds no weights of improved_vit_tiny" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    assert cli.run(command.main, arguments) == 2
    assert "pip install 'vitcls[classical]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def cell(method, share, right, seconds, seed=0):
    """A cell of 400 test images, of which the first `right` are right."""
    correct = np.arange(400) < right
    draws = np.random.default_rng(seed).integers(400, size=(1_000, 400))
    return Cell(method, share, int(500 * share), right / 400, 0.0, 1.0, seconds, correct[draws].mean(axis=1))


def test_the_quickest_of_those_that_cannot_be_told_from_the_best_is_advised():
    cells = [cell("probe", 1.0, 320, 20), cell("fine_tuned", 1.0, 321, 900), cell("hog_svm", 1.0, 160, 2)]
    first, second, *_ = results.advice(cells)
    assert first.startswith("Use the probe: with 500 training images it gets 80.0% of the test images right")
    assert second.startswith("Fine-tuned gets 0.2 points more, which these test images do not tell from none")
    assert second.endswith("and takes 15 min.")


def test_the_best_is_advised_where_the_images_tell_or_time_is_no_matter():
    better = [cell("probe", 1.0, 320, 20), cell("fine_tuned", 1.0, 350, 900)]
    assert results.advice(better)[0].startswith("Use fine-tuning")
    assert "The next, the probe, gets 7.5 points less" in results.advice(better)[1]
    quick = [cell("probe", 1.0, 320, 1), cell("hog_svm", 1.0, 321, 20)]
    assert results.advice(quick)[0].startswith("Use HOG + SVM")


def test_the_next_is_the_second_of_the_table_also_where_it_ties_with_the_best():
    tied = [cell("hog_svm", 1.0, 320, 2), cell("fine_tuned", 1.0, 320, 900), cell("from_scratch", 1.0, 160, 300)]
    first, second, *rest = results.advice(tied)
    assert first.startswith("Use HOG + SVM") and not rest
    assert second.startswith(
        "The next, fine-tuning, gets 0.0 points less, which these test images do not tell from none"
    )
    assert second.endswith("and takes 15 min.")


@pytest.mark.parametrize(
    ("right", "draws", "words"),
    [
        (280, 0, "More images will help"),
        (319, 0, "will not change much"),
        (319, 1, "do not tell whether more images help"),  # as where the two are wrong about other images
    ],
)
def test_more_images_are_advised_where_the_last_ones_helped(right, draws, words):
    cells = [cell("probe", 0.25, 200, 5), cell("probe", 0.5, right, 10, draws), cell("probe", 1.0, 320, 20)]
    assert words in results.advice(cells)[-1] and "from 250 to 500 images" in results.advice(cells)[-1]


GRAY = """
from vitcls.config import default_config

def get_config():
    config = default_config("resnet18")
    config.model.update(depths=(1, 1), width=8, stem="small")
    config.dataset.update(name="folder", image_size=28, validation=0.2)
    config.update(batch_size=16, total="4 steps", eval_every="2 steps", checkpoint_every="2 steps")
    config.init.freeze_norm = True
    config.report.timing = False
    return config
"""


@pytest.fixture
def fashion(tmp_path):
    """Real gray pictures as PNG files, 200 to learn from and 200 to be tested by, one directory for each class."""
    unpack = next(filter(pathlib.Path.exists, (p / "shared" / "data" / "unpack.py" for p in HERE.parents)), None)
    if unpack is None:
        pytest.skip("no data beside the repository")
    command = [sys.executable, unpack, "fashion_mnist", "--limit=200", "--format=folder", f"--out={tmp_path}"]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path / "fashion_mnist"


@pytest.mark.usefixtures("no_pictures")
def test_gray_pictures_in_folders_are_trained_on_and_judged_with_weights_of_colours(fashion, tmp_path, capsys):
    fields = {"depths": (1, 1), "width": 8, "stem": "small"}
    variables = init_variables(models.create("resnet18", 7, **fields), jax.random.key(0), (28, 28, 3))
    weights = safetensors(tmp_path / "w.safetensors", to_torch("resnet18", variables, **fields))
    (tmp_path / "gray.py").write_text(GRAY)
    data = [f"--config={tmp_path / 'gray.py'}", f"--config.dataset.data_dir={fashion}"]
    assert cli.run(main.main, [*data, f"--config.init.weights={weights}", f"--workdir={tmp_path / 'run'}"]) == 0
    assert "first layer from 3 to 1 channels" in capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / "dataset.json").read_text())
    assert kept["image_shape"] == [28, 28, 1] and kept["num_examples"] == {"train": 160, "validation": 40, "test": 200}
    assert kept["class_names"] == sorted(path.name for path in (fashion / "train").iterdir())

    arguments = [*data, f"--weights={weights}", f"--workdir={tmp_path / 'out'}", "--shares=100", "--steps=4"]
    assert cli.run(command.main, arguments) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "out" / "worth.json").read_text())["rows"]
    assert [row["images"] for row in rows] == [160] * 4
    assert {row["method"]: row["accuracy"] for row in rows}["hog_svm"] > 0.6  # chance is 0.1
