"""Run a table of experiments, and write what came of it.

vitcls experiment --config=configs/experiments/TABLE.py[:PRESET] --workdir=DIR [--only=REGEX] [--seeds=0,1,2]
    [--folds=K] [--workers=N] [--storage=URL] [--override=KEY=VALUE] [--list] [--report_only]

Started again it goes on; the same command on other machines, with --storage=postgresql://... and a directory that all
of them see, shares the work.
"""

import argparse
import dataclasses
import datetime
import os
import pathlib
import sys
from collections.abc import Sequence

from vitcls import cli, ledger
from vitcls.core.errors import RunError, UserError
from vitcls.experiment import budget, results, table, work
from vitcls.experiment.table import Run, Table
from vitcls.experiment.work import State
from vitcls.training import places


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    what = _table(flags)
    directory = pathlib.Path(flags.workdir)
    runs = _runs(what, directory, flags)
    if flags.list:
        print("\n".join(_listed(runs, ledger.read(flags.storage, directory), flags.workers)))
        return
    if not flags.report_only:
        entries = work.work(runs, directory, flags.workers, flags.storage)
        if what.equal_time:
            every = table.runs_of(what, directory, seeds=flags.seeds, overrides=flags.override)
            budget.plan(every, _states(every, entries), directory)
            runs = _runs(what, directory, flags)
            entries = work.work(runs, directory, flags.workers, flags.storage)
    elif directory.is_dir():
        entries = ledger.read(flags.storage, directory)
    else:
        raise UserError(f"--workdir={directory} is not there; run the table first")
    _report(what, runs, _with_begun(runs, what, directory, flags), directory, entries)


def _table(flags: argparse.Namespace) -> Table:
    what = table.load(flags.config)
    if flags.folds is None:
        return what
    if not what.pooled:
        raise UserError(f"--folds={flags.folds} is of cross-validation: --config=configs/experiments/kfold.py:CONFIG")
    return table.load(f"{flags.config},{flags.folds}")


def _runs(what: Table, directory: pathlib.Path, flags: argparse.Namespace) -> list[Run]:
    """The runs that the flags choose; raises UserError where a workdir holds another."""
    whole = budget.with_equal_time(what, directory)
    runs = table.runs_of(whole, directory, only=flags.only, seeds=flags.seeds, overrides=flags.override)
    for run in _with_begun(runs, what, directory, flags):
        work.check_config(run)
    return runs


def _with_begun(chosen: Sequence[Run], what: Table, directory: pathlib.Path, flags: argparse.Namespace) -> list[Run]:
    """The runs that were chosen now or before, which are in the results; in the order of the table."""
    whole = budget.with_equal_time(what, directory)
    runs = {run.name: run for run in [*table.begun(whole, directory, flags.override), *chosen]}
    places = [row.name for row in whole.rows]
    return sorted(runs.values(), key=lambda run: (run.seed, places.index(run.row.name)))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog=cli.program("experiment"), description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE[:PRESET]", help="a table of configs/experiments/")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the runs and the results live")
    parser.add_argument("--folds", type=int, metavar="K", help="of cross-validation, for kfold.py:CONFIG")
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose name contains it, such as 'vit.*seed0'")
    parser.add_argument("--seeds", default="", metavar="0,1,2", help="others than the table's")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="for every run's config")
    parser.add_argument("--workers", default="1", metavar="N", help="runs at a time, on this machine")
    parser.add_argument("--storage", default="", metavar="URL", help=ledger.HELP)
    parser.add_argument("--list", action="store_true", help="say what would run, and how long it may take")
    parser.add_argument("--report_only", action="store_true", help="write the results of what has finished")
    cli.add_import_argument(parser)
    flags = parser.parse_args(argv)
    places.check_many(flags.workdir)
    if os.path.exists(flags.workdir) and not os.path.isdir(flags.workdir):
        raise UserError(f"--workdir={flags.workdir} is no directory; use another")
    flags.seeds = _seeds(flags.seeds)
    flags.override = [_override(text) for text in flags.override]
    flags.workers = _workers(flags.workers)
    return flags


def _seeds(text: str) -> tuple[int, ...]:
    """The numbers of a list, each once; () for the table's own."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(","))) if text else ()
    except ValueError:
        raise UserError(f"--seeds={text} is no list of numbers, such as 0,1,2") from None


def _override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--override={text} must be KEY=VALUE, such as --override=dataset.data_dir=DIR")
    return key, value


def _workers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise UserError(f"--workers={text} must be a number of processes, from 1 to 256")
    return int(text)


def _listed(runs: Sequence[Run], entries: work.Entries, workers: int) -> list[str]:
    known, states = work.seconds_by_row(entries), _states(runs, entries)
    lines, total = [], 0.0
    for run in runs:
        state = states[run.name]
        seconds = work.seconds_left(run, state, known)
        total = None if total is None or seconds is None else total + seconds
        at = f", step {state.step:,} of {state.total_steps:,}" if state.step and state.status != "finished" else ""
        lines.append(f"{run.name:<40} {state.status}{at}{_about(seconds) if state.status != 'finished' else ''}")
    left = "unknown until a run has finished" if total is None else _span(total / workers)
    return [*lines, f"{len(runs)} runs; time left: {left}"]


def _span(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _about(seconds: float | None) -> str:
    return "" if seconds is None else f", about {_span(seconds)}"


def _states(runs: Sequence[Run], entries: work.Entries) -> dict[str, State]:
    states = {run.name: work.state_of(run) for run in runs}
    for name, error in work.failed(entries).items():
        if name in states and states[name].status in ("pending", "interrupted"):
            states[name] = dataclasses.replace(states[name], status="failed", error=error)
    return states


def _report(
    what: Table, chosen: Sequence[Run], runs: Sequence[Run], directory: pathlib.Path, entries: work.Entries
) -> None:
    """Writes the results of `runs`; raises RunError where some of those that were chosen have failed."""
    states = _states(runs, entries)
    print(results.write(what, runs, states, directory), end="")
    print(f"\nresults: {os.path.join(directory, 'index.html')}")
    failures = sum(states[run.name].status == "failed" for run in chosen)
    if failures:
        raise RunError(f"{failures} of {len(chosen)} runs failed; the same command tries them again")


if __name__ == "__main__":
    sys.exit(cli.run(main))
