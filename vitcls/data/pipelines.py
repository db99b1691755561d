"""The two ways of images to the devices, resident and streaming: which one, and batches that do not tell them apart."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vitcls.core.errors import UserError
from vitcls.core.sharding import Partition
from vitcls.data import images as image_files
from vitcls.data import streaming
from vitcls.data.dataset import Dataset, Split
from vitcls.data.images import Crop
from vitcls.data.memory import host_memory_bytes
from vitcls.data.resident import Cropping, Resident
from vitcls.data.streaming import Streaming

_RESIDENT_SHARE = 0.25  # of a device's memory that images may take
_LARGEST_KEPT = 256  # pixels of a side from which random resized crops are taken
_HOST_SHARE = 0.5  # of the host's memory that images decoded for the devices may take


def choose_pipeline(dataset: Dataset, config) -> str:
    """'resident' or 'streaming' for the block `dataset` of a config; 'auto' goes by what fits.

    Raises UserError for random resized crops of images in memory that are to be streamed.
    """
    kept = kept_shape(dataset, config)
    chosen = config.pipeline if config.pipeline != "auto" else "resident" if _fits(dataset, kept) else "streaming"
    if chosen == "streaming" and config.random_resized_crop and isinstance(dataset.train.images, np.ndarray):
        raise UserError(
            f"config.dataset.random_resized_crop with pipeline='streaming' is for image files; those of "
            f"'{dataset.name}' are in memory, so use pipeline='resident'"
        )
    return chosen


def kept_shape(dataset: Dataset, config) -> tuple[int, int, int]:
    """H, W, C of the training images on the devices: more than the model sees where crops of them are resized.

    So much that the smallest crop is not enlarged, but no more than the images have, nor than `_LARGEST_KEPT`.
    """
    *size, channels = dataset.image_shape
    if not config.random_resized_crop or isinstance(dataset.train.images, np.ndarray):
        return dataset.image_shape
    largest = dataset.largest or (_LARGEST_KEPT, _LARGEST_KEPT)
    enough = (math.ceil(side / math.sqrt(config.crop_area[0])) for side in size)
    return *(
        max(side, min(_LARGEST_KEPT, *limits)) for side, *limits in zip(size, enough, largest, strict=True)
    ), channels


def _fits(dataset: Dataset, kept: tuple[int, int, int]) -> bool:
    """Whether all splits fit on a device as the resident pipeline keeps them, and in the host on their way there."""
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    num_examples = {name: len(split.labels) for name, split in splits.items() if split is not None}
    encoded = [name for name in num_examples if not isinstance(splits[name].images, np.ndarray)]
    decoded_bytes = sum(num_examples[name] for name in encoded) * int(np.prod(kept))
    return (
        resident_bytes(num_examples, kept) <= _RESIDENT_SHARE * _device_memory_bytes()
        and decoded_bytes <= _HOST_SHARE * host_memory_bytes()
    )


def resident_bytes(num_examples: dict[str, int], image_shape: tuple[int, int, int]) -> int:
    """Bytes of images on each device: the whole training split and a share of every other split."""
    evaluated = sum(-(-count // jax.device_count()) for name, count in num_examples.items() if name != "train")
    return (num_examples["train"] + evaluated) * int(np.prod(image_shape))


def _device_memory_bytes() -> int:
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit") or host_memory_bytes() // jax.local_device_count()


def pixels(split: Split, image_shape: tuple[int, int, int]) -> np.ndarray:
    """The images of a split as they are in memory, uint8 [N, H, W, C]; encoded ones are decoded to `image_shape`."""
    if isinstance(split.images, np.ndarray):
        return split.images
    *size, channels = image_shape
    return image_files.decode_all(split.images, size=tuple(size), channels=channels, decoding=split.decoding)


def decode(dataset: Dataset, splits: tuple[str, ...] = ("train", "validation", "test")) -> Dataset:
    """The data set with the images of these splits as arrays uint8 [N, H, W, C], for the resident pipeline."""
    there = {name: split for name in splits if (split := getattr(dataset, name)) is not None}
    arrays = {
        name: dataclasses.replace(split, images=pixels(split, dataset.image_shape)) for name, split in there.items()
    }
    return dataclasses.replace(dataset, **arrays)


TrainBatches = Resident | Streaming


def train_batches(dataset: Dataset, config, *, partition: Partition, batch_size: int, seed: int) -> TrainBatches:
    """The training split behind the pipeline that the block `dataset` of a config asks for.

    Both have `host_inputs(step, length)`, what one call needs on the devices, and, traced, `batch_fn(inputs, step,
    length)`, which gives i -> batch of step + i. They give the same batches. `close()` ends what reads ahead.
    """
    arguments = {
        "num_classes": dataset.num_classes,
        "batch_size": batch_size,
        "seed": seed,
        "balanced": config.sampling == "balanced",
    }
    spare = 1.0 if config.fast_decode else image_files.SPARE
    crop = Crop(tuple(config.crop_area), tuple(config.crop_ratio), spare) if config.random_resized_crop else None
    if choose_pipeline(dataset, config) == "resident":
        if crop:
            images, aspects = _whole_images(dataset, config)
            cropping = Cropping(crop, dataset.image_shape[:2], aspects, dataset.train.decoding.interpolation)
            return Resident(partition, images, dataset.train.labels, cropping=cropping, **arguments)
        train = decode(dataset, ("train",)).train
        return Resident(partition, train.images, train.labels, **arguments)
    return Streaming(partition, dataset.train, image_shape=dataset.image_shape, crop=crop, **arguments)


def _whole_images(dataset: Dataset, config) -> tuple[np.ndarray, np.ndarray]:
    """The training images uint8 [N, h, w, C], each squeezed into one shape, and the width / height that they had."""
    train, (height, width, channels) = dataset.train, kept_shape(dataset, config)
    if isinstance(train.images, np.ndarray):
        return (dataset.whole or train).images, np.full(len(train.labels), width / height, np.float32)
    images = image_files.decode_all(
        train.images, size=(height, width), channels=channels, decoding=train.decoding, whole=True
    )
    return images, image_files.aspects_of(train.images)


class EvaluationBatches:
    """The batches of a split in order, on the devices.

    With `keep`, a split in memory is moved there once and stays; else every pass moves it again, batch by batch.
    """

    def __init__(
        self,
        split: Split,
        *,
        image_shape: tuple[int, int, int],
        partition: Partition,
        batch_size: int,
        keep: bool = True,
    ):
        self._split = split
        self._keep = keep and isinstance(split.images, np.ndarray)
        self._image_shape = image_shape
        self._partition = partition
        self._batch_size = batch_size
        self._kept: list[dict[str, Any]] | None = None

    @property
    def labels(self) -> np.ndarray:
        """int32 [N], of the split in order."""
        return self._split.labels

    def __len__(self) -> int:
        return -(-len(self.labels) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._kept is not None:
            return iter(self._kept)
        batches = map(self._partition.put_batch, self._host_batches())
        if self._keep:
            self._kept = list(batches)
            return iter(self._kept)
        return batches

    def _host_batches(self) -> Iterator[dict[str, np.ndarray]]:
        if not isinstance(self._split.images, np.ndarray):
            return streaming.evaluation_batches(
                self._partition, self._split, image_shape=self._image_shape, batch_size=self._batch_size
            )
        return array_batches(self._split, self._batch_size, self._partition.local_rows(self._batch_size))


def array_batches(split: Split, batch_size: int, rows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """`rows` of every batch of a split in memory; the last batch is padded with zeros and masked."""
    for start in range(0, len(split.labels), batch_size):
        count = min(batch_size, len(split.labels) - start)
        batch = {
            "image": split.images[start : start + count],
            "label": split.labels[start : start + count],
            "mask": np.ones(count, np.float32),
        }
        pad = batch_size - count
        yield {name: np.concatenate([x, np.zeros((pad, *x.shape[1:]), x.dtype)])[rows] for name, x in batch.items()}
