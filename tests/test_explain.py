"""vitcls explain: what it writes, that grey is what does no better than random, and what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vitcls import cli, explain
from vitcls.attribution.explainer import METHODS
from vitcls.report import fonts, overlays
from vitcls.training.opened import open_with_data

CHEAP = "--method=gradcam,rollout"


@pytest.fixture(scope="module")
def explained(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("explained") / "run"
    shutil.copytree(trained, path)
    assert cli.run(explain.main, [f"--workdir={path}", "--images=4", CHEAP]) == 0
    return path


def test_every_overlay_has_its_evidence_and_every_number_an_interval(explained):
    found = json.loads((explained / "explain" / "metrics.json").read_text())
    assert set(found["methods"]) == {"gradcam", "rollout"} and len(found["overlays"]) == 4 * 2 * 2
    for row in found["overlays"]:
        assert 0 <= row["random_deletion"]["low"] <= row["random_deletion"]["high"] <= 1
        assert row["better_than_random"] == (row["p_value"] <= 0.05)
        with Image.open(explained / "explain" / row["file"]) as picture:
            assert picture.width > 300
    for figures in found["methods"].values():
        for key in ("deletion", "insertion", "deletion_gain", "insertion_gain", "better"):
            assert figures[key]["low"] <= figures[key]["value"] <= figures[key]["high"]
        assert figures["pointing"]["value"] is None  # three classes make no mosaic of four
    assert found["methods"]["rollout"]["randomisation"]["head"]["value"] == pytest.approx(1)
    with open(explained / "explain" / "overlays.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 16
    page = (explained / "explain" / "index.html").read_text(encoding="utf-8")
    assert page.count("<img") == 4 and "http" not in page.partition("</style>")[2]


@pytest.mark.by_turns
def test_a_file_is_explained_by_all_methods(explained, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "odd <name>.png")
    copy = shutil.copytree(explained, tmp_path / "copy")
    flags = [f"--workdir={copy}", f"--method={','.join(METHODS)}", "--classes=1", str(tmp_path / "odd <name>.png")]
    assert cli.run(explain.main, flags) == 0
    found = json.loads((copy / "explain" / "metrics.json").read_text())
    assert [row["method"] for row in found["overlays"]] == list(METHODS)
    assert found["methods"]["integrated_gradients"]["completeness"]["kept"]
    assert found["methods"]["gradcam"]["deletion"]["low"] is None  # of one image
    assert "odd &lt;name&gt;.png" in (copy / "explain" / "index.html").read_text(encoding="utf-8")


def test_files_of_one_name_are_told_apart_and_one_image_gives_no_verdict(explained, tmp_path, capsys):
    for place, level in (("a.png", 0), ("sub/a.png", 255), ("sub/b.png", 9)):
        (tmp_path / "photos" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / "photos" / place)
    copy = shutil.copytree(explained, tmp_path / "copy")
    flags = [f"--workdir={copy}", "--method=rollout", "--classes=1", "--images=1", str(tmp_path / "photos")]
    assert cli.run(explain.main, flags) == 0
    found = json.loads((copy / "explain" / "metrics.json").read_text())
    photos = tmp_path / "photos"
    expected = [str(photos / "a.png"), str(photos / "sub" / "a.png"), "b.png"]
    assert [row["image"] for row in found["overlays"]] == expected
    assert found["methods"]["rollout"]["depends_on_weights"] is None  # one test image says nothing
    assert "FAILS" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "value, said",
    [(0.7, "0.70 [0.60, 0.80], FAILS: alike"), (-0.7, "-0.70 [-0.80, -0.60], FAILS: opposite"), (0.1, "")],
)
def test_maps_that_are_alike_or_opposite_without_weights_fail(value, said):
    correlation = {"value": value, "low": value - 0.1, "high": value + 0.1}
    found = {"randomisation": {"all": correlation}, "depends_on_weights": explain._depends(correlation)}
    assert explain._correlation(found) == (said or "0.10 [0.00, 0.20]")


def test_what_is_no_better_than_random_is_grey():
    pixels, heat = np.full((8, 8, 3), 200, np.uint8), np.eye(8)
    true, untrue = (np.asarray(overlays.overlay(pixels, overlays.Drawn(heat, [], good))) for good in (True, False))
    assert np.ptp(true.astype(int), axis=-1).max() > 60
    plain = np.ptp(untrue.astype(int), axis=-1)
    rows = slice(0, 60)  # above the word
    assert plain[rows].max() == 0 and plain.max() > 0


def test_a_run_that_is_always_wrong_is_shown_as_many_images(trained):
    opened = open_with_data(trained, splits=("test",))
    sample = explain._sample(opened)
    predicted = opened.explainer.probabilities(sample.pixels.astype(np.float32) / 255).argmax(axis=1)
    for labels, count in (((predicted + 1) % 3, 1), ((predicted + 1) % 3, 4), (predicted, 5)):
        shown = explain._right_and_wrong(opened.explainer, sample._replace(labels=labels), count)
        assert len(shown.names) == len(shown.pixels) == len(shown.labels) == count


def test_pictures_have_the_letters_of_names():
    """Not one sign for all that a font does not know."""
    pixels, row = np.zeros((8, 8, 3), np.uint8), [overlays.Drawn(np.eye(8), ["gradcam"], True)]
    drawn = {np.asarray(overlays.sheet(pixels, name, [(name, row)])).tobytes() for name in "\u00e9\u00ea\u0436\u03b1"}
    assert len(drawn) == 4
    drawn = {np.asarray(overlays.sheet(pixels, name, [(name, row)])).tobytes() for name in "\u732b\u72ac"}
    assert len(drawn) == (2 if fonts.can_draw("\u732b") else 1)


@pytest.mark.parametrize(
    "name", ["Cavalier King Charles spaniel, one of many, 98.2%", "猫" * 60, "_".join(["long"] * 30)]
)
def test_long_names_stay_in_the_picture(name):
    pixels, row = np.zeros((8, 8, 3), np.uint8), [overlays.Drawn(np.eye(8), ["gradcam"], True)]
    short, long = (np.asarray(overlays.sheet(pixels, text, [(text, row)])) for text in ("cat", name))
    assert (long[:, -8:] == 255).all() and (long < 255).sum() > (short < 255).sum()
    assert (len(long) > len(short)) == (" " in name)  # words go to further lines, one alone loses its end
    assert overlays._wrapped(name, 11, 150) != [name]
    assert all(overlays._font(11, name).getlength(line) <= 150 for line in overlays._wrapped(name, 11, 150))


def test_a_verdict_that_does_not_fit_is_below_the_map():
    pixels, heat = np.zeros((8, 64, 3), np.uint8), np.random.default_rng(0).random((8, 64))
    drawn = overlays.Drawn(heat, ["gradcam"], False)
    assert np.ptp(np.asarray(overlays.overlay(pixels, drawn)).astype(int), axis=-1).max() == 0  # no word is in it
    true = overlays.beside(pixels, "a", drawn._replace(true=True))
    assert overlays.beside(pixels, "a", drawn).height == true.height + overlays._LINE
    said = drawn._replace(lines=["gradcam", f"p = 0.50: {overlays.WORD}"])
    assert overlays._lines(said, (128, 16)) == said.lines  # once is enough


@pytest.mark.by_turns
def test_the_forward_of_a_run_is_what_its_report_says(trained):
    opened = open_with_data(trained, splits=("test",))
    _, probabilities = opened.predictions("test")
    images = opened.dataset.test.images[:5].astype(np.float32) / 255
    logits = np.asarray(opened.forward(opened.variables, images), np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(odds / odds.sum(axis=1, keepdims=True), probabilities[:5], rtol=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere.png"], "nowhere.png"),
        (["--method=gradcan"], "did you mean 'gradcam'?"),
        (["--table"], "--table is of all models, and takes no other flags"),
        (["--classes=0"], "--classes=0 must be 1 or more"),
        (["--images=none"], "--images"),
        (["--checkpoint=99"], "checkpoint '99' is not there"),
        (["--workdir=nowhere"], "nowhere is not the workdir of a run"),
    ],
)
def test_mistakes_are_one_line(explained, flags, words, capsys):
    before = (explained / "explain" / "metrics.json").read_text()
    capsys.readouterr()
    code = cli.run(explain.main, [f"--workdir={explained}", *flags])
    err = capsys.readouterr().err
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert (explained / "explain" / "metrics.json").read_text() == before
