"""One run at a time in a workdir: a lock that also works on a network disk, and that a dead run does not keep.

The file says who holds it and is written anew every few seconds. On the holder's own machine a dead process is seen
at once. From another machine a holder counts as dead when the file has not changed for a while by the observer's own
clock, so that clocks need not agree.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid

from vitcls.core import peers
from vitcls.core.errors import RunError, Stopped, UserError
from vitcls.training.files import FAILED_FILE, LOCK_FILE

HEARTBEAT = 5.0  # seconds between two writes
IN_USE = "is in use by"  # in what a second run says
_SILENCE = 30.0  # seconds without a write after which a holder on another machine is dead
_REASON = 200  # characters
_logger = logging.getLogger("vitcls")


class LockFile:
    """lock.json in a directory, which is made for it where it is missing. A bucket has the same methods."""

    def __init__(self, workdir: os.PathLike | str):
        self.workdir = pathlib.Path(workdir)
        self._path = self.workdir / LOCK_FILE
        self._made = [path for path in (self.workdir, *self.workdir.parents) if not path.exists()]
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={self.workdir} cannot be made ({error.strerror}); use another") from None

    def create(self, text: str) -> bool:
        """Makes the file; False where there is one. Exclusive creation is atomic on network disks too."""
        try:
            with open(self._path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"--workdir={self.workdir} cannot be written to ({error.strerror}); use another") from None
        return True

    def read(self) -> str | None:
        """The text; None where there is no file."""
        try:
            return self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def replace(self, text: str, token: str) -> None:
        own = self._path.with_name(f"{LOCK_FILE}.{token}")
        try:
            own.write_text(text, encoding="utf-8")
            os.replace(own, self._path)
        finally:  # where the disk is full
            own.unlink(missing_ok=True)

    def remove_dead(self, holder: str, token: str) -> None:
        """Removes the lock of the dead `holder`, and no other that was made meanwhile."""
        aside = self._path.with_name(f"{LOCK_FILE}.{token}.old")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, aside)
            if (_parse(aside.read_text(encoding="utf-8"))["token"] or holder) != holder:
                os.rename(aside, self._path)
            aside.unlink()

    def fail(self, text: str, token: str) -> None:
        """Makes failed.json of the lock; where the disk is full its reason takes the room of the lock, if it can."""
        with contextlib.suppress(OSError):
            try:
                self.replace(text, token)
            except OSError:
                with open(self._path, "r+", encoding="utf-8") as file:
                    file.write(text)
                    file.truncate()
        with contextlib.suppress(OSError):
            os.replace(self._path, self._path.with_name(FAILED_FILE))

    def release(self, *, held: bool) -> None:
        """Removes the lock, if it is `held`, and the directories that were made for it alone."""
        if held:
            self._path.unlink(missing_ok=True)
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()


class WorkdirLock(contextlib.AbstractContextManager):
    """Holds a workdir from construction to exit; raises UserError where a living run holds it.

    Where it is left by an error of the run, failed.json says so, until `run_dir.begin` begins the next one.
    """

    def __init__(self, file: LockFile):
        self._file = file
        self._held = this_process()
        self.lost = False  # another run has taken the workdir
        self._stop = threading.Event()
        self._beats = 0
        self._acquire()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()
        peers.last_acts.append(self._fail)

    def check(self) -> None:
        """Raises RunError where another run has taken the workdir, as it does after a long sleep of this one."""
        if self.lost:
            holder = _describe(self._holder() or {})
            raise RunError(f"{self._file.workdir} was taken over by {holder}; this run stops and saves nothing more")

    def __exit__(self, kind=None, error: BaseException | None = None, traceback=None) -> None:
        peers.last_acts.remove(self._fail)
        in_order = error is None or isinstance(error, Stopped | UserError | KeyboardInterrupt)
        self._release("" if in_order else _reason(error))

    def _fail(self, reason: str) -> None:
        """Of a process that ends at once, since another is gone."""
        self._release(reason, patience=1.0)

    def _release(self, failure: str, patience: float | None = None) -> None:
        self._stop.set()
        self._thread.join(patience)
        if failure and not self.lost:
            self._file.fail(self._text(failure=failure), self._held["token"])
        self._file.release(held=not self.lost)

    def _acquire(self) -> None:
        while not self._file.create(self._text()):
            holder = self._holder()
            if holder is None:  # it was released just now
                continue
            if self._is_alive(holder):
                raise UserError(
                    f"{self._file.workdir} {IN_USE} {_describe(holder)}; wait for it, or use another --workdir"
                )
            _logger.warning("the lock of %s, which is dead, is taken over", _describe(holder))
            self._file.remove_dead(holder["token"], self._held["token"])

    def _holder(self) -> dict | None:
        text = self._file.read()
        return None if text is None else _parse(text)

    def _is_alive(self, holder: dict) -> bool:
        if holder["machine"] == _machine():
            return not died_here(holder)
        held = f"{_describe(holder)} holds {self._file.workdir}"
        _logger.info("%s; watching for %.0f s whether it lives ...", held, _SILENCE)
        deadline = time.monotonic() + _SILENCE
        while time.monotonic() < deadline:
            time.sleep(0.5)
            if self._holder() != holder:
                return True
        return False

    def _text(self, **more: str) -> str:
        return json.dumps(self._held | {"beats": self._beats, "last_beat": _now()} | more) + "\n"

    def beat(self) -> None:
        """Writes the heartbeat, unless another run has taken the workdir; raises what its disk or bucket raises."""
        holder = self._holder()
        self.lost = self.lost or (holder is not None and holder["token"] != self._held["token"])
        if not self.lost:
            self._beats += 1
            self._file.replace(self._text(), self._held["token"])

    def _keep_beating(self) -> None:
        while not self.lost and not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(Exception):  # a disk or a bucket that is away, in whatever words, may come back
                self.beat()


def this_process() -> dict:
    """Who holds something: this process, on this machine, from now on."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "process_id": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "since": _now(),
        "token": uuid.uuid4().hex,
    }


def died_here(holder: dict) -> bool:
    """Whether a holder was a process of this machine, and is no more; of another machine nothing is known."""
    if holder.get("machine") != _machine():
        return False
    return holder["process_start"] is None or _process_start(holder["process_id"]) != holder["process_start"]


def _parse(text: str) -> dict:
    """The contents of a lock; one that is incomplete may be in the making."""
    try:
        holder = json.loads(text)
        return {
            key: holder[key] for key in ("host", "machine", "process_id", "process_start", "since", "token", "beats")
        }
    except (ValueError, KeyError, TypeError):
        return {"host": "?", "machine": "?", "process_id": 0, "process_start": None, "since": "?", "token": ""}


def _describe(holder: dict) -> str:
    if not holder.get("token"):
        return f"a run that {LOCK_FILE} does not name"
    return f"process {holder['process_id']} on {holder['host']} since {holder['since']}"


def _reason(error: BaseException) -> str:
    """Why a run failed, in a line."""
    text = " ".join(str(error).split())[:_REASON]
    return text if isinstance(error, RunError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")


def _machine() -> str:
    """Where process ids mean the same: this boot of this machine, this namespace of processes (a container's own)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_start(process_id: int) -> str | None:
    """What tells a process from a later one of the same id; None where it is dead."""
    try:
        fields = pathlib.Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # state; start time in ticks since boot
    except OSError:
        pass
    if pathlib.Path("/proc/self/stat").exists():
        return None
    try:  # a system without /proc
        os.kill(process_id, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "alive"
