"""Reads .npz, a ZIP file of NumPy's arrays, without pickle and without belief in what its headers claim."""

import ast
import math
import re
import struct
import zipfile
import zlib

import numpy as np

from vitcls.models.weights.arrays import MAX_NAMES, LazyArray, checked_shape, unusable

_HEADER_BYTES = 4_096  # of one array; real ones have about 120
_MAX_RATIO = 64  # bytes of an array for one of the file: weights hardly shrink, but a new head is all zeros
_HEADER = re.compile(
    r"\{\s*'descr':\s*'([^']{1,8})',\s*'fortran_order':\s*(True|False),\s*'shape':\s*(\([\d, ]{0,200}\)),?\s*\}\s*"
)


def read_npz(path: str) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """The arrays of a file by name, as they are asked for, and no metadata.

    Raises UserError for what is no ZIP file, and for an array that is pickled, of another kind than numbers, or not as
    long as its header says.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not 0 < len(entries) <= MAX_NAMES:
                raise unusable(path, f"it holds {len(entries)} arrays")
            return {entry.filename.removesuffix(".npy"): _array(path, archive, entry) for entry in entries}, {}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if str(error).startswith(path):
            raise
        raise unusable(path, f"it is no whole .npz file ({str(error)[:80]})") from None


def _array(path: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> LazyArray:
    name = entry.filename.removesuffix(".npy")
    if entry.file_size > _MAX_RATIO * (entry.compress_size + 2**14):
        raise unusable(path, f"'{name[:60]}' claims {entry.file_size:,} bytes out of {entry.compress_size:,}")
    with archive.open(entry) as file:
        first = file.read(10)
        if first[:6] != b"\x93NUMPY" or len(first) < 10 or first[6] not in (1, 2):
            raise unusable(path, f"'{name[:60]}' is no array of NumPy")
        length, start = struct.unpack("<H", first[8:10])[0], 10
        if first[6] == 2:
            length, start = struct.unpack("<I", first[8:10] + file.read(2))[0], 12
        text = file.read(length).decode("latin-1") if length <= _HEADER_BYTES else ""
    match = _HEADER.fullmatch(text)
    kind = match and re.fullmatch(r"[<>|=]?([fiub])(1|2|4|8)", match[1])
    if kind is None:
        what = match[1] if match else "an unknown header"
        raise unusable(path, f"'{name[:60]}' has the type {what!r}; it must be plain numbers")
    shape, dtype = checked_shape(path, name, ast.literal_eval(match[3])), np.dtype(match[1])
    if math.prod(shape) * dtype.itemsize != entry.file_size - start - length:
        raise unusable(path, f"'{name[:60]}' has not the length of its shape {shape}; is the file cut short?")

    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as opened, opened.open(entry) as file:
                file.read(start + length)
                flat = np.frombuffer(file.read(), dtype)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise unusable(path, f"'{name[:60]}' is damaged ({error})") from None
        return flat.reshape(shape, order="F" if match[2] == "True" else "C")

    return LazyArray(shape, dtype, read)
