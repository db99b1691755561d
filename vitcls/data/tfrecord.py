"""TFRecord files, without TensorFlow: a length and its checksum, the record, and its checksum."""

import io
import struct
from collections.abc import Iterator

from vitcls.core import buckets
from vitcls.core.errors import UserError

_BLOCK = 2**20  # bytes that are asked of a bucket at once
_HEADER, _FOOTER = 12, 4  # length uint64 and its CRC; then, after the record, its CRC


def scan(files, name: str) -> Iterator[tuple[int, int, bytes]]:
    """(offset of its first byte, length in bytes, record) of every record; raises UserError for a damaged file.

    `files` is fsspec's file system that has `name`.
    """
    size, place = files.info(name, timeout=buckets.limit())["size"], 0
    with io.BufferedReader(_Ranges(files, name, size), _BLOCK) as file:
        while place < size:
            header = file.read(_HEADER)
            length = struct.unpack("<Q", header[:8])[0] if _is_header(header) else size
            end = place + _HEADER + length + _FOOTER
            if end > size:
                raise UserError(f"{name} is damaged or cut short at byte {place:,}; prepare the data set again")
            yield place + _HEADER, length, file.read(length)
            file.read(_FOOTER)
            place = end


def read(files, name: str, offset: int, length: int) -> bytes:
    record = files.cat_file(name, start=offset, end=offset + length, timeout=buckets.limit(length))
    if len(record) != length:  # not every service says that it was cut off
        raise OSError(f"{name} ends within the record at byte {offset:,}")
    return record


class _Ranges(io.RawIOBase):
    """A file that is read from end to end, in requests that are given up in time."""

    def __init__(self, files, name: str, size: int):
        self._files, self._name, self._size, self._place = files, name, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        length = min(len(buffer), self._size - self._place)
        if length:
            buffer[:length] = read(self._files, self._name, self._place, length)
            self._place += length
        return length


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
