"""Watches the other processes of a run, so that none waits for one that is gone.

A process that is killed takes its word with it: the others wait in a collective, or fail in one with the words of the
network. JAX's own service notices by its heartbeats (C++ threads, so busy Python is no silence), or at once when
process 0, which hosts it, is gone, and then aborts every process. The abort is held up for a few seconds here, in
which a process says in one line who is gone and ends with exit code 1.
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

HEARTBEAT = 20  # seconds without a sign of life after which JAX's service takes a process for dead
_PERIOD = 1.0  # seconds between two beats of ours, which tell who it was
_NO_ANSWER = 2.0  # seconds without an answer of the service: it is gone, or JAX is about to abort
_BEATS = "vitcls/beats/"
_ON_THE_WIRE = ("gloo", "nccl", "connection", "socket", "unavailable", "deadline_exceeded")


class Watch:
    """Beats in JAX's service for this process, notes the beats of the others, and ends the process if one is gone."""

    def __init__(self, client, coordinator: str, process_id: int, num_processes: int):
        self._client, self._coordinator, self._process_id = client, coordinator, process_id
        now = time.monotonic()
        self._answered: float | None = now
        self._beats = dict.fromkeys(range(num_processes), ("", now))  # what was last seen, and since when
        for loop in (self._beat, self._judge):
            threading.Thread(target=loop, daemon=True).start()

    def wait(self, error: Exception) -> None:
        """Waits for the verdict, which ends the process, where an error may come of a process that is gone."""
        if any(word in str(error).lower() for word in _ON_THE_WIRE):
            time.sleep(HEARTBEAT + 3 * _NO_ANSWER)

    def _beat(self) -> None:
        for beat in itertools.count():
            try:
                self._client.key_value_set(f"{_BEATS}{self._process_id}", str(beat), allow_overwrite=True)
                # Many processes read each other's less often: a thousand would read a million a second.
                if beat % (1 + len(self._beats) // 32) == 0:
                    self._note(self._client.key_value_dir_get(_BEATS))
                self._answered = time.monotonic()
            except Exception:  # the service is gone, or the run is over and has left it
                if self._is_there():
                    self._answered = None
                    return
            time.sleep(_PERIOD)

    def _note(self, beats: list[tuple[str, str]]) -> None:
        now = time.monotonic()
        for key, value in beats:
            process = int(key.removeprefix(_BEATS))
            if self._beats[process][0] != value:
                self._beats[process] = value, now

    def _judge(self) -> None:
        while self._answered is not None:
            if time.monotonic() - self._answered > _NO_ANSWER and (who := self._gone()) is not None:
                since = "its connection is closed" if who == 0 else f"no sign of life for {HEARTBEAT} s"
                end(f"process {who} is gone ({since}); start the run again, it goes on from its last checkpoint")
            time.sleep(_PERIOD / 4)

    def _gone(self) -> int | None:
        """The process that is gone; None where all may be there, as when the network is slow."""
        if self._process_id and not self._is_there():
            return 0
        silent = [i for i, (_, since) in self._beats.items() if time.monotonic() - since > HEARTBEAT - 2 * _PERIOD]
        return next((i for i in silent if i not in (0, self._process_id)), None)

    def _is_there(self) -> bool:
        """Whether process 0 still listens."""
        host, _, port = self._coordinator.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=_NO_ANSWER):
            return True
        return False


def watch() -> Watch:
    """Begins to watch the processes of `jax.distributed.initialize`, which must have been called."""
    from jax._src import distributed

    state = distributed.global_state
    _delay_aborts()
    return Watch(state.client, state.coordinator_address, state.process_id, state.num_processes)


def end(message: str) -> None:
    """Ends the process with one line and exit code 1, whatever its other threads wait for."""
    sys.stdout.flush()
    print(f"failed: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _delay_aborts() -> None:
    """Holds up an abort by six seconds, the number of its signal: the C library's sleep() is its handler."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
