"""vitcls unknown: images of something else, the threshold that predict keeps to, and what is refused."""

import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.serve.running import png
from vitcls import cli, predict, train, unknown


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Coloured noise and stripes, as a folder of files without classes and of another size."""
    path, rng = tmp_path_factory.mktemp("strangers"), np.random.default_rng(0)
    (path / "below").mkdir()
    for i in range(24):
        pixels = rng.integers(0, 256, (10, 12, 3), np.uint8) if i % 2 else np.full((10, 12, 3), 10 * i, np.uint8)
        Image.fromarray(pixels).save(path / "below" / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def measured(trained, strangers, tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "run"
    shutil.copytree(trained, path)
    assert cli.run(unknown.main, [f"--workdir={path}", f"--ood={strangers}", "--ood=digits"]) == 0
    return path


def call(command, arguments, capsys):
    capsys.readouterr()
    code = cli.run(command.main, arguments)
    return code, *capsys.readouterr()


def test_four_scores_are_measured_for_each_set(measured, strangers):
    found = json.loads((measured / "unknown" / "metrics.json").read_text())
    assert set(found["sets"]) == {str(strangers), "digits"}
    for figures in found["sets"].values():
        assert set(figures["scores"]) == {"msp", "energy", "mahalanobis", "knn"}
        for row in figures["scores"].values():
            assert all(0 <= row[key]["low"] <= row[key]["value"] <= row[key]["high"] <= 1 for key in ("auroc", "fpr95"))
    assert found["sets"][str(strangers)]["num_examples"] == 12  # the other half chose the score
    assert (measured / "unknown" / "scores.png").exists() and (measured / "unknown" / "scores_digits.csv").exists()


def test_predict_says_what_is_unlike_anything_seen(measured, tmp_path, capsys):
    """With a threshold above and below any score."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    copy = shutil.copytree(measured, tmp_path / "copy")
    made = json.loads((copy / "unknown.json").read_text())
    for threshold, expected in ((1e30, True), (-1e30, False)):
        (copy / "unknown.json").write_text(json.dumps(made | {"threshold": threshold}))
        code, out, _ = call(predict, [f"--workdir={copy}", "--json", str(tmp_path / "black.png")], capsys)
        assert code == 0 and json.loads(out)["unknown"] is expected
        _, out, _ = call(predict, [f"--workdir={copy}", str(tmp_path / "black.png")], capsys)
        assert ("  unlike anything seen in training" in out.splitlines()) is expected


@pytest.mark.by_turns
@pytest.mark.parametrize("score", ["msp", "energy", "mahalanobis", "knn"])
def test_every_score_is_kept_and_read_back(measured, strangers, score, tmp_path, capsys):
    copy = shutil.copytree(measured, tmp_path / "copy")
    assert cli.run(unknown.main, [f"--workdir={copy}", f"--ood={strangers}", f"--score={score}"]) == 0
    found = json.loads((copy / "unknown" / "metrics.json").read_text())
    files = sorted(str(path) for path in (strangers / "below").iterdir())
    code, out, _ = call(predict, [f"--workdir={copy}", "--json", *files], capsys)
    called = [json.loads(line)["unknown"] for line in out.splitlines()]
    half = np.random.default_rng(0).permutation(24) % 2 != 0
    assert code == 0 and found["score"] == score
    assert np.mean(np.array(called)[half]) == pytest.approx(found["sets"][str(strangers)]["found"]["value"])


def test_sets_of_one_name_have_a_table_each_and_few_images_no_interval(trained, strangers, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    few = [tmp_path / name / "few" for name in "ab"]
    for i, folder in enumerate(few):
        folder.mkdir(parents=True)
        for name in ("0.png", "1.png")[: 2 - i]:
            shutil.copy(strangers / "below" / name, folder)
    code, _, err = call(unknown, [f"--workdir={copy}", *(f"--ood={folder}" for folder in few)], capsys)
    assert code == 2 and f"--ood={few[1]} has one image" in err.splitlines()[-1] and not (copy / "unknown").exists()
    shutil.copy(strangers / "below" / "1.png", few[1])
    shutil.copy(strangers / "below" / "2.png", few[1])
    assert call(unknown, [f"--workdir={copy}", *(f"--ood={folder}" for folder in few)], capsys)[0] == 0
    assert (copy / "unknown" / "scores_few_1.csv").read_text() != (copy / "unknown" / "scores_few_2.csv").read_text()
    for figures in json.loads((copy / "unknown" / "metrics.json").read_text())["sets"].values():
        assert {row["auroc"]["low"] for row in figures["scores"].values()} == {None}
        assert figures["found"]["low"] < figures["found"]["high"]
    assert "fewer than 10 images have no intervals" in (copy / "unknown" / "index.html").read_text()


def test_a_threshold_of_another_checkpoint_is_not_used(measured, tmp_path, capsys):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    flags = [f"--workdir={measured}", "--json", "--checkpoint=8", str(tmp_path / "black.png")]
    code, out, err = call(predict, flags, capsys)
    assert code == 0 and "unknown" not in json.loads(out) and "measured at step 12, not 8" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ood=nowhere"], "data set 'nowhere' is not known"),
        (["--ood=nowhere.npz"], "is not a file"),
        (["--ood=/nowhere/at/all"], "is neither a folder of images, nor an .npz file, nor the name of a data set"),
        (["--ood=synthetic"], "is what the run was trained on"),
        (["--ood=synthetic", "--ood_data_dir=elsewhere"], "is what the run was trained on"),
        (["--ood={empty}"], "has no images"),
        ([], "--ood"),
        (["--ood=digits", "--score=magic"], "--score"),
    ],
)
def test_mistakes_are_one_line(measured, flags, words, tmp_path, capsys):
    before = (measured / "unknown.json").read_text()
    code, _, err = call(unknown, [f"--workdir={measured}", *(flag.format(empty=tmp_path) for flag in flags)], capsys)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert (measured / "unknown.json").read_text() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "unknown.npz").unlink(),
        lambda path: (path / "unknown.npz").write_bytes(b"PK"),
        lambda path: (path / "unknown.json").write_text("{}"),
        lambda path: (path / "unknown.json").write_text("["),
    ],
)
def test_damage_is_one_line(measured, damage, tmp_path, capsys):
    copy = shutil.copytree(measured, tmp_path / "copy")
    damage(copy)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    code, _, err = call(predict, [f"--workdir={copy}", str(tmp_path / "black.png")], capsys)
    assert code == 2 and "run vitcls unknown again" in err and len(err.splitlines()) == 1


def test_the_runs_own_file_is_nothing_unknown(tiny_config, no_pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8), np.arange(60) % 3
    np.savez("own.npz", x_train=images[:45], y_train=labels[:45], x_test=images[45:], y_test=labels[45:])
    tiny_config.dataset.update(name="npz", data_dir=str(tmp_path / "own.npz"))
    tiny_config.total = "2 steps"
    train.train_and_evaluate(tiny_config, tmp_path / "run")
    (tmp_path / "alias.npz").symlink_to("own.npz")
    for name in ("own.npz", "alias.npz"):
        code, _, err = call(unknown, ["--workdir=run", f"--ood={name}"], capsys)
        assert code == 2 and f"--ood={name} is what the run was trained on" in err and len(err.splitlines()) == 1
    shutil.move("own.npz", "moved.npz")
    code, _, err = call(unknown, ["--workdir=run", "--ood=moved.npz", "--data_dir=moved.npz"], capsys)
    assert code == 2 and "--ood=moved.npz is what the run was trained on" in err


def test_the_runs_own_folder_is_nothing_unknown(tiny_config, no_pictures, tmp_path, capsys):
    """By its files, however they are reached; what else is in the folder is something else."""
    root = tmp_path / "photos"
    for place, number in itertools.product(("train/a", "train/b", "test/a", "test/b", "others"), range(12)):
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / f"{number}.png").write_bytes(png(number))
    tiny_config.dataset.update(name="folder", data_dir=str(root))
    tiny_config.total = "2 steps"
    train.train_and_evaluate(tiny_config, tmp_path / "run")
    (tmp_path / "alias").symlink_to(root)
    for place in (root, root / "test", root / "train" / "a", tmp_path / "alias", tmp_path / "alias" / "test"):
        code, _, err = call(unknown, [f"--workdir={tmp_path}/run", f"--ood={place}"], capsys)
        assert code == 2 and f"--ood={place} is what the run was trained on" in err
    assert call(unknown, [f"--workdir={tmp_path}/run", f"--ood={root}/others"], capsys)[0] == 0
