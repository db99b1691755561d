"""Where a workdir is: a directory, or a place in a bucket, of which a run works in a copy on its own disk.

A bucket, gs:// or s3://, is no file system: nothing is appended, renamed or locked in it, and it may be out of reach
for a while. So a run reads and writes a local copy as it does a directory, and a thread of process 0 brings the bucket
up to date every few seconds. A kill may come between any two files: of a checkpoint the manifest goes up last, and what
has none was never there. Other processes need no disk in common; each copies what it reads.
"""

import atexit
import contextlib
import logging
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from vitcls.core import buckets, errors
from vitcls.core.cache import cache_dir
from vitcls.core.errors import RunError, UserError
from vitcls.core.terminal import printable
from vitcls.training.files import CHECKPOINTS, CONFIG_FILE, FAILED_FILE, LOCK_FILE, MANIFEST, METRICS_FILE, PROFILE
from vitcls.training.lock import LockFile, WorkdirLock

try:
    import fcntl
except ImportError:  # Windows, where copies of killed processes stay
    fcntl = None

_FLAG = "--workdir"
_PERIOD = 5.0  # seconds between two looks at what has changed
_EVENTS_PERIOD = 60.0  # TensorBoard's files grow all the time and go up whole
_PATIENCE = 600.0  # seconds for which a run that has ended tries to reach the bucket
_TRIES = 3  # to read a whole file
_SMALL = 5 * 2**20  # bytes; gcsfs sends larger files bare
_PART_BYTES = 2**18  # of metrics.jsonl, after which a new part is begun
_PARTS = f"{METRICS_FILE}.parts"
_logger = logging.getLogger("vitcls")


class Place:
    """A directory that all processes see."""

    shared = True

    def __init__(self, path: pathlib.Path):
        self.path = path

    def refresh(self) -> None:
        """Brings a copy up to date; raises RunError where the original is out of reach."""

    def share(self) -> None:
        """Lets the other processes have what the holder has written: it sends, and the others, later, fetch."""

    @contextlib.contextmanager
    def hold(self) -> Iterator[WorkdirLock]:
        """Holds the workdir, as process 0 of a run does; raises UserError where a living run holds it."""
        with WorkdirLock(LockFile(self.path)) as lock:
            yield lock


@contextlib.contextmanager
def opened(name: os.PathLike | str, *, arrays: bool = True) -> Iterator[Place]:
    """The place of a workdir that is named by a path, or by the URL of a bucket.

    Without `arrays` the copy of a bucket lacks them, to look at the rest quickly.

    Raises UserError for a URL of another kind, a bucket that is not there or refuses, and a name that is not UTF-8, to
    which Orbax and TensorBoard could not write.
    """
    check(name)
    if not buckets.is_url(name):
        yield Place(pathlib.Path(name))
        return
    bucket = Bucket(os.fspath(name), arrays=arrays)
    try:
        bucket.refresh()
        yield bucket
    finally:
        bucket.close()


def copied(name: os.PathLike | str) -> pathlib.Path:
    """The directory of a workdir to read: its own, or a copy that is removed when the process ends.

    Raises UserError as `opened` does.
    """
    held = contextlib.ExitStack()
    place = held.enter_context(opened(name))
    atexit.register(held.close)
    return place.path


def matching(pattern: str) -> list[str]:
    """The URLs of the runs in a bucket that a URL with * means, in order.

    Raises UserError where there is none, and as `opened` does.
    """
    check(pattern)
    files, scheme = buckets.file_system(pattern, _FLAG), pattern.partition("://")[0]
    with buckets.in_one_line(pattern):
        files.invalidate_cache()
        found = files.glob(f"{pattern.partition('://')[2].rstrip('/')}/{CONFIG_FILE}", timeout=buckets.limit())
    if not found:
        raise UserError(f"{pattern} is the workdir of no run: no folder that matches it has a {CONFIG_FILE}")
    return [f"{scheme}://{path.removesuffix(f'/{CONFIG_FILE}')}" for path in sorted(found)]


def publish(name: os.PathLike | str, directory: pathlib.Path, part: str) -> None:
    """Puts a file or folder of a workdir that was written anew, such as 'report', where the workdir is."""
    if not buckets.is_url(name):
        return
    files, root = buckets.file_system(os.fspath(name), _FLAG), os.fspath(name).rstrip("/").partition("://")[2]
    there = (directory / part, *(directory / part).rglob("*"))
    new = [path.relative_to(directory).as_posix() for path in there if path.is_file()]
    with buckets.in_one_line(os.fspath(name)):
        for local in new:
            _put(files, directory / local, f"{root}/{local}")
        for old in files.find(f"{root}/{part}", timeout=buckets.limit()):
            if old.removeprefix(f"{root}/") not in new:
                files.rm_file(old, timeout=buckets.limit())


def check(name: os.PathLike | str) -> None:
    """Raises UserError where no workdir can have this name; looks at nothing but the name."""
    name = os.fspath(name)
    if printable(name) != name:
        raise UserError(f"the name of the workdir '{name}' is not UTF-8; choose another --workdir")
    if buckets.is_url(name) and not buckets.is_in_bucket(name):
        known = " or ".join(f"{scheme}://BUCKET/DIR" for scheme in buckets.EXTRAS)
        raise UserError(f"--workdir={name} cannot be used; give a directory, {known}")


def check_many(name: os.PathLike | str) -> None:
    """As `check`, of a directory with many runs, which cannot be in a bucket and is not itself that of a run."""
    buckets.check_local(os.fspath(name), _FLAG)
    check(name)
    if os.path.exists(os.path.join(name, CONFIG_FILE)):
        raise UserError(f"{_FLAG}={os.fspath(name)} holds a run; give a directory for many")


class Bucket(Place):
    """A workdir in a bucket, and its copy on this machine."""

    shared = False

    def __init__(self, url: str, *, arrays: bool = True):
        self._files = buckets.file_system(url, _FLAG)
        self._claim = _claim_copy(pathlib.Path(os.path.abspath(cache_dir() / "workdirs")))
        super().__init__(pathlib.Path(self._claim.name).with_suffix(""))
        self.path.mkdir()
        self._url, self._arrays = url.rstrip("/"), arrays
        errors.copies[str(self.path)] = self._url
        self._root = self._url.partition("://")[2]
        self._sent: dict[str, tuple] = {}  # what the bucket has: name -> signature of the local file
        self._found: dict[str, Any] = {}  # what the bucket had when it was read: name -> its size, time or tag
        self._metrics = _Parts()
        self._lock: WorkdirLock | None = None
        self._pushing = threading.Lock()
        self._answered = time.monotonic()  # when the bucket last did
        self._silent_since: float | None = None
        self._keep = False  # the local copy, of which the bucket lacks something
        self._torn: list[str] = []  # files in the bucket of checkpoints that are not whole

    def close(self) -> None:
        if not self._keep:
            shutil.rmtree(self.path, ignore_errors=True)
        pathlib.Path(self._claim.name).unlink(missing_ok=True)
        self._claim.close()

    def share(self) -> None:
        if self._lock is None:
            self._keep_trying(self._refresh)
        else:
            self._finish()

    def refresh(self) -> None:
        with buckets.in_one_line(self._url):
            self._refresh()

    def _refresh(self) -> None:
        there = self._list()
        for name in sorted(there):
            if name.startswith(f"{_PARTS}/") or name == METRICS_FILE or self._found.get(name) == there[name]:
                continue
            with contextlib.suppress(FileNotFoundError):  # a living run has removed it
                self._fetch(name, size=there[name][0])
        whole = {name for name in there if name == METRICS_FILE or name.startswith(f"{_PARTS}/")}
        if any(self._found.get(name) != there[name] for name in whole):
            self._metrics.read({name: self._read(name, size=there[name][0]) for name in whole}, self.path)
        for name in self._found.keys() - there.keys():
            self._forget(name)
        self._found = there
        self._note_answer()

    def _note_answer(self) -> None:
        self._answered = time.monotonic()

    def _read(self, name: str, size: int) -> bytes:
        return self._files.cat_file(f"{self._root}/{name}", timeout=buckets.limit(size))

    def _forget(self, name: str) -> None:
        """Removes a file from the copy, and the folders that are empty without it."""
        local = self.path / name
        local.unlink(missing_ok=True)
        self._sent.pop(name, None)
        for folder in local.relative_to(self.path).parents[:-1]:
            with contextlib.suppress(OSError):
                (self.path / folder).rmdir()

    def _fetch(self, name: str, size: int) -> None:
        local = self.path / name
        local.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            self._files.get_file(f"{self._root}/{name}", str(local), timeout=buckets.limit(size))
            # Not every service says that it was cut off; only checkpoints never change after they were listed.
            if local.stat().st_size == size or not _checkpoint(name):
                break
        else:
            raise RunError(f"{self._url}/{name} cannot be read as a whole; the same command tries again")
        if name != LOCK_FILE:  # which has a writer of its own
            self._sent[name] = _signature(local)

    def _list(self) -> dict[str, Any]:
        """What is in the bucket that a run reads, by its name in the workdir; only checkpoints that are whole."""
        self._files.invalidate_cache()
        found = {
            path.removeprefix(f"{self._root}/"): (info["size"], str(info.get("mtime") or info.get("LastModified")))
            for path, info in self._files.find(self._root, detail=True, timeout=buckets.limit()).items()
        }
        whole = {name.rpartition("/")[0] for name in found if name.endswith(f"/{MANIFEST}")}
        self._torn = [name for name in found if (folder := _checkpoint(name)) and folder not in whole]
        return {
            name: mark
            for name, mark in found.items()
            if (self._arrays or "/tree/" not in name)
            and name not in self._torn
            and not name.startswith(f"{PROFILE}/")
            and "tfevents" not in name
        }

    @contextlib.contextmanager
    def hold(self) -> Iterator[WorkdirLock]:
        with buckets.in_one_line(self._url):
            lock = WorkdirLock(_LockObject(self._files, self._root, self._url, self._note_answer))
        with lock:
            self.refresh()  # another run may have ended since
            with buckets.in_one_line(self._url):
                self._remove(self._torn)
            stop = threading.Event()
            self._lock = lock
            thread = threading.Thread(target=self._keep_up, args=(stop,), daemon=True)
            thread.start()
            try:
                yield lock
            finally:
                stop.set()
                thread.join()
                self._finish()

    def _keep_up(self, stop: threading.Event) -> None:
        events_since = time.monotonic()
        while not stop.wait(_PERIOD):
            with_events = time.monotonic() - events_since > _EVENTS_PERIOD
            if self._try(self._push, with_events=with_events) and with_events:
                events_since = time.monotonic()

    def _finish(self) -> None:
        """Brings the bucket up to date with all that there is.

        Raises RunError where it stays out of reach, and where another run has taken the workdir.
        """
        self._keep_trying(self._push, with_events=True, last=True)
        self._lock.check()

    def _keep_trying(self, act: Callable[..., None], **options: bool) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not self._try(act, **options):
            if time.monotonic() > deadline:
                self._keep = self._lock is not None
                if self._keep:
                    errors.copies.pop(str(self.path), None)  # which is told by its own name
                lacks = f"; what it lacks is in {self.path}" if self._keep else ""
                raise RunError(f"{self._url} could not be reached for {_PATIENCE:.0f} s{lacks}")
            time.sleep(min(_PERIOD, 1.0))

    def _try(self, act: Callable[..., None], **options: bool) -> bool:
        """Whether the bucket could be reached; says once that it could not, and once that it can again."""
        try:
            with self._pushing:
                if self._lock and self._silent_since is not None:
                    self._lock.beat()  # another run may have taken the workdir meanwhile
                act(**options)
        except RunError:
            raise
        except Exception as error:  # whatever a network, a proxy or a service says
            if self._silent_since is None:
                self._silent_since = self._answered
                reason = buckets.reason(error)
                _logger.warning("%s cannot be reached (%s); the run goes on and tries again", self._url, reason)
            return False
        if self._silent_since is not None:
            _logger.info("%s is reached again after %.0f s", self._url, time.monotonic() - self._silent_since)
            self._silent_since = None
        return True

    def _push(self, *, with_events: bool, last: bool = False) -> None:
        if self._lock.lost:
            return
        # Checkpoints are listed first: what was said up to their step is in files that are listed later.
        names = list(_names(self.path, checkpoints=True)) + list(_names(self.path, checkpoints=False))
        changed = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # Orbax has removed an older checkpoint meanwhile
                signature = _signature(self.path / name)
                if signature != self._sent.get(name) and (with_events or "tfevents" not in name):
                    changed[name] = signature
        for name in sorted(changed, key=_order):
            with contextlib.suppress(FileNotFoundError):
                self._send(name, last=last)
                self._sent[name] = changed[name]
                self._note_answer()
        if last and (self._metrics.open_parts or self._metrics.superseded):
            self._send(METRICS_FILE, last=True)
        gone = [name for name in self._sent.keys() - set(names) if not (self.path / name).exists()]
        self._remove(sorted(gone, key=lambda name: not name.endswith(f"/{MANIFEST}")))

    def _send(self, name: str, *, last: bool) -> None:
        if name != METRICS_FILE:
            _put(self._files, self.path / name, f"{self._root}/{name}")
            return
        for part, data in self._metrics.next(self.path / name, whole=last):
            self._files.pipe_file(f"{self._root}/{part}", data, timeout=buckets.limit(len(data)))
        self._remove(self._metrics.superseded)
        self._metrics.superseded = []

    def _remove(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/{name}", timeout=buckets.limit())
                self._note_answer()
            self._sent.pop(name, None)


def _claim_copy(copies: pathlib.Path) -> IO[bytes]:
    """The locked file NAME.lock beside a copy NAME that is to be made; removes the copies of killed processes.

    The lock ends with the process, however that ends.
    """
    copies.mkdir(exist_ok=True)
    for path in copies.glob("*.lock") if fcntl else ():
        with contextlib.suppress(OSError), open(path, "rb") as file:  # OSError: its process lives, or has just ended
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink()
    while True:
        file = tempfile.NamedTemporaryFile(dir=copies, suffix=".lock", delete=False)  # noqa: SIM115 (its copy's life)
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):  # else another process found it before it was locked
            return file
        file.close()


class _Parts:
    """metrics.jsonl as objects, which cannot be appended to: the file as it once was, and parts by their offset."""

    def __init__(self):
        self._sent = 0  # bytes that the bucket has
        self._begin = 0  # where the open part begins
        self._inode = 0
        self.open_parts: list[str] = []  # in the bucket
        self.superseded: list[str] = []  # that the file now holds, and that may still be in the bucket

    def read(self, objects: dict[str, bytes], directory: pathlib.Path) -> None:
        """Puts the file together from its objects."""
        data = objects.get(METRICS_FILE, b"")
        self.open_parts = sorted(name for name in objects if name != METRICS_FILE)
        for name in self.open_parts:
            # A part that begins before the end is one that a killed run had put into the file, and not yet removed.
            if int(name.rpartition("/")[2]) == len(data):
                data += objects[name]
        (directory / METRICS_FILE).write_bytes(data)

    def next(self, path: pathlib.Path, *, whole: bool) -> Iterator[tuple[str, bytes]]:
        """The objects that the bucket lacks, whole lines each."""
        data, inode = path.read_bytes(), path.stat().st_ino
        data = data[: data.rfind(b"\n") + 1]
        if whole or inode != self._inode or len(data) < self._sent:  # the file is another: it was rewound
            yield METRICS_FILE, data
            self.superseded, self.open_parts = [*self.superseded, *self.open_parts], []
            self._begin = len(data)
        elif len(data) > self._sent:
            name = f"{_PARTS}/{self._begin:012d}"
            yield name, data[self._begin :]
            if name not in self.open_parts:
                self.open_parts.append(name)
            self.superseded = [old for old in self.superseded if old != name]
            if len(data) - self._begin > _PART_BYTES:
                self._begin = len(data)
        self._sent, self._inode = len(data), inode


class _LockObject:
    """A lock as an object of a bucket; see `LockFile`. It notes when the bucket has answered."""

    def __init__(self, files, root: str, url: str, note_answer: Callable[[], None] = lambda: None):
        self.workdir, self._note_answer = url, note_answer
        self._files, self._root, self._path = files, root, f"{root}/{LOCK_FILE}"

    def create(self, text: str) -> bool:
        if self.read() is not None:
            return False
        try:
            self._files.pipe_file(self._path, text.encode(), mode="create", timeout=buckets.limit())
        except FileExistsError:  # also where fsspec tried again, as the answer to its own success was lost
            return self.read() == text
        time.sleep(_SETTLE)  # for services that do not know of exclusive creation: the last of two wins
        return self.read() == text

    def read(self) -> str | None:
        self._files.invalidate_cache()
        try:
            return self._files.cat_file(self._path, timeout=buckets.limit()).decode(errors="replace")
        except FileNotFoundError:
            return None

    def replace(self, text: str, token: str) -> None:
        self._files.pipe_file(self._path, text.encode(), timeout=buckets.limit())
        self._note_answer()

    def remove_dead(self, holder: str, token: str) -> None:
        if holder in (self.read() or ""):
            self._files.rm_file(self._path, timeout=buckets.limit())

    def fail(self, text: str, token: str) -> None:
        with contextlib.suppress(Exception):  # out of reach: then the lock is left as well
            self._files.pipe_file(f"{self._root}/{FAILED_FILE}", text.encode(), timeout=buckets.limit())

    def release(self, *, held: bool) -> None:
        if held:
            with contextlib.suppress(Exception):  # out of reach: without heartbeats it is soon taken for dead
                self._files.rm_file(self._path, timeout=buckets.limit())


_SETTLE = 1.0  # seconds


def _put(files, local: pathlib.Path, remote: str) -> None:
    """Sends a file as it is.

    gcsfs sends what is small as a part of a MIME message, between line feeds; of one that ends in a carriage return a
    server may take that for the half of a line break that is not content. In one chunk of its own size it goes bare.
    """
    size = local.stat().st_size
    if files.protocol[0] == "gs" and size < _SMALL:
        files.pipe_file(remote, local.read_bytes(), chunksize=max(size, 1), timeout=buckets.limit(size))
    else:
        files.put_file(str(local), remote, timeout=buckets.limit(size))


def _names(directory: pathlib.Path, *, checkpoints: bool) -> Iterator[str]:
    """The files of a workdir that belong into the bucket, by their names in it."""
    for folder, _, files in os.walk(directory):  # which does not mind that a folder is gone before it is looked into
        for file in files:
            name = pathlib.Path(folder, file).relative_to(directory).as_posix()
            passing = any(part.startswith(".") or part.endswith(".tmp") or "-tmp" in part for part in name.split("/"))
            if not passing and name != LOCK_FILE and name.startswith(f"{CHECKPOINTS}/") == checkpoints:
                yield name


def _checkpoint(name: str) -> str | None:
    """The folder 'checkpoints/STEP' that a name is in."""
    match = re.match(rf"{CHECKPOINTS}/\d+(?=/)", name)
    return match and match[0]


def _order(name: str) -> tuple[bool, bool, int, str]:
    """Checkpoints after the rest, their manifests after all of them, the oldest first."""
    folder = _checkpoint(name)
    step = int(folder.rpartition("/")[2]) if folder else 0
    return name.startswith(f"{CHECKPOINTS}/"), name.endswith(f"/{MANIFEST}"), step, name


def _signature(path: pathlib.Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
