"""vitcls inspect: duplicates, leakage and label errors that were put there, and what is refused."""

import csv
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.data.textures import textures
from vitcls import cli, inspect
from vitcls.data import duplicates
from vitcls.data.dataset import Split
from vitcls.metrics.label_errors import confident_joint, confident_learning

CLEANLAB = np.load(pathlib.Path(__file__).parent / "metrics" / "cleanlab.npz")  # 2.9.0


def call(arguments, capsys):
    capsys.readouterr()
    code = cli.run(inspect.main, [str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * 15.9).astype(np.uint8)[..., None], found.target.astype(np.int64)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Digits of which 40 labels are wrong, 5 test images are training images, and one of training is there thrice."""
    path = tmp_path_factory.mktemp("planted")
    images, labels = digits()
    train, test = images[:1200].copy(), images[1200:1500].copy()
    train_labels, test_labels = labels[:1200].copy(), labels[1200:1500].copy()
    rng = np.random.default_rng(0)
    wrong = rng.choice(np.arange(20, 1200), 40, replace=False)
    train_labels[wrong] = (train_labels[wrong] + rng.integers(1, 10, 40)) % 10
    test[:5], test_labels[:5] = train[:5], train_labels[:5]
    train[10], train[11] = train[12], train[12]
    train[13] = 0
    np.savez(path / "set.npz", x_train=train, y_train=train_labels, x_test=test, y_test=test_labels)
    return path, set(wrong.tolist())


@pytest.fixture(scope="module")
def inspected(planted):
    path, _ = planted
    assert cli.run(inspect.main, [f"--data_dir={path / 'set.npz'}", f"--out={path / 'out'}", "--features=pixels"]) == 0
    return path / "out"


def lines(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_was_planted_is_found(inspected, planted):
    _, wrong = planted
    assert "mistakes of that classifier" not in (inspected / "index.html").read_text()  # it knows digits
    found = json.loads((inspected / "metrics.json").read_text())
    assert found["splits"]["train"]["num_examples"] == 1200 and found["splits"]["train"]["distinct"] == 1198
    assert found["splits"]["train"]["blank"] == 1 and found["splits"]["test"]["blank"] == 0
    assert found["duplicates"]["pairs"]["train"]["exact"] == 2
    assert found["duplicates"]["pairs"]["train and test"]["exact"] == 5
    assert found["duplicates"]["test_equal_in_training"]["value"] == pytest.approx(5 / 300)
    assert found["duplicates"]["test_seen_in_training"]["value"] >= 5 / 300
    said = "rather images of one kind, as digits are, than copies"
    assert said not in (inspected / "index.html").read_text()
    many = {name: {"exact": 0, "near": 300} for name in found["duplicates"]["pairs"]}
    assert said in "\n".join(inspect._lines(found | {"duplicates": found["duplicates"] | {"pairs": many}}))
    doubted = [int(line["index"]) for line in lines(inspected / "label_errors.csv") if line["split"] == "train"]
    assert len(wrong & set(doubted)) >= 30 and len(wrong & set(doubted)) >= 0.6 * len(doubted)
    errors = found["label_errors"]
    assert errors["share"]["low"] < errors["share"]["value"] < errors["share"]["high"]
    assert errors["found"] == len(lines(inspected / "label_errors.csv"))


def test_files_name_each_image(inspected):
    exact = [line for line in lines(inspected / "duplicates.csv") if line["kind"] == "exact"]
    places = {(line["split_1"], int(line["index_1"]), line["split_2"], int(line["index_2"])) for line in exact}
    assert {("train", i, "test", i) for i in range(5)} <= places
    assert {("train", 10, "train", 11), ("train", 10, "train", 12)} <= places
    counts = {(line["split"], line["class"]): int(line["images"]) for line in lines(inspected / "classes.csv")}
    assert sum(n for (split, _), n in counts.items() if split == "train") == 1200
    assert {path.name for path in inspected.iterdir()} == {
        *("metrics.json", "index.html", "classes.csv", "duplicates.csv", "label_errors.csv"),
        *("classes.png", "contact_sheet.png", "duplicates.png", "label_errors.png"),
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of classes: a photo again under another name, one as JPEG, one mirrored, one smaller."""
    root = tmp_path_factory.mktemp("photos")
    images = textures(24, 96)
    for i, image in enumerate(images):
        folder = root / ("cat" if i % 2 else "dog")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    (root / "cat" / "again.png").write_bytes((root / "dog" / "00.png").read_bytes())
    Image.fromarray(images[2]).save(root / "dog" / "saved.jpg", quality=80)
    Image.fromarray(images[3][:, ::-1]).save(root / "cat" / "mirrored.png")
    Image.fromarray(images[4]).resize((60, 60)).save(root / "dog" / "smaller.png")
    return root


def test_photos_that_look_the_same_are_found(photos, tmp_path, capsys):
    code, out, _ = call([f"--data_dir={photos}", f"--out={tmp_path / 'out'}", "--features=none"], capsys)
    assert code == 0 and "1 of them have different labels" in out
    pairs = {
        frozenset((line["file_1"], line["file_2"])): line["kind"] for line in lines(tmp_path / "out" / "duplicates.csv")
    }
    assert pairs == {
        frozenset(("dog/00.png", "cat/again.png")): "exact",
        frozenset(("dog/02.png", "dog/saved.jpg")): "near",
        frozenset(("cat/03.png", "cat/mirrored.png")): "near",
        frozenset(("dog/04.png", "dog/smaller.png")): "near",
    }
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "label_errors" not in found and not (tmp_path / "out" / "label_errors.csv").exists()
    sizes = [split[key] for split in found["splits"].values() for key in ("smallest_image", "largest_image")]
    assert [60, 60] in sizes and [96, 96] in sizes


def test_a_folder_with_broken_files_and_labels_by_lot(tmp_path, capsys):
    """Sizes are height x width; what cannot be used is named; a classifier that knows nothing is no judge."""
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "photos" / ("cat", "dog")[rng.integers(2)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"none")
    os.rename(folder / "39.png", os.fsencode(folder) + b"/caf\xe9.png")
    os.link(os.fsencode(folder) + b"/caf\xe9.png", folder / "again.png")
    out = tmp_path / "out"
    code, said, _ = call([f"--data_dir={tmp_path / 'photos'}", f"--out={out}", "--features=color"], capsys)
    assert code == 0 and "files that cannot be used: 1, see skipped.csv" in said
    assert "most doubts are rather mistakes of that classifier" in said
    assert [line["File"] for line in lines(out / "skipped.csv")] == [f"{folder.name}/broken.png"]
    assert b"/caf\xe9.png" in (out / "duplicates.csv").read_bytes()
    found = json.loads((out / "metrics.json").read_text())
    assert found["skipped_files"] == 1 and found["splits"]["train"]["largest_image"] == [20, 30]


@pytest.mark.parametrize("image_size", [0, 8])
def test_oblong_arrays_are_looked_at_whole_and_as_they_came(image_size, tmp_path, capsys):
    """Alike in the middle, which is what a model of square images sees, and different at the left."""
    images = np.full((40, 16, 64, 1), 200, np.uint8)
    images[:, :, :20] = np.random.default_rng(0).integers(0, 256, (40, 16, 20, 1))
    images[7], images[9] = images[3], 200
    np.savez(tmp_path / "wide.npz", x_train=images[:30], y_train=np.arange(30) % 2, x_test=images[30:], y_test=[0] * 10)
    config = f"--config={pathlib.Path(__file__).parents[1] / 'configs' / 'vit_digits.py'}"
    keys = {"name": "npz", "data_dir": tmp_path / "wide.npz", "image_size": image_size}
    flags = [config, *(f"--config.dataset.{key}={value}" for key, value in keys.items()), "--features=none"]
    code, _, err = call([*flags, f"--out={tmp_path / 'out'}"], capsys)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    train = found["splits"]["train"]
    assert (train["blank"], train["distinct"], train["largest_image"]) == (1, 29, [16, 64])
    assert found["duplicates"]["pairs"]["train"] == {"exact": 1, "near": 0}
    assert found["duplicates"]["test_seen_in_training"]["value"] == 0
    seen = images[:30] / 255 if not image_size else np.full(30, 200 / 255)
    assert (train["mean"], train["std"]) == ([round(seen.mean(), 4)], [max(round(seen.std(), 4), 0.001)])


@pytest.mark.by_turns
def test_a_run_looks_by_its_own_features(trained, capsys, tmp_path):
    code, out, err = call([f"--workdir={trained}", f"--out={tmp_path / 'out'}", "--folds=2"], capsys)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["label_errors"]["features"] == "network" and "validation" not in found["splits"]
    assert "network features" in out and not (trained / "inspect").exists()


def test_what_cannot_be_is_one_line(planted, photos, tmp_path, capsys):
    path, _ = planted
    out = f"--out={tmp_path / 'out'}"
    for arguments, expected in (
        ([out], "give --config=FILE, --data_dir"),
        ([f"--data_dir={photos}"], "--out=DIR says where"),
        ([f"--data_dir={photos}", out, "--features=nothing"], "a workdir, color, hog, pixels"),
        ([f"--data_dir={photos}", out, "--features=pixels", "--folds=1"], "at least 2"),
        ([f"--data_dir={photos}", out, "--features=pixels", "--folds=40"], "too few for 40 folds"),
        ([f"--data_dir={tmp_path / 'none'}", out], "is not a directory"),
        ([f"--data_dir={path / 'set.npz'}", out, "--config.dataset.image_size=8"], "none is given"),
        ([f"--config={path / 'set.npz'}", f"--workdir={path}", out], "give one"),
    ):
        code, _, err = call(arguments, capsys)
        assert code == 2 and len(err.splitlines()) == 1 and expected in err, err
    assert not (tmp_path / "out").exists()


def test_nothing_of_the_user_is_replaced(photos, planted, tmp_path, capsys):
    """Neither what stands in --out already, nor the data themselves; an earlier inspection is."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("mine")
    before = sorted(photos.rglob("*"))
    flags = [f"--data_dir={photos}", "--features=none"]
    for out, words in (
        (mine, "holds thesis.txt"),
        (tmp_path / "file", "is a file"),
        (photos, "is among the data"),
        (photos / "dog" / "out", "is among the data"),
        ("/proc/out", "cannot be written"),
    ):
        code, _, err = call([*flags, f"--out={out}"], capsys)
        assert code == 2 and words in err and len(err.splitlines()) == 1, err
    path, _ = planted
    code, _, err = call([f"--data_dir={path / 'set.npz'}", f"--out={path}", "--features=none"], capsys)
    assert code == 2 and "which is no file of an inspection" in err
    assert (mine / "thesis.txt").read_text() == "years" and sorted(photos.rglob("*")) == before
    for _ in range(2):
        assert call([*flags, f"--out={tmp_path / 'out'}"], capsys)[0] == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} <= set(inspect.FILES)


def test_confident_learning_is_cleanlabs():
    labels, probabilities = CLEANLAB["labels"], CLEANLAB["probabilities"]
    np.testing.assert_array_equal(confident_joint(labels, probabilities), CLEANLAB["joint"])
    found, theirs = set(confident_learning(labels, probabilities).indices.tolist()), set(CLEANLAB["issues"].tolist())
    assert len(found ^ theirs) <= 1  # how halves are rounded


def test_labels_that_all_are_right_are_not_doubted():
    labels = np.arange(60) % 3
    probabilities = np.full((60, 3), 0.05)
    probabilities[np.arange(60), labels] = 0.9
    assert not len(confident_learning(labels, probabilities).indices)
    labels[0] = 1
    assert confident_learning(labels, probabilities).indices.tolist() == [0]
    assert confident_learning(labels, probabilities).suggested.tolist() == [0]


def test_near_pairs_by_brute_force():
    """All pairs of images and of their mirror images, against numpy's correlation."""
    rng = np.random.default_rng(0)
    images = textures(40)
    noisy = np.clip(images[:10] + rng.normal(0, 3, images[:10].shape), 0, 255).astype(np.uint8)
    thumbnails = np.concatenate([images, noisy, images[10:15, :, ::-1]])
    found = duplicates.near_pairs(thumbnails)
    flat = thumbnails.reshape(len(thumbnails), -1).astype(float)
    flipped = thumbnails[:, :, ::-1].reshape(len(thumbnails), -1).astype(float)
    count = len(thumbnails)
    both = np.maximum(np.corrcoef(flat), np.corrcoef(flat, flipped)[:count, count:])
    expected = {(i, j) for i in range(count) for j in range(i + 1, count) if both[i, j] >= 0.98}
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert {(i, 40 + i) for i in range(10)} | {(10 + i, 50 + i) for i in range(5)} <= expected


def test_features_find_what_a_hash_does_not():
    images = textures(30)
    darker = (images[:3] * 0.5).astype(np.uint8)
    darker[:, :12] = 0  # a black bar, which changes the hash
    thumbnails = np.concatenate([images, darker])
    features = np.random.default_rng(0).normal(size=(33, 8)).astype(np.float32)
    features[30:] = features[:3]
    found = duplicates.near_pairs_by_features(features, thumbnails)
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    alike = [np.corrcoef(images[i].ravel(), darker[i].ravel())[0, 1] for i in range(3)]
    assert pairs == {(i, 30 + i) for i in range(3) if alike[i] >= 0.9}


def test_equal_arrays_are_one_group():
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 7, 3), np.uint8)
    images[4] = images[1]
    look = duplicates.look(Split(images, np.zeros(6, np.int32)), 3)
    assert duplicates.exact_groups(look.digests).tolist() == [0, 1, 2, 3, 1, 5]
    assert look.thumbnails.shape == (6, 32, 32, 3) and look.sizes.tolist() == [[9, 7]] * 6
