"""Every source but TFDS against what was put into it, and every way in which one can be unusable."""

import itertools
import logging
import os
import pathlib
import shutil
import struct
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.data.loaded import config, decoded
from vitcls import predict
from vitcls.core import cache
from vitcls.core.cache import cache_dir
from vitcls.core.errors import UserError
from vitcls.data import DatasetInfo, describe, read_image
from vitcls.data import decode as decode_splits
from vitcls.data import images as image_files
from vitcls.data.dataset import SkippedFile
from vitcls.data.images import examine
from vitcls.data.loading import load
from vitcls.data.sources.folder import FileImages


def paths(split):
    return [pathlib.Path(split.images.name(index)) for index in range(len(split.images))]


# Digits and synthetic


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    dataset = load(config(name="digits", validation=0.1, test=0.2))
    assert dataset.image_shape == (8, 8, 1) and dataset.num_classes == 10 and dataset.class_names[3] == "3"
    expected = load_digits()
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [len(split.labels) for split in splits] == [1294, 144, 359]
    images = np.concatenate([split.images for split in splits]).reshape(-1, 64)
    labels = np.concatenate([split.labels for split in splits])
    assert images.dtype == np.uint8 and images.max() == 255 and labels.dtype == np.int32
    found = sorted((*image, label) for image, label in zip(np.rint(images * (16 / 255)), labels, strict=True))
    assert found == sorted((*image, label) for image, label in zip(expected.data, expected.target, strict=True))


def test_synthetic_is_deterministic_balanced_and_learnable():
    from sklearn.neighbors import NearestCentroid

    block = config(name="synthetic", num_examples=200, num_classes=4, image_size=8, validation=0.0)
    first, again = load(block), load(block)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert first.image_shape == (8, 8, 3) and first.validation is None
    np.testing.assert_array_equal(np.bincount(first.train.labels), [40] * 4)
    model = NearestCentroid().fit(first.train.images.reshape(160, -1).astype(float), first.train.labels)
    assert model.score(first.test.images.reshape(40, -1).astype(float), first.test.labels) > 0.95
    block.split_seed = 1
    assert not np.array_equal(load(block).train.images, first.train.images)
    assert load(config(name="synthetic", num_examples=30, num_classes=2)).image_shape == (32, 32, 3)
    wide = load(config(name="synthetic", num_examples=30, num_classes=2, image_size=(6, 10)))
    assert wide.image_shape == wide.train.images.shape[1:] == (6, 10, 3)


def test_synthetic_jpegs_are_files_of_real_sizes_and_learnable():
    from sklearn.neighbors import NearestCentroid

    block = config(name="synthetic_jpeg", num_examples=48, num_classes=3, image_size=(6, 8), test=0.25)
    dataset, again = load(block), load(block)
    assert dataset.image_shape == (6, 8, 3) and len(dataset.train.images) == 32
    encoded = [dataset.train.images.read(index) for index in range(8)]
    assert encoded == [again.train.images.read(index) for index in range(8)]
    sizes = {examine(file)[:2] for file in encoded}
    assert len(sizes) == 8 and all(400 <= width <= 600 and 300 <= height <= 450 for width, height in sizes)
    assert len({load(block).test.images.read(index) for index in range(12)} - set(encoded)) == 12
    train, test = (decoded(split, dataset).reshape(-1, 144).astype(float) for split in (dataset.train, dataset.test))
    model = NearestCentroid().fit(train, dataset.train.labels)
    assert model.score(test, dataset.test.labels) > 0.9
    block.split_seed = 1
    assert load(block).train.images.read(0) != encoded[0]
    block.image_size = 0
    with pytest.raises(UserError, match=r"differ in size, from 300x400 to 450x600; set config.dataset.image_size"):
        load(block)


def test_eval_crop_is_that_of_every_split_and_of_predict(tmp_path, npz):
    """Nested squares: the central half of an image is white, and nothing else of it is."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:6, 2:6] = 255
    for name in "ab":
        for number in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    files = load(folder_config(tmp_path, validation=0.2, image_size=4, eval_crop=0.5))
    resident = decode_splits(files)
    for split, arrays in ((getattr(s, name) for s in (files, resident)) for name in ("train", "validation", "test")):
        assert (read_image(split, 0, (4, 4, 1)) == 255).all() and (arrays.images == 255).all()
    image = predict.read(tmp_path / "a" / "0.png", (4, 4, 1), image_files.Decoding(0.0, 0.5))
    assert (image == 255).all()
    arrays = np.tile(pixels, (20, 1, 1))
    for image_size in (0, 8, 4):
        block = npz(x_train=arrays, y_train=LABELS)
        block.update(image_size=image_size, eval_crop=0.5)
        assert (load(block).test.images == 255).mean() > 0.5  # what is white is wider; an edge is soft if enlarged
        block.random_resized_crop = True  # of whole images
        dataset = load(block)
        assert (dataset.test.images == 255).mean() > 0.5
        assert dataset.whole.images.mean() == pytest.approx(255 / 4, rel=0.05)
        assert (dataset.train.images == 255).mean() > 0.5  # as an evaluation sees it


def test_folds_take_the_place_of_the_validation_split_and_leave_test_alone():
    blocks = [config(name="digits", num_folds=4, fold=fold) for fold in range(4)]
    datasets = [load(block) for block in blocks]
    plain = load(config(name="digits", validation=0.0))
    for dataset in datasets:
        np.testing.assert_array_equal(dataset.test.images, plain.test.images)
        assert len(dataset.train.labels) + len(dataset.validation.labels) == len(plain.train.labels)
    held = np.concatenate([dataset.validation.images for dataset in datasets]).reshape(-1, 64)
    np.testing.assert_array_equal(np.unique(held, axis=0), np.unique(plain.train.images.reshape(-1, 64), axis=0))


def test_folds_say_that_the_own_validation_split_is_not_used(npz, caplog):
    block = npz(**GOOD, x_val=IMAGES[:7], y_val=LABELS[:7])
    assert len(load(block).validation.labels) == 7 and not caplog.messages
    block.update(num_folds=5)
    dataset = load(block)
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [16, 4, 6]
    (line,) = caplog.messages
    assert "num_folds=5" in line and "the 7 images of the validation split that comes with 'set' are not used" in line
    load(config(name="digits", num_folds=5))
    assert len(caplog.messages) == 1


def test_images_in_memory_are_resized():
    assert load(config(name="digits", image_size=12)).train.images.shape[1:] == (12, 12, 1)
    assert load(config(name="digits", image_size=(12, 6))).train.images.shape[1:] == (12, 6, 1)


# npz

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 5, 5, 3), np.uint8)
LABELS = np.arange(20) % 2
GOOD = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:6], "y_test": LABELS[:6]}


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "set.npz", **arrays)
        return config(name="npz", data_dir=str(tmp_path / "set.npz"), validation=0.0)

    return write


def test_npz_with_keras_and_with_medmnist_keys(npz):
    keras = load(npz(**GOOD))
    assert keras.name == "set" and keras.class_names == ("0", "1") and keras.validation is None
    np.testing.assert_array_equal(keras.train.images, IMAGES)
    np.testing.assert_array_equal(keras.test.labels, LABELS[:6])
    medmnist = {
        f"{split}_{kind}": array
        for split in ("train", "val", "test")
        for kind, array in (("images", IMAGES[..., 0]), ("labels", LABELS[:, None]))
    }
    dataset = load(npz(**medmnist, class_names=np.array(["benign", "malignant"]), extra=np.zeros(3)))
    assert dataset.class_names == ("benign", "malignant") and dataset.image_shape == (5, 5, 1)
    np.testing.assert_array_equal(dataset.validation.images, IMAGES[..., :1])
    np.testing.assert_array_equal(dataset.train.labels, LABELS)


def test_npz_without_a_test_split_is_split(npz):
    block = npz(x_train=IMAGES, y_train=LABELS)
    block.test = 0.2
    dataset = load(block)
    assert len(dataset.train.labels) == 16 and len(dataset.test.labels) == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint16, np.int64])
def test_npz_images_of_other_types(npz, dtype):
    images = IMAGES.astype(dtype)
    if np.issubdtype(dtype, np.floating):
        images = np.maximum(images - dtype(0.4), 0) / dtype(255)  # to be rounded up again
    np.testing.assert_array_equal(load(npz(**GOOD | {"x_train": images})).train.images, IMAGES)


@pytest.mark.parametrize(("dtype", "white"), [(np.uint16, 4095), (np.int64, 4095), (np.float32, 4080.5)])
def test_npz_has_one_white_for_all_splits(npz, dtype, white, caplog):
    logging.getLogger("vitcls").addHandler(caplog.handler)
    train = RNG.integers(0, 4081, (20, 5, 5)).astype(dtype)
    train[0, 0, 0] = 4080 if white == 4095 else 4080.5
    test = train[:6] * dtype(2)  # by itself it would have another
    dataset = load(npz(x_train=train, y_train=LABELS, x_test=test, y_test=LABELS[:6]))
    logging.getLogger("vitcls").removeHandler(caplog.handler)
    for split, values in ((dataset.train, train), (dataset.test, test)):
        expected = np.rint(np.minimum(values, white) * (255 / white))
        assert np.abs(split.images[..., 0] - expected).max() <= (dtype == np.float32)  # halves, in its own precision
    assert dataset.train.decoding.max_value == white
    (line,) = set(caplog.messages)  # once or twice: other tests may have stopped its propagation
    assert f"is {white if white != 4095 else 4080}, so {white} becomes white; set config.dataset.max_value" in line


def test_npz_with_a_given_white(npz):
    block = npz(**GOOD | {"x_train": IMAGES.astype(np.uint16), "x_test": IMAGES[:6].astype(float)})
    block.max_value = 51.0
    dataset = load(block)
    np.testing.assert_array_equal(dataset.train.images, np.minimum(IMAGES, 51) * 5)
    np.testing.assert_array_equal(dataset.test.images, dataset.train.images[:6])


NPZ_ERRORS = {
    "two lengths": ({"y_train": LABELS[:-1]}, "20 images and 19 labels"),
    "no labels": ({"y_test": None}, "has 'x_test' but no 'y_test'"),
    "no images": ({"x_train": None}, "has 'y_train' but no 'x_train'"),
    "no train": ({"x_train": None, "y_train": None}, "no 'x_train' or 'train_images'; it has x_test, y_test"),
    "negative": ({"y_train": LABELS - 1}, "'y_train' .* has the label -1"),
    "gap": ({"y_train": LABELS * 2}, "no training image of class 1"),
    "huge label": ({"y_train": LABELS * 2**40}, "'y_train' .* has the label 1099511627776"),
    "large label": ({"y_train": LABELS * 2**30}, "no training image of class 1"),
    "test label": ({"y_test": LABELS[:6] + 1}, "test split .* has the label 2, outside 0 .. 1"),
    "fractions": ({"y_train": LABELS + 0.5}, r"'y_train' .* is float64 \(20,\); labels are whole numbers"),
    "infinite": ({"y_train": np.full(20, np.inf)}, "'y_train'"),
    "nan": ({"y_train": np.full(20, np.nan)}, "'y_train' .* whole numbers"),
    "one-hot": ({"y_train": np.eye(2)[LABELS]}, r"'y_train' .* is float64 \(20, 2\)"),
    "strings": ({"y_train": np.array(["a"] * 20)}, "'y_train' .* whole numbers"),
    "complex": ({"y_train": LABELS.astype(complex)}, "'y_train' .* whole numbers"),
    "one class": ({"y_train": LABELS * 0, "y_test": LABELS[:6] * 0}, "has 1 class"),
    "pickle": ({"y_train": np.array([None] * 20)}, "cannot be read as .npz without pickles"),
    "too bright": (
        {"x_train": IMAGES / 255, "x_test": IMAGES[:6] * 2.0},
        "'x_test' .* float64 up to 510.0, above the 1 that the training images keep to; .*config.dataset.max_value",
    ),
    "too bright for 8 bits": ({"x_test": IMAGES[:6] * np.int64(2)}, "'x_test' .* int64 up to 510, above the 255"),
    "infinite image": ({"x_train": IMAGES + np.inf}, "'x_train' .* float64 from inf to inf"),
    "signed": ({"x_train": IMAGES.astype(int) - 1}, "'x_train' .* int64 from -1"),
    "nan image": ({"x_train": np.full((20, 5, 5, 3), np.nan)}, "'x_train' .* from nan to nan"),
    "boolean": ({"x_train": IMAGES > 0}, "'x_train' .* is bool"),
    "channels first": ({"x_train": IMAGES.swapaxes(1, 3)[:, :, :, :2]}, "images are"),
    "flat": ({"x_train": IMAGES.reshape(20, -1)}, r"'x_train' .* is \(20, 75\)"),
    "no examples": ({"x_train": IMAGES[:0], "y_train": LABELS[:0]}, r"'x_train' .* is \(0, 5, 5, 3\)"),
    "channels": ({"x_test": IMAGES[:6, :, :, :1]}, "differ in channels: 1 and 3"),
    "sizes": ({"x_test": IMAGES[:6, :4, :4]}, "differ in size, from 4x4 to 5x5; set config.dataset.image_size"),
    "names": ({"class_names": np.array(["a", "b", "c"])}, "class 'c' .* has no training image"),
    "same name": ({"class_names": np.array(["a", "a"])}, "two classes .* have the name 'a'"),
    "bytes": ({"class_names": np.array([b"\xff", b"b"])}, "'class_names' .* bytes that are not UTF-8; save them as"),
    "two spellings": (
        {"train_images": IMAGES, "train_labels": LABELS},
        "has 'x_train' and 'train_images'; leave one of them out",
    ),
    "number names": ({"class_names": np.arange(2)}, "'class_names' .* is int64"),
}


@pytest.mark.parametrize("name", NPZ_ERRORS)
def test_npz_that_cannot_be_used(npz, name):
    changes, message = NPZ_ERRORS[name]
    arrays = {key: array for key, array in (GOOD | changes).items() if array is not None}
    with pytest.raises(UserError, match=message) as error:
        load(npz(**arrays))
    assert "\n" not in str(error.value)


def test_npz_files_that_are_damaged_or_none(npz, tmp_path):
    path = pathlib.Path(npz(**GOOD).data_dir)
    whole = path.read_bytes()
    block = config(name="npz", data_dir=str(path))
    for data in (
        b"",
        b"not a zip file",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:300] + b"\xff" * 40 + whole[340:],
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"set\.npz cannot be read as \.npz") as error:
            load(block)
        assert "\n" not in str(error.value)
    np.save(path.with_suffix(".npy"), IMAGES)
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        load(config(name="npz", data_dir=str(path.with_suffix(".npy"))))
    for missing in ("", str(tmp_path), str(tmp_path / "none.npz")):
        with pytest.raises(UserError, match="is not a file"):
            load(config(name="npz", data_dir=missing))


# Folders


def write_image(path: pathlib.Path, size=(8, 8), mode="RGB", seed=None):
    rng = np.random.default_rng(len(str(path)) if seed is None else seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten images each, all distinct."""
    root = tmp_path / "pets"
    for number in range(10):
        write_image(root / "dog" / f"{number}.png", seed=number)
        write_image(root / "cat" / f"{number}.PNG", seed=100 + number)
    return root


def folder_config(root, **values):
    return config(**{"name": "folder", "data_dir": str(root), "validation": 0.0} | values)


def test_folder_without_splits_is_split_the_same_way_every_time(folder):
    block = folder_config(folder, validation=0.25, test=0.2)
    dataset, again = load(block), load(block)
    assert dataset.name == "pets" and dataset.class_names == ("cat", "dog") and dataset.image_shape == (8, 8, 3)
    sizes = [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [12, 4, 4] and dataset.skipped == ()
    assert len({path for split in (dataset.train, dataset.validation, dataset.test) for path in paths(split)}) == 20
    for split, same in ((dataset.train, again.train), (dataset.test, again.test)):
        assert paths(split) == paths(same)
        assert [path.parent.name for path in paths(split)] == [dataset.class_names[k] for k in split.labels]
    expected = [np.asarray(Image.open(path)) for path in paths(dataset.train)]
    np.testing.assert_array_equal(decoded(dataset.train, dataset), expected)


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_folder_with_splits(tmp_path, validation):
    for split, count in (("train", 3), (validation, 2), ("test", 1)):
        for name in ("b", "a"):
            for number in range(count):
                write_image(tmp_path / split / name / f"{number}.png", mode="L")
    dataset = load(folder_config(tmp_path, validation=0.1))
    assert dataset.class_names == ("a", "b") and dataset.image_shape == (8, 8, 1)
    for split, count in ((dataset.train, 3), (dataset.validation, 2), (dataset.test, 1)):
        np.testing.assert_array_equal(split.labels, np.repeat([0, 1], count))
    write_image(tmp_path / "test" / "c" / "0.png")
    with pytest.raises(UserError, match=r"test/c is a class that .*train does not have"):
        load(folder_config(tmp_path))


def test_folder_skips_what_cannot_be_used_and_says_why(folder, tmp_path):
    outside = tmp_path / "outside.png"
    write_image(outside)
    (folder / "cat" / "secret.png").symlink_to(outside)
    (folder / "cat" / "inside.png").symlink_to(folder / "cat" / "0.PNG")
    (folder / "dog" / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    (folder / "cat" / "empty.jpg").touch()
    (folder / "cat" / "page.jpg").write_text("<html><body>Not found</body></html>")
    (folder / "cat" / "more").mkdir()
    (folder / "cat" / "more" / "notes.txt").write_text("nothing")
    whole = (folder / "dog" / "1.png").read_bytes()
    (folder / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "wrong name.jpg").write_bytes(whole)  # a PNG file: contents count
    for hidden in (".DS_Store", ".hidden.png"):
        (folder / "dog" / hidden).write_text("")
    (folder / ".thumbnails").mkdir()
    for _ in range(2):  # the second time from the cache
        dataset = load(folder_config(folder))
        skipped = {file.path: file.reason for file in dataset.skipped}
        cut = skipped.pop("dog/cut.png")
        assert cut.startswith("cannot be decoded")
        assert skipped == {
            "cat/secret.png": "is a link out of the folder",
            "dog/elsewhere": "is a link out of the folder",
            "cat/empty.jpg": "is empty",
            "cat/page.jpg": "is an HTML page",
            "cat/more/notes.txt": "is not an image",
        }
        used = {path.name for split in (dataset.train, dataset.test) for path in paths(split)}
        assert {"inside.png", "wrong name.jpg"} < used and "secret.png" not in used
        assert len(dataset.train.labels) + len(dataset.test.labels) == 22


def test_a_file_that_has_changed_is_looked_at_again(folder):
    load(folder_config(folder))
    path = folder / "cat" / "0.PNG"
    path.write_bytes(path.read_bytes()[:60])
    assert [file.path for file in load(folder_config(folder)).skipped] == ["cat/0.PNG"]
    write_image(path)
    assert load(folder_config(folder)).skipped == ()


def test_a_damaged_cache_of_verdicts_is_made_anew(folder):
    (folder / "cat" / "empty.jpg").touch()
    expected = load(folder_config(folder)).skipped
    for path in (cache_dir() / "folders").iterdir():
        for content in (b"", b"{", b"[]", b"\xff\xfe", b"not json", b"PK\x05\x06" + bytes(18)):
            path.write_bytes(content)
            assert load(folder_config(folder)).skipped == expected


def jpeg_with_comments(path: pathlib.Path, size, comments: int) -> bytes:
    """A JPEG file whose header has so many comments of 60 kB."""
    write_image(path, size=size)
    data = path.read_bytes()
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
    path.write_bytes(data[:2] + comments * comment + data[2:])
    return path.read_bytes()


def test_the_first_look_reads_headers_and_ends_and_decodes_what_they_leave_open(folder):
    for comments in (0, 1, 5):
        jpeg_with_comments(folder / "cat" / f"{comments}.jpg", (10, 20 + comments), comments)
    whole = jpeg_with_comments(folder / "dog" / "damaged.jpg", (10, 30), 0)
    scan = whole.index(b"\xff\xda") + 14
    (folder / "dog" / "damaged.jpg").write_bytes(whole[:scan] + whole[-2:])  # nothing between header and end
    (folder / "dog" / "padded.jpg").write_bytes(whole + b"\0\0")
    (folder / "dog" / "cut.jpg").write_bytes(whole[: scan + 20])
    (folder / "dog" / "start.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    dataset = load(folder_config(folder, image_size=8))
    used = {path.name for split in (dataset.train, dataset.test) for path in paths(split)}
    assert {"0.jpg", "1.jpg", "5.jpg", "padded.jpg", "damaged.jpg"} < used
    assert [(file.path, file.reason[:21]) for file in dataset.skipped] == [
        ("dog/cut.jpg", "cannot be decoded (im"),
        ("dog/start.png", "is not an image"),
    ]
    for _ in range(2):  # the second time from the index
        with pytest.raises(UserError, match="differ in size, from 8x8 to 30x10"):
            load(folder_config(folder))


def test_only_new_files_are_looked_at(folder, monkeypatch):
    def stored():
        return {path: path.stat().st_mtime_ns for path in (cache_dir() / "folders").iterdir()}

    looked_at, opened = [], open

    def count(path, *args, **kwargs):
        # Names are bytes there; the training images whose depth is looked at, at every start, are read by their paths.
        if isinstance(path, bytes) and path.startswith(os.fsencode(folder)):
            looked_at.append(os.path.basename(path))
        return opened(path, *args, **kwargs)

    def load_and_count():
        looked_at.clear()
        with monkeypatch.context() as context:
            context.setattr("builtins.open", count)
            dataset = load(folder_config(folder))
        return {path.name for split in (dataset.train, dataset.test) for path in paths(split)}

    assert len(load_and_count()) == len(looked_at) == 20
    before = stored()
    load_and_count()
    assert not looked_at and stored() == before
    write_image(folder / "cat" / "new.png")
    (folder / "dog" / "3.png").unlink()
    names = load_and_count()
    assert looked_at == [b"new.png"] and "new.png" in names and "3.png" not in names


def test_names_that_are_not_utf_8(folder):
    good = (folder / "cat" / "0.PNG").read_bytes()
    for name, content in ((b"\xe4 good.png", good), (b"\xff bad.png", b"")):
        with open(os.fsencode(folder / "cat") + b"/" + name, "wb") as file:
            file.write(content)
    for _ in range(2):  # the second time from the index
        dataset = load(folder_config(folder))
        assert [os.fsencode(file.path) for file in dataset.skipped] == [b"cat/\xff bad.png"]
        found = [split for split in (dataset.train, dataset.test) for path in paths(split) if "good" in path.name]
        names = [os.path.basename(os.fsencode(path)) for path in paths(found[0])]
        assert found[0].images.read(names.index(b"\xe4 good.png")) == good


def test_files_come_in_the_order_of_their_parts(folder):
    """A workdir of 0.1.0 goes on with the same splits only if the order stays that of pathlib."""
    for name in ("a/b.png", "a-b.png", "a.png", "a/c/d.png", "B.png", "ü.png", "\uffee.png", "\U0001f600.png"):
        write_image(folder / "train" / "dog" / name)
        write_image(folder / "train" / "cat" / name)
    for name in ("cat", "dog"):
        shutil.rmtree(folder / name)
    write_image(folder / "test" / "cat" / "0.png")
    dataset = load(folder_config(folder))
    assert paths(dataset.train) == [
        path for name in ("cat", "dog") for path in sorted((folder / "train" / name).rglob("*.png"))
    ]


def test_a_directory_that_cannot_be_read_is_skipped(folder, monkeypatch):
    write_image(folder / "cat" / "closed" / "0.png")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # file modes do not stop root
    (file,) = load(folder_config(folder)).skipped
    assert (file.path, file.reason) == ("cat/closed", "cannot be read (Permission denied)")


def test_folder_of_gray_and_colour_and_of_differing_sizes(folder):
    write_image(folder / "cat" / "gray.png", mode="L")
    assert load(folder_config(folder)).image_shape == (8, 8, 3)
    write_image(folder / "cat" / "wide.png", size=(20, 10))
    with pytest.raises(UserError, match=r"differ in size, from 8x8 to 10x20; set config.dataset.image_size"):
        load(folder_config(folder))
    dataset = load(folder_config(folder, image_size=16))
    assert dataset.image_shape == (16, 16, 3) and decoded(dataset.train, dataset).shape[1:] == (16, 16, 3)


def test_images_need_not_be_square(tmp_path):
    for name in "ab":
        for number in range(4):
            write_image(tmp_path / name / f"{number}.png", size=(10, 6))
    dataset = load(folder_config(tmp_path))
    assert dataset.image_shape == (6, 10, 3)
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths(dataset.train)])
    np.testing.assert_array_equal(decode_splits(dataset).train.images, pixels)
    assert load(folder_config(tmp_path, image_size=6)).image_shape == (6, 6, 3)
    wide = load(folder_config(tmp_path, image_size=(2, 10)))
    path = paths(wide.train)[0]
    for image in (decoded(wide.train, wide)[0], predict.read(path, wide.image_shape, wide.train.decoding)):
        np.testing.assert_array_equal(image, pixels[0, 2:4])


@pytest.fixture
def deep_folder(tmp_path):
    """Sixteen images of 12 bits in 16; the brightest training image reaches 4080, a test image 5000."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in "ab":
            for number in range(count):
                values = rng.integers(0, 100 * (number + 1), (8, 8)).astype(np.uint16)
                values[0, 0] = 4080 if number == 5 else 5000 if split == "test" else values[0, 0]
                path = tmp_path / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    return tmp_path


def test_deep_images_have_one_white_found_in_the_training_images(deep_folder, caplog):
    logging.getLogger("vitcls").addHandler(caplog.handler)
    dataset = load(folder_config(deep_folder))
    logging.getLogger("vitcls").removeHandler(caplog.handler)
    (line,) = set(caplog.messages)  # once or twice: other tests may have stopped its propagation
    assert "largest value of the training images is 4080, so 4095 becomes white; set config.dataset.max_value" in line
    measured = describe(dataset, folder_config(deep_folder))
    assert measured.max_value == 4095 and DatasetInfo.from_json(measured.to_json()) == measured
    as_arrays = decode_splits(dataset)
    for split, array in ((dataset.train, as_arrays.train), (dataset.test, as_arrays.test)):
        for index, path in enumerate(paths(split)):
            values = np.asarray(Image.open(path)).astype(int)
            expected = np.rint(np.minimum(values, 4095) * (255 / 4095))
            np.testing.assert_array_equal(array.images[index, ..., 0], expected)
            np.testing.assert_array_equal(read_image(split, index, dataset.image_shape)[..., 0], expected)
            np.testing.assert_array_equal(predict.read(path, dataset.image_shape, split.decoding)[..., 0], expected)


def test_a_deep_image_that_is_damaged_is_black_and_named(deep_folder, caplog):
    file = sorted(deep_folder.rglob("*.png"))[1]
    content = bytearray(file.read_bytes())
    start = content.index(b"IDAT") + 8
    content[start : start + 20] = bytes(20)
    file.write_bytes(content)
    dataset = load(folder_config(deep_folder))
    assert dataset.train.decoding.max_value == 4095
    decode_splits(dataset, ("train", "test"))
    assert f"{file} cannot be decoded" in caplog.text


def test_the_white_of_deep_images_can_be_given_or_kept(deep_folder):
    assert load(folder_config(deep_folder, max_value=1000.0)).test.decoding.max_value == 1000
    for kept in (0.0, 700.0):  # of a run, even one of version 0.1, that is evaluated
        assert load(folder_config(deep_folder), max_value=kept).test.decoding.max_value == kept


def test_a_deep_image_among_others_is_enough(folder):
    values = np.full((8, 8), 300, np.uint16)
    for name in ("cat", "dog"):
        Image.fromarray(values).save(folder / name / "deep.png")
    dataset = load(folder_config(folder))
    assert dataset.train.decoding.max_value == 511
    flat = [path for path in paths(dataset.train) if path.name != "deep.png"]
    np.testing.assert_array_equal(
        read_image(dataset.train, list(paths(dataset.train)).index(flat[0]), (8, 8, 3)),
        np.asarray(Image.open(flat[0])),
    )


def test_images_of_8_bits_cost_no_pass_for_a_white(tmp_path, monkeypatch):
    for name in "ab":
        for number in range(50):
            write_image(tmp_path / "train" / name / f"{number}.png")
            write_image(tmp_path / "test" / name / f"{number}.png")
    reads = []
    read = FileImages.read
    monkeypatch.setattr(FileImages, "read", lambda self, index: reads.append(index) or read(self, index))
    assert load(folder_config(tmp_path)).train.decoding.max_value == 0
    assert len(reads) == len(set(reads)) == 64 and {0, 99} <= set(reads)


def test_folders_that_cannot_be_used(tmp_path):
    def refused(message, root=tmp_path):
        with pytest.raises(UserError, match=message) as error:
            load(folder_config(root))
        assert "\n" not in str(error.value)

    refused("is not a directory", tmp_path / "none")
    refused("is not a directory", "")
    refused("has no directories")
    (tmp_path / "cat").mkdir()
    refused("has 1 class")
    (tmp_path / "dog").mkdir()
    refused("train split .* is empty")
    for number in range(3):
        write_image(tmp_path / "cat" / f"{number}.png")
    (tmp_path / "dog" / "0.png").touch()
    refused(r"class 'dog' of .* has no training image.*\(1 file was skipped; dog/0\.png is empty\)")
    for number in range(1, 3):
        (tmp_path / "cat" / f"{number}.png").unlink()
    write_image(tmp_path / "dog" / "1.png")
    refused("no class has two examples, so no test split can be carved; give the data set a test split of its own")


def test_a_class_of_one_image_does_not_stop_a_folder(folder, caplog):
    write_image(folder / "bird" / "0.png")
    dataset = load(folder_config(folder, validation=0.25))
    assert dataset.class_names == ("bird", "cat", "dog")
    counts = [np.bincount(split.labels, minlength=3) for split in (dataset.train, dataset.validation, dataset.test)]
    np.testing.assert_array_equal(counts, [[1, 6, 6], [0, 2, 2], [0, 2, 2]])
    assert [line.split("; ")[0] for line in caplog.messages] == [
        "class 'bird' has a single example, which stays in training"
    ] * 2


def test_folder_links_that_lead_nowhere_or_in_circles(folder):
    (folder / "cat" / "self.png").symlink_to(folder / "cat" / "self.png")
    (folder / "cat" / "gone.png").symlink_to(folder / "cat" / "none.png")
    (folder / "bird").symlink_to(folder / "cat", target_is_directory=True)
    skipped = {file.path: file.reason for file in load(folder_config(folder)).skipped}
    assert skipped == {
        "bird": "is a linked directory; copy or move it here",
        "cat/self.png": "is a link to no file",
        "cat/gone.png": "is a link to no file",
    }


def test_classes_may_be_called_like_splits(tmp_path):
    for name in ("train", "plane"):
        for number in range(3):
            write_image(tmp_path / name / f"{number}.png")
    assert load(folder_config(tmp_path, test=0.34)).class_names == ("plane", "train")


def test_splits_of_a_folder_must_make_sense(tmp_path):
    for split in ("val", "test"):
        write_image(tmp_path / split / "a" / "0.png")
    with pytest.raises(UserError, match="has a directory 'test' but no 'train'"):
        load(folder_config(tmp_path))
    write_image(tmp_path / "train" / "a" / "0.png")
    write_image(tmp_path / "valid" / "a" / "0.png")
    with pytest.raises(UserError, match="are both the validation split"):
        load(folder_config(tmp_path))


@pytest.fixture
def split_folder(tmp_path):
    """Two classes of three training images and one test image each, and another test split out of the folder."""
    for place in (tmp_path / "pets" / "train", tmp_path / "pets" / "test", tmp_path / "outside"):
        for name, number in itertools.product("ab", range(3)):
            write_image(place / name / f"{number}.png", seed=number)
    return tmp_path / "pets"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rm -r test; ln -s ../outside test", "pets/test is a linked directory; copy or move it here"),
        ("ln -s ../outside val", "pets/val is a linked directory; copy or move it here"),
        ("rm -r train; ln -s ../outside train", "pets/train is a linked directory; copy or move it here"),
        ("mv test Test", "pets/Test is no split by its name; call it 'test'"),
        ("mv test Test; mv train Train", "pets/Test is no split by its name; call it 'test'"),
        ("mv test/a/* test; rm -r test/a test/b", "pets/test has no directories; put the images of each class in"),
        ("rm -r train/?; ln -s ../../outside/a train/a", "pets/train/a is a linked directory; copy or move it here"),
        ("rm -r train/b; ln -s ../../outside/b train/b", "does not have; there it is a link, which is not followed"),
    ],
)
def test_no_split_is_left_out_in_silence(split_folder, change, words):
    subprocess.run(change, shell=True, cwd=split_folder, check=True)
    with pytest.raises(UserError) as caught:
        load(folder_config(split_folder))
    assert words in str(caught.value)


def test_a_linked_class_of_a_split_is_skipped_as_it_is_said(split_folder):
    shutil.rmtree(split_folder / "test" / "b")
    (split_folder / "test" / "b").symlink_to("../../outside/b", target_is_directory=True)
    dataset = load(folder_config(split_folder))
    assert dataset.skipped == (SkippedFile("test/b", "is a linked directory; copy or move it here"),)
    assert {path.parent.name for path in paths(dataset.test)} == {"a"}


def test_an_empty_split_is_none(split_folder):
    shutil.rmtree(split_folder / "test")
    (split_folder / "test").mkdir()
    assert len(load(folder_config(split_folder, test=0.34)).test.labels) == 2


def test_a_file_that_could_not_be_read_is_tried_again(folder, monkeypatch):
    denied = folder / "cat" / "0.PNG"
    opened = open

    def refuse(path, *args, **kwargs):
        if path == os.fsencode(denied):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr("builtins.open", refuse)  # file modes do not stop root
        (file,) = load(folder_config(folder)).skipped
    assert (file.path, file.reason) == ("cat/0.PNG", "cannot be read (Permission denied)")
    assert load(folder_config(folder)).skipped == ()


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_cache_that_others_could_write_programs_into_is_refused(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("VITCLS_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    assert cache.cache_dir() == tmp_path / "cache"
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(UserError, match=f"can be written by others; run 'chmod 700 {tmp_path}/cache'"):
        cache.cache_dir()
