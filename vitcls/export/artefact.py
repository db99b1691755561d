"""The files that a run is exported to: how they are opened, and what they hold."""

import io
import json
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vitcls.core.errors import UserError
from vitcls.export import onnx, saved_model, tflite

PROGRAM, ABOUT = "program.stablehlo", "about.json"
_MOST_BYTES = 2**33  # of a program that is read
_DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "uint8": "U8", "bfloat16": "BF16"}


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


def check(path: str) -> None:
    """Raises UserError for what is no program of vitcls at first sight; no runtime is needed."""
    if not pathlib.Path(path).exists():
        raise UserError(f"{path} is not there")
    if _runtime(path) in (_load_program, tflite.load) and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no exported program of vitcls")


def load(path: str) -> Artefact:
    """Opens what `vitcls export` wrote, but for weights, in its own runtime; which one its name says.

    Raises UserError for what is none, and where the runtime is missing. Nothing is unpickled.
    """
    try:
        answer, about = _runtime(path)(path)
        shape = tuple(about["image_shape"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, RuntimeError) as error:
        raise UserError(f"{path} is no exported program of vitcls ({' '.join(str(error).split())[:120]})") from None

    def checked(images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise ValueError(f"images are {images.dtype} {images.shape}; they must be uint8 [B, {shape}]")
        return answer(images)

    return Artefact(checked, about)


def _runtime(path: str) -> Callable:
    if pathlib.Path(path).is_dir():
        return saved_model.load
    return {".tflite": tflite.load, ".onnx": onnx.load}.get(pathlib.Path(path).suffix, _load_program)


def _load_program(path: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    import jax
    from jax import export

    with zipfile.ZipFile(path) as archive:
        if max(archive.getinfo(name).file_size for name in (PROGRAM, ABOUT)) > _MOST_BYTES:
            raise ValueError("it is too large")
        program, about = archive.read(PROGRAM), json.loads(archive.read(ABOUT))
    call = jax.jit(export.deserialize(bytearray(program)).call)
    return lambda images: np.asarray(call(images)), about


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


def keep(made: pathlib.Path, path: pathlib.Path) -> None:
    """Moves a file or directory to its name, in the place of an older one; both are on one disk."""
    if path.is_dir():
        path.rename(made.with_name("older"))
    made.replace(path)


def size(path: pathlib.Path) -> int:
    """The bytes of a file, or of all files of a directory."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
