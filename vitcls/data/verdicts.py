"""Whether the files of a folder are images that can be used: looked at once, and kept in the cache.

A file is looked at again only when its size or time has changed.
"""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vitcls.core.cache import cache_dir, load_arrays, store_arrays
from vitcls.core.progress import show_progress
from vitcls.data import images as image_files
from vitcls.data.images import BadImage

_HEADS = (2**14, 2**18)  # bytes: of most headers; of one that has a thumbnail and a colour profile
_ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"\0\0\0\0IEND\xaeB`\x82"}  # JPEG and PNG: start to end
_CHUNK = 64  # files per task
Verdict = tuple[int, int, int] | str  # width, height and channels, or why not


def verdicts(
    root: pathlib.Path, names: np.ndarray, keys: np.ndarray, stamps: np.ndarray
) -> tuple[np.ndarray, dict[int, str]]:
    """Returns (width, height, channels) of every file, int32 [N, 3], 0 where it cannot be used, and by row why not.

    Args:
      root: of the folder.
      names: bytes [N], the path of each file below the root.
      keys: bytes [N], the same with links followed.
      stamps: int64 [N, 2], size in bytes and time of change in ns.
    """
    path = cache_dir() / "folders" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.npz"
    index = _read_index(path)
    places = np.minimum(np.searchsorted(index["keys"], keys), len(index["keys"]) - 1)
    known = (index["keys"][places] == keys) & (index["stamps"][places] == stamps).all(1)
    shapes = np.where(known[:, None], index["shapes"][places], 0).astype(np.int32)
    whys = dict(zip(index["bad"].tolist(), index["reasons"].tolist(), strict=True))
    reasons = {row: whys[places[row]] for row in np.flatnonzero(known & (shapes[:, 2] == 0)).tolist()}

    new, passing = np.flatnonzero(~known), []
    looked_at = show_progress(_look_at(os.fsencode(root), names[new]), len(new), "looking at new files")
    for row, verdict in zip(new.tolist(), looked_at, strict=True):
        if isinstance(verdict, OSError):  # may pass without a change of the file: not to be kept
            passing.append(row)
            reasons[row] = f"cannot be read ({verdict.strerror})"
        elif isinstance(verdict, str):
            reasons[row] = verdict
        else:
            shapes[row] = verdict
    if len(new) > len(passing):
        _store_index(path, np.delete(np.arange(len(keys)), passing), keys, stamps, shapes, reasons)
    return shapes, reasons


# What is known of no file; as the first entry of every index it saves the case of an empty one.
_NOTHING = {
    "keys": np.array([b""]),  # sorted
    "stamps": np.full((1, 2), -1),
    "shapes": np.zeros((1, 3), np.uint8),
    "bad": np.zeros(0, np.int64),  # places in `keys`
    "reasons": np.zeros(0, "U1"),
}


def _read_index(path: pathlib.Path) -> dict[str, np.ndarray]:
    index = load_arrays(path, tuple(_NOTHING))
    if index is None or len({len(index[name]) for name in ("keys", "stamps", "shapes")}) > 1:
        return _NOTHING
    return index


def _store_index(path, rows: np.ndarray, keys: np.ndarray, stamps: np.ndarray, shapes: np.ndarray, reasons) -> None:
    """Keeps what is known of `rows`; two links to a file have one key."""
    keys, first = np.unique(keys[rows], return_index=True)
    rows = rows[first]
    shapes = shapes[rows]
    bad = np.flatnonzero(shapes[:, 2] == 0)
    arrays = {
        "keys": keys,
        "stamps": stamps[rows],
        "shapes": shapes.astype(np.min_scalar_type(shapes.max(initial=0))),
        "bad": bad + 1,
        "reasons": np.array([reasons[row] for row in rows[bad].tolist()], "U"),
    }
    store_arrays(path, {name: np.concatenate([_NOTHING[name], array]) for name, array in arrays.items()})


def _look_at(root: bytes, names: np.ndarray) -> Iterator[Verdict | OSError]:
    """Looks at files in threads, a chunk of them at a time; in order."""

    def look(start: int) -> list[Verdict | OSError]:
        return [_verdict(os.path.join(root, name)) for name in names[start : start + _CHUNK].tolist()]

    with ThreadPoolExecutor() as pool:
        for chunk in pool.map(look, range(0, len(names), _CHUNK)):
            yield from chunk


def _verdict(path: bytes) -> Verdict | OSError:
    """By its header and its end for JPEG and PNG; what these leave open is decoded, as is every other format."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start, end = os.pread(file.fileno(), 8, 0), os.pread(file.fileno(), 12, max(size - 12, 0))
            whole = any(start.startswith(first) and end.endswith(last) for first, last in _ENDS.items())
            for length in _HEADS if whole and size <= 8 * image_files.MAX_PIXELS else ():
                with contextlib.suppress(BadImage):  # perhaps its header is longer
                    return image_files.examine(os.pread(file.fileno(), length, 0))
        return image_files.verify(pathlib.Path(os.fsdecode(path)))
    except BadImage as error:
        return str(error)
    except OSError as error:
        return error
