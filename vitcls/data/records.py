"""Random access to TFRecord files, without TensorFlow: an index of where every record lies."""

import dataclasses
import hashlib
import os
import pathlib
import struct
from collections.abc import Callable, Sequence

import numpy as np

from vitcls.cache import cache_dir
from vitcls.errors import UserError

_HEADER, _FOOTER = 12, 4  # length uint64 and its CRC; then, after the record, its CRC


@dataclasses.dataclass(frozen=True)
class RecordImages:
    """The encoded images of records, read by place; see `data.images.EncodedImages`."""

    files: tuple[str, ...]
    file_numbers: np.ndarray  # [N]
    offsets: np.ndarray  # [N], bytes
    lengths: np.ndarray  # [N], bytes
    parse: Callable[[bytes], tuple[bytes, int]]  # record -> encoded image, label

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> bytes:
        return self.parse(self._record(index))[0]

    def take(self, indices: np.ndarray) -> "RecordImages":
        return dataclasses.replace(
            self,
            file_numbers=self.file_numbers[indices],
            offsets=self.offsets[indices],
            lengths=self.lengths[indices],
        )

    def _record(self, index: int) -> bytes:
        with open(self.files[self.file_numbers[index]], "rb", buffering=0) as file:
            return os.pread(file.fileno(), int(self.lengths[index]), int(self.offsets[index]))

    def read_labels(self) -> np.ndarray:
        """The label of every record, int64 [N]; images are not decoded."""
        labels = np.empty(len(self), np.int64)
        for number, name in enumerate(self.files):
            with open(name, "rb") as file:
                for index in np.flatnonzero(self.file_numbers == number):
                    file.seek(int(self.offsets[index]))
                    labels[index] = self.parse(file.read(int(self.lengths[index])))[1]
        return labels


def index_records(
    files: Sequence[os.PathLike | str], parse: Callable[[bytes], tuple[bytes, int]]
) -> tuple[RecordImages, np.ndarray]:
    """Returns the records of TFRecord files and their labels, int64 [N]; the index is kept in the cache directory.

    Raises UserError naming a file that is cut short or no TFRecord file.
    """
    files = tuple(map(os.fspath, files))
    path = cache_dir() / "indexes" / f"{_fingerprint(files)}.npz"
    names = ("file_numbers", "offsets", "lengths", "labels")
    try:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError):
        arrays = None
    if arrays is None:
        numbers, offsets, lengths = [], [], []
        for number, name in enumerate(files):
            for offset, length in _scan(name):
                numbers.append(number)
                offsets.append(offset)
                lengths.append(length)
        arrays = {
            "file_numbers": np.asarray(numbers, np.int32),
            "offsets": np.asarray(offsets, np.int64),
            "lengths": np.asarray(lengths, np.int64),
        }
        arrays["labels"] = RecordImages(files, **arrays, parse=parse).read_labels()
        _store(path, arrays)
    labels = arrays.pop("labels")
    return RecordImages(files, **arrays, parse=parse), labels


def _scan(name: str):
    """Yields (offset, length) of every record of a file."""
    size = os.path.getsize(name)
    with open(name, "rb") as file:
        place = 0
        while place < size:
            file.seek(place)
            header = file.read(_HEADER)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == _HEADER else size
            if place + _HEADER + length + _FOOTER > size:
                raise UserError(f"{name} is damaged or cut short at byte {place:,}; prepare the data set again")
            yield place + _HEADER, length
            place += _HEADER + length + _FOOTER


def _fingerprint(files: Sequence[str]) -> str:
    facts = [(os.path.abspath(name), os.path.getsize(name), os.stat(name).st_mtime_ns) for name in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _store(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
    np.savez(temporary, **arrays)
    os.replace(temporary, path)
