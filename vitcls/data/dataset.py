"""What a data set is to the rest of vitcls."""

import dataclasses

import numpy as np

from vitcls.data.images import BY_FORMAT, Decoding, EncodedImages


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples in a fixed order: images uint8 [N, H, W, C] or encoded, labels int32 [N]; how images are decoded."""

    images: np.ndarray | EncodedImages
    labels: np.ndarray
    decoding: Decoding = BY_FORMAT

    def take(self, indices: np.ndarray) -> "Split":
        in_memory = isinstance(self.images, np.ndarray)
        images = self.images[indices] if in_memory else self.images.take(indices)
        return dataclasses.replace(self, images=images, labels=self.labels[indices])


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
    largest: tuple[int, int] | None = None  # height and width, at most, of its images as they came, where known
    whole: Split | None = None  # training images in memory before `eval_crop`, for random crops; None: those of `train`

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_examples(self) -> dict[str, int]:
        """Of every split that there is."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: len(split.labels) for name, split in splits.items() if split is not None}


@dataclasses.dataclass(frozen=True)
class Source:
    """What a source gives: 'train', and 'validation' and 'test' where it has its own; sizes as found."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    shapes: tuple[tuple[int, int, int], ...]  # the distinct H, W, C of its images
    skipped: tuple[SkippedFile, ...] = ()
    max_value: float = 0.0  # by which arrays of more than 8 bits were scaled; see `images.Decoding`
    complete: bool = True  # whether `shapes` are those of all images, not of the first

    @property
    def largest(self) -> tuple[int, int] | None:
        """Height and width, at most, of its images; None where not all of them are known."""
        if not (self.shapes and self.complete):
            return None
        return max(height for height, _, _ in self.shapes), max(width for _, width, _ in self.shapes)
