"""The files: a program with what it is (a zip), and weights by PyTorch's names with the same (a .safetensors)."""

import io
import json
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vitcls.core.errors import UserError

PROGRAM, ABOUT = "program.stablehlo", "about.json"
_MOST_BYTES = 2**33  # of a program that is read
_DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "uint8": "U8"}


class Artefact(NamedTuple):
    """An exported run: `answer(images uint8 [B, H, W, C]) -> probabilities float32 [B, K]`, and what it is."""

    answer: Callable[[np.ndarray], np.ndarray]
    about: dict[str, Any]


def pack_program(program: bytes, about: Mapping[str, Any]) -> bytes:
    """A zip, not compressed, with the program and what it is."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, content in ((PROGRAM, program), (ABOUT, json.dumps(about, indent=2).encode())):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)  # the same bytes every day
    return whole.getvalue()


def load(path: str) -> Artefact:
    """Opens what `--format=stablehlo` wrote; raises UserError for what is none. Nothing of it is unpickled."""
    import jax
    from jax import export

    try:
        with zipfile.ZipFile(path) as archive:
            if max(archive.getinfo(name).file_size for name in (PROGRAM, ABOUT)) > _MOST_BYTES:
                raise ValueError("it is too large")
            program, about = archive.read(PROGRAM), json.loads(archive.read(ABOUT))
        exported = export.deserialize(bytearray(program))
        shape = tuple(about["image_shape"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"{path} is no exported program of vitcls ({' '.join(str(error).split())[:120]})") from None
    call = jax.jit(exported.call)

    def answer(images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise ValueError(f"images are {images.dtype} {images.shape}; they must be uint8 [B, {shape}]")
        return np.asarray(call(images))

    return Artefact(answer, about)


def pack_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The format of https://github.com/huggingface/safetensors: length, JSON header, the arrays' bytes in C order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts, end = [], 0
    for name, array in arrays.items():
        content = np.ascontiguousarray(array).tobytes()
        offsets = [end, end + len(content)]
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        parts.append(content)
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file in one move; raises UserError where that cannot be."""
    coming = path.with_name(f".{path.name}.part")
    try:
        coming.write_bytes(content)
        coming.replace(path)
    except OSError as error:
        coming.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
