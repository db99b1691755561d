"""Runs what a table still lacks, some at a time, each in a process of its own.

The workdirs are the ledger: a run is finished when its report is there, alive while its lock is, and whoever takes the
lock has the run. So workers on several machines share a table through the directory it lives in, none takes the run of
another, and that of a dead one is taken up where its last checkpoint is.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from vitcls import config as configs
from vitcls import jobs, status
from vitcls.core.errors import UserError
from vitcls.experiment.table import Run
from vitcls.training.files import CONFIG_FILE
from vitcls.training.lock import IN_USE

LEDGER = "ledger.jsonl"


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
    with contextlib.suppress(OSError, ValueError):
        report = json.loads((run.workdir / "report" / "metrics.json").read_text(encoding="utf-8"))
        if report["split"] == run.config.report.split and seen["state"] == "finished":
            return State("finished", **places, report=report)
    return State("alive" if seen["state"] == "alive" else "interrupted", **places)


def check_config(run: Run) -> None:
    """Raises UserError where the workdir holds a run of another config."""
    try:
        there = configs.flatten(configs.from_json((run.workdir / CONFIG_FILE).read_text(encoding="utf-8")).to_dict())
    except (OSError, UserError):  # it has just begun, or the run itself will say what is wrong
        return
    wanted = configs.flatten(run.config.to_dict())
    changed = sorted(key for key in there.keys() | wanted.keys() if there.get(key) != wanted.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"{run.workdir} holds a run of another config: {key} was {there.get(key)!r}, is {wanted.get(key)!r}; use "
            "another --workdir, or remove that run"
        )


def failed(runs: Sequence[Run], directory: pathlib.Path) -> dict[str, str]:
    """The runs whose last process failed, by name, with the last line that it said."""
    codes = {entry["run"]: entry["code"] for entry in _ledger(directory)}
    return {run.name: _reason(codes[run.name], jobs.last_line(run.workdir)) for run in runs if codes.get(run.name)}


def _reason(code: int, last_line: str) -> str:
    return last_line if code > 0 and last_line else f"its process ended with exit code {code}"


def work(runs: Sequence[Run], directory: pathlib.Path, workers: int) -> None:
    """Runs all that is not finished, `workers` at a time; what fails is left for the next time.

    Returns when nothing is left, here or with other workers. Raises Stopped once all runs have saved, after a signal.
    """
    failures: dict[str, str] = {}
    by_name = {run.name: run for run in runs}
    states = dict.fromkeys(by_name, State("pending"))
    with jobs.Jobs(workers) as processes, _Display(runs, failures) as display:
        while True:
            states |= {run.name: state_of(run) for run in runs if states[run.name].status != "finished"}
            left = [run for run in runs if states[run.name].status != "finished" and run.name not in failures]
            if not left and not processes.running:
                return
            for run in left:
                if states[run.name].status != "alive" and run.name not in processes.running and processes.free:
                    processes.start(run.name, run.workdir, run.config)
            processes.wait(functools.partial(display.show, states, processes.running))
            for end in processes.ended():
                if end.code == 2 and IN_USE in end.last_line:
                    continue  # another worker was faster
                _note(directory, by_name[end.name], end)
                if end.code:
                    failures[end.name] = _reason(end.code, end.last_line)
                    display.say(f"{end.name} failed: {failures[end.name]}; see {jobs.LOG_FILE} in its directory")


def _note(directory: pathlib.Path, run: Run, end: jobs.Ended) -> None:
    entry = {"run": run.name, "row": run.row.name, "seconds": end.seconds, "code": end.code}
    with open(directory / LEDGER, "a", encoding="utf-8") as ledger:
        ledger.write(json.dumps(entry) + "\n")


def _ledger(directory: pathlib.Path) -> Iterator[dict[str, Any]]:
    """What has ended, in order; a line that was cut short is left out."""
    with contextlib.suppress(FileNotFoundError):
        for line in (directory / LEDGER).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def seconds_by_row(directory: pathlib.Path) -> dict[str, float]:
    """How long a run of each row took in all, for those of which one has finished; '' is the mean of all."""
    spent: dict[tuple[str, str], float] = {}
    finished: dict[str, list[float]] = {}
    for entry in _ledger(directory):
        key = entry["row"], entry["run"]
        spent[key] = spent.get(key, 0.0) + entry["seconds"]
        if entry["code"] == 0:
            finished.setdefault(entry["row"], []).append(spent[key])
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

    def __init__(self, runs: Sequence[Run], failures: dict[str, str]):
        self._runs, self._failures = runs, failures
        self._directory = runs[0].workdir.parents[1]
        self._bar = tqdm(
            total=len(runs), bar_format="{desc} |{bar:20}| {n:.1f} of {total} runs{postfix}", disable=None, leave=True
        )
        self._said: set[str] = set()

    def __exit__(self, *error) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def show(self, states: dict[str, State], running: dict[str, Any]) -> None:
        known, share, left = seconds_by_row(self._directory), 0.0, 0.0
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
        failed = f", {len(self._failures)} failed" if self._failures else ""
        time_left = "" if left is None else f", {datetime.timedelta(seconds=round(left / max(len(running), 1)))} left"
        self._bar.set_postfix_str(failed + time_left)
