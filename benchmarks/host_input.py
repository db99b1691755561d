"""Images per second of the host's work for ImageNet: read, decode, crop at random, resize, batch.

    python -m benchmarks.host_input --cores=1,2

The same JPEG files of 500x375 pixels in the same TFRecord files go through vitcls' streaming, through tf.data as its
guides advise (interleave, decode and crop in one operation, batch, prefetch) and, where it is installed, through Grain
with vitcls' decoding. Each number of cores is a process of its own, bound to them; in it the pipelines take turns. The
files are textured, so that they have about the bytes of ImageNet's (110 KB): smooth ones decode twice as fast.

Images per second of CPU time are what one core does when it has nothing else to do; they hold on a machine that others
use too, where the wall clock's do not. `rss` is the memory of a process that streams with vitcls, after each of
`--epochs`. The row `fast_decode` is what config.dataset.fast_decode changes: of how many crops, by how much of 255.
"""

import functools
import importlib.util
import io
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from benchmarks import harness
from vitcls import cli

_SIZE = (500, 375)
_SHARDS, _DIFFERENT = 8, 128  # files, and photographs, which repeat
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_BATCH = 64
_UNTIMED = 6  # batches that a pipeline may have made ahead


@functools.cache
def photograph(number: int) -> bytes:
    """A JPEG with structure of every scale, about 95 KB."""
    rng = np.random.default_rng(number)
    width, height = _SIZE
    picture = np.full((height, width, 3), 128.0)
    for pixels, strength in ((32, 60), (8, 25), (3, 20), (1, 14)):
        coarse = rng.normal(128, strength, (height // pixels + 1, width // pixels + 1, 3))
        layer = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize(_SIZE, Image.Resampling.BICUBIC)
        picture += np.asarray(layer, np.float64) - 128
    file = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_records(directory: pathlib.Path, count: int) -> list[str]:
    """Records of one byte, the label, and a photograph."""
    import tensorflow as tf

    names = [str(directory / f"photographs-{shard}.tfrecord") for shard in range(_SHARDS)]
    for shard, name in enumerate(names):
        with tf.io.TFRecordWriter(name) as writer:
            for number in range(shard, count, _SHARDS):
                writer.write(bytes([number % 10]) + photograph(number % _DIFFERENT))
    return names


def _split(names: list[str]):
    from vitcls.data.dataset import Split
    from vitcls.data.records import index_records

    images, labels = index_records(names, lambda record: (record[1:], record[0]))
    return Split(images, labels.astype(np.int32))


def vitcls_batches(names: list[str], size: int, fast: bool = False) -> Iterator:
    """Batches of vitcls' streaming, on the device."""
    from vitcls.core import sharding
    from vitcls.data import images
    from vitcls.data.streaming import Crop, Streaming

    crop = Crop(_AREA, _RATIO, 1.0 if fast else images.SPARE)
    shape = {"image_shape": (size, size, 3), "num_classes": 10, "batch_size": _BATCH}
    stream = Streaming(sharding.all_devices("data"), _split(names), seed=0, balanced=False, crop=crop, **shape)
    step = 0
    while True:
        yield stream.host_inputs(step, 1)
        step += 1


def tf_data_batches(names: list[str], size: int) -> Iterator:
    """tf.data by its own guides: parallel interleave, shuffle, decode and crop in one operation, batch, prefetch."""
    import tensorflow as tf

    def load(record):
        data = tf.strings.substr(record, 1, -1)
        start, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros((1, 0, 4)),
            area_range=_AREA,
            aspect_ratio_range=_RATIO,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = [start[0], start[1], extent[0], extent[1]]
        image = tf.image.resize(tf.image.decode_and_crop_jpeg(data, window, channels=3), (size, size))
        return tf.cast(image, tf.uint8), tf.cast(tf.io.decode_raw(tf.strings.substr(record, 0, 1), tf.uint8), tf.int32)

    files = tf.data.Dataset.from_tensor_slices(names).shuffle(len(names)).repeat()
    dataset = files.interleave(tf.data.TFRecordDataset, cycle_length=4, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.shuffle(256).map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    yield from dataset.batch(_BATCH, drop_remainder=True).prefetch(4).as_numpy_iterator()


def grain_batches(names: list[str], size: int) -> Iterator:
    """Grain's shuffling, threads and batches around vitcls' reading and decoding."""
    import grain

    from vitcls.data import images

    split = _split(names)

    def load(index, rng):
        data = split.images.read(index)
        width, height, _ = images.examine(data)
        box = images.random_resized_crop_box(rng, width, height, _AREA, _RATIO)
        return images.decode(data, size=(size, size), channels=3, box=box), split.labels[index]

    dataset = grain.MapDataset.range(len(split.labels)).shuffle(seed=0).repeat().seed(0).random_map(load).batch(_BATCH)
    yield from dataset.to_iter_dataset(grain.ReadOptions(num_threads=os.cpu_count(), prefetch_buffer_size=4))


def pipelines(size: int) -> dict[str, Callable[[list[str]], Iterator]]:
    found = {"vitcls streaming": lambda names: vitcls_batches(names, size)}
    if 2 * size <= min(_SIZE):  # else it changes nothing
        found["vitcls, fast_decode"] = lambda names: vitcls_batches(names, size, fast=True)
    found["tf.data"] = lambda names: tf_data_batches(names, size)
    if importlib.util.find_spec("grain"):
        found["grain"] = lambda names: grain_batches(names, size)
    return found


def turn(batches: Iterator, count: int) -> tuple[float, float]:
    """Seconds of wall clock and of all CPUs for `count` batches, after those that were made ahead."""
    for _ in range(_UNTIMED):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    taken = time.perf_counter() - wall, time.process_time() - cpu
    batches.close()
    return taken


def rates(names: list[str], size: int, count: int, repeats: int) -> list[harness.Row]:
    """One row a pipeline, in this process; they take turns, after one that is not timed."""
    found = pipelines(size)
    rounds = [{name: turn(make(names), count) for name, make in found.items()} for _ in range(1 + repeats)][1:]
    rows = []
    for name in found:
        wall, cpu = (harness.Timing(tuple(each[name][part] for each in rounds)) for part in (0, 1))
        images = count * _BATCH
        rows.append(
            {
                "pipeline": name,
                "images a CPU second": images / cpu.median,
                "slowest..fastest": f"{images / max(cpu.seconds):,.0f}..{images / min(cpu.seconds):,.0f}",
                "images/s by the clock": images / wall.median,
                "CPU ms an image": 1e3 * cpu.median / images,
            }
        )
    return rows


def resident_megabytes() -> float:
    fields = pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(names: list[str], size: int, count: int, epochs: int) -> list[harness.Row]:
    """Resident memory after every epoch of `count` images."""
    batches, rows = vitcls_batches(names, size), []
    for epoch in range(1, epochs + 1):
        for _ in range(count // _BATCH):
            next(batches)
        rows.append({"epoch": epoch, "rss MB": resident_megabytes()})
    return rows


def differences(names: list[str], size: int, count: int) -> list[harness.Row]:
    """What `fast_decode` changes: of how many random crops, and by how much, in steps of 255."""
    from vitcls.data import images

    split, found = _split(names), []
    for index in range(min(count, 2 * _DIFFERENT)):
        data = split.images.read(index)
        box = images.random_resized_crop_box(np.random.default_rng(index), *_SIZE, _AREA, _RATIO)
        usual, fast = (
            images.decode(data, size=(size, size), channels=3, box=box, spare=spare).astype(int)
            for spare in (images.SPARE, 1.0)
        )
        found.append((np.abs(usual - fast).mean(), np.abs(usual - fast).max()))
    means, largest = np.array(found).T
    changed = means > 0
    row = {"crops changed %": 100 * float(changed.mean())}
    if changed.any():
        row |= {"mean difference of those": float(means[changed].mean()), "largest": float(largest.max())}
    return [row]


def main(argv: list[str]) -> int:
    flags = harness.parser(__doc__)
    flags.add_argument("--cores", type=harness.integers, default="1,2", help="numbers of cores, one process each")
    flags.add_argument("--size", type=int, default=224, help="pixels that the model sees")
    flags.add_argument("--images", type=int, default=1024, help="in the files")
    flags.add_argument("--batches", type=int, default=8, help=f"of {_BATCH} images, in one turn")
    flags.add_argument("--epochs", type=int, default=3, help="after which the memory is looked at")
    flags.add_argument("--job", help="for the child process")
    args = flags.parse_args(argv)
    if args.job:
        job = json.loads(args.job)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.pop("cores")])
        kind = {"rates": rates, "memory": memory, "fast_decode": differences}[job.pop("kind")]
        print(json.dumps({"rows": kind(**job)}))
        return 0
    if not importlib.util.find_spec("grain"):
        print("grain is not installed and has no rows; 'pip install grain'", file=sys.stderr)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        names = write_records(pathlib.Path(directory), args.images)
        kilobytes = sum(map(os.path.getsize, names)) / args.images / 1e3
        jobs = [dict(kind="rates", count=args.batches, repeats=args.repeats, cores=cores) for cores in args.cores]
        last = {"count": args.images, "cores": args.cores[-1]}
        jobs += [{"kind": "memory", "epochs": args.epochs} | last, {"kind": "fast_decode"} | last]
        for job in jobs:
            job |= {"names": names, "size": args.size}
            ran = harness.in_child("benchmarks.host_input", ["--job", json.dumps(job)])
            shared = {"what": job["kind"], "KB an image": kilobytes, "size": args.size, "cores": job["cores"]}
            rows += [shared | row for row in ran.get("rows", [{"error": ran.get("error")}])]
    harness.publish("host_input", rows, args.out)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(cli.run(main))
