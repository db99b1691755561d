"""A directory of results, made anew by one process at a time and put in the place of the old one in one move."""

import contextlib
import errno
import logging
import os
import pathlib
import shutil
import time
from typing import IO

from vitcls.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where nothing is claimed
    fcntl = None

_logger = logging.getLogger("vitcls")
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a disk without locks


class Part(contextlib.AbstractContextManager):
    """Claims `directory` from entry to exit, before the work whose results it will hold; `replace` puts them there.

    Raises UserError on entry where it cannot be written or a living process has claimed it, and does not end within
    `patience` seconds. What a killed one has left is taken over, and what is not put in place is removed.
    """

    def __init__(self, directory: os.PathLike | str, patience: float = 0.0):
        self._patience = patience
        self.directory = pathlib.Path(os.path.realpath(directory))  # what a link means, which stays
        self.new = self.directory.with_name(f".{self.directory.name}.new")  # to be filled
        self._old = self.directory.with_name(f".{self.directory.name}.old")  # while the two change places

    def __enter__(self) -> "Part":
        self._made = [path for path in self.directory.parents if not path.exists()]
        try:
            self._lock = self._wait_for_it()
        except BlockingIOError:
            raise UserError(f"{self.directory} is being written by another command; wait for it to end") from None
        except OSError as error:
            self._remove_parents()
            raise UserError(f"{self.directory} cannot be written: {error.strerror or error}") from None
        if self._old.exists() and not self.directory.exists():  # of a process that was killed between two moves
            self._old.rename(self.directory)
        for path in self.new.iterdir():  # of a killed process
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self

    def __exit__(self, *error) -> None:
        if not self._lock.closed:
            shutil.rmtree(self.new, ignore_errors=True)
            self._lock.close()
            self._remove_parents()

    def replace(self) -> None:
        """Puts what was made in the place of the directory, or where there is none yet; the claim ends."""
        shutil.rmtree(self._old, ignore_errors=True)
        if self.directory.exists():
            self.directory.rename(self._old)
        self.new.rename(self.directory)  # still locked, or another could claim it half-way
        (self.directory / _LOCK).unlink()
        self._lock.close()
        shutil.rmtree(self._old, ignore_errors=True)

    def _wait_for_it(self) -> IO[str]:
        end, told = time.monotonic() + self._patience, False
        while True:
            try:
                return self._acquire()
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
            if not told:
                _logger.info("waiting for another command that writes %s", self.directory)
            told = True
            time.sleep(0.5)

    def _acquire(self) -> IO[str]:
        """The locked file; the lock ends with the process, however that ends."""
        while True:
            self.new.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:
                file = opened.enter_context(open(self.new / _LOCK, "w", encoding="utf-8"))
                try:
                    if fcntl is not None:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.new / _LOCK)):  # else put in place just now
                    opened.pop_all()
                    return file

    def _remove_parents(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()
