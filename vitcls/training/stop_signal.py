"""An orderly stop: SIGTERM and Ctrl-C become a request, on which all processes agree."""

import contextlib
import signal
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

_SECONDS_BETWEEN_QUESTIONS = 1.0


class StopSignal(contextlib.AbstractContextManager):
    """Turns SIGTERM and the first Ctrl-C into a request to save and stop, on which all processes agree.

    To agree is a collective that waits for the devices, so several processes do it about once a second, not at every
    call: how many calls that is they agree on too.
    """

    def __init__(self):
        self._code = 0
        self._calls_left = self._calls = 1  # until the processes ask each other again
        self._asked = time.perf_counter()
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self._code = 128 + number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_IGN)

    def requested(self) -> int:
        """The exit code of a run that has to stop now, else 0; the same on all processes, which must all ask."""
        if jax.process_count() == 1:
            return self._code
        self._calls_left -= 1
        if self._calls_left:
            return 0
        seconds = (time.perf_counter() - self._asked) / self._calls
        code, slowest = multihost_utils.process_allgather(np.array([self._code, seconds], np.float32)).max(axis=0)
        # At most twice as many as before: a few fast calls do not tell how long a hundred will take.
        most = min(2 * self._calls, 100)
        self._calls_left = self._calls = int(np.clip(_SECONDS_BETWEEN_QUESTIONS / slowest, 1, most))
        self._asked = time.perf_counter()
        return int(code)
