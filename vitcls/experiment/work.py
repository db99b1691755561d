"""Runs what a table still lacks, some at a time, each in a process of its own.

A run is finished when `vitcls status` says so and its report is that of the end. The ledger says which worker has it,
and how its last process ended; that of a dead worker is taken up where its last checkpoint is.
"""

import contextlib
import dataclasses
import datetime
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from vitcls import jobs, ledger, status
from vitcls.core.errors import UserError
from vitcls.experiment.table import Run, row_of
from vitcls.ledger import Entry
from vitcls.training import run_dir

Entries = Mapping[str, Entry]


@dataclasses.dataclass(frozen=True)
class State:
    """What is known of a run."""

    status: str  # 'finished', 'alive', 'interrupted', 'pending', 'failed'
    step: int | None = None
    total_steps: int | None = None
    report: dict[str, Any] | None = None  # metrics.json of a finished run
    error: str = ""


def state_of(run: Run) -> State:
    """Reads it from the workdir."""
    try:
        seen = status.status(run.workdir, datetime.datetime.now().astimezone())
    except UserError:
        return State("pending")
    places = {"step": seen["step"], "total_steps": seen["total_steps"]}
    report = status.final_report(run.workdir, run.config.to_dict())
    if seen["state"] == "finished" and report.get("split") == run.config.report.split:
        return State("finished", **places, report=report)
    return State("alive" if seen["state"] == "alive" else "interrupted", **places)


def check_config(run: Run) -> None:
    """Raises UserError where the workdir holds a run that would not go on with the config."""
    try:
        changes = run_dir.config_changes(run.workdir, run.config)
    except (OSError, UserError):  # it has just begun, or the run itself will say what is wrong
        return
    for key, (was, now) in changes.items():
        raise UserError(
            f"{run.workdir} holds a run of another config: {key} was {was!r}, is {now!r}; use another --workdir, or "
            "remove that run"
        )


def failed(entries: Entries) -> dict[str, str]:
    """The runs whose last process failed, by name, with the last line that it said."""
    return {name: _reason(entry.code, entry.last_line) for name, entry in entries.items() if entry.code}


def _reason(code: int, last_line: str) -> str:
    return last_line.removeprefix("failed: ") if code > 0 and last_line else f"its process ended with exit code {code}"


def work(runs: Sequence[Run], directory: pathlib.Path, workers: int, storage: str) -> Entries:
    """Runs all that is not finished, `workers` at a time; what fails is left for the next time.

    Returns what the ledger holds when nothing is left, here or with other workers. Raises Stopped after a signal, once
    all runs have saved.
    """
    states = {run.name: State("pending") for run in runs}
    processes = jobs.Jobs(workers)
    with ledger.start(storage, directory, processes.pause) as queue, processes, _Display(runs) as display:
        while True:
            states |= {run.name: state_of(run) for run in runs if states[run.name].status != "finished"}
            entries = queue.entries()
            ended = {name for name, entry in entries.items() if entry.code is not None and entry.beat >= queue.began}
            left = [run for run in runs if states[run.name].status != "finished" and run.name not in ended]
            if not left and not processes.running:
                return entries
            for run in left:
                free = processes.free and run.name not in processes.running and states[run.name].status != "alive"
                held = run.name in entries and entries[run.name].held
                if free and not held and queue.claim(run.name, {}, again=True) is not None:
                    processes.start(run.name, run.workdir, run.config)
            processes.wait(functools.partial(display.show, states, entries, processes.running))
            for end in processes.ended():
                if end.in_use:
                    queue.release(end.name)
                    continue
                queue.end(end.name, end.code, end.seconds, end.last_line, {})
                if end.code:
                    display.say(f"{end.name} failed: {_reason(end.code, end.last_line)}; see its {jobs.LOG_FILE}")


def seconds_by_row(entries: Entries) -> dict[str, float]:
    """How long a run of each row took in all, for those of which one has finished; '' is the mean of all."""
    finished: dict[str, list[float]] = {}
    for name, entry in entries.items():
        if entry.code == 0:
            finished.setdefault(row_of(name), []).append(entry.seconds)
    means = {row: sum(values) / len(values) for row, values in finished.items()}
    return means | ({"": sum(means.values()) / len(means)} if means else {})


def seconds_left(run: Run, state: State, known: dict[str, float]) -> float | None:
    """An estimate from the runs that have finished; None where none has."""
    whole = known.get(run.row.name, known.get(""))
    if whole is None or state.status == "finished":
        return 0.0 if state.status == "finished" else None
    done = (state.step or 0) / state.total_steps if state.total_steps else 0.0
    return whole * max(0.0, 1 - done)


class _Display(contextlib.AbstractContextManager):
    """One bar for the table, and what each process of this worker is at."""

    def __init__(self, runs: Sequence[Run]):
        self._runs = runs
        self._bar = tqdm(
            total=len(runs), bar_format="{desc} |{bar:20}| {n:.1f} of {total} runs{postfix}", disable=None, leave=True
        )
        self._said: set[str] = set()

    def __exit__(self, *error) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def show(self, states: dict[str, State], entries: Entries, running: dict[str, Any]) -> None:
        known, share, left = seconds_by_row(entries), 0.0, 0.0
        for run in self._runs:
            state = state_of(run) if run.name in running else states[run.name]
            if state.status == "finished" and run.name not in self._said:
                self._said.add(run.name)
                self.say(f"{run.name} finished, accuracy {state.report['accuracy']:.2%}")
            share += 1.0 if state.status == "finished" else (state.step or 0) / (state.total_steps or 1)
            seconds = seconds_left(run, state, known)
            left = None if left is None or seconds is None else left + seconds
        self._bar.n = min(share, len(self._runs))
        self._bar.set_description_str(", ".join(running) or "waiting for other workers", refresh=False)
        failures = len(failed({name: entry for name, entry in entries.items() if name in states}))
        said = [f"{failures} failed"] if failures else []
        if left is not None:
            said.append(f"{datetime.timedelta(seconds=round(left / max(len(running), 1)))} left")
        self._bar.set_postfix_str(", ".join(said))  # tqdm puts a comma before
