"""What a data set is to the rest of vitcls."""

import dataclasses

import numpy as np

from vitcls.data.images import EncodedImages


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples in a fixed order: images uint8 [N, H, W, C] or encoded, labels int32 [N]."""

    images: np.ndarray | EncodedImages
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> "Split":
        in_memory = isinstance(self.images, np.ndarray)
        return Split(self.images[indices] if in_memory else self.images.take(indices), self.labels[indices])


@dataclasses.dataclass(frozen=True)
class SkippedFile:
    """A file of a folder that is not used, and why."""

    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of a classification set; test is never part of train or validation."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    image_shape: tuple[int, int, int]  # H, W, C as the model will see them
    skipped: tuple[SkippedFile, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a source gives: 'train', and 'validation' and 'test' where it has its own; sizes as found."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    shapes: tuple[tuple[int, int, int], ...]  # the distinct H, W, C of its images
    skipped: tuple[SkippedFile, ...] = ()
