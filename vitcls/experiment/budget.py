"""A table's rows again with one budget of time, in place of one of epochs.

How long a step of each row takes is known once the row has finished; how many steps it then gets is written down once,
so that a table that goes on has the same rows.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from vitcls.experiment.parts import States, numbers
from vitcls.experiment.table import Row, Run, Table
from vitcls.training import run_dir

FILE = "equal_time.json"


def with_equal_time(table: Table, directory: pathlib.Path) -> Table:
    """The table with the rows of equal time, once `plan` has been made."""
    file = directory / FILE
    if not table.equal_time or not file.exists():
        return table
    planned = json.loads(file.read_text(encoding="utf-8"))
    part = f"As much training time for each: {planned['seconds']:,.0f} s by what the runs above took"
    again = [_again(row, planned["steps"][row.name], part) for row in table.rows if row.name in planned["steps"]]
    return dataclasses.replace(table, rows=[*table.rows, *again])


def _again(row: Row, steps: int, part: str) -> Row:
    config = row.config.copy_and_resolve_references()
    config.total = f"{steps} steps"
    return dataclasses.replace(row, name=f"{row.name}-equal_time", config=config, paper={}, part=part)


def plan(runs: Sequence[Run], states: States, directory: pathlib.Path) -> None:
    """Writes how many steps each row takes in the time of the median row; not before each has a finished run."""
    rates: dict[str, list[float]] = {run.row.name: [] for run in runs}
    spent: dict[str, list[float]] = {run.row.name: [] for run in runs}
    for run in runs:
        seconds = numbers(states[run.name]).get("train_seconds")
        if seconds:
            rates[run.row.name].append(states[run.name].total_steps / seconds)
            spent[run.row.name].append(seconds)
    if (directory / FILE).exists() or not all(rates.values()):
        return
    seconds = float(np.median([np.median(values) for values in spent.values()]))
    steps = {row: max(1, round(float(np.median(values)) * seconds)) for row, values in rates.items()}
    run_dir.write_atomically(directory / FILE, json.dumps({"seconds": seconds, "steps": steps}, indent=2) + "\n")
