"""vitcls robustness: what it measures, against another run, from published files, and what is refused."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest

from vitcls import cli, robustness
from vitcls.data.corruptions import CORRUPTIONS, SEVERITIES
from vitcls.data.corruptions.curves import CURVES, levels_of, shift
from vitcls.data.corruptions.files import CorruptedFiles
from vitcls.data.dataset import Split
from vitcls.metrics import robustness as rates
from vitcls.metrics.resampling import estimate
from vitcls.report import robustness_plots
from vitcls.training.opened import open_with_data

ONLY = "contrast,gaussian_noise,occlusion,shift"


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    path = shutil.copytree(trained, tmp_path_factory.mktemp("robust") / "run")
    assert cli.run(robustness.main, [f"--workdir={path}", f"--only={ONLY}"]) == 0
    return path


def read(path):
    return json.loads((path / "robustness" / "metrics.json").read_text())


def refused(arguments, capsys):
    capsys.readouterr()
    assert cli.run(robustness.main, arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_each_level_has_accuracy_and_consistency_with_intervals(measured):
    found = read(measured)
    assert list(found["corruptions"]) == ["gaussian_noise", "contrast"] and list(found["curves"]) == [
        "occlusion",
        "shift",
    ]
    rows = [row for one in found["corruptions"].values() for key in ("accuracy", "consistency") for row in one[key]]
    rows += [
        point[key] for points in found["curves"].values() for point in points for key in ("accuracy", "consistency")
    ]
    assert [point["level"] for point in found["curves"]["shift"]] == [12.5, 18.75, 25]  # of 8 pixels, 6 % are none
    assert len(rows) == 2 * (2 * 5 + len(CURVES["occlusion"].levels) + 3)
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rows)
    errors = [1 - row["value"] for one in found["corruptions"].values() for row in one["accuracy"]]
    assert found["mean_error"]["value"] == pytest.approx(np.mean(errors))
    assert found["mean_error"]["low"] <= found["mean_error"]["value"] <= found["mean_error"]["high"]
    assert found["clean"]["value"] == json.loads((measured / "report" / "metrics.json").read_text())["accuracy"]


def test_files_say_the_same(measured):
    folder, found = measured / "robustness", read(measured)
    with open(folder / "corruptions.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 10
    by_name = {(line["corruption"], int(line["severity"])): float(line["accuracy"]) for line in lines}
    for name, one in found["corruptions"].items():
        assert [by_name[name, s] for s in SEVERITIES] == [row["value"] for row in one["accuracy"]]
    assert {path.name for path in folder.iterdir()} == {
        *("metrics.json", "index.html", "corruptions.csv", "curves.csv"),
        *("corruptions.png", "severities.png", "curves.png", "examples.png"),
    }
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png") == 4 and "gaussian_noise" in page


def test_families_that_were_not_measured_have_no_panel(measured):
    figure = robustness_plots.severities(read(measured))  # contrast and gaussian noise
    assert [axes.get_title() for axes in figure.axes if axes.axison] == ["Noise", "Digital"]


def test_against_itself_nothing_differs_and_the_mce_is_one(measured, trained, capsys):
    flags = [f"--workdir={measured}", "--only=gaussian_noise,shift", "--images=10", f"--against={trained}"]
    assert cli.run(robustness.main, flags) == 0
    found = read(measured)
    against = found["against"]
    assert found["num_examples"] == 10 and against["mce"]["value"] == 1
    rows = [against["difference"]["clean"], *against["difference"]["gaussian_noise"], *against["difference"]["shift"]]
    assert all(row == {"value": 0, "low": 0, "high": 0} for row in rows)
    out = capsys.readouterr().out
    assert "mCE over 1 of 15 corruptions 100.0%" in out and "mean error over gaussian_noise and" in out
    assert "\nshift: " in out and "as they are, +0.00% [+0.00%, +0.00%] more are right" in out


def test_a_corruption_for_validation_has_its_line_and_levels_their_unit(measured, capsys):
    assert cli.run(robustness.main, [f"--workdir={measured}", "--only=gaussian_blur,rotation"]) == 0
    out = capsys.readouterr().out
    assert "\ngaussian_blur: " in out and ", the worst rotation [degrees].\n" in out and "The mean error" not in out


def test_one_image_has_no_interval_of_means(measured):
    """Its bootstrap would say nothing; its pages are drawn all the same."""
    assert cli.run(robustness.main, [f"--workdir={measured}", "--only=contrast,shift", "--images=1"]) == 0
    found = read(measured)
    assert found["num_examples"] == 1 and found["corruptions"]["contrast"]["mean_error"]["low"] is None
    assert found["corruptions"]["contrast"]["accuracy"][0]["low"] is not None


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory):
    """Two corruptions as files: one that changes nothing, and black images."""
    path = tmp_path_factory.mktemp("published")
    test = open_with_data(trained, splits=("test",)).dataset.test
    np.save(path / "labels.npy", np.tile(test.labels.astype(np.uint8), 5))
    np.save(path / "fog.npy", np.tile(test.images, (5, 1, 1, 1)))
    np.save(path / "frost.npy", np.zeros((5 * len(test.labels), *test.images.shape[1:]), np.uint8))
    return path


def test_published_files_take_the_place_of_corruptions(measured, published):
    assert cli.run(robustness.main, [f"--workdir={measured}", f"--data_dir={published}", "--only=fog,frost"]) == 0
    found = read(measured)
    assert found["source"] == f"files in {published}"
    fog, frost = found["corruptions"]["fog"], found["corruptions"]["frost"]
    assert all(row["value"] == found["clean"]["value"] for row in fog["accuracy"])
    assert all(row["value"] == 1 for row in fog["consistency"])
    labels = np.load(published / "labels.npy")
    shares = np.bincount(labels) / len(labels)
    assert any(frost["accuracy"][0]["value"] == pytest.approx(share) for share in shares)  # one class for all


def test_files_go_with_images_that_are_read_from_disk(published, trained):
    test = open_with_data(trained, splits=("test",)).dataset.test
    streamed = CorruptedFiles(published, Split(None, test.labels), np.arange(len(test.labels)), test.images.shape[1:])
    np.testing.assert_array_equal(streamed.split("fog", 3).images, test.images)


def test_files_of_other_images_are_refused(measured, published, tmp_path, capsys):
    before = read(measured)
    copy = shutil.copytree(published, tmp_path / "copy")
    np.save(copy / "fog.npy", np.load(copy / "fog.npy")[..., :1])
    assert "fog.npy holds uint8" in refused([f"--workdir={measured}", f"--data_dir={copy}"], capsys)
    (copy / "fog.npy").write_bytes(b"no array")
    assert "is no file of numbers" in refused([f"--workdir={measured}", f"--data_dir={copy}"], capsys)
    (copy / "fog.npy").write_bytes(b"")
    assert "fog.npy is no file of numbers" in refused([f"--workdir={measured}", f"--data_dir={copy}"], capsys)
    np.save(copy / "labels.npy", np.load(copy / "labels.npy")[::-1])
    assert "has not the labels" in refused([f"--workdir={measured}", f"--data_dir={copy}"], capsys)
    assert "has no file" in refused([f"--workdir={measured}", f"--data_dir={published}", "--only=snow"], capsys)
    assert read(measured) == before


def test_what_cannot_be_is_one_line(measured, tmp_path, capsys):
    flags = [f"--workdir={measured}"]
    assert "did you mean 'contrast'" in refused([*flags, "--only=contrst"], capsys)
    assert "--images=-1" in refused([*flags, "--images=-1"], capsys)
    assert str(tmp_path / "none") in refused([*flags, f"--against={tmp_path / 'none'}"], capsys)
    assert "once" in refused([*flags, "--data_dir=a", "--data_dir=b"], capsys)


@pytest.mark.parametrize("side, count", [(2, 0), (4, 2), (8, 3), (9, 4), (16, 4), (17, 5), (32, 5)])
def test_every_level_of_a_shift_moves_something(side, count):
    levels = levels_of("shift", [side, 64])
    assert len(levels) == count and len(levels_of("occlusion", [side])) == 9
    image = np.arange(side**2, dtype=np.float32).reshape(side, side, 1)
    for level in levels:
        moved = jax.vmap(shift, (0, None, None))(jax.random.split(jax.random.key(0), 20), image, level / 100)
        assert (np.asarray(moved) != image).any()


def test_mce_by_hand():
    """Two corruptions of two severities and four images; the reference is wrong on half of them, then on all."""
    wrong = np.array([[[1, 0, 0, 0], [1, 1, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]]], bool)
    other = np.array([[[1, 1, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 1], [1, 1, 1, 1]]], bool)
    found = estimate({"mine": wrong, "other": other}, lambda e: rates.mean_corruption_error(e["mine"], e["other"]))
    assert found["value"] == pytest.approx((0.75 / 1.0 + 1.0 / 2.0) / 2)
    clean, other_clean = np.array([1, 0, 0, 0], bool), np.array([0, 0, 0, 0], bool)
    relative = estimate(
        {"mine": wrong, "other": other, "clean": clean, "other_clean": other_clean},
        lambda e: rates.relative_corruption_error(e["mine"], e["clean"], e["other"], e["other_clean"]),
    )
    assert relative["value"] == pytest.approx((0.25 / 1.0 + 0.5 / 2.0) / 2)


def test_intervals_hold_the_truth():
    """Of the mean error over three correlated corruptions, in 300 simulations."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        shared = rng.random((1, 1, 200))
        wrong = shared < np.array([0.2, 0.3, 0.4]).reshape(1, 3, 1)
        found = estimate({"wrong": wrong}, lambda e: rates.mean_error(e["wrong"]), resamples=300)
        held += found["low"] <= 0.3 <= found["high"]
    assert 0.91 <= held / 300 <= 0.98


def test_all_names_are_measured_where_none_is_given(trained):
    opened = open_with_data(trained, splits=("test",))
    gray = opened.trained.info.image_shape[-1] == 1
    names = robustness._names(opened, (), None)
    assert names == [name for name in (*CORRUPTIONS, *CURVES) if not (gray and name == "saturate")]
