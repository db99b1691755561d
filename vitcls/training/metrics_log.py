"""Where a run says how it is doing: metrics.jsonl, and events for TensorBoard."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Mapping

from vitcls.training.files import METRICS_FILE


class MetricWriter(contextlib.AbstractContextManager):
    """Appends events to metrics.jsonl: one JSON object a line, `step` and then names such as `train/loss`.

    Only the first of several processes writes (`active`). A run that is resumed from a checkpoint says again what the
    killed one had said after it: that is dropped first, and TensorBoard is told to.
    """

    def __init__(self, workdir: os.PathLike | str, *, rewind_to: int, active: bool = True):
        from tensorboardX import SummaryWriter  # and, where they are installed, the clients of two clouds

        path = pathlib.Path(workdir) / METRICS_FILE
        if active:
            _rewind(path, rewind_to)
        self._file = open(path, "a", encoding="utf-8") if active else None  # noqa: SIM115 (closed by __exit__)
        self._tensorboard = SummaryWriter(os.fspath(workdir), purge_step=rewind_to + 1) if active else None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one event; a value that is not finite becomes null."""
        if self._file is None:
            return
        values = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)

    def sync(self) -> None:
        """Returns when all that was written would outlive the machine."""
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def __exit__(self, *error) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()


def read_history(workdir: os.PathLike | str) -> list[dict]:
    """The events of metrics.jsonl, oldest first; [] where there is none. A last line cut short is left out."""
    path = pathlib.Path(workdir) / METRICS_FILE
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line that a killed process was writing
    return events


def _rewind(path: pathlib.Path, step: int) -> None:
    """Keeps the events up to `step`; the file is replaced in one move, so that a kill loses nothing."""
    events = [event for event in read_history(path.parent) if event["step"] <= step]
    replacement = path.with_suffix(".tmp")
    with open(replacement, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
        file.flush()
        os.fsync(file.fileno())
    os.replace(replacement, path)
