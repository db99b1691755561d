"""How many steps the trainings of a table take, so that all of them end within some minutes.

A short training of each method says what a step costs, and what else a run does. The number that follows is written
down, so that a table that goes on has the same runs.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from vitcls.core.errors import RunError, UserError
from vitcls.experiment import work
from vitcls.experiment.table import Run
from vitcls.training import metrics_log, run_dir

FILE = "pace.json"
LEAST, MOST = 20, 200  # steps; more learn little from few images
_PILOT = 8  # steps of a short training
_USED = 0.9  # of the time that is left; the rest is for a machine that slows down
_logger = logging.getLogger("vitcls")


def with_steps(run: Run, steps: int) -> Run:
    """The same run, of so many steps."""
    config = run.row.config.copy_and_resolve_references()
    config.total = f"{steps} steps"
    return dataclasses.replace(run, row=dataclasses.replace(run.row, config=config))


def chosen(directory: pathlib.Path, minutes: float) -> int | None:
    """The number of steps that was written down; None where none was. Raises UserError for that of other minutes."""
    file = directory / FILE
    if not file.exists():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        steps, before = int(kept["steps"]), float(kept["minutes"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} cannot be used ({error}); remove it, and the same command chooses anew") from None
    if before != minutes:
        raise UserError(
            f"the trainings in {directory} have {steps} steps each, for --minutes={before:g}; give that again, or use "
            "another --workdir"
        )
    return steps


def choose(runs: Sequence[Run], directory: pathlib.Path, minutes: float, spent: float) -> int:
    """As many steps, the same for all `runs`, as end them within `minutes` of which `spent` seconds are over.

    Raises RunError where a short training fails.
    """
    pilots = {}
    for run in runs:
        if run.row.series not in pilots:  # the smallest share comes first
            place = directory / "pace" / f"short_{run.row.series}"
            pilots[run.row.series] = dataclasses.replace(with_steps(run, _PILOT), workdir=place)
    entries = work.work(list(pilots.values()), directory / "pace", 1, "")
    for name, reason in work.failed(entries).items():
        raise RunError(f"the short training {name} failed: {reason}; run it again")
    costs = {
        series: Cost(_seconds_per_step(pilot), entries[pilot.name].seconds, _PILOT) for series, pilot in pilots.items()
    }
    spent += sum(cost.seconds for cost in costs.values())
    left = 60 * minutes - spent
    steps, takes = fitting([costs[run.row.series] for run in runs], _USED * left)
    say = _logger.info if takes <= left else _logger.warning
    say("each training takes %d steps, and the table about %.0f minutes", steps, (spent + takes) / 60)
    run_dir.write_atomically(directory / FILE, json.dumps({"minutes": minutes, "steps": steps}) + "\n")
    return steps


class Cost(NamedTuple):
    """Of a short training."""

    per_step: float  # seconds
    seconds: float  # of the whole process: it starts, compiles, evaluates and reports
    steps: int


def fitting(costs: Sequence[Cost], seconds: float) -> tuple[int, float]:
    """How many steps each of some trainings may take, and how many seconds all take then."""
    besides = sum(cost.seconds - cost.steps * cost.per_step for cost in costs)
    per_step = sum(cost.per_step for cost in costs)
    steps = min(max(int((seconds - besides) / per_step), LEAST), MOST)
    return steps, besides + steps * per_step


def _seconds_per_step(pilot: Run) -> float:
    """Without compilation."""
    times = [event["train/seconds"] for event in metrics_log.read_history(pilot.workdir) if "train/seconds" in event]
    return times[-1] / _PILOT
