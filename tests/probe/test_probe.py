"""`vitcls probe`: its features and classifiers beside scikit-learn, scikit-image and the network called by hand."""

import dataclasses
import json
import os
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import vitcls
from tests.conftest import make_tiny_config
from tests.models.test_weight_files import safetensors
from vitcls import cli, compare, config, data, evaluate, main, status, train
from vitcls.core import sharding
from vitcls.probe import __main__ as command
from vitcls.probe import classifiers, features, few_shot
from vitcls.probe.classifiers import CLASSIFIERS, Examples
from vitcls.probe.run import prepare, with_features
from vitcls.training import run_dir
from vitcls.training.opened import open_with_data

BY_HAND = {
    "linear": lambda value: make_pipeline(StandardScaler(), LogisticRegression(C=value, max_iter=1_000)),
    "knn": lambda value: KNeighborsClassifier(value, metric="cosine"),
    "svm": lambda value: LinearSVC(C=value, random_state=0),
    "centroid": lambda value: NearestCentroid(),
}


def clusters(count, seed, num_classes=3):
    """Overlapping clusters in 5 dimensions."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % num_classes
    means = np.random.default_rng(9).normal(0, 1, (num_classes, 5))
    return Examples((means[labels] + draw.normal(0, 1, (count, 5)) + 3).astype(np.float32), labels)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_classifier_is_that_of_scikit_learn_with_the_setting_that_is_best_on_validation(name, num_classes):
    train, validation, test = (clusters(n, seed, num_classes) for n, seed in ((90, 0), (60, 1), (200, 2)))
    scale = train.features.std() if name == "svm" else 1
    by_hand = {}
    for value in CLASSIFIERS[name].values:
        estimator = BY_HAND[name](value).fit(train.features / scale, train.labels)
        by_hand[value] = [estimator.score(x.features / scale, x.labels) for x in (validation, test)]
    fitted = classifiers.fit(name, train, validation)
    best = max(by_hand, key=lambda value: by_hand[value][0])
    assert fitted.choice == (f"{CLASSIFIERS[name].key} {best:g}" if best else "nothing to choose")
    probabilities = fitted.predict(test.features)
    assert probabilities.dtype == np.float32 and probabilities.shape == (200, num_classes)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert np.mean(probabilities.argmax(axis=1) == test.labels) == by_hand[best][1]
    assert (fitted.head is None) == (name in ("knn", "centroid"))
    if fitted.head:
        kernel, bias = fitted.head
        assert (kernel.shape, bias.shape, kernel.dtype, bias.dtype) == ((5, num_classes), (num_classes,), "f4", "f4")
        np.testing.assert_allclose(softmax(test.features @ kernel + bias, axis=1), probabilities, rtol=0, atol=1e-5)


def test_the_temperature_of_scores_has_the_least_loss():
    train, validation = clusters(90, 0), clusters(400, 1)
    probabilities = classifiers.fit("centroid", train, validation).predict(validation.features).astype(np.float64)
    logits = np.log(np.maximum(probabilities, 1e-12))

    def loss(power):
        scaled = np.exp(power * logits)
        return -np.log((scaled / scaled.sum(axis=1, keepdims=True))[np.arange(400), validation.labels]).mean()

    assert loss(1) < min(loss(0.9), loss(1.1))


def test_k_is_not_more_than_there_are_training_images():
    fitted = classifiers.fit("knn", clusters(6, 0), clusters(30, 1))
    assert fitted.choice in ("k 1", "k 3", "k 5")


def test_draws_are_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [50, 20, 30])
    one = few_shot.draw(labels, 5, seed=0, number=0)
    assert np.bincount(labels[one]).tolist() == [5, 5, 5] and len(set(one.tolist())) == 15
    np.testing.assert_array_equal(one, few_shot.draw(labels, 5, seed=0, number=0))
    for other in ((5, 0, 1), (5, 1, 0)):
        assert not np.array_equal(one, few_shot.draw(labels, other[0], seed=other[1], number=other[2]))


def test_the_interval_of_the_mean_holds_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(0)
    intervals = [few_shot.interval(list(draw.normal(0.7, 0.05, few_shot.DRAWS))) for _ in range(2_000)]
    covered = np.mean([low <= 0.7 <= high for low, high in intervals])
    assert 0.935 < covered < 0.965


def test_classical_features_are_those_of_their_definitions():
    from skimage.feature import hog

    image = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)
    by_hand = hog(image, orientations=9, pixels_per_cell=(4, 4), cells_per_block=(2, 2), channel_axis=-1)
    np.testing.assert_allclose(features._hog(image.shape)(image), by_hand, rtol=1e-6)
    edges = [np.linspace(0, 256, 9)] * 3
    counts, _ = np.histogramdd(image.reshape(-1, 3)[:, ::-1], bins=edges)  # the last channel varies the slowest
    np.testing.assert_allclose(features._color(image.shape)(image) ** 2, counts.ravel() / 320, atol=1e-6)
    np.testing.assert_allclose(features._pixels(image.shape)(image), image.ravel() / 255, rtol=1e-6)


@pytest.fixture
def photos(tmp_path):
    """Three classes of 12 photos of 16x16 pixels, that can be told apart by their brightness."""
    draw = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "photos" / f"class_{label}").mkdir(parents=True)
        for i in range(12):
            picture = draw.integers(0, 60, (16, 16, 3), np.uint8) + np.uint8(60 * label)
            Image.fromarray(picture).save(tmp_path / "photos" / f"class_{label}" / f"{i:02d}.bmp")
    return tmp_path / "photos"


def rows_of(name, photos, tmp_path):
    """The features of the training photos, and the config that was made for them."""
    made = with_features(config.default_config("lenet5"), name)
    made.probe.classifier = "linear"
    made.dataset.update(name="folder", data_dir=str(photos), image_size=8, validation=0.2)
    made, _, dataset, info, start = prepare(made, tmp_path / "none", "")
    partition = sharding.all_devices("data")
    extractor = features.make_extractor(made, info, start, partition)
    return features.features_of(extractor, dataset.train, dataset.image_shape, partition, 8), made


def test_features_of_a_changed_image_are_computed_anew(photos, tmp_path):
    first, _ = rows_of("pixels", photos, tmp_path)
    again, _ = rows_of("pixels", photos, tmp_path)
    assert (first.cached, again.cached) == (False, True)
    np.testing.assert_array_equal(first.rows, again.rows)
    for path in photos.rglob("*.bmp"):  # one byte of each, neither size nor time
        status, content = path.stat(), bytearray(path.read_bytes())
        content[-1] ^= 255
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed, _ = rows_of("pixels", photos, tmp_path)
    assert not changed.cached and not np.array_equal(changed.rows, first.rows)


def test_features_of_another_crop_are_computed_anew(photos, tmp_path):
    rows_of("pixels", photos, tmp_path)
    made = with_features(config.default_config("lenet5"), "pixels")
    made.probe.classifier = "linear"
    made.dataset.update(name="folder", data_dir=str(photos), image_size=8, validation=0.2, eval_crop=0.5)
    made, _, dataset, info, _ = prepare(made, tmp_path / "none", "")
    partition = sharding.all_devices("data")
    extractor = features.make_extractor(made, info, None, partition)
    assert not features.features_of(extractor, dataset.train, dataset.image_shape, partition, 8).cached


@pytest.mark.by_turns
def test_training_images_are_prepared_as_those_of_an_evaluation(tmp_path):
    made = with_features(make_tiny_config(), "pixels")
    made.probe.classifier = "centroid"
    made.dataset.update(name="digits", image_size=4, eval_crop=0.5)
    plain = prepare(made, tmp_path, "").dataset.train.images
    made.dataset.random_resized_crop = True
    np.testing.assert_array_equal(prepare(made, tmp_path, "").dataset.train.images, plain)


def test_features_of_a_run_are_what_its_network_gives_its_classifier(trained, tmp_path):
    made = with_features(config.default_config("lenet5"), str(trained))
    run = vitcls.open_run(trained)
    assert made.model.name == run.config.model.name
    made.dataset = run.config.dataset
    made.probe.classifier = "linear"
    made, _, dataset, info, start = prepare(made, tmp_path / "none", "")
    partition = sharding.all_devices("data")
    extractor = features.make_extractor(made, info, start, partition)
    found = features.features_of(extractor, dataset.test, dataset.image_shape, partition, 16)
    images = run.normalize(dataset.test.images)
    _, state = run.model.apply(run.variables, images, train=False, mutable=["intermediates"])
    np.testing.assert_allclose(found.rows, state["intermediates"]["features"][0], rtol=1e-4, atol=1e-5)
    assert features.features_of(extractor, dataset.test, dataset.image_shape, partition, 16).cached
    path = next(iter(initial_variables(made, info, start)))
    assert identity(made, info, start, partition, path, 0.0) == extractor.identity
    assert identity(made, info, start, partition, path, 1e-3) != extractor.identity


def initial_variables(made, info, start):
    from vitcls.training import build, initial

    return initial.read(made, info, build.make_model(made, info), start).variables


def identity(made, info, start, partition, path, change):
    """What identifies the features with one weight of `path` changed."""
    from vitcls.training import initial

    read = initial.read

    def changed(*arguments):
        found = read(*arguments)
        weight = np.array(found.variables[path])
        weight.flat[0] += change
        return found._replace(variables=found.variables | {path: weight})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial, "read", changed)
        return features.make_extractor(made, info, start, partition).identity


CONFIG = """
from tests.conftest import make_tiny_config

def get_config():
    return make_tiny_config()
"""


@pytest.fixture
def tiny_file(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    return tmp_path / "tiny.py"


def run(capsys, *arguments, main=command.main):
    """(exit code, stdout, stderr) of a command in this process."""
    code = cli.run(main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.by_turns
def test_probes_are_compared_with_a_training(trained, tiny_file, tmp_path, capsys):
    places = []
    for name, classifier in (("hog", "svm"), ("pixels", "knn"), (trained, "centroid")):
        places.append(tmp_path / f"{classifier}")
        arguments = [f"--features={name}", f"--classifier={classifier}", f"--config={tiny_file}", "--shots=1,3"]
        code, out, err = run(capsys, *arguments, f"--workdir={places[-1]}")
        assert code == 0, err
        assert out.startswith("1 of each class: accuracy ") and "report: " in out
    metrics = json.loads((places[1] / "report" / "metrics.json").read_text())
    assert [row["shots"] for row in metrics["few_shot"]] == [1, 3]
    for row in metrics["few_shot"]:
        assert len(row["draws"]) == 10 and row["accuracy"] == pytest.approx(np.mean(row["draws"]))
    assert {"feature_seconds", "train_seconds"} <= metrics["units"].keys()
    page = (places[1] / "report" / "index.html").read_text()
    assert "knn on pixels" in page and "nothing was logged" not in page
    assert not (places[1] / "report" / "curves.png").exists()
    code, out, err = run(capsys, *places, trained, main=compare.main)
    assert code == 0, err
    for name in ("svm", "knn", "centroid", "run"):
        assert f"| {name} " in out
    _, out, _ = run(capsys, places[0], main=status.main)
    assert "-/-" in out and "finished, test accuracy" in out
    code, _, err = run(capsys, f"--workdir={places[0]}", main=evaluate.main)
    assert code == 2 and "holds a probe" in err
    code, _, err = run(capsys, f"--config={tiny_file}", f"--workdir={places[0]}", main=main.main)
    assert code == 2 and "probe.classifier was 'svm', is ''" in err
    others = ["--features=pixels", "--classifier=knn", f"--config={tiny_file}", f"--workdir={places[0]}"]
    code, _, err = run(capsys, *others)
    assert code == 2 and "probe.classifier was 'svm', is 'knn'" in err and len(err.splitlines()) == 1  # no work before


def make_scaled_config():
    """Of a network that multiplies what its head says."""
    made = make_tiny_config()
    with made.unlocked():
        made.model = config.default_config("airbench94").model
    made.model.widths = (8, 8)
    return made


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    path = tmp_path_factory.mktemp("scaled") / "run"
    train.train_and_evaluate(make_scaled_config(), path)
    return path


@pytest.mark.by_turns
@pytest.mark.parametrize(("classifier", "of"), [("linear", "trained"), ("svm", "trained"), ("linear", "scaled")])
def test_a_probe_of_one_layer_predicts_and_is_trained_on(request, tiny_file, tmp_path, capsys, classifier, of):
    place, features = tmp_path / "probe", request.getfixturevalue(of)
    arguments = [f"--features={features}", f"--classifier={classifier}", f"--config={tiny_file}", f"--workdir={place}"]
    arguments.append("--config.test_time_augmentation=mirror_shift")  # which features are without
    code, _, err = run(capsys, *arguments)
    assert code == 0, err
    opened = open_with_data(place, splits=("test",))
    labels, found = opened.predictions("test")
    with np.load(place / "report" / "predictions.npz") as kept:
        np.testing.assert_array_equal(labels, kept["labels"])
        np.testing.assert_allclose(found, kept["probabilities"], rtol=0, atol=1e-4)
    images = np.stack([data.read_image(opened.dataset.test, i, opened.trained.info.image_shape) for i in range(3)])
    np.testing.assert_allclose(vitcls.open_run(place).predict(images), found[:3], rtol=0, atol=1e-4)
    code, _, err = run(capsys, f"--workdir={place}", main=evaluate.main)
    assert code == 2 and "holds a probe, whose report is that of" in err
    shutil.rmtree(place / "report")  # as where it was killed before it ended
    assert run(capsys, *arguments)[0] == 0
    again = run_dir.open_workdir(place).restore(opened.model, "best")[1]
    jax.tree.map(np.testing.assert_array_equal, again, dict(opened.variables))
    started = make_tiny_config() if of == "trained" else make_scaled_config()
    started.init.update(weights=str(place), head="keep")
    given = train.prepare(started, None, "", range(0)).start.variables
    kept = traverse_util.flatten_dict(dict(opened.variables), sep="/")
    assert given.keys() == kept.keys()
    for path, leaf in given.items():
        np.testing.assert_array_equal(leaf, kept[path])


@pytest.mark.parametrize(
    ("features_", "more", "words"),
    [
        ("hog", ["--classifier=svn"], "--classifier 'svn' is not known; did you mean 'svm'?"),
        ("", [], "--features '' is not known"),
        ("hogg", [], "--features 'hogg' is not known; did you mean 'hog'?"),
        ("hog", ["--shots=1,99"], "--shots=99 is more than the"),
        ("hog", ["--shots=0"], "--shots=0 is impossible"),
        ("hog", ["--shots=a"], "--shots=a is no list of numbers"),
        ("hog", ["--config.dataset.validation=0"], "set config.dataset.validation above 0"),
        ("hog", ["--config.dataset.image_size=4"], "hog is for images of at least 8x8 pixels, not 4x4"),
        ("WORKDIR", ["--config.dataset.image_size=16"], "knows images of 8x8x3, and those of 'synthetic' are 16x16x3"),
        ("WEIGHTS", [], "holds no weights of improved_vit_tiny"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(features_, more, words, trained, tiny_file, tmp_path, capsys):
    weights = safetensors(tmp_path / "w.safetensors", {"conv1.weight": np.zeros((4, 3, 3, 3), np.float32)})
    name = {"WORKDIR": trained, "WEIGHTS": weights}.get(features_, features_)
    arguments = [f"--features={name}", f"--config={tiny_file}", f"--workdir={tmp_path / 'run'}", *more]
    if not any(flag.startswith("--classifier") for flag in more):
        arguments.append("--classifier=svm")
    code, _, err = run(capsys, *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_hog_without_its_library_is_one_line(tiny_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    arguments = ["--features=hog", "--classifier=svm", f"--config={tiny_file}", f"--workdir={tmp_path / 'run'}"]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "pip install 'vitcls[classical]'" in err
    assert not (tmp_path / "run").exists()


def test_features_that_do_not_fit_in_memory_are_refused(monkeypatch, tiny_file, tmp_path, capsys):
    monkeypatch.setattr(features, "host_memory_bytes", lambda: 1_000)
    arguments = ["--features=pixels", "--classifier=knn", f"--config={tiny_file}", f"--workdir={tmp_path / 'run'}"]
    code, _, err = run(capsys, *arguments, "--config.dataset.split_seed=7")
    assert code == 2 and "192 numbers each" in err
    assert not (tmp_path / "run").exists()


def test_images_of_an_array_are_told_apart_by_their_bytes():
    split = data.Split(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32))
    other = dataclasses.replace(split, images=split.images.copy())
    other.images[1, 3, 3, 0] = 1
    ours, theirs = (features._hash(features._images(each, (4, 4, 1))) for each in (split, other))
    assert ours != theirs
