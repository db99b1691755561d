"""Progress of a run: a bar with the time left on a terminal, plain lines elsewhere."""

import contextlib
import logging
import sys
import time

import jax
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vitcls.metrics import METRICS

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


_UNSEEN = ("l2", "gradient_norm", "skipped", "images_per_second", "seconds", "epoch")  # numbers that few follow


def _words(event: dict[str, float]) -> str:
    """The few numbers of an event that a person follows."""
    kind = next(iter(event)).split("/")[0]
    words = [kind]
    for key, value in event.items():
        name = key.removeprefix(f"{kind}/")
        if name not in _UNSEEN:
            form = METRICS[name].format if name in METRICS else "{:.4g}"
            words.append(f"{name.replace('_', ' ')} {form.format(value)}")
    if event.get("train/skipped"):
        words.append(f"{event['train/skipped']:.0f} updates skipped (not finite)")
    return "  ".join(words)
