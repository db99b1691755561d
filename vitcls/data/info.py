"""What a model needs to know of its data: measured once, kept as dataset.json."""

import dataclasses
import json
import math

import numpy as np

from vitcls.core.errors import UserError
from vitcls.data import images as image_files
from vitcls.data.dataset import Dataset, SkippedFile, Split

_STATISTICS_SAMPLE = 5_000  # encoded images decoded to estimate the mean and std of a split that is streamed
_BLOCK_BYTES = 2**20  # of images that are counted at a time


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
        computed_mean, computed_std = mean_and_std(dataset.train, dataset.image_shape)
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


def mean_and_std(split: Split, image_shape: tuple[int, int, int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, in [0, 1], of a split; where images are encoded, of a fixed random sample at `image_shape`."""
    images = split.images
    if not isinstance(images, np.ndarray):
        chosen = np.arange(len(images))
        if len(images) > _STATISTICS_SAMPLE:
            chosen = np.sort(np.random.default_rng(0).choice(len(images), _STATISTICS_SAMPLE, replace=False))
        *size, channels = image_shape
        images = image_files.decode_all(
            images.take(chosen), size=tuple(size), channels=channels, decoding=split.decoding
        )
    moments = [_moments(counts) for counts in _histograms(images).tolist()]
    return tuple(mean for mean, _ in moments), tuple(max(std, 1e-3) for _, std in moments)


def _moments(counts: list[int]) -> tuple[float, float]:
    """Mean and std of values in [0, 1], given how often each of 0 .. 255 occurs.

    In whole numbers up to the last division, so that every machine finds the same.
    """
    count = sum(counts)
    total = sum(value * times for value, times in enumerate(counts))
    squares = sum(value * value * times for value, times in enumerate(counts))
    return total / (255 * count), math.sqrt((count * squares - total**2) / (255 * count) ** 2)


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
