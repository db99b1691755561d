"""`vitcls compare` on workdirs that were trained: what it prints, writes and refuses."""

import base64
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from scipy import stats

from vitcls import cli, compare
from vitcls.report import comparison as pages
from vitcls.report import comparison_plots, plots
from vitcls.training import predictions as kept
from vitcls.training.run_dir import open_workdir

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Two recipes of two seeds: flat-seed0 (trained by conftest) and flat-seed1, wide-seed0 and wide-seed1."""
    from vitcls.train import train_and_evaluate

    directory = tmp_path_factory.mktemp("runs")
    shutil.copytree(trained, directory / "flat-seed0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "styled", lambda draw: None)
        for name, width, seed in (("flat", 16, 1), ("wide", 32, 0), ("wide", 32, 1)):
            config = open_workdir(trained).config.copy_and_resolve_references()
            config.seed, config.model.mlp_dim = seed, width
            train_and_evaluate(config, directory / f"{name}-seed{seed}")
    return directory


def run(arguments, capsys):
    """(exit code, stdout, stderr) of the command in this process."""
    code = cli.run(compare.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def accuracy(path):
    return json.loads((path / "report" / "metrics.json").read_text())["accuracy"]


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The command in a process of its own: (its directory, its stdout, compare.json)."""
    out = tmp_path_factory.mktemp("out") / "comparison"
    command = [sys.executable, "-m", "vitcls.compare", *sorted(runs.iterdir()), f"--out={out}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "nothing that exists"}  # no device is used
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"comparison: {out}/index.html\n"
    return out, done.stdout, json.loads((out / "compare.json").read_text(), parse_constant=pytest.fail)


def test_what_is_printed_is_what_is_written(written):
    out, printed, _ = written
    assert (out / "compare.md").read_text() == printed
    assert sorted(path.name for path in out.iterdir()) == sorted(pages.FILES)
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert re.match(r"\| Group +\| Seeds +\| Letters +\| Accuracy", rows[0])
    assert len({line.count("|") for line in rows[:4]}) == len({len(line) for line in rows[:4]}) == 1
    assert "Welch's t test asks whether two recipes differ" in printed and "McNemar" not in printed


def test_seeds_are_grouped_and_their_metrics_are_those_of_the_reports(runs, written):
    _, _, result = written
    by_name = {group["name"]: group for group in result["groups"]}
    assert {name: group["num_seeds"] for name, group in by_name.items()} == {"flat": 2, "wide": 2}
    for name, group in by_name.items():
        reports = [json.loads((runs / f"{name}-seed{k}" / "report" / "metrics.json").read_text()) for k in (0, 1)]
        for metric, numbers in group["metrics"].items():
            assert numbers["value"] == pytest.approx(np.mean([report[metric] for report in reports]), abs=1e-6), metric
            assert numbers["low"] <= numbers["high"]
    assert [row["seed"] for row in result["runs"] if row["group"] == "flat"] == [0, 1]
    assert result["config_differences"]["model.mlp_dim"] == ([16, 32] if [*by_name] == ["flat", "wide"] else [32, 16])
    assert set(result["config_differences"]) == {"model.mlp_dim"}
    assert result["units"]["loss"] == "nats (cross-entropy)"


def test_the_pair_of_recipes_has_a_test_of_its_seeds(runs, written):
    _, printed, result = written
    (pair,) = result["pairs"]
    a, b = ([accuracy(runs / f"{pair[key]}-seed{k}") for k in (0, 1)] for key in "ab")
    expected = stats.permutation_test(
        (a, b), lambda a, b: abs(np.mean(a) - np.mean(b)), alternative="greater", vectorized=False
    ).pvalue
    assert pair["test"] == "welch"  # of two seeds each, a permutation test's p is at least 1/3
    assert pair["permutation_p"] == pytest.approx(expected)
    assert f"Welch, t({pair['freedom']:.1f}) = {pair['t']:.2f}" in printed
    assert (pair["p"] <= 0.05) == pair["separated"] == ([group["letters"] for group in result["groups"]] == ["a", "b"])
    if pair["differences"]["accuracy"]["value"]:
        assert "points of accuracy: " in printed


def test_the_page_needs_no_other_file(written):
    out, _, result = written
    page = (out / "index.html").read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert {base64.b64decode(data) for data in embedded} == {path.read_bytes() for path in out.glob("*.png")}
    assert len(embedded) == page.count("<img") == 4
    assert not re.search(r"<script|<link|href=|url\(|@import", page)
    for row in result["runs"]:
        assert row["workdir"] in page
    for name in ("intervals", "differences", "curves", "disagreements"):
        with PIL.Image.open(out / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 1 and max(picture.size) < 2_000, name


def test_two_single_runs_have_mcnemars_test(runs, capsys):
    code, out, err = run([runs / "flat-seed0", runs / "wide-seed0"], capsys)
    assert (code, err) == (0, "")
    right = {}
    for name in ("flat", "wide"):
        with np.load(runs / f"{name}-seed0" / "report" / "predictions.npz") as arrays:
            right[name] = arrays["probabilities"].argmax(axis=1) == arrays["labels"]
    flat, wide = (int((right[a] & ~right[b]).sum()) for a, b in (("flat", "wide"), ("wide", "flat")))
    p = stats.binomtest(flat, flat + wide).pvalue if flat + wide else 1
    assert f"McNemar, {max(flat, wide)} : {min(flat, wide)}" in out and f"| {p:.4f} |" in out
    assert "n/a, the deviation between seeds is not known from one" in out or flat == wide


def test_without_out_nothing_is_written(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in runs.rglob("*"))
    assert run(sorted(runs.iterdir()), capsys)[0] == 0
    assert not list(tmp_path.iterdir()) and sorted(path for path in runs.rglob("*")) == before


def change(path, **arrays):
    """Writes predictions again with other arrays; None leaves one out."""
    with np.load(path / "report" / "predictions.npz") as old:
        whole = {name: old[name] for name in old} | arrays
    np.savez(path / "report" / "predictions.npz", **{k: v for k, v in whole.items() if v is not None})


def arrays(path):
    with np.load(path / "report" / "predictions.npz") as old:
        return {name: old[name] for name in old}


def cut(path):
    file = path / "report" / "predictions.npz"
    file.write_bytes(file.read_bytes()[:-300])


def flip(path):
    file = path / "report" / "predictions.npz"
    data = bytearray(file.read_bytes())
    data[data.index(b"NUMPY") + 200] ^= 255  # CRC-32 finds it
    file.write_bytes(data)


def evaluate_elsewhere(path):
    """Another split of the same size."""
    file = path / "report" / "metrics.json"
    file.write_text(file.read_text().replace('"split": "test"', '"split": "train"'))


def of_other_data(path):
    file = path / "config.json"
    file.write_text(file.read_text().replace('"split_seed": 0', '"split_seed": 1'))


def of_other_pixels(path):
    info = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(info | {"mean": [0.3, 0.4, 0.5]}))


DAMAGE = {
    "no evaluation": (lambda path: shutil.rmtree(path / "report"), "has no report/predictions.npz; train to the end"),
    "cut short": (cut, "predictions.npz is damaged"),
    "a flipped byte": (flip, "predictions.npz is damaged"),
    "pickled": (lambda path: change(path, labels=np.array([None, {}])), "predictions.npz is damaged: Object arrays"),
    "no ids": (lambda path: change(path, ids=None), "is damaged: it has no ids"),
    "fewer labels": (lambda path: change(path, labels=arrays(path)["labels"][1:]), "not of the same evaluation"),
    "labels of no class": (lambda path: change(path, labels=arrays(path)["labels"] + 9), "labels are not in 0 .. 2"),
    "another shape": (lambda path: change(path, probabilities=np.zeros((24, 2), np.float32)), "it holds float32"),
    "not finite": (
        lambda path: change(path, probabilities=arrays(path)["probabilities"] * np.float32("nan")),
        "not all probabilities are finite",
    ),
    "other labels": (lambda path: change(path, labels=arrays(path)["labels"][::-1]), "different test images"),
    "other ids": (lambda path: change(path, ids=arrays(path)["ids"][::-1]), "different test images"),
    "another split": (evaluate_elsewhere, "were evaluated on different test images (splits test and train)"),
    "split otherwise": (of_other_data, "different test images (config.dataset.split_seed is 0 and 1)"),
    "other pixels": (of_other_pixels, "different test images (the means of their training images are not the same)"),
    "no metrics": (lambda path: (path / "report" / "metrics.json").write_text("{"), "metrics.json cannot be used"),
    "no run": (lambda path: (path / "config.json").unlink(), "is not the workdir of a run"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_cannot_be_compared_is_one_line(name, runs, capsys, tmp_path):
    damage, words = DAMAGE[name]
    shutil.copytree(runs / "wide-seed0", tmp_path / "other")
    damage(tmp_path / "other")
    code, out, err = run([runs / "flat-seed0", tmp_path / "other", f"--out={tmp_path / 'out'}"], capsys)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and words in err
    assert not (tmp_path / "out").exists()


def test_a_test_split_of_its_own_does_not_depend_on_the_seed_of_the_others(runs, tmp_path):
    images, labels = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    compared = []
    for seed, name in enumerate(("flat-seed0", "wide-seed0")):
        copy = shutil.copytree(runs / name, tmp_path / name)
        values = json.loads((copy / "config.json").read_text())
        values["dataset"] |= {"name": "npz", "data_dir": str(tmp_path / "own.npz"), "split_seed": seed}
        (copy / "config.json").write_text(json.dumps(values))
        compared.append(kept.read_predictions(open_workdir(copy)))
    kept.check_same_images(compared)
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels)
    with pytest.raises(cli.UserError, match=r"different test images \(config.dataset.split_seed is 0 and 1\)"):
        kept.check_same_images(compared)
    (tmp_path / "own.npz").unlink()
    with pytest.raises(cli.UserError, match="different test images"):
        kept.check_same_images(compared)


@pytest.mark.parametrize(
    "change", [{"fraction": 0.5}, {"interpolation": "bicubic"}, {"corrections": "fixed"}, {"correction_weight": 3}]
)
def test_runs_may_differ_in_what_they_were_trained_on(change, runs, tmp_path):
    """Of which the means are then others."""
    copy = shutil.copytree(runs / "wide-seed0", tmp_path / "other")
    of_other_pixels(copy)
    values = json.loads((copy / "config.json").read_text())
    values["dataset"] |= change
    (copy / "config.json").write_text(json.dumps(values))
    kept.check_same_images([kept.read_predictions(open_workdir(path)) for path in (runs / "flat-seed0", copy)])


def test_too_few_workdirs_and_the_same_twice_are_one_line(runs, capsys, tmp_path):
    one = runs / "flat-seed0"
    assert run([one], capsys)[::2] == (2, "error: there is nothing to compare; give at least two workdirs\n")
    (tmp_path / "link").symlink_to(one)
    code, _, err = run([one, tmp_path / "link"], capsys)
    assert code == 2 and "is given twice" in err
    shutil.copytree(one, tmp_path / "copy")
    code, _, err = run([one, tmp_path / "copy"], capsys)
    assert code == 2 and "are the same training, with seed 0; give one of them" in err
    assert run([], capsys)[0] == 2


def test_a_directory_with_something_else_is_not_replaced(runs, capsys, tmp_path):
    both = [runs / "flat-seed0", runs / "wide-seed0"]
    (tmp_path / "thesis.tex").touch()
    code, out, err = run([*both, f"--out={tmp_path}"], capsys)
    assert (code, out) == (2, "") and "holds thesis.tex, which is no file of a comparison" in err
    code, _, err = run([*both, f"--out={tmp_path / 'thesis.tex'}"], capsys)
    assert code == 2 and "is a file; name a directory" in err
    code, _, err = run([*both, f"--out={tmp_path / 'thesis.tex' / 'out'}"], capsys)
    assert (code, err.count("\n")) == (2, 1) and "cannot be written: Not a directory" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_where_the_data_are_gone_the_page_says_so(runs, tmp_path, monkeypatch):
    def gone(config, **kwargs):
        raise cli.UserError("the data <are> gone")

    monkeypatch.setattr(compare.data, "load", gone)
    monkeypatch.setattr(plots, "styled", lambda draw: None)
    compare.compare([runs / "flat-seed0", runs / "wide-seed0"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "nothing to draw, the data cannot be read: the data &lt;are&gt; gone" in page
    assert "Images on which they differ most" in page  # the table is there all the same


def test_a_second_comparison_replaces_the_first(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "styled", lambda draw: None)
    both = [runs / "flat-seed0", runs / "wide-seed0"]
    compare.compare(both, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    compare.compare([*both, runs / "wide-seed1"], ".")
    assert len(json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_cannot_become_markup_or_break_a_table(runs, tmp_path):
    result = compare.compare([runs / "flat-seed0", runs / "wide-seed0"])
    text = json.dumps(result).replace("flat-seed0", "a|b<i>\\n|")
    result = json.loads(text) | {"dataset": "<i>digits"}
    rows = [line for line in pages.to_markdown(result).splitlines() if line.startswith(r"| a\|b<i> \| ")]
    page = pages.to_html(result, ["<b>x</b>", "y", "z"], [])
    assert "<i>" not in page and "<b>x" not in page and len(rows) >= 2


def test_pictures_are_those_of_the_images_in_question(runs):
    """Every image is asked for by its place in the split, and is the one that was evaluated."""
    opened = kept.read_predictions(open_workdir(runs / "flat-seed0"))
    images = compare._images([opened])
    from vitcls import data

    test = data.load(opened.run.config.dataset).test
    np.testing.assert_array_equal(images(np.array([5, 2])), test.images[[5, 2]])
    asked = []
    row = {"id": 7, "label": 1, "groups": {n: {"predicted": k, "true_probability": k / 4} for k, n in enumerate("xy")}}
    figure = comparison_plots.disagreements(
        [row], ["cat", "dog"], lambda ids: asked.extend(ids) or np.zeros((1, 4, 4, 3))
    )
    assert asked == [7]
    assert figure.axes[0].get_title() == "true: dog\ny: dog, 25 %\nx: cat, 0 %"


def test_curves_are_by_epoch(runs):
    run_ = kept.read_predictions(open_workdir(runs / "flat-seed0"))
    epochs, values = compare._curve(run_, "accuracy")
    train = run_.run.info.num_examples["train"]
    assert epochs.tolist() == pytest.approx([6 * 16 / train, 12 * 16 / train]) and len(values) == 2
    assert comparison_plots.curves({"accuracy": {"a": [(np.zeros(0), np.zeros(0))]}}) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["vit", "resnet"], ["vit", "resnet"]),
        (["vit_small_lr_1e-3", "vit_small_lr_1e-4"], ["…1e-3", "…1e-4"]),
        (["vit_small_lr_1e-3"], ["vit_s…1e-3"]),
        (["same_start_a_long_name", "same_start_another"], ["…a_lo…name", "…another"]),
        (["_run", "x$y"], [" run", r"x\$y"]),
        (["network_a_dropout", "network_b_dropout", "vit"], ["network…a…", "network…b…", "vit"]),
        (["abcdefghijklmno", "abcdefgXhijklmno", "z"], ["abcde…lmno", "abcd…mno 2", "z"]),
        (["猫猫猫猫猫猫", "犬"], ["猫猫…猫猫", "犬"]),
    ],
)
def test_what_names_have_in_common_is_left_out_where_they_are_long(names, expected):
    assert list(comparison_plots.short_names(names, 10).values()) == expected


@pytest.mark.parametrize("end", ["", "-HOMOGENEOUS-WARMUP", "-とても長い名前の設定"])
def test_groups_have_labels_of_their_own_and_a_legend_inside_the_picture(end):
    families = ("resnext_wide_stem_conv_A{:02}_mixup_bottleneck", "MobileNet_w{:02}_augment", "vit{:02}_gamma_warmup_M")
    names = [families[k % 3].format(k) + end for k in range(12)]
    for length in (11, 22, 26):
        labels = list(comparison_plots.short_names(names, length).values())
        assert len(set(labels)) == 12 and max(map(plots.columns, labels)) <= length
    seeds = [(np.arange(3.0), np.arange(3.0))]

    def draw():
        figure = comparison_plots.curves({"accuracy": dict.fromkeys(names, seeds)})
        figure.canvas.draw()
        return figure

    figure = plots.styled(draw)
    box = figure.legends[0].get_window_extent()
    assert len(figure.legends) == 1 and box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    assert figure.axes[0].get_position().height > 0.4


def test_more_seeds_are_told_pair_by_pair_where_the_deviation_is_known():
    def pair(a, b, value, **more):
        return {"a": a, "b": b, "separated": False, "differences": {"accuracy": {"value": value}}, **more}

    sizes = {"one": 1, "two": 2, "five": 5, "nine": 9}
    lines = pages.more_seeds(
        {
            "groups": [{"name": name, "num_seeds": size} for name, size in sizes.items()],
            "pairs": [
                pair("two", "five", 0.015, seeds_needed=8),
                pair("five", "nine", -0.01, seeds_needed=8),
                pair("nine", "two", 0.001, seeds_needed=None),
                pair("nine", "five", 0.02, seeds_needed=4),
                pair("two", "nine", 0.0, seeds_needed=None),
                pair("five", "two", 0.2, seeds_needed=4) | {"separated": True},
                pair("one", "two", 0.1, seeds_needed=None),
                pair("one", "five", 0.1, seeds_needed=None),
            ],
        }
    )
    assert lines == [
        "two and five differ by 1.50 points of accuracy: about 6 more of two and 3 more of five would separate them.",
        "five and nine differ by 1.00 points of accuracy: about 3 more of five would separate them.",
        "nine and two differ by 0.10 points of accuracy: no number of seeds that can be trained would separate them.",
        "nine and five differ by 2.00 points of accuracy: such a difference needs about 4 seeds each, which are there; "
        "chance or the correction hides it.",
        "More seeds to separate one and two; one and five: n/a, the deviation between seeds is not known from one.",
    ]
