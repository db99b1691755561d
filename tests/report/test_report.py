"""A report is whole, self-contained and readable, whatever the classes are called and however the run went."""

import base64
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import PIL.Image
import pytest

from vitcls import metrics, report
from vitcls.core.terminal import printable
from vitcls.report import plots
from vitcls.report.part import Part

EVIL = "<script>alert(\"x\")</script> & 'friends' $\\frac{1}{2}$ who have a very long name"
NAMES = [EVIL, "猫", "two\nlines", "", *(f"class_{k}" for k in range(4, 10))]
FACTS = {
    "Model": "model <b>",
    "Command": "python -m vitcls.main --config=a.py --note='<i>'",
    "Seed": "0",
    "Skipped files": ["\udcff.png: is empty", "a<img src=http://x/y.png>.png: cannot be read", "b&c.jpg: is truncated"],
}
HISTORY = [
    {"step": 10, "train/loss": 2.0, "train/accuracy": 0.3, "train/learning_rate": 1e-3, "train/images_per_second": 9.0},
    {"step": 20, "train/loss": 1.5, "train/accuracy": 0.5, "train/learning_rate": 5e-4},
    {"step": 20, "eval/loss": 1.7, "eval/accuracy": 0.4, "eval/top5_accuracy": 0.9},
]
ALWAYS = {"confusion_matrix.png", "class_accuracy.png", "roc.png", "reliability.png"}
TRAINING = {"curves.png", "learning_rate.png"}


def predictions(num_classes=10, count=200, skill=1.5):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % num_classes
    logits = rng.normal(size=(count, num_classes)) + skill * np.eye(num_classes)[labels]
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return labels, (exp / exp.sum(axis=1, keepdims=True)).astype(np.float32)


def pictures(indices):
    """Every image holds its own index: uint8 [n, 4, 4, 3]."""
    return np.broadcast_to(np.asarray(indices, np.uint8)[:, None, None, None], (len(indices), 4, 4, 3))


def write(directory, labels, probabilities, names, *, images=pictures, history=HISTORY, facts=FACTS):
    results = {"dataset": "set <&>", "split": "test", "checkpoint_step": 20}
    roc = metrics.roc_curves(labels, probabilities)
    results |= metrics.classification_report(metrics.evidence_of(labels, probabilities), names)
    results |= {
        "parameters": 1234567,
        "flops_per_image": 2.5e6,
        "latency_ms": {"median": 1.25, "p95": 2.5},
        "images_per_second": 1000.0,
        "train_seconds": 60.0,
        "learned_weights": {"Fusion weight of 3x3": 0.625},
    }
    with Part(directory) as made:
        report.write(
            made,
            metrics=results,
            labels=labels,
            probabilities=probabilities,
            roc=roc,
            class_names=names,
            images=images,
            history=history,
            facts=facts,
        )
    return results


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.text.append(data)

    def values(self, tag, name):
        return [value for *where, value in self.attributes if where == [tag, name]]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report with everything in it: (its directory, what was measured)."""
    directory = tmp_path_factory.mktemp("run") / "report"
    return directory, write(directory, *predictions(), NAMES)


@pytest.fixture(scope="module")
def page(written):
    return Page((written[0] / "index.html").read_text())


def test_metrics_json_holds_the_numbers_and_their_units(written):
    directory, results = written
    loaded = json.loads((directory / "metrics.json").read_text(), parse_constant=pytest.fail)
    units = loaded.pop("units")
    assert loaded == results
    numbers = {name for name, value in results.items() if isinstance(value, (int, float, dict))}
    assert numbers <= units.keys()


def test_the_predictions_are_kept(written):
    labels, probabilities = predictions()
    with np.load(written[0] / "predictions.npz") as kept:
        assert {name: str(kept[name].dtype) for name in kept} == {
            "labels": "int32",
            "probabilities": "float32",
            "ids": "int64",
        }
        np.testing.assert_array_equal(kept["labels"], labels)
        np.testing.assert_array_equal(kept["probabilities"], probabilities)
        np.testing.assert_array_equal(kept["ids"], np.arange(200))


def test_the_pictures_are_valid_and_of_sane_size(written):
    directory, _ = written
    files = {path.name for path in directory.glob("*.png")}
    assert files == ALWAYS | TRAINING | {"mistakes.png"}
    for name in files:
        with PIL.Image.open(directory / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 300 and max(picture.size) < 2000, (name, picture.size)
            assert np.asarray(picture.convert("L")).std() > 1, name


def test_the_page_needs_no_other_file(written, page):
    directory, _ = written
    sources = page.values("img", "src")
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources}
    assert embedded == {path.read_bytes() for path in directory.glob("*.png")}
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not [value for _, name, value in page.attributes if name in ("href", "srcset", "action", "background")]
    assert not re.search(r"url\(|@import", "".join(page.text))


def test_every_picture_is_described(page):
    assert len(page.values("img", "alt")) == page.tags.count("img") == 7
    assert all(len(text) > 20 for text in page.values("img", "alt"))


def test_no_text_can_become_markup(page):
    text = "".join(page.text)
    for untrusted in (EVIL, FACTS["Model"], FACTS["Command"], "set <&>", *FACTS["Skipped files"]):
        assert printable(untrusted) in text  # a file's name need not be UTF-8
    assert "b" not in page.tags[: page.tags.index("div")] and "i" not in page.tags
    assert page.tags.count("img") == 7


def test_the_page_says_the_headline_the_classes_and_what_was_skipped(written, page):
    _, results = written
    text = "".join(page.text)
    for number in (f"{results['accuracy']:.2%}", f"{results['loss']:.4f}", f"{results['auc_ovr_macro']:.4f}"):
        assert number in text
    for unit in ("1.25 ms", "1,000 images/s", "60.0 s", "2,500,000 FLOPs", "nats"):
        assert unit in text
    assert "3 files were skipped" in text
    rows = page.tags.count("tr")
    assert rows >= 1 + len(NAMES)


def test_without_history_the_page_says_so(tmp_path):
    write(tmp_path / "report", *predictions(num_classes=2, count=20), ["a", "b"], history=[], facts={})
    files = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert files == ALWAYS | {"mistakes.png"}
    text = "".join(Page((tmp_path / "report" / "index.html").read_text()).text)
    assert text.count("nothing to draw") == 2
    assert "skipped" not in text


def test_a_perfect_classifier_has_a_report(tmp_path):
    labels = np.arange(20) % 2
    results = write(tmp_path / "report", labels, np.eye(2, dtype=np.float32)[labels], ["no", "yes"], images=pytest.fail)
    assert results["accuracy"] == 1
    assert not (tmp_path / "report" / "mistakes.png").exists()
    assert "every prediction is right" in (tmp_path / "report" / "index.html").read_text()


def test_labels_of_one_class_have_a_report(tmp_path):
    _, probabilities = predictions(num_classes=3, count=30)
    write(tmp_path / "report", np.zeros(30, int), probabilities, ["a", "b", "c"], history=[])
    assert "–" in (tmp_path / "report" / "index.html").read_text()  # no numbers for two of the classes


def test_a_new_report_replaces_the_old_one_whole(tmp_path):
    directory = tmp_path / "report"
    directory.mkdir()
    (directory / "left_over.png").write_text("")
    write(directory, *predictions(num_classes=2, count=20), ["a", "b"])
    assert not (directory / "left_over.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_report_that_fails_half_way_leaves_the_old_one_alone(tmp_path):
    directory = tmp_path / "report"
    directory.mkdir()
    (directory / "index.html").write_text("the old one")

    def broken(indices):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        write(directory, *predictions(num_classes=2, count=20), ["a", "b"], images=broken, history=[])
    assert [(path.name, path.read_text()) for path in directory.iterdir()] == [("index.html", "the old one")]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    labels, probabilities = predictions(num_classes=2, count=20)
    with pytest.raises(ValueError, match="JSON"), Part(tmp_path / "report") as made:
        report.write(
            made,
            metrics={"loss": float("nan")},
            labels=labels,
            probabilities=probabilities,
            roc=metrics.roc_curves(labels, probabilities),
            class_names=["a", "b"],
            images=pictures,
            history=[],
            facts={},
        )
    assert not (tmp_path / "report").exists()


def test_the_mistakes_are_the_most_confident_ones():
    labels = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]], np.float32)
    asked = []

    def images(indices):
        asked.extend(indices)
        return pictures(indices)

    figure = plots.mistakes(labels, probabilities, ["cat", "dog"], images)
    assert asked == [2, 1]
    assert [axes.get_title() for axes in figure.axes] == ["cat\n→ dog, 80 %", "cat\n→ dog, 60 %"]
    assert [axes.images[0].get_array().max() for axes in figure.axes] == [2, 1]


def test_the_confusion_matrix_shows_shares_of_the_true_class():
    labels = np.array([0, 0, 0, 0, 1])
    probabilities = np.eye(2, dtype=np.float32)[[0, 0, 0, 1, 1]]
    figure = plots.confusion_matrix(labels, probabilities, ["cat", "dog"])
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[75, 25], [0, 100]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "100"]


@pytest.mark.parametrize("num_classes", [2, 60, 250, 1000])
def test_the_bars_of_the_classes_are_sorted_and_complete(num_classes):
    rows = [
        {"name": str(k), "num_examples": 1, "recall": (k * 7 % num_classes) / num_classes} for k in range(num_classes)
    ]
    rows.append({"name": "absent", "num_examples": 0, "recall": None})
    figure = plots.class_accuracy(rows)
    bars = [patch.get_width() for axes in figure.axes for patch in axes.patches]
    expected = 100 * np.arange(num_classes)[::-1] / num_classes
    if num_classes > 250:
        expected = np.append(expected[:125], expected[-125:])
        assert "the 125 best and the 125 worst of 1,000" in figure.get_suptitle()
    np.testing.assert_allclose(bars, expected)
    assert max(figure.get_size_inches() * figure.dpi) < 2**15


def test_the_series_of_a_history_leave_out_what_is_missing():
    events = [{"step": 1, "x": 0.5}, {"step": 2, "y": 1.0}, {"step": 3, "x": float("nan")}, {"step": 4, "x": 2}]
    np.testing.assert_array_equal(plots.series(events, "x"), [[1, 4], [0.5, 2]])
    assert plots.curves([{"step": 1, "eval/loss": 1.0}]) is not None
    assert plots.curves([{"step": 1}]) is plots.learning_rate([{"step": 1}]) is None


def test_names_are_shortened_to_what_can_be_drawn():
    assert plots.shorten("a" * 30, 10) == "a" * 9 + "…"
    assert plots.shorten("two\n lines") == "two lines"
    assert plots.columns("猫a") == 3 and len(plots.shorten("猫" * 12, 10)) == 5  # each as wide as two letters
    assert plots.shorten("$x$ \U0010fffd") == r"\$x\$ □"


def test_drawing_leaves_the_style_of_the_process_alone(written):
    assert matplotlib.rcParams["axes.titleweight"] == matplotlib.rcParamsDefault["axes.titleweight"]
