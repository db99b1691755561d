import dataclasses
import gc
import io
import math
import os
import threading
import time
import tracemalloc
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from vitcls import data
from vitcls.core import sharding
from vitcls.core.errors import RunError, UserError
from vitcls.data import pipelines, streaming
from vitcls.data.dataset import Dataset, Split
from vitcls.data.images import Decoding
from vitcls.data.memory import host_memory_bytes
from vitcls.data.order import epoch_order
from vitcls.data.pipelines import kept_shape
from vitcls.data.records import index_records
from vitcls.data.settings import DatasetSettings
from vitcls.data.sources.folder import FileImages

SHAPE = (6, 6, 3)


def dataset(num_examples=40, encoded_in=None):
    """Image i is filled with the value i, so that a batch tells which examples it has."""
    images = np.broadcast_to(
        np.arange(num_examples, dtype=np.uint8)[:, None, None, None], (num_examples, *SHAPE)
    ).copy()
    labels = (np.arange(num_examples) % 4 == 0).astype(np.int32)
    split = Split(images, labels)
    if encoded_in is not None:
        paths = tuple(encoded_in / f"{i:03d}.png" for i in range(num_examples))
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image).save(path)
        split = Split(image_files(paths), labels)
    return Dataset("test", ("no", "yes"), split, split, split, SHAPE)


def image_files(paths):
    """Images in files of one directory."""
    return FileImages(str(paths[0].parent), np.array([path.name.encode() for path in paths]))


def config(**values):
    block = {
        "pipeline": "resident",
        "sampling": "uniform",
        "random_resized_crop": False,
        "fast_decode": False,
        "crop_area": (0.08, 1.0),
        "crop_ratio": (0.75, 4 / 3),
        "mean": (),
        "std": (),
    }
    return ConfigDict(block | values)


def read(dataset, config, steps, *, batch_size=16, length=2, seed=0, partition=None):
    """The batches of calls that start at `steps`, on the host: image [calls, length, B, ...] and so on."""
    partition = partition or sharding.all_devices("data")
    batches = data.train_batches(dataset, config, partition=partition, batch_size=batch_size, seed=seed)
    gather = jax.jit(lambda given, step: jax.vmap(batches.batch_fn(given, step, length))(np.arange(length)))
    read = [jax.device_get(gather(batches.host_inputs(step, length), np.int32(step))) for step in steps]
    return jax.tree.map(lambda *parts: np.stack(parts), *read)


@pytest.mark.by_turns
@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_both_pipelines_give_the_same_batches(tmp_path, sampling):
    resident = read(dataset(), config(sampling=sampling), [0, 2, 4])
    in_memory = read(dataset(), config(sampling=sampling, pipeline="streaming"), [0, 2, 4])
    encoded = read(dataset(encoded_in=tmp_path), config(sampling=sampling, pipeline="streaming"), [0, 2, 4])
    jax.tree.map(np.testing.assert_array_equal, resident, in_memory)
    jax.tree.map(np.testing.assert_array_equal, resident, encoded)
    assert (resident["label"] == (resident["image"][..., 0, 0, 0] % 4 == 0)).all()
    if sampling == "balanced":
        assert resident["label"].reshape(-1)[:40].mean() == 0.5


def test_reading_goes_on_when_a_disk_comes_back(tmp_path, caplog):
    photos, away = tmp_path / "photos", tmp_path / "away"
    photos.mkdir()
    encoded = dataset(encoded_in=photos)
    undisturbed = read(encoded, config(pipeline="streaming"), [0, 2, 4])
    photos.rename(away)
    threading.Timer(2.0, away.rename, [photos]).start()
    disturbed = read(encoded, config(pipeline="streaming"), [0, 2, 4])
    jax.tree.map(np.testing.assert_array_equal, disturbed, undisturbed)
    gone, back = caplog.messages
    assert "No such file or directory" in gone and gone.endswith("; trying again for 120 s")
    assert back == "the data can be read again"


def test_a_disk_that_does_not_come_back_ends_the_run_in_one_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(streaming, "_PATIENCE", 1.0)
    encoded = dataset(encoded_in=tmp_path)
    (tmp_path / "007.png").unlink()
    with pytest.raises(RunError, match=r"could not be read for 1 s \(.*007.png'\); the last checkpoint is kept, and"):
        read(encoded, config(pipeline="streaming"), [0, 2, 4])
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("pipeline", ["resident", "streaming"])
def test_every_epoch_has_every_example_once(pipeline):
    batches = read(dataset(), config(pipeline=pipeline), range(0, 10, 2))
    seen = batches["image"][..., 0, 0, 0].reshape(-1)  # 10 batches of 16 are 4 epochs of 40
    for epoch in np.split(seen, 4):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(40))
    assert not np.array_equal(seen[:40], seen[40:80])


@pytest.mark.parametrize("pipeline", ["resident", "streaming"])
def test_a_run_can_be_entered_at_any_step(pipeline):
    whole = read(dataset(), config(pipeline=pipeline), [0, 2, 4, 6])
    late = read(dataset(), config(pipeline=pipeline), [6, 2])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[[3, 1]], b), whole, late)
    other = read(dataset(), config(pipeline=pipeline), [0], seed=1)
    assert not np.array_equal(whole["image"][0], other["image"][0])


def test_an_order_is_computed_once_for_all_threads_and_before_it_is_needed():
    computed, begun = [], [threading.Event() for _ in range(5)]

    def compute(epoch):
        computed.append(epoch)
        begun[epoch].set()
        time.sleep(0.05)  # long enough for all the threads to ask
        return np.random.default_rng(epoch).permutation(10)

    order = streaming._once_and_ahead(compute)
    with ThreadPoolExecutor(8) as threads:
        for epoch in range(4):
            for found in threads.map(order, [epoch] * 8):
                np.testing.assert_array_equal(found, np.random.default_rng(epoch).permutation(10))
            assert begun[epoch + 1].wait(10)
    assert computed == [0, 1, 2, 3, 4]
    assert order(0).tolist() == np.random.default_rng(0).permutation(10).tolist()  # a run that is entered again


def test_a_damaged_file_is_black_in_both_pipelines_and_ends_no_run(tmp_path, caplog):
    encoded = dataset(encoded_in=tmp_path)
    path = tmp_path / "007.png"
    data_chunk = path.read_bytes().index(b"IDAT") + 4
    path.write_bytes(path.read_bytes()[:data_chunk] + b"\xff" * 8 + path.read_bytes()[data_chunk + 8 :])
    clean = read(dataset(), config(), [0, 2, 4])
    clean["image"][clean["image"] == 7] = 0
    for pipeline in ("resident", "streaming"):
        jax.tree.map(np.testing.assert_array_equal, clean, read(encoded, config(pipeline=pipeline), [0, 2, 4]))
    crop = read(encoded, config(pipeline="streaming", random_resized_crop=True), [0, 2, 4])
    assert not np.any(crop["image"] == 7)
    partition = sharding.all_devices("data")
    batches = data.EvaluationBatches(encoded.test, image_shape=SHAPE, partition=partition, batch_size=16)
    seen = np.concatenate([jax.device_get(batch)["image"][:, 0, 0, 0] for batch in batches])[:40]
    np.testing.assert_array_equal(seen, np.where(np.arange(40) == 7, 0, np.arange(40)))
    (line,) = caplog.messages
    assert line.startswith(f"{path} cannot be decoded (") and "it is taken as a black image" in line


@pytest.mark.by_turns
@pytest.mark.parametrize("pipeline", ["streaming", "resident"])
@pytest.mark.parametrize("height_and_width", [(12, 12), (8, 14)])
def test_random_resized_crops_are_a_function_of_the_place_in_the_run(tmp_path, height_and_width, pipeline):
    rng = np.random.default_rng(0)
    paths = tuple(tmp_path / f"{i}.png" for i in range(8))
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    split = Split(image_files(paths), np.arange(8, dtype=np.int32) % 2)
    files = Dataset("test", ("a", "b"), split, None, split, (*height_and_width, 3))
    cropping = config(pipeline=pipeline, random_resized_crop=True)
    first, again = (read(files, cropping, steps, batch_size=8, length=1) for steps in ([0, 1], [1]))
    np.testing.assert_array_equal(first["image"][1], again["image"][0])
    assert first["image"].shape == (2, 1, 8, *height_and_width, 3)
    assert not np.array_equal(np.sort(first["image"][0], axis=None), np.sort(first["image"][1], axis=None))


def test_fast_decoding_is_of_large_crops_in_training_alone(tmp_path):
    y, x = np.mgrid[0:128, 0:160]
    path = tmp_path / "ramp.jpg"
    Image.fromarray(np.stack([x, y, 128 + 8 * ((x // 8 + y // 8) % 2)], -1).astype(np.uint8)).save(path, quality=95)
    split = Split(image_files((path,) * 8), np.arange(8, dtype=np.int32) % 2)
    files = Dataset("test", ("a", "b"), split, None, split, (24, 24, 3))
    block = {"pipeline": "streaming", "random_resized_crop": True, "crop_area": (0.2, 0.8)}
    usual, fast = (
        read(files, config(fast_decode=fast, **block), [0], batch_size=8, length=1)["image"].astype(int)
        for fast in (False, True)
    )
    assert not np.array_equal(usual, fast) and np.abs(usual - fast).mean() < 2
    evaluated = [streaming.read_image(split, 0, (24, 24, 3)) for _ in range(2)]
    np.testing.assert_array_equal(*evaluated)
    with pytest.raises(ValueError, match="fast_decode=True is impossible; it must be False without random_resized"):
        DatasetSettings(fast_decode=True)


class Counting:
    """Encoded images that know which of them were read."""

    def __init__(self, images):
        self.images, self.seen = images, []

    def __len__(self):
        return len(self.images)

    def read(self, index):
        self.seen.append(index)
        return self.images.read(index)

    def name(self, index):
        return self.images.name(index)


def encoded_images(kind, directory, count):
    """`count` PNGs as files, or in four TFRecord files."""
    files = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(np.full(SHAPE, number % 256, np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    if kind == "folder":
        paths = [directory / f"{number:04d}.png" for number in range(count)]
        for path, data in zip(paths, files, strict=True):
            path.write_bytes(data)
        return image_files(paths)
    shards = [str(directory / f"{shard}.tfrecord") for shard in range(4)]
    for shard, name in enumerate(shards):
        with tf_record_writer(name) as writer:
            for data in files[shard::4]:
                writer.write(data)
    return index_records(shards, lambda record: (record, 0))[0]


def tf_record_writer(name):
    import tensorflow as tf

    return tf.io.TFRecordWriter(name)


def processes(owners, monkeypatch):
    """For every process a partition as it would see it: `owners` says whose each device of the mesh is."""
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(process_index=owner) for owner in owners]))
    for process in sorted(set(owners)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        yield sharding.Partition("data", mesh)


def test_a_stream_that_is_dropped_reads_no_more(tmp_path, monkeypatch):
    """At once, not when garbage is collected: a thread in C++ at the end of Python ends the process with an abort."""
    images = Counting(encoded_images("records", tmp_path, 64))
    slow = images.read
    monkeypatch.setattr(images, "read", lambda index: time.sleep(0.02) or slow(index))
    arguments = dict(image_shape=SHAPE, num_classes=4, batch_size=16, seed=0, balanced=False, crop=None)
    gc.disable()
    try:
        stream = streaming.Streaming(sharding.all_devices("data"), Split(images, np.zeros(64, np.int32)), **arguments)
        stream.host_inputs(0, 1)
        del stream
        time.sleep(0.1)  # the reads that were on their way
        read = len(images.seen)
        time.sleep(0.3)
        assert len(images.seen) == read < 80  # five batches, of which four are read ahead
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["folder", "records"])
def test_no_process_reads_the_images_of_another(kind, tmp_path, monkeypatch):
    encoded = encoded_images(kind, tmp_path, 640)
    labels = np.arange(640, dtype=np.int32) % 4
    seen, trained, evaluated = [], [], []
    for partition in processes([0, 0, 1, 1, 1, 1, 0, 0], monkeypatch):  # as the mesh of a TPU slice has them
        images = Counting(encoded)
        arguments = dict(image_shape=SHAPE, num_classes=4, batch_size=16, seed=0, balanced=False, crop=None)
        batches = streaming.Streaming(partition, Split(images, labels), **arguments)._read_from(0)
        trained.append(np.concatenate([next(batches)["image"][:, 0, 0, 0] for _ in range(10)]))
        batches.close()
        seen.append(set(images.seen))
        assert len(images.seen) == len(seen[-1])  # far from the end of the first epoch: none is read twice
        images.seen.clear()
        for batch in streaming.evaluation_batches(partition, Split(images, labels), image_shape=SHAPE, batch_size=16):
            assert len(batch["mask"]) == 8
        evaluated.append(sorted(images.seen))
    assert not seen[0] & seen[1] and min(map(len, seen)) >= 80
    order = np.asarray(epoch_order(0, 0, labels, num_classes=4, balanced=False))[:160]
    names = [encoded.read(index) for index in order]
    both = np.sort(np.concatenate(trained))
    np.testing.assert_array_equal(both, np.sort([np.asarray(Image.open(io.BytesIO(x)))[0, 0, 0] for x in names]))
    assert not set(evaluated[0]) & set(evaluated[1])
    assert sorted(evaluated[0] + evaluated[1]) == list(range(640))


def test_random_resized_crops_of_images_in_memory_need_them_on_the_devices():
    message = r"random_resized_crop with pipeline='streaming' is for image files; those of 'test' are in memory"
    with pytest.raises(UserError, match=message):
        data.choose_pipeline(dataset(), config(pipeline="streaming", random_resized_crop=True))
    assert data.choose_pipeline(dataset(), config(pipeline="auto", random_resized_crop=True)) == "resident"


@pytest.mark.parametrize(
    ("size", "least", "largest", "kept"),
    [
        ((224, 224), 0.08, (500, 500), (256, 256)),
        ((64, 64), 0.08, (500, 500), (227, 227)),  # 64 / sqrt(0.08)
        ((64, 64), 0.25, (500, 500), (128, 128)),
        ((64, 64), 0.08, (90, 120), (90, 120)),
        ((64, 64), 0.08, (40, 40), (64, 64)),
        ((64, 64), 0.08, None, (227, 227)),
        ((384, 384), 0.08, (500, 500), (384, 384)),
    ],
)
def test_of_image_files_so_much_is_kept_that_crops_are_not_enlarged(tmp_path, size, least, largest, kept):
    files = dataclasses.replace(dataset(encoded_in=tmp_path), image_shape=(*size, 3), largest=largest)
    assert kept_shape(files, config(random_resized_crop=True, crop_area=(least, 1.0))) == (*kept, 3)
    assert kept_shape(files, config()) == (*size, 3)


def test_a_crop_of_everything_is_the_image_whatever_it_was_squeezed_into(tmp_path):
    """A picture of 40x20 pixels is kept as a square; the crop that has its own shape and area shows it undistorted."""
    columns = np.linspace(0, 255, 40)[None, :, None]
    picture = np.broadcast_to(columns, (20, 40, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "0.png")
    Image.fromarray(picture[:, ::-1]).save(tmp_path / "1.png")
    split = Split(image_files((tmp_path / "0.png", tmp_path / "1.png")), np.int32([0, 1]))
    files = Dataset("test", ("a", "b"), split, None, split, (10, 20, 3))
    block = config(random_resized_crop=True, crop_area=(1.0, 1.0), crop_ratio=(2.0, 2.0))
    batch = read(files, block, [0], batch_size=8, length=1)
    for image, label in zip(batch["image"][0, 0], batch["label"][0, 0], strict=True):
        expected = picture if label == 0 else picture[:, ::-1]
        half = expected.reshape(10, 2, 20, 2, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(image[:, 2:-2], half[:, 2:-2], atol=4)


def test_random_resized_crops_on_the_devices_know_their_interpolation():
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), np.uint8)
    batches = []
    for interpolation in ("bilinear", "bicubic"):
        split = Split(images, np.arange(8, dtype=np.int32) % 2, Decoding(interpolation=interpolation))
        arrays = Dataset("test", ("a", "b"), split, None, split, SHAPE)
        batches.append(read(arrays, config(random_resized_crop=True), [0], batch_size=8, length=1)["image"])
    assert not np.array_equal(*batches)


@pytest.mark.parametrize("encoded", [False, True])
def test_evaluation_counts_every_example_once(tmp_path, encoded):
    examples = dataset(encoded_in=tmp_path if encoded else None).test
    partition = sharding.all_devices("data")
    batches = data.EvaluationBatches(examples, image_shape=SHAPE, partition=partition, batch_size=16)
    for _ in range(2):  # the second time from the devices, where they stay
        got = [jax.device_get(batch) for batch in batches]
        mask = np.concatenate([batch["mask"] for batch in got])
        images = np.concatenate([batch["image"] for batch in got])[mask > 0]
        labels = np.concatenate([batch["label"] for batch in got])[mask > 0]
        assert [len(batch["mask"]) for batch in got] == [16, 16, 16] and len(batches) == 3
        assert mask.sum() == 40
        np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(40))
        np.testing.assert_array_equal(labels, examples.labels)


def test_mean_and_std_are_those_of_the_training_split(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, *SHAPE), np.uint8)
    train, test = Split(images[:20], np.arange(20) % 2), Split(images[20:], np.arange(10) % 2)
    measured = data.describe(Dataset("test", ("a", "b"), train, None, test, SHAPE), config())
    np.testing.assert_allclose(measured.mean, (images[:20] / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(measured.std, (images[:20] / 255).std((0, 1, 2)), rtol=1e-6)
    assert measured.num_examples == {"train": 20, "test": 10}
    assert measured.class_counts == (10, 10)
    assert data.DatasetInfo.from_json(measured.to_json()) == measured
    given = data.describe(
        Dataset("test", ("a", "b"), train, None, test, SHAPE), config(mean=(0.5,) * 3, std=(1.0,) * 3)
    )
    assert (given.mean, given.std) == ((0.5,) * 3, (1.0,) * 3)
    half = data.describe(Dataset("test", ("a", "b"), train, None, test, SHAPE), config(std=(1.0,) * 3))
    assert (half.mean, half.std) == (measured.mean, (1.0,) * 3)


@pytest.mark.parametrize("shape", [(3000, 32, 32, 3), (1797, 8, 8, 1), (3, 1024, 700, 3)])
def test_mean_and_std_are_rounded_once_and_take_little_memory(shape):
    """dataset.json of an old run, which other machines may go on with, is compared with them."""
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    counts = np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(shape[-1])])
    weights, values = counts / images[..., 0].size, np.arange(256) / 255
    mean = weights @ values
    split = Split(images, np.arange(len(images)) % 2)
    tracemalloc.start()
    measured = data.describe(Dataset("test", ("a", "b"), split, None, split, shape[1:]), config())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(measured.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(measured.std, np.sqrt(weights @ values**2 - mean**2), rtol=1e-14)  # as 0.1.0 had it
    for channel, (mean, std) in enumerate(zip(measured.mean, measured.std, strict=True)):
        pixels = Counter(images[..., channel].ravel().tolist())
        exact = sum(Fraction(value, 255) * count for value, count in pixels.items()) / pixels.total()
        squares = sum(Fraction(value, 255) ** 2 * count for value, count in pixels.items()) / pixels.total()
        assert (mean, std) == (float(exact), math.sqrt(squares - exact**2))
    assert peak < 2**23 + images[0].nbytes * 4


@pytest.mark.eight_devices
def test_auto_counts_all_that_the_devices_would_keep(monkeypatch):
    assert data.choose_pipeline(dataset(), config(pipeline="auto")) == "resident"
    rows = 40 + 5 + 5  # all of train, and an eighth of validation and of test
    for memory, pipeline in ((4 * rows * 6 * 6 * 3, "resident"), (4 * rows * 6 * 6 * 3 - 1, "streaming")):
        monkeypatch.setattr(pipelines, "_device_memory_bytes", lambda memory=memory: memory)
        assert data.choose_pipeline(dataset(), config(pipeline="auto")) == pipeline


def test_auto_does_not_decode_more_than_the_host_holds(tmp_path, monkeypatch):
    files = dataset(encoded_in=tmp_path)
    for memory, pipeline in ((2 * 120 * 6 * 6 * 3, "resident"), (2 * 120 * 6 * 6 * 3 - 1, "streaming")):
        monkeypatch.setattr(pipelines, "_device_memory_bytes", lambda: 2**30)
        monkeypatch.setattr(pipelines, "host_memory_bytes", lambda memory=memory: memory)
        assert data.choose_pipeline(files, config(pipeline="auto")) == pipeline
        assert data.choose_pipeline(dataset(), config(pipeline="auto")) == "resident"  # it is in the host already


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"sys/fs/cgroup/memory.max": "max"}, None),
        ({"sys/fs/cgroup/memory.max": "4096"}, 4096),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "4096"}, 4096),
        (
            {"proc/self/cgroup": "0::/job/step", "sys/fs/cgroup/job/memory.max": "4096"}
            | {"sys/fs/cgroup/job/step/memory.max": "max", "sys/fs/cgroup/other/memory.max": "1"},
            4096,
        ),
        (
            {"proc/self/cgroup": "0::/job/step", "sys/fs/cgroup/job/memory.max": "8192"}
            | {"sys/fs/cgroup/job/step/memory.max": "4096"},
            4096,
        ),
        ({"proc/self/cgroup": "0::/outside", "sys/fs/cgroup/memory.max": "4096"}, 4096),
        (
            {"proc/self/cgroup": "4:cpu,memory:/a:b\n1:name=systemd:/init.scope\n0::/"}
            | {"sys/fs/cgroup/memory/a:b/memory.limit_in_bytes": "4096"}
            | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
            4096,
        ),
        ({"proc/self/cgroup": "damaged", "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096"}, 4096),
    ],
)
def test_the_memory_of_the_host_is_what_its_cgroup_leaves(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory_bytes(tmp_path) == (expected or physical)


def test_a_split_that_is_streamed_does_not_stay_on_the_devices():
    partition = sharding.all_devices("data")
    kept, streamed = (
        data.EvaluationBatches(dataset().test, image_shape=SHAPE, partition=partition, batch_size=16, keep=keep)
        for keep in (True, False)
    )
    for _ in range(2):
        jax.tree.map(
            np.testing.assert_array_equal, list(map(jax.device_get, kept)), list(map(jax.device_get, streamed))
        )
    assert next(iter(kept))["image"] is next(iter(kept))["image"]
    first = weakref.ref(next(batch["image"] for batch in streamed))
    gc.collect()
    assert first() is None


@pytest.mark.parametrize("random_resized_crop", [False, True])
def test_an_image_is_a_row_on_the_devices(random_resized_crop):
    partition, block = sharding.all_devices("data"), config(random_resized_crop=random_resized_crop)
    batches = data.train_batches(dataset(), block, partition=partition, batch_size=16, seed=0)
    assert batches.host_inputs(0, 1)["image"].shape == (40, 6 * 6 * 3)


def test_the_order_of_an_epoch_is_made_once():
    partition = sharding.all_devices("data")
    batches = data.train_batches(dataset(), config(), partition=partition, batch_size=16, seed=0)
    first, second, third = (
        batches.host_inputs(step, 1)["orders"] for step in (0, 1, 3)
    )  # 40 examples: step 3 is in epoch 1
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert third[0] is first[1]
