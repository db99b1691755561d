"""Watches the other processes of a run, so that none waits for one that is gone.

A process that is killed leaves the others in a collective, where they wait, or fail in the words of the network. JAX's
service notices it: by its heartbeats, which come from C++ threads, so that busy Python is no silence; or at once if it
is process 0, which hosts the service. Then it aborts every process. Here that abort is held up for a few seconds, in
which the process says in one line who is gone and ends with exit code 1.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

HEARTBEAT = 20  # seconds without a sign of life after which JAX's service takes a process for dead
_PERIOD = 1.0  # seconds between two beats of ours, which only tell who it was
_NO_ANSWER = 2.0  # seconds without an answer of the service: the network is slow, or JAX is about to abort
# Of HEARTBEAT, in which no beat of a process has come while the service still answered; on a busy machine they lag.
_SILENT = 0.6
_BEATS = "vitcls/beats/"
_ON_THE_WIRE = ("gloo", "nccl", "connection", "socket", "unavailable", "deadline_exceeded")


class Watch:
    """Keeps beats of every process in JAX's service, and ends this process in order when another is gone."""

    def __init__(self, state):
        """`state`: the one of `jax.distributed.initialize`, which must have been called."""
        self._state = state
        now = time.monotonic()
        self._answered = now
        self._beats = dict.fromkeys(range(state.num_processes), ("", now))  # what was last seen, and since when
        _delay_aborts()
        for loop in (self._beat, self._judge):
            threading.Thread(target=loop, daemon=True).start()

    def wait(self, error: Exception) -> None:
        """Waits for the verdict, which ends the process, where an error may come of a process that is gone."""
        if any(word in str(error).lower() for word in _ON_THE_WIRE):
            time.sleep(HEARTBEAT + 3 * _NO_ANSWER)

    def _beat(self) -> None:
        beats = itertools.count()
        while client := self._state.client:  # None once the run is over
            beat = next(beats)
            try:
                client.key_value_set(f"{_BEATS}{self._state.process_id}", str(beat), allow_overwrite=True)
                # Many processes read each other's less often: a thousand would read a million a second.
                if beat % (1 + len(self._beats) // 32) == 0:
                    self._note(client.key_value_dir_get(_BEATS))
                self._answered = time.monotonic()
            except Exception:  # no answer; `_judge` decides what it means
                pass
            time.sleep(_PERIOD)

    def _note(self, beats: list[tuple[str, str]]) -> None:
        now = time.monotonic()
        for key, value in beats:
            process = int(key.removeprefix(_BEATS))
            if self._beats[process][0] != value:
                self._beats[process] = value, now

    def _judge(self) -> None:
        while self._state.client:
            if time.monotonic() - self._answered > _NO_ANSWER and (gone := self._gone()):
                end(f"process {gone}; start the run again, it goes on from its last checkpoint")
            time.sleep(_PERIOD / 4)

    def _gone(self) -> str:
        """Who is gone, and how that is known; '' where all may be there."""
        now, own = time.monotonic(), self._state.process_id
        silence = f"no sign of life for {HEARTBEAT} s"
        for process, (_, since) in self._beats.items():
            if process not in (0, own) and self._answered - since > _SILENT * HEARTBEAT:
                return f"{process} is gone ({silence})"
        if own and now - self._answered > HEARTBEAT - 2 * _PERIOD:
            return f"0 is gone ({silence})"
        return "0 is gone (its connection is closed)" if own and self._is_refused() else ""

    def _is_refused(self) -> bool:
        """Whether nobody listens where process 0 was; a slow network is no refusal."""
        host, _, port = self._state.coordinator_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_NO_ANSWER).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False


def watch() -> Watch:
    """Begins to watch the processes of `jax.distributed.initialize`, which must have been called."""
    from jax._src import distributed

    return Watch(distributed.global_state)


last_acts: list[Callable[[str], None]] = []  # of a process that `end` ends; each is given the message


def end(message: str) -> None:
    """Ends the process with one line and exit code 1, whatever its other threads wait for."""
    sys.stdout.flush()
    print(f"failed: {message}", file=sys.stderr, flush=True)
    for act in last_acts:
        with contextlib.suppress(Exception):  # of a disk or a bucket
            act(message)
    os._exit(1)


def _delay_aborts() -> None:
    """Holds up an abort by six seconds, the number of its signal: the C library's sleep() is its handler."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
