"""ArrayRecord files, through the package that TensorFlow Datasets reads them with; on a disk only."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from vitcls.core.errors import UserError

_AT_ONCE = 64  # records in memory while a file is read from end to end


def scan(files, name: str) -> Iterator[tuple[int, int, bytes]]:
    """(number in the file, 1, record) of every record; raises UserError for a damaged file, OSError for no file."""
    with _opened(name) as reader:
        count = reader.num_records()
        for start in range(0, count, _AT_ONCE):
            for number, record in enumerate(reader.read(start, min(start + _AT_ONCE, count)), start):
                yield number, 1, record


def read(files, name: str, number: int, count: int) -> bytes:
    with _opened(name) as reader:
        return reader.read([number])[0]


@contextlib.contextmanager
def _opened(name: str) -> Iterator[Any]:
    """A reader, opened for every read: a large set has more files than a process may hold open."""
    from array_record.python import array_record_module

    os.stat(name)  # a disk that is away is told from a damaged file
    reader = array_record_module.ArrayRecordReader(name, "readahead_buffer_size:0")  # for reads in any order
    try:
        if not reader.ok():
            reader.read([0])  # says why
        yield reader
        reader.close()
    except RuntimeError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{name} is damaged ({reason}); prepare the data set again") from None
