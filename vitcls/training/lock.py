"""One run at a time in a workdir: a lock file that also works on a network disk, and that a dead run does not keep.

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

from vitcls.core.errors import RunError, UserError

LOCK_FILE = "lock.json"
HEARTBEAT = 5.0  # seconds between two writes
_SILENCE = 30.0  # seconds without a write after which a holder on another machine is dead
_logger = logging.getLogger("vitcls")


class WorkdirLock(contextlib.AbstractContextManager):
    """Holds a workdir from construction to exit; raises UserError where a living run holds it."""

    def __init__(self, workdir: os.PathLike | str):
        self._path = pathlib.Path(workdir) / LOCK_FILE
        self._held = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "process_id": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "since": _now(),
            "token": uuid.uuid4().hex,
        }
        self._lost = False
        self._stop = threading.Event()
        self._beats = 0
        self._made = [path for path in (self._path.parent, *self._path.parent.parents) if not path.exists()]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={self._path.parent} cannot be made ({error.strerror}); use another") from None
        self._acquire()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RunError where another run has taken the workdir, as it does after a long sleep of this one."""
        if self._lost:
            holder = _describe(_read(self._path) or {})
            raise RunError(f"{self._path.parent} was taken over by {holder}; this run stops and saves nothing more")

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            self._path.unlink(missing_ok=True)
        for folder in self._made:  # what was made for the lock alone goes with it
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _acquire(self) -> None:
        while not self._create():
            holder = _read(self._path)
            if holder is None:  # it was released just now
                continue
            if _is_alive(self._path, holder):
                raise UserError(
                    f"{self._path.parent} is in use by {_describe(holder)}; wait for it, or use another --workdir"
                )
            _logger.warning("the lock of %s, which is dead, is taken over", _describe(holder))
            self._remove_dead(holder)

    def _create(self) -> bool:
        """Makes the lock file; False where there is one. Exclusive creation is atomic on network disks too."""
        try:
            with open(self._path, "x", encoding="utf-8") as file:
                file.write(self._text())
        except FileExistsError:
            return False
        return True

    def _remove_dead(self, holder: dict) -> None:
        """Removes the lock of a dead holder, and no other that was made meanwhile."""
        aside = self._path.with_name(f"{LOCK_FILE}.{self._held['token']}.old")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, aside)
            if (_read(aside) or holder)["token"] != holder["token"]:
                os.rename(aside, self._path)
            aside.unlink()

    def _text(self) -> str:
        return json.dumps(self._held | {"beats": self._beats, "last_beat": _now()}) + "\n"

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a full or absent disk may come back
                holder = _read(self._path)
                if holder is not None and holder["token"] != self._held["token"]:
                    self._lost = True
                    return
                self._beats += 1
                own = self._path.with_name(f"{LOCK_FILE}.{self._held['token']}")
                own.write_text(self._text(), encoding="utf-8")
                os.replace(own, self._path)


def _is_alive(path: pathlib.Path, holder: dict) -> bool:
    if holder["machine"] == _machine():
        return _process_start(holder["process_id"]) == holder["process_start"] is not None
    _logger.info("%s holds %s; watching for %.0f s whether it lives ...", _describe(holder), path.parent, _SILENCE)
    deadline = time.monotonic() + _SILENCE
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if _read(path) != holder:
            return True
    return False


def _read(path: pathlib.Path) -> dict | None:
    """The contents of a lock file; None where there is none. One that is incomplete may be in the making."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: holder[key] for key in ("host", "machine", "process_id", "process_start", "since", "token", "beats")
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return {"host": "?", "machine": "?", "process_id": 0, "process_start": None, "since": "?", "token": ""}


def _describe(holder: dict) -> str:
    if not holder.get("token"):
        return f"a run that {LOCK_FILE} does not name"
    return f"process {holder['process_id']} on {holder['host']} since {holder['since']}"


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
