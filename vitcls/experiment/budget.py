"""A table's rows again with one budget of time, in place of one of epochs.

How long a step of each row takes is known once the row has finished; how many steps it then gets is written down once,
so that a table that goes on has the same rows.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitcls.core.errors import UserError
from vitcls.experiment.parts import States, numbers
from vitcls.experiment.table import Row, Run, Table
from vitcls.training import run_dir

FILE = "equal_time.json"


def with_equal_time(table: Table, directory: pathlib.Path) -> Table:
    """The table with the rows of equal time, once `plan` has been made."""
    file = directory / FILE
    if not table.equal_time or not file.exists():
        return table
    planned = _read(file)
    part = f"As much training time for each: {planned['seconds']:,.0f} s by what the runs above took"
    again = [_again(row, planned["steps"][row.name], part) for row in table.rows if row.name in planned["steps"]]
    return dataclasses.replace(table, rows=[*table.rows, *again])


def _again(row: Row, steps: int, part: str) -> Row:
    config = row.config.copy_and_resolve_references()
    config.total = f"{steps} steps"
    return dataclasses.replace(row, name=f"{row.name}-equal_time", config=config, paper={}, part=part)


def _read(file: pathlib.Path) -> dict[str, Any]:
    """The plan of a table; raises UserError where it is none."""
    try:
        planned = json.loads(file.read_text(encoding="utf-8"))
        if planned["seconds"] > 0 and all(isinstance(steps, int) for steps in planned["steps"].values()):
            return planned
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise UserError(
        f"{file} cannot be used; remove it and the runs of equal time (runs/*-equal_time-*), and the same command plans"
        " anew"
    )


def plan(runs: Sequence[Run], states: States, directory: pathlib.Path) -> None:
    """Writes how many steps each row takes in the time of the median row; not before each has a finished run.

    `runs` are those of the whole table. A row that came later gets the time of the others.
    """
    file = directory / FILE
    planned = _read(file) if file.exists() else None
    new = [run for run in runs if planned is None or run.row.name not in planned["steps"]]
    rates: dict[str, list[float]] = {run.row.name: [] for run in new}
    spent: dict[str, list[float]] = {run.row.name: [] for run in new}
    for run in new:
        seconds = numbers(states[run.name]).get("train_seconds")
        if seconds:
            rates[run.row.name].append(states[run.name].total_steps / seconds)
            spent[run.row.name].append(seconds)
    if not new or not all(rates.values()):
        return
    seconds = planned["seconds"] if planned else float(np.median([np.median(values) for values in spent.values()]))
    steps = {row: max(1, round(float(np.median(values)) * seconds)) for row, values in rates.items()}
    text = json.dumps({"seconds": seconds, "steps": (planned["steps"] if planned else {}) | steps}, indent=2) + "\n"
    run_dir.write_atomically(file, text, once=planned is None)  # another worker may have planned meanwhile
