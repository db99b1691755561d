"""The private cache directory: compiled programs and indexes of data sets; it may be deleted at any time."""

import os
import pathlib

from vitcls.errors import UserError


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
