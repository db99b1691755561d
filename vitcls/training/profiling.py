"""Traces of training steps, for TensorBoard or Perfetto (docs/performance.md says how to read them)."""

import contextlib
import logging
import os
import pathlib
from typing import Any

import jax

from vitcls.core.errors import UserError

PyTree = Any
_logger = logging.getLogger("vitcls")


def parse_steps(text: str | None) -> range:
    """'100:110' -> range(100, 110), the steps to trace; nothing -> none. Raises UserError for anything else."""
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"--profile_steps='{text}' must be FIRST:LAST, such as 100:110 for the ten steps from 100 on")
    return range(int(first), int(last))


class Trace(contextlib.AbstractContextManager):
    """Traces every call that runs one of `steps`, and nothing else, into `directory`."""

    def __init__(self, directory: os.PathLike | str, steps: range):
        self._directory = pathlib.Path(directory)
        self._steps = steps
        self._running = False

    def begin(self, before: int, after: int) -> None:
        """Call before the steps [before, after)."""
        if self._steps and not self._running and before < self._steps.stop and after > self._steps.start:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's own frames would fill the trace
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True, profiler_options=options)
            self._running = True

    def end(self, after: int, result: PyTree) -> None:
        """Call after the steps; blocks on `result`."""
        if self._running and after >= self._steps.stop:
            jax.block_until_ready(result)
            self._stop()

    def __exit__(self, *error) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        self._running, self._steps = False, range(0)
        jax.profiler.stop_trace()
        _logger.info("traced: open %s in Perfetto or TensorBoard", self._directory)
