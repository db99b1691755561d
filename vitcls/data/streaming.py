"""tf.data, for what does not fit in device memory; the only file that imports TensorFlow, and lazily.

tf.data brings the threads, the deterministic order and the prefetching. Every random choice (order, crop) is a pure
function of (seed, position in the run), so the stream can be entered at any step and is the same ever after.
"""

import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from vitcls.core.errors import RunError
from vitcls.core.sharding import Partition
from vitcls.core.terminal import quiet_tensorflow
from vitcls.data import images as image_files
from vitcls.data.dataset import Split
from vitcls.data.images import BadImage, Crop
from vitcls.data.order import epoch_order

_logger = logging.getLogger("vitcls")
_CHUNK = 32  # examples per task: large enough to hide the cost of calling Python, small enough to spread a batch
_PREFETCHED = 4  # batches ready ahead of the one that is asked for
_KEPT_EPOCHS = 4  # orders in memory: the one before, this one, the next, and one to spare
_PATIENCE = 120.0  # seconds for which files are tried again that a disk does not give


class Streaming:
    """Training batches read and decoded on the host, ahead of the devices."""

    def __init__(
        self,
        partition: Partition,
        split: Split,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        batch_size: int,
        seed: int,
        balanced: bool,
        crop: Crop | None,
    ):
        self._partition = partition
        self._split = split
        self._image_shape = image_shape
        self._batch_size = batch_size
        self._seed = seed
        self._crop = crop
        self._order = _host_epoch_order(seed, split.labels, num_classes=num_classes, balanced=balanced)
        self._batches: Iterator[dict[str, np.ndarray]] | None = None
        self._next_step = -1

    def host_inputs(self, step: int, length: int) -> dict[str, Any]:
        """What the call that starts at `step` needs on the devices: its batches, stacked."""
        if step != self._next_step:
            self._batches = self._read_from(step)
        batches = [next(self._batches) for _ in range(length)]
        self._next_step = step + length
        return self._partition.put_batch(
            {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}, stacked=True
        )

    def close(self) -> None:
        """Ends the threads that read ahead; they must not outlive the thread that asks, or Python itself."""
        self._batches, self._next_step = None, -1

    def batch_fn(self, inputs: dict[str, jax.Array], step: jax.Array, length: int) -> Callable[[jax.Array], dict]:
        """Traced: returns i -> batch of `step` + i, for i < `length`."""
        return lambda i: jax.tree.map(lambda x: x[i], inputs)

    def _read_from(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of every batch from `step` on, without end."""
        # Without `self`, which has the iterator: a stream that is dropped is closed at once.
        split, order, batch_size, shape = self._split, self._order, self._batch_size, self._image_shape
        crop, seed, rows = self._crop, self._seed, self._partition.local_rows(self._batch_size)

        def load(row: int) -> tuple[np.ndarray, np.integer]:
            batch, place = divmod(row, len(rows))
            position = (step + batch) * batch_size + int(rows[place])  # in the whole run
            epoch, offset = divmod(position, len(split.labels))
            index = int(order(epoch)[offset])
            return read_image(split, index, shape, crop=crop, seed=(seed, position)), split.labels[index]

        mask = np.ones(len(rows), np.float32)
        batches = _parallel_batches(load, len(rows), shape, threads=image_files.reading_threads(split.images))
        return ({"image": images, "label": labels, "mask": mask} for images, labels in batches)


def evaluation_batches(
    partition: Partition, split: Split, *, image_shape: tuple[int, int, int], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of every batch of a split, in order; the last batch is padded and masked."""
    rows = partition.local_rows(batch_size)
    num_rows = len(rows)
    num_examples = len(split.labels)

    def load(row: int) -> tuple[np.ndarray, np.integer]:
        batch, place = divmod(row, num_rows)
        index = min(batch * batch_size + int(rows[place]), num_examples - 1)
        return read_image(split, index, image_shape), split.labels[index]

    num_batches = -(-num_examples // batch_size)
    threads = image_files.reading_threads(split.images)
    batches = _parallel_batches(load, num_rows, image_shape, threads=threads, num_batches=num_batches)
    for batch, (images, labels) in enumerate(batches):
        mask = (batch * batch_size + rows < num_examples).astype(np.float32)
        yield {"image": images, "label": labels, "mask": mask}


def read_image(
    split: Split,
    index: int,
    image_shape: tuple[int, int, int],
    *,
    crop: Crop | None = None,
    seed: tuple[int, ...] = (),
) -> np.ndarray:
    """Image `index` of a split as uint8 [H, W, C] of `image_shape`; with `crop`, a random resized crop by `seed`.

    An image that cannot be decoded is black, see `images.warn_black`.
    """
    encoded = split.images[index] if isinstance(split.images, np.ndarray) else split.images.read(index)
    if isinstance(encoded, np.ndarray):
        return encoded
    try:
        return _decode(split, encoded, image_shape, crop, seed)
    except BadImage as error:
        image_files.warn_black(split.images.name(index), error)
        return np.zeros(image_shape, np.uint8)


def _decode(
    split: Split, encoded: bytes, image_shape: tuple[int, int, int], crop: Crop | None, seed: tuple[int, ...]
) -> np.ndarray:
    size, channels = image_shape[:2], image_shape[2]
    if crop is None:
        return image_files.decode(encoded, size=size, channels=channels, decoding=split.decoding)
    width, height, _ = image_files.examine(encoded)
    box = image_files.random_resized_crop_box(np.random.default_rng(seed), width, height, crop.area, crop.ratio)
    arguments = {"size": size, "channels": channels, "decoding": split.decoding}
    return image_files.decode(encoded, box=box, spare=crop.spare, **arguments)


class _Patience:
    """Loads again what a disk does not give, for a time; told in one line, though many threads read."""

    def __init__(self, load: Callable[[int], Any], seconds: float):
        self._load, self._seconds = load, seconds
        self._lock, self._waiting = threading.Lock(), 0
        self._ended = ""  # why no row is loaded any more

    def end(self, why: str) -> None:
        """Makes every row fail that has not been loaded; reading threads are idle soon."""
        self._ended = self._ended or why

    def __call__(self, row: int) -> Any:
        """Raises RunError where it cannot be read for so long, and at once when that was so of another row."""
        end = math.inf
        while not self._ended:
            try:
                loaded = self._load(row)
            except OSError as error:
                if end == math.inf:
                    end = time.monotonic() + self._seconds
                    self._count(1, f"{error}; trying again for {self._seconds:.0f} s")
                if time.monotonic() >= end:
                    self.end(
                        f"the data could not be read for {self._seconds:.0f} s ({error}); the last checkpoint is kept, "
                        "and the same command goes on from it"
                    )
                time.sleep(min(1.0, self._seconds / 10))
            else:
                if end < math.inf:
                    self._count(-1, "the data can be read again")
                return loaded
        raise RunError(self._ended)

    def _count(self, change: int, line: str) -> None:
        """Counts the rows that wait, and tells of the first and of the end of the last."""
        with self._lock:
            self._waiting += change
            if self._waiting == max(change, 0) and not self._ended:
                _logger.warning("%s", line)


def _parallel_batches(
    load: Callable[[int], tuple[np.ndarray, np.integer]],
    num_rows: int,
    image_shape: tuple[int, int, int],
    *,
    threads: int,
    num_batches: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs load(0), load(1), ... in `threads` of tf.data; yields images [num_rows, H, W, C] and labels [num_rows].

    Raises what `load` raises, but RunError for a disk that fails for _PATIENCE seconds.
    """
    tf = _tensorflow()
    chunk = math.gcd(num_rows, _CHUNK)
    chunks_per_batch = num_rows // chunk
    patient, failures, closed = _Patience(load, _PATIENCE), [], threading.Event()

    def load_chunk(number: np.int64) -> tuple[np.ndarray, np.ndarray]:
        try:
            examples = [patient(row) for row in range(int(number) * chunk, (int(number) + 1) * chunk)]
        except Exception as error:  # which TensorFlow would wrap
            if closed.is_set():
                return np.zeros((chunk, *image_shape), np.uint8), np.zeros(chunk, np.int32)
            failures.append(error)
            raise
        return np.stack([image for image, _ in examples]), np.array([label for _, label in examples], np.int32)

    def load_in_graph(number):
        images, labels = tf.numpy_function(load_chunk, [number], [tf.uint8, tf.int32])
        return tf.ensure_shape(images, (chunk, *image_shape)), tf.ensure_shape(labels, (chunk,))

    limit = np.iinfo(np.int64).max if num_batches is None else num_batches * chunks_per_batch
    dataset = (
        tf.data.Dataset.range(limit)
        .map(load_in_graph, num_parallel_calls=threads, deterministic=True)
        .batch(chunks_per_batch, drop_remainder=True, num_parallel_calls=2, deterministic=True)
        .prefetch(_PREFETCHED)
    )
    # The thread that tunes is told to end only when it next wakes up: a pipeline that is closed, as at the end of a
    # run, would now and then wait for it, for up to a minute.
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    dataset = dataset.with_options(options)
    batches = dataset.as_numpy_iterator()
    try:
        for images, labels in batches:
            yield images.reshape(num_rows, *image_shape), labels.reshape(num_rows)
    except tf.errors.OpError:
        if failures:
            raise failures[0] from None
        raise
    finally:  # nobody waits for what is being read
        closed.set()
        patient.end("the stream is closed")


def _host_epoch_order(
    seed: int, labels: np.ndarray, *, num_classes: int, balanced: bool
) -> Callable[[int], np.ndarray]:
    """epoch -> the order that the resident pipeline would use, computed on the host."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        host = jax.local_devices()[0]
    order = jax.jit(functools.partial(epoch_order, num_classes=num_classes, balanced=balanced))

    def compute(epoch: int) -> np.ndarray:
        with jax.default_device(host), jax.transfer_guard("allow"):
            return np.asarray(order(seed, epoch, labels))

    return _once_and_ahead(compute)


def _once_and_ahead(compute: Callable[[int], np.ndarray]) -> Callable[[int], np.ndarray]:
    """`compute` of an epoch for many threads: once, and that of the next epoch before it is asked for.

    The threads that read are at most a few epochs apart, so the newest are kept.
    """
    worker, lock = ThreadPoolExecutor(1), threading.Lock()
    orders: dict[int, Future] = {}

    def order(epoch: int) -> np.ndarray:
        with lock:
            for wanted in (epoch, epoch + 1):
                if wanted not in orders:
                    orders[wanted] = worker.submit(compute, wanted)
            found = orders[epoch]
            while len(orders) > _KEPT_EPOCHS:
                del orders[next(iter(orders))]
        return found.result()

    return order


@functools.cache
def _tensorflow():
    """TensorFlow, quiet and kept off the accelerators."""
    quiet_tensorflow()
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf
