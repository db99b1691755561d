"""Data: where images come from (sources), how they reach the devices (resident, streaming), how they are varied
(augment).

`describe` measures a loaded data set once; `train_batches` and `evaluation_batches` hide which pipeline is used.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from vitcls.core.errors import UserError
from vitcls.core.partition import Partition
from vitcls.data import images as image_files
from vitcls.data import streaming
from vitcls.data.dataset import Dataset, SkippedFile, Split
from vitcls.data.memory import host_memory_bytes
from vitcls.data.resident import Resident
from vitcls.data.sources import load
from vitcls.data.streaming import Crop, Streaming, read_image

__all__ = [
    "Dataset",
    "DatasetInfo",
    "EvaluationBatches",
    "Split",
    "TrainBatches",
    "choose_pipeline",
    "decode",
    "describe",
    "load",
    "read_image",
    "resident_bytes",
    "train_batches",
]

_STATISTICS_SAMPLE = 5_000  # encoded images decoded to estimate the mean and std of a split that is streamed
_BLOCK_BYTES = 2**20  # of images that are counted at a time
_RESIDENT_SHARE = 0.25  # of a device's memory that images may take
_HOST_SHARE = 0.5  # of the host's memory that images decoded for the devices may take


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a model needs to know of its data ever after; written beside the config as dataset.json."""

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # H, W, C
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    num_examples: dict[str, int]  # by split
    class_counts: tuple[int, ...]  # of the training split
    skipped: tuple[SkippedFile, ...]
    max_value: float = 0.0  # the white of images of more than 8 bits; see `images.Decoding`

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "DatasetInfo":
        fields = json.loads(text)
        fields["skipped"] = tuple(SkippedFile(**file) for file in fields["skipped"])
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def describe(dataset: Dataset, config) -> DatasetInfo:
    """Measures a data set: counts, and the training split's own mean and std unless `config` gives them.

    Args:
      dataset: as `load` returns it.
      config: the block `dataset` of the config.
    """
    mean, std = tuple(config.mean), tuple(config.std)
    channels = dataset.image_shape[-1]
    for key, value in (("mean", mean), ("std", std)):
        if value and len(value) != channels:
            raise UserError(f"config.dataset.{key} has {len(value)} values, but the images have {channels} channels")
    if not (mean and std):
        computed_mean, computed_std = _mean_and_std(dataset)
        mean, std = mean or computed_mean, std or computed_std
    return DatasetInfo(
        name=dataset.name,
        class_names=dataset.class_names,
        image_shape=dataset.image_shape,
        mean=mean,
        std=std,
        num_examples=dataset.num_examples,
        class_counts=tuple(np.bincount(dataset.train.labels, minlength=dataset.num_classes).tolist()),
        skipped=dataset.skipped,
        max_value=dataset.train.decoding.max_value,
    )


def _mean_and_std(dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, in [0, 1], of the training split; of a fixed random sample of it where images are encoded."""
    images = dataset.train.images
    if not isinstance(images, np.ndarray):
        chosen = np.arange(len(images))
        if len(images) > _STATISTICS_SAMPLE:
            chosen = np.sort(np.random.default_rng(0).choice(len(images), _STATISTICS_SAMPLE, replace=False))
        size, channels = dataset.image_shape[:2], dataset.image_shape[2]
        images = image_files.decode_all(
            images.take(chosen), size=size, channels=channels, decoding=dataset.train.decoding
        )
    values = np.arange(256) / 255
    weights = _histograms(images) / images[..., 0].size
    mean = weights @ values
    std = np.sqrt(weights @ values**2 - mean**2)
    return tuple(mean.tolist()), tuple(np.maximum(std, 1e-3).tolist())


def _histograms(images: np.ndarray) -> np.ndarray:
    """How often each channel of uint8 [N, H, W, C] has each value: int64 [C, 256]; exact, and all that is needed.

    A few images at a time, since bincount makes every byte of its input eight.
    """
    histograms = np.zeros((images.shape[-1], 256), np.int64)
    rows = max(1, _BLOCK_BYTES // images[0].size)
    for start in range(0, len(images), rows):
        for channel, histogram in enumerate(histograms):
            histogram += np.bincount(images[start : start + rows, ..., channel].ravel(), minlength=256)
    return histograms


def choose_pipeline(dataset: Dataset, config) -> str:
    """'resident' or 'streaming' for the block `dataset` of a config; 'auto' goes by what fits."""
    if config.random_resized_crop and isinstance(dataset.train.images, np.ndarray):
        raise UserError(
            f"config.dataset.random_resized_crop is for image files; those of '{dataset.name}' are in memory, so use "
            "config.augment.scale and config.augment.crop"
        )
    if config.pipeline == "resident" and config.random_resized_crop:
        raise UserError(
            "config.dataset.random_resized_crop needs config.dataset.pipeline='streaming'; "
            "with 'resident' use config.augment.scale and config.augment.crop"
        )
    if config.pipeline != "auto":
        return config.pipeline
    fits = _fits(dataset)
    return "resident" if fits and not config.random_resized_crop else "streaming"


def _fits(dataset: Dataset) -> bool:
    """Whether all splits fit on a device as the resident pipeline keeps them, and in the host on their way there."""
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    num_examples = {name: len(split.labels) for name, split in splits.items() if split is not None}
    encoded = [name for name in num_examples if not isinstance(splits[name].images, np.ndarray)]
    decoded_bytes = sum(num_examples[name] for name in encoded) * int(np.prod(dataset.image_shape))
    return (
        resident_bytes(num_examples, dataset.image_shape) <= _RESIDENT_SHARE * _device_memory_bytes()
        and decoded_bytes <= _HOST_SHARE * host_memory_bytes()
    )


def resident_bytes(num_examples: dict[str, int], image_shape: tuple[int, int, int]) -> int:
    """Bytes of images on each device: the whole training split and a share of every other split."""
    evaluated = sum(-(-count // jax.device_count()) for name, count in num_examples.items() if name != "train")
    return (num_examples["train"] + evaluated) * int(np.prod(image_shape))


def _device_memory_bytes() -> int:
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit") or host_memory_bytes() // jax.local_device_count()


def decode(dataset: Dataset, splits: tuple[str, ...] = ("train", "validation", "test")) -> Dataset:
    """The data set with the images of these splits as arrays uint8 [N, H, W, C], for the resident pipeline."""
    size, channels = dataset.image_shape[:2], dataset.image_shape[2]
    arrays = {}
    for name in splits:
        split = getattr(dataset, name)
        if split is not None and not isinstance(split.images, np.ndarray):
            images = image_files.decode_all(split.images, size=size, channels=channels, decoding=split.decoding)
            arrays[name] = dataclasses.replace(split, images=images)
    return dataclasses.replace(dataset, **arrays)


TrainBatches = Resident | Streaming


def train_batches(dataset: Dataset, config, *, partition: Partition, batch_size: int, seed: int) -> TrainBatches:
    """The training split behind the pipeline that the block `dataset` of a config asks for.

    Both have `data(step, length)`, what one call needs on the devices, and `open(data, step, length)`, which gives
    the batches inside that call; both give the same batches.
    """
    arguments = {
        "num_classes": dataset.num_classes,
        "batch_size": batch_size,
        "seed": seed,
        "balanced": config.sampling == "balanced",
    }
    if choose_pipeline(dataset, config) == "resident":
        train = decode(dataset, ("train",)).train
        return Resident(partition, train.images, train.labels, **arguments)
    crop = Crop(tuple(config.crop_area), tuple(config.crop_ratio)) if config.random_resized_crop else None
    return Streaming(partition, dataset.train, image_shape=dataset.image_shape, crop=crop, **arguments)


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
