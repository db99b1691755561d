"""Random access to TFRecord files, without TensorFlow: an index of where every record lies."""

import dataclasses
import hashlib
import os
import struct
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vitcls.core.cache import cache_dir, load_arrays, store_arrays
from vitcls.core.errors import UserError

_HEADER, _FOOTER = 12, 4  # length uint64 and its CRC; then, after the record, its CRC
Parse = Callable[[bytes], tuple[bytes, int]]  # record -> encoded image, label


@dataclasses.dataclass(frozen=True)
class RecordImages:
    """The encoded images of records, read by place; see `data.images.EncodedImages`."""

    files: tuple[str, ...]
    file_numbers: np.ndarray  # [N]
    offsets: np.ndarray  # [N], bytes
    lengths: np.ndarray  # [N], bytes
    parse: Parse

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> bytes:
        return self.parse(self._record(index))[0]

    def name(self, index: int) -> str:
        return f"the image at byte {self.offsets[index]:,} of {self.files[self.file_numbers[index]]}"

    def take(self, indices: np.ndarray) -> "RecordImages":
        return dataclasses.replace(
            self,
            file_numbers=self.file_numbers[indices],
            offsets=self.offsets[indices],
            lengths=self.lengths[indices],
        )

    def _record(self, index: int) -> bytes:
        # Opened for every read: a large set has more files than a process may hold open.
        with open(self.files[self.file_numbers[index]], "rb", buffering=0) as file:
            return os.pread(file.fileno(), int(self.lengths[index]), int(self.offsets[index]))


def index_records(files: Sequence[os.PathLike | str], parse: Parse) -> tuple[RecordImages, np.ndarray]:
    """Returns the records of TFRecord files and their labels, int64 [N]; no image is decoded.

    All files are read once; the index is kept in the cache directory for as long as they stay as they are. Raises
    UserError naming a file that is missing, cut short or damaged.
    """
    files = tuple(map(os.fspath, files))
    path = cache_dir() / "indexes" / f"{_fingerprint(files)}.npz"
    arrays = load_arrays(path, ("file_numbers", "offsets", "lengths", "labels"))
    if arrays is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            tables = list(pool.map(lambda name: _scan(name, parse), files))
        offsets, lengths, labels = np.concatenate([np.zeros((0, 3), np.int64), *tables]).T
        arrays = {
            "file_numbers": np.repeat(np.arange(len(files)), [len(table) for table in tables]),
            "offsets": offsets,
            "lengths": lengths,
            "labels": labels,
        }
        store_arrays(path, arrays)
    labels = arrays.pop("labels")
    return RecordImages(files, **arrays, parse=parse), labels


def _scan(name: str, parse: Parse) -> np.ndarray:
    """Reads a file from end to end: (offset, length, label) of every record, int64 [N, 3]."""
    size = os.path.getsize(name)
    rows = []
    with open(name, "rb") as file:
        place = 0
        while place < size:
            header = file.read(_HEADER)
            length = struct.unpack("<Q", header[:8])[0] if _is_header(header) else size
            end = place + _HEADER + length + _FOOTER
            if end > size:
                raise UserError(f"{name} is damaged or cut short at byte {place:,}; prepare the data set again")
            record = file.read(length)
            try:
                rows.append((place + _HEADER, length, parse(record)[1]))
            except Exception as error:  # a protocol buffer can be damaged in many ways
                reason = textwrap.shorten(str(error), 200, placeholder=" ...")
                raise UserError(
                    f"the record at byte {place:,} of {name} cannot be read ({reason}); prepare the data set again"
                ) from None
            file.read(_FOOTER)
            place = end
    return np.asarray(rows, np.int64).reshape(-1, 3)


def _is_header(header: bytes) -> bool:
    """Whether the 12 bytes before a record are a length and its checksum (TFRecord's masked CRC-32C)."""
    if len(header) != _HEADER:
        return False
    checksum = crc32c(header[:8])
    masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == struct.unpack("<I", header[8:])[0]


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli) of a few bytes, as RFC 3720 defines it."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = _CRC_TABLE[(checksum ^ byte) & 0xFF] ^ checksum >> 8
    return checksum ^ 0xFFFFFFFF


def _crc_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


_CRC_TABLE = tuple(map(_crc_entry, range(256)))


def _fingerprint(files: Sequence[str]) -> str:
    try:
        facts = [(os.path.abspath(name), os.path.getsize(name), os.stat(name).st_mtime_ns) for name in files]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); prepare the data set again") from None
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
