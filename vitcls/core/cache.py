"""The private cache directory: compiled programs and indexes of data sets; it may be deleted at any time."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np

from vitcls.core.errors import UserError


def cache_dir() -> pathlib.Path:
    """$VITCLS_CACHE_DIR, else ~/.cache/vitcls.

    Compiled programs are loaded from it and run, so a directory that others can write is refused with a UserError.
    """
    path = pathlib.Path(os.environ.get("VITCLS_CACHE_DIR") or pathlib.Path.home() / ".cache" / "vitcls")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise UserError(
            f"the cache directory {path} can be written by others; run 'chmod 700 {path}', or set VITCLS_CACHE_DIR"
        )
    return path


def load_arrays(path: pathlib.Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The arrays of these names that `store_arrays` has kept; None where they are not there or damaged."""
    try:
        with open(path, "rb") as file, np.load(file) as stored:  # np.load leaves open what it opened and cannot read
            return {name: stored[name] for name in names}
    except Exception:  # whatever is wrong with the file, it is made anew
        return None


def store_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Keeps arrays, at once or not at all; a full disk only means that they are made again next time."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name  # of its own, for processes that share the directory
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
