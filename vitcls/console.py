"""The terminal and the signals: a progress bar with ETA, plain lines elsewhere, and an orderly stop."""

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_SECONDS_BETWEEN_QUESTIONS = 1.0
_logger = logging.getLogger("vitcls")


class ProgressBar(contextlib.AbstractContextManager):
    """Steps done, speed and time left: a bar on a terminal, one line per report elsewhere."""

    def __init__(self, step: int, total: int):
        self._step, self._total = step, total
        self._timed_from: tuple[int, float] | None = None  # (step, time) after the first call, which compiles
        shown = sys.stderr.isatty() and jax.process_index() == 0
        self._bar = tqdm(
            total=total, initial=step, unit="step", disable=not shown, dynamic_ncols=True, leave=False, smoothing=0.1
        )
        self._redirect = logging_redirect_tqdm([_logger]) if shown else contextlib.nullcontext()

    def __enter__(self) -> "ProgressBar":
        self._redirect.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()
        self._redirect.__exit__(*error)

    def advance(self, steps: int) -> None:
        self._step += steps
        self._bar.update(steps)
        if self._timed_from is None:
            self._timed_from = self._step, time.perf_counter()

    def report(self, step: int, event: dict[str, float]) -> None:
        """Shows an event of training in the bar or as a line, and an evaluation always as a line."""
        if "train/seconds" in event and not self._bar.disable:
            self._bar.set_postfix_str(_words(event), refresh=False)
            return
        line = f"step {step:,}/{self._total:,}  {_words(event)}"
        if "train/seconds" in event:
            line += f"  {event['train/images_per_second']:,.0f} images/s{self._time_left(step)}"
        _logger.info("%s", line)

    def _time_left(self, step: int) -> str:
        first, since = self._timed_from or (step, 0.0)
        if step in (first, self._total):
            return ""
        seconds = (time.perf_counter() - since) / (step - first) * (self._total - step)
        return f"  {tqdm.format_interval(seconds)} left"


def _words(event: dict[str, float]) -> str:
    """The few numbers of an event that a person follows."""
    kind = next(iter(event)).split("/")[0]
    words = [f"{kind}"]
    for name, form in (("loss", ".4f"), ("accuracy", ".2%"), ("top5_accuracy", ".2%"), ("learning_rate", ".3g")):
        value = event.get(f"{kind}/{name}")
        if value is not None:
            words.append(f"{name.replace('_', ' ')} {value:{form}}")
    if event.get("train/skipped"):
        words.append(f"{event['train/skipped']:.0f} updates skipped (not finite)")
    return "  ".join(words)


def show_progress(items: Iterable, total: int, what: str, *, every: float = 10.0) -> Iterator:
    """Passes on `items`, `total` in number: a bar on a terminal, a line each `every` seconds elsewhere."""
    shown = jax.process_index() == 0
    if shown and sys.stderr.isatty():
        yield from tqdm(items, what, total, leave=False, dynamic_ncols=True, delay=1.0)
        return
    begin = told = time.perf_counter()
    for done, item in enumerate(items):
        if shown and time.perf_counter() - told >= every:
            told = time.perf_counter()
            left = tqdm.format_interval((told - begin) / max(done, 1) * (total - done))
            _logger.info("%s: %s of %s, %s left", what, f"{done:,}", f"{total:,}", left)
        yield item


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
