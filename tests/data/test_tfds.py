"""TFDS sets and records against what was put into them, on a disk and in buckets."""

import os
import pathlib
import shutil
import struct
import subprocess
import sys

import fsspec
import jax
import numpy as np
import pytest

from tests import bucket
from tests.data.loaded import config, decoded
from vitcls.core.cache import cache_dir
from vitcls.core.errors import RunError, UserError
from vitcls.core.sharding import all_devices
from vitcls.data import images as image_files
from vitcls.data.loading import load
from vitcls.data.records import index_records
from vitcls.data.streaming import Streaming
from vitcls.data.tfrecord import crc32c
from vitcls.prepare import prepare

RNG = np.random.default_rng(0)
PREPARE = """
import io, sys, tensorflow_datasets as tfds, numpy as np
from PIL import Image

def prepare(name, splits, **options):
    builder = tfds.builder(name, **{"data_dir": sys.argv[1]} | options)
    builder._split_generators = lambda *_: {split: enumerate(examples) for split, examples in splits.items()}
    builder.download_and_prepare()

rng = np.random.default_rng(0)

def jpeg(number):
    file = io.BytesIO()
    shape = (10 + number % 3, 12, 3)
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file, "JPEG")
    file.seek(0)
    return file

def imagenet(count, label):
    return [{"image": jpeg(i), "label": label(i), "file_name": f"{i}.jpg"} for i in range(count)]

prepare("imagenet2012", {
    "train": imagenet(1000, lambda i: i),
    "validation": imagenet(30, lambda i: i),
    "test": imagenet(5, lambda i: -1),
})
prepare("binary_alpha_digits", {
    "train": [{"image": np.full((20, 16, 1), i, np.uint8), "label": i % 36} for i in range(72)],
})
arrays = np.load(sys.argv[2])
mnist = {
    split: [
        {"image": image, "label": int(label)} for image, label in zip(arrays[f"x_{split}"], arrays[f"y_{split}"])
    ]
    for split in ("train", "test")
}
prepare("mnist", mnist)
prepare("mnist", mnist, data_dir=sys.argv[1] + "/array_record", file_format="array_record")
prepare("mnist", mnist, data_dir=sys.argv[1] + "/parquet", file_format="parquet")
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS directory, written by TFDS: a small ImageNet (no labels in 'test'), a set that has only 'train', and
    images in the place of MNIST's, which lie beside them as mnist.npz."""
    directory = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(1)
    arrays = {}
    for split, count in (("train", 200), ("test", 50)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 28, 28, 1), np.uint8)
        arrays[f"y_{split}"] = rng.permutation(count) % 10
    np.savez(directory / "mnist.npz", **arrays)
    command = [sys.executable, "-c", PREPARE, directory, directory / "mnist.npz"]
    subprocess.run(command, check=True, capture_output=True)
    return directory


def tfds_config(directory, **values):
    return config(**{"name": "mnist", "data_dir": str(directory), "validation": 0.0} | values)


def as_rows(images, labels):
    """The examples in an order that does not depend on how they were stored."""
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_tfds_gives_the_examples_that_were_prepared(prepared):
    dataset = load(tfds_config(prepared))
    assert dataset.name == "mnist" and dataset.image_shape == (28, 28, 1) and dataset.validation is None
    assert dataset.class_names == tuple("0123456789") and dataset.train.labels.dtype == np.int32
    with np.load(prepared / "mnist.npz") as arrays:
        for split, name in ((dataset.train, "train"), (dataset.test, "test")):
            assert as_rows(decoded(split, dataset), split.labels) == as_rows(arrays[f"x_{name}"], arrays[f"y_{name}"])
    chosen = np.array([5, 0, 17])
    np.testing.assert_array_equal(decoded(dataset.train.take(chosen), dataset), decoded(dataset.train, dataset)[chosen])


def test_tfds_in_array_record_form_is_the_same_set(prepared):
    dataset, expected = load(tfds_config(prepared / "array_record")), load(tfds_config(prepared))
    for split, same in ((dataset.train, expected.train), (dataset.test, expected.test)):
        assert len(split.labels) > 40
        np.testing.assert_array_equal(split.labels, same.labels)
        np.testing.assert_array_equal(decoded(split, dataset), decoded(same, expected))
    assert dataset.train.images.name(3).startswith("the image of record 3 of ")


def test_a_form_that_is_not_read_is_one_line(prepared):
    with pytest.raises(UserError, match=r"'mnist' is prepared as parquet, .* as tfrecord or array_record"):
        load(tfds_config(prepared / "parquet"))


def test_damaged_array_records_are_named(prepared, tmp_path):
    shutil.copytree(prepared / "array_record" / "mnist", tmp_path / "mnist")
    (path,) = tmp_path.glob("mnist/*/mnist-train*")
    whole, images = path.read_bytes(), load(tfds_config(tmp_path)).train.images
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(UserError, match=r"mnist-train.* is damaged \(.*hash mismatch.*\); prepare the data set again"):
        images.read(0)
    for damaged in (path.read_bytes(), whole[:-3], whole[:1000], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"mnist-train.* is damaged \(.*\); prepare the data set again"):
            load(tfds_config(tmp_path))
    path.unlink()
    with pytest.raises(OSError, match="mnist-train"):  # which is waited for, as by _Patience
        images.read(0)


@pytest.fixture(params=["gs", "s3"])
def buckets(request, monkeypatch):
    """fsspec's view of a server of buckets, one of which is called runs."""
    monkeypatch.setattr(image_files, "_THREADS_AFAR", 4)  # the server of gs accepts five connections at once
    process, url = bucket.start_server(request.param)
    go_to(request.param, url, monkeypatch)
    yield bucket.files(request.param, url)
    process.communicate()


def go_to(scheme, url, monkeypatch):
    """Makes clients look for buckets at `url`."""
    for name, value in bucket.environment(scheme, url).items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class(scheme).clear_instance_cache()  # S3's knows its server from the start


@pytest.mark.by_turns
def test_tfds_in_a_bucket_is_the_same_set(prepared, buckets):
    """Read by ranges of bytes; resized images of differing sizes, and the first batch of a stream, are the disk's."""
    url = f"{buckets.protocol[0]}://runs/data"
    for name in ("imagenet2012", "mnist"):
        buckets.put(str(prepared / name), f"runs/data/{name}", recursive=True)
    for values in ({}, {"name": "imagenet2012", "image_size": 8}):
        dataset, expected = load(tfds_config(url, **values)), load(tfds_config(prepared, **values))
        np.testing.assert_array_equal(dataset.train.labels, expected.train.labels)
        np.testing.assert_array_equal(decoded(dataset.test, dataset), decoded(expected.test, expected))
        part = dataset.train.take(np.array([90, 3, 91, 7, 3]))
        np.testing.assert_array_equal(decoded(part, dataset), decoded(dataset.train, dataset)[[90, 3, 91, 7, 3]])
    inputs = []
    for split in (dataset.train, expected.train):
        shape = {"image_shape": (8, 8, 3), "num_classes": 1000, "batch_size": 64}
        stream = Streaming(all_devices("data"), split, seed=0, balanced=False, crop=None, **shape)
        inputs.append(stream.host_inputs(2, 3))
        stream.close()
    afar, near = inputs
    jax.tree.map(np.testing.assert_array_equal, afar, near)
    with pytest.raises(UserError, match=f"'cifar10' is not prepared in {url}; .* and copy it there"):
        load(tfds_config(url, name="cifar10"))
    with pytest.raises(UserError, match=r"the bucket .*nowhere is not there; create it, or use another data_dir"):
        load(tfds_config(url.replace("runs", "nowhere")))
    with pytest.raises(UserError, match=f"--data_dir={url} is a URL; prepare 'mnist' on a disk"):
        prepare("mnist", url)


@pytest.mark.by_turns
def test_records_that_lie_together_are_read_by_one_request(prepared, buckets, monkeypatch):
    """Up to a size, and with what lies between them up to another; the images are the same."""
    scheme = buckets.protocol[0]
    buckets.put(str(prepared / "mnist"), "runs/data/mnist", recursive=True)
    proxy = bucket.Proxy(os.environ[next(iter(bucket.environment(scheme, "")))])
    go_to(scheme, proxy.url, monkeypatch)
    dataset = load(tfds_config(f"{scheme}://runs/data"))
    ends = dataset.train.take(np.array([199, 0, 199]))
    wanted = decoded(load(tfds_config(prepared)).train, dataset)
    for part, gap, requests in ((2**20, 2**14, 2), (2**20, -1, 201), (2**14, 2**14, 13)):
        monkeypatch.setattr("vitcls.data.records._PART", part)
        monkeypatch.setattr("vitcls.data.records._GAP", gap)
        before = proxy.answered
        np.testing.assert_array_equal(decoded(dataset.train, dataset), wanted)
        assert proxy.answered - before == requests
        np.testing.assert_array_equal(decoded(ends, dataset), wanted[[199, 0, 199]])
    proxy.close()


@pytest.mark.by_turns
@pytest.mark.parametrize("file", ["dataset_info.json", "tfrecord"])
def test_a_bucket_that_falls_silent_is_told_in_a_line(prepared, buckets, monkeypatch, file):
    """While a set is described, and while its records are looked for."""
    scheme = buckets.protocol[0]
    buckets.put(str(prepared / "mnist"), "runs/data/mnist", recursive=True)
    proxy = bucket.Proxy(os.environ[next(iter(bucket.environment(scheme, "")))])
    go_to(scheme, proxy.url, monkeypatch)
    monkeypatch.setattr("vitcls.core.buckets._ANSWER", 1.0)
    url = f"{scheme}://runs/data"
    with proxy.catch(file, "head"), pytest.raises(RunError, match=rf"{url} cannot be reached \(no answer\)"):
        load(tfds_config(url))


def test_tfds_by_version_and_with_a_validation_split(prepared):
    dataset = load(tfds_config(prepared, name="mnist:3.*.*", validation=0.2))
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [160, 40, 50]


def test_no_tensorflow_is_loaded(prepared):
    code = (
        "import sys; from vitcls.config import default_config; from vitcls.data.loading import load\n"
        "block = default_config('improved_vit_tiny').dataset\n"
        "block.update(name='mnist', data_dir=sys.argv[1])\n"
        "load(block).train.images.read(0)\n"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, prepared], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_labels_that_are_not_public_make_validation_the_test_split(prepared):
    with pytest.raises(UserError, match=r"differ in size, from 10x12 to 12x12; set config.dataset.image_size"):
        load(tfds_config(prepared, name="imagenet2012"))
    dataset = load(tfds_config(prepared, name="imagenet2012", image_size=8))
    assert dataset.num_classes == 1000 and dataset.validation is None and dataset.image_shape == (8, 8, 3)
    np.testing.assert_array_equal(np.sort(dataset.train.labels), np.arange(1000))
    np.testing.assert_array_equal(np.sort(dataset.test.labels), np.arange(30))
    assert dataset.class_names[0] == "n01440764"


def test_tfds_without_a_test_split_is_split(prepared):
    dataset = load(tfds_config(prepared, name="binary_alpha_digits", test=0.5))
    assert dataset.image_shape == (20, 16, 1)
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), np.ones(36))
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), np.ones(36))
    values = decoded(dataset.train, dataset)[:, 0, 0, 0]  # each image is filled with its number
    np.testing.assert_array_equal(values % 36, dataset.train.labels)


def test_tfds_sets_without_tfds(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"'cifar10' is one of TensorFlow Datasets, .* or use one of .*npz"):
        load(tfds_config(tmp_path, name="cifar10"))


def test_tfds_sets_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"'cifar1000' is not known; did you mean 'cifar100'\?"):
        load(tfds_config(tmp_path, name="cifar1000"))
    with pytest.raises(UserError, match=r"'digit' is not known; did you mean 'digits'\?"):
        load(tfds_config(tmp_path, name="digit"))
    for name in ("cifar10:9.9.9", "cifar10/nothing", "cifar10/x=3", "", "a/b/c d"):
        with pytest.raises(UserError, match="is not known"):
            load(tfds_config(tmp_path, name=name))
    for name in ("huggingface:x/y", "kaggle:digits", "some-one:cifar10/a:1.0.0"):
        with pytest.raises(UserError, match=f"'{name}' has a namespace"):
            load(tfds_config(tmp_path, name=name))
    with pytest.raises(UserError, match=r"not prepared in .*cifar100.*vitcls prepare cifar100 --data_dir="):
        load(tfds_config(tmp_path, name="cifar100"))
    assert not list(tmp_path.iterdir())


def test_the_index_of_records_is_kept_and_made_anew_when_damaged(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("VITCLS_CACHE_DIR", str(tmp_path))
    expected = load(tfds_config(prepared)).train.labels
    indexes = sorted((tmp_path / "indexes").iterdir())
    assert [path.suffix for path in indexes] == [".npz", ".npz"]
    before = [path.stat().st_mtime_ns for path in indexes]
    np.testing.assert_array_equal(load(tfds_config(prepared)).train.labels, expected)
    assert [path.stat().st_mtime_ns for path in indexes] == before
    whole = indexes[0].read_bytes()
    for damaged in (b"", b"no zip", whole[:50], whole[: len(whole) // 2], whole[:-200]):
        for path in indexes:
            path.write_bytes(damaged)
        np.testing.assert_array_equal(load(tfds_config(prepared)).train.labels, expected)
        assert sorted((tmp_path / "indexes").iterdir()) == indexes


def record_file(path: pathlib.Path, records: list[bytes]) -> pathlib.Path:
    """A TFRecord file; the checksums of records are left out, as nothing reads them."""
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            checksum = crc32c(length)
            masked = (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) % 2**32
            file.write(length + struct.pack("<I", masked) + record + bytes(4))
    return path


def parse(record: bytes) -> tuple[bytes, int]:
    return record[1:], record[0]


def test_crc32c():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the standard
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_records_are_read_in_any_order_from_several_files(tmp_path):
    records = [bytes([k % 5]) + RNG.bytes(k) for k in range(30)]
    files = [record_file(tmp_path / f"{k}", records[10 * k : 10 * k + 10]) for k in range(3)]
    files.insert(1, record_file(tmp_path / "empty", []))
    images, labels = index_records(files, parse)
    np.testing.assert_array_equal(labels, np.arange(30) % 5)
    for index in RNG.permutation(30):
        assert images.read(index) == records[index][1:]
    taken = images.take(np.array([29, 3]))
    assert [taken.read(0), taken.read(1)] == [records[29][1:], records[3][1:]]


def damage(name: str, path: pathlib.Path):
    data = bytearray(path.read_bytes())
    second = 16 + struct.unpack("<Q", data[:8])[0]
    match name:
        case "cut record":
            del data[-10:]
        case "cut header":
            del data[second + 6 :]
        case "long":
            data[second : second + 8] = struct.pack("<Q", 2**60)
        case "bit":
            data[second] ^= 1
        case "zeros":
            data[second:] = bytes(16 * 100)
        case "html":
            data[:] = b"<html>" * 100
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["cut record", "cut header", "long", "bit", "zeros", "html"])
def test_damaged_record_files_are_named(tmp_path, name):
    path = record_file(tmp_path / "file.tfrecord", [bytes([k]) + RNG.bytes(50) for k in range(4)])
    damage(name, path)
    with pytest.raises(UserError, match=r"file\.tfrecord is damaged or cut short at byte"):
        index_records([path], parse)


def test_damaged_tfds_files_are_named(prepared, tmp_path):
    shutil.copytree(prepared / "mnist", tmp_path / "mnist")
    (path,) = tmp_path.glob("mnist/*/mnist-train*")
    data = bytearray(path.read_bytes())
    data[12:40] = b"\xff" * 28  # the record, not its length
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"the record at 12 of .*mnist-train.* cannot be read"):
        load(tfds_config(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=r"mnist-train.* cannot be read .*prepare the data set again"):
        load(tfds_config(tmp_path))


def test_a_full_disk_costs_the_cache_only(tmp_path, monkeypatch):
    monkeypatch.setenv("VITCLS_CACHE_DIR", str(tmp_path / "cache"))
    path = record_file(tmp_path / "file", [b"\1a", b"\2b"])
    (cache_dir() / "indexes").write_text("a file where the directory should be")
    assert index_records([path], parse)[1].tolist() == [1, 2]
    assert os.listdir(tmp_path / "cache") == ["indexes"]
