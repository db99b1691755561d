"""CIFAR-10-C and CIFAR-100-C as they are published: NAME.npy of five severities, and labels.npy."""

import os
import pathlib

import numpy as np

from vitcls.core.errors import UserError
from vitcls.data.corruptions import CORRUPTIONS, SEVERITIES
from vitcls.data.dataset import Split

_LABELS = "labels.npy"


def is_corrupted(directory: os.PathLike | str) -> bool:
    """Whether it holds such files."""
    return (pathlib.Path(directory) / _LABELS).is_file()


class CorruptedFiles:
    """The corrupted test images in a directory, severity after severity, each in the order of the test split."""

    def __init__(self, directory: os.PathLike | str, test: Split, rows: np.ndarray, image_shape: tuple[int, int, int]):
        """`test` are the images of the test split that are looked at, `rows` their places in it.

        Raises UserError where a file cannot be read or is of other images.
        """
        self._directory, self._test, self._rows = pathlib.Path(directory), test, rows
        self._image_shape = image_shape
        labels = _read(self._directory / _LABELS)
        self._count = len(labels) // len(SEVERITIES)
        inside = labels.ndim == 1 and self._count > rows.max(initial=-1)
        if not inside or not np.array_equal(labels[: self._count][rows], test.labels):
            raise UserError(f"{self._directory / _LABELS} has not the labels of the run's test images, in their order")
        self.names = tuple(name for name in CORRUPTIONS if (self._directory / f"{name}.npy").is_file())
        if not self.names:
            raise UserError(
                f"{directory} has {_LABELS} but no NAME.npy of a corruption, as {next(iter(CORRUPTIONS))}.npy"
            )
        self._files = {name: self._open(name) for name in self.names}

    def _open(self, name: str) -> np.ndarray:
        path = self._directory / f"{name}.npy"
        images, expected = _read(path), (self._count * len(SEVERITIES), *self._image_shape)
        if images.dtype != np.uint8 or images.shape != expected:
            raise UserError(f"{path} holds {images.dtype} {list(images.shape)}, not uint8 {list(expected)}")
        return images

    def split(self, name: str, severity: int) -> Split:
        """The images under a corruption, from 1 to 5."""
        first = (severity - 1) * self._count
        return Split(np.asarray(self._files[name][first + self._rows]), self._test.labels)


def _read(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is no file of numbers: {error}") from None
