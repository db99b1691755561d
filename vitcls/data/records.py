"""Random access to the records of files, on a disk or in a bucket: an index of where every record lies."""

import dataclasses
import hashlib
import os
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vitcls.core import buckets
from vitcls.core.cache import cache_dir, load_arrays, store_arrays
from vitcls.core.errors import UserError
from vitcls.data import array_record, images, tfrecord

FORMS = {"tfrecord": tfrecord, "array_record": array_record}  # each scans a file, and reads a record of one
_PART, _GAP = 2**20, 2**14  # bytes that are asked of a bucket at once, and that may lie unused between them
Parse = Callable[[bytes], tuple[bytes, int]]  # record -> encoded image, label


@dataclasses.dataclass(frozen=True)
class RecordImages:
    """The encoded images of records, read by place; see `data.images.EncodedImages`."""

    store: Any  # fsspec's file system that has the files
    form: str  # one of FORMS
    files: tuple[str, ...]
    file_numbers: np.ndarray  # [N]
    offsets: np.ndarray  # [N], as the form counts them
    lengths: np.ndarray  # [N]
    parse: Parse

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def afar(self) -> bool:
        return self.store.protocol != ("file", "local")

    def read(self, index: int) -> bytes:
        return self.parse(self._read(index, int(self.offsets[index]), int(self.lengths[index])))[0]

    def neighbors(self) -> list[np.ndarray]:
        """The indices of all records in parts that lie side by side in a file, up to 1 MiB each."""
        order = np.lexsort((self.offsets, self.file_numbers))
        places = np.stack([self.file_numbers, self.offsets, self.lengths], axis=1)[order].tolist()
        parts: list[list[int]] = []
        begin, end, number = 0, 0, -1
        for index, (file_number, offset, length) in zip(order.tolist(), places, strict=True):
            if file_number != number or offset - end > _GAP or offset + length - begin > _PART:
                parts.append([])
                begin, number = offset, file_number
            parts[-1].append(index)
            end = offset + length
        return [np.array(part) for part in parts]

    def read_together(self, indices: np.ndarray) -> list[bytes]:
        """The images of a part of `neighbors`."""
        offsets, lengths = self.offsets[indices], self.lengths[indices]
        begin = int(offsets.min())
        data = self._read(int(indices[0]), begin, int((offsets + lengths).max()) - begin)
        return [
            self.parse(data[offset - begin : offset - begin + length])[0]
            for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True)
        ]

    def name(self, index: int) -> str:
        unit = "at byte" if self.form == "tfrecord" else "of record"
        return f"the image {unit} {self.offsets[index]:,} of {self.files[self.file_numbers[index]]}"

    def take(self, indices: np.ndarray) -> "RecordImages":
        return dataclasses.replace(
            self,
            file_numbers=self.file_numbers[indices],
            offsets=self.offsets[indices],
            lengths=self.lengths[indices],
        )

    def _read(self, index: int, offset: int, length: int) -> bytes:
        """What lies there in the file of a record."""
        name = self.files[self.file_numbers[index]]
        try:
            return FORMS[self.form].read(self.store, name, offset, length)
        except Exception as error:  # whatever a network, a proxy or a service says
            if not self.afar or isinstance(error, UserError):
                raise
            raise OSError(f"{name} cannot be read: {buckets.reason(error)}") from None


def index_records(
    files: Sequence[os.PathLike | str], parse: Parse, *, form: str = "tfrecord", store: Any = None
) -> tuple[RecordImages, np.ndarray]:
    """Returns the records of files and their labels, int64 [N]; no image is decoded.

    All files are read once; the index is kept in the cache directory for as long as they stay as they are. `store` is
    fsspec's file system that has them, by default the local one. Raises UserError naming a file that is missing, cut
    short or damaged.
    """
    import fsspec

    store = store or fsspec.filesystem("file")
    files = tuple(map(os.fspath, files))
    path = cache_dir() / "indexes" / f"{_fingerprint(store, files)}.npz"
    arrays = load_arrays(path, ("file_numbers", "offsets", "lengths", "labels"))
    if arrays is None:
        found = RecordImages(store, form, files, *np.zeros((3, 0), np.int64), parse=parse)
        with ThreadPoolExecutor(images.reading_threads(found)) as pool:
            tables = list(pool.map(lambda name: _scan(store, form, name, parse), files))
        offsets, lengths, labels = np.concatenate([np.zeros((0, 3), np.int64), *tables]).T
        arrays = {
            "file_numbers": np.repeat(np.arange(len(files)), [len(table) for table in tables]),
            "offsets": offsets,
            "lengths": lengths,
            "labels": labels,
        }
        store_arrays(path, arrays)
    labels = arrays.pop("labels")
    return RecordImages(store, form, files, **arrays, parse=parse), labels


def _scan(store: Any, form: str, name: str, parse: Parse) -> np.ndarray:
    """Reads a file from end to end: (offset, length, label) of every record, int64 [N, 3]."""
    rows = []
    for offset, length, record in FORMS[form].scan(store, name):
        try:
            rows.append((offset, length, parse(record)[1]))
        except Exception as error:  # a protocol buffer can be damaged in many ways
            reason = textwrap.shorten(str(error), 200, placeholder=" ...")
            raise UserError(
                f"the record at {offset:,} of {name} cannot be read ({reason}); prepare the data set again"
            ) from None
    return np.asarray(rows, np.int64).reshape(-1, 3)


def _fingerprint(store: Any, files: Sequence[str]) -> str:
    """Of names, sizes and times; folders are listed, as asking a bucket for each file takes long."""
    found = {}
    for folder in {os.path.dirname(name) for name in files}:
        found |= store.find(folder, maxdepth=1, detail=True, timeout=buckets.limit())
    facts = []
    for name in files:
        try:
            info = found[store._strip_protocol(name)]
        except KeyError:
            raise UserError(f"{name} cannot be read (it is not there); prepare the data set again") from None
        facts.append((name, info["size"], str(info.get("mtime") or info.get("LastModified"))))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
