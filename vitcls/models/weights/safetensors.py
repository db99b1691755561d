"""Reads .safetensors: eight bytes of length, a JSON header, the bytes of all arrays one after the other.

Without the library, which has no BF16 for NumPy and believes the header's lengths.
"""

import itertools
import json
import math
import os
import struct
from typing import Any, BinaryIO

import numpy as np

from vitcls.models.weights.arrays import MAX_HEADER_BYTES, MAX_NAMES, LazyArray, checked_shape, unusable

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # the upper half of a float32
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_DEEPEST = 32  # brackets of a real header, whose metadata may be JSON too


def read_safetensors(path: str) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """The arrays of a file by name, as they are asked for, and its metadata.

    Raises UserError for a header that is cut short, too large, nested, or does not fit the length of the file.
    """
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        header, start = _header(path, file, length)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or len(header) > MAX_NAMES or not header:
        raise unusable(path, f"its header is not that of a .safetensors file ({len(header)} arrays)")
    arrays = {name: _array(path, name, entry, start, length) for name, entry in header.items()}
    places = sorted(entry["data_offsets"] for entry in header.values())
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(places)):
        raise unusable(path, "its header gives two arrays the same bytes")
    return arrays, {str(key): str(value) for key, value in metadata.items()}


def _header(path: str, file: BinaryIO, length: int) -> tuple[dict[str, Any], int]:
    """The header and where the arrays begin."""
    first = file.read(8)
    size = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= size <= min(length - 8, MAX_HEADER_BYTES):
        raise unusable(path, f"its header claims {size:,} bytes of a file of {length:,}; is it cut short?")
    text = file.read(size)
    if _depth(text) > _DEEPEST:
        raise unusable(path, "its header is nested, which that of no .safetensors file is")
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise unusable(path, f"its header is not JSON ({str(error)[:60]})") from None
    if not isinstance(header, dict):
        raise unusable(path, "its header is no JSON object")
    return header, 8 + size


def _depth(text: bytes) -> int:
    """How many brackets are open at once, at most; those inside of strings count too, which only makes it more."""
    codes = np.frombuffer(text, np.uint8)
    opened = np.isin(codes, np.frombuffer(b"[{", np.uint8)).astype(np.int8)
    closed = np.isin(codes, np.frombuffer(b"]}", np.uint8)).astype(np.int8)
    return int(np.cumsum(opened - closed, dtype=np.int32).max(initial=0))


def _array(path: str, name: str, entry: Any, start: int, length: int) -> LazyArray:
    if not isinstance(entry, dict) or not isinstance(entry.get("data_offsets"), list):
        raise unusable(path, f"the entry '{name[:60]}' of its header is no array")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise unusable(path, f"'{name[:60]}' has the type {str(dtype)[:20]!r}; known are {', '.join(_DTYPES)}")
    shape, kind = checked_shape(path, name, entry.get("shape")), np.dtype(_DTYPES[dtype])
    offsets = entry["data_offsets"]
    if len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise unusable(path, f"the offsets of '{name[:60]}' are impossible")
    begin, end = offsets
    if not 0 <= begin <= end <= length - start or end - begin != math.prod(shape) * kind.itemsize:
        raise unusable(
            path,
            f"'{name[:60]}' does not fit its place, bytes {begin} to {end} of {length - start:,}; cut short?",
        )

    def read() -> np.ndarray:
        flat = np.fromfile(path, kind, math.prod(shape), offset=start + begin)
        if flat.size != math.prod(shape):
            raise unusable(path, "it has been cut short since it was opened")
        if dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(shape)

    return LazyArray(shape, np.dtype(np.float32) if dtype == "BF16" else kind, read)
