"""Say what published weights are worth on your own images: HOG + SVM, from scratch, probe and fine-tuned.

vitcls worth --config=configs/transfer.py:MODEL --weights=FILE --workdir=DIR [--shares=5,10,25,50,100]
    [--minutes=60|--steps=N] [--workers=1] [--config.a.b=value ...]

The trainings take as many steps, up to 200, as fit into the minutes. Started again it goes on: what is finished is not
run again.
"""

import argparse
import math
import pathlib
import sys
import time

from vitcls import cli, config_file
from vitcls.core.errors import RunError, UserError
from vitcls.experiment import work
from vitcls.experiment.table import Run
from vitcls.probe.run import probe
from vitcls.training import places
from vitcls.training.files import CONFIG_FILE
from vitcls.worth import pace, results
from vitcls.worth.runs import LEARNED, plan


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    directory = pathlib.Path(flags.workdir)
    cli.start_jax()
    since = time.monotonic()
    steps = flags.steps or pace.chosen(directory, flags.minutes)
    runs = plan(flags.config, flags.weights, flags.shares, steps or pace.MOST, directory)
    for run in runs:
        work.check_config(run)
    trained = [run for run in runs if run.row.series in LEARNED]
    probed = [run for run in runs if run.row.series not in LEARNED]
    for run in probed:
        if work.state_of(run).status != "finished":
            probe(run.config, run.workdir)
    if steps is None and any((run.workdir / CONFIG_FILE).exists() for run in trained):
        steps = pace.MOST  # of an earlier --steps, or version, as their configs say
    if steps is None:
        steps = pace.choose(trained, directory, flags.minutes, time.monotonic() - since)
        trained = [pace.with_steps(run, steps) for run in trained]
    entries = _train(trained, directory, flags.workers)
    runs = probed + trained
    cells, num_test = results.read(runs, {name: entry.seconds for name, entry in entries.items()})
    name = pathlib.Path(flags.config.dataset.data_dir or flags.config.dataset.name).name
    title = f"{flags.config.model.name} on {name}"
    lines = results.write(directory, title, cells, num_test, steps)
    print(results.markdown_table(*results.table(cells)))
    print("\n" + "\n".join(lines) + f"\nresults: {directory / 'index.html'}")


def _train(trained: list[Run], directory: pathlib.Path, workers: int) -> work.Entries:
    """Runs all that is not finished, and returns the ledger; raises RunError where a training failed."""
    entries = work.work(trained, directory, workers, "")
    if failed := work.failed(entries):
        name, reason = next(iter(failed.items()))
        raise RunError(f"{len(failed)} of {len(trained)} trainings failed, as {name}: {reason}; run it again")
    return entries


def _parse(argv: list[str]) -> argparse.Namespace:
    rest, overrides = config_file.split_overrides(argv)
    parser = cli.Parser(prog=cli.program("worth"), description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE[:PRESET]", help="such as configs/transfer.py:MODEL")
    parser.add_argument("--weights", required=True, metavar="FILE", help="of the config's model, or a run's workdir")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the runs and the results live")
    parser.add_argument("--shares", default="5,10,25,50,100", metavar="5,10,...", help="percent of the training images")
    parser.add_argument("--minutes", type=float, metavar="M", help="for all of it; default: 60")
    parser.add_argument("--steps", type=int, metavar="N", help="of each training, however long they take")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trainings at a time; default: 1")
    cli.add_import_argument(parser)
    flags = parser.parse_args(rest)
    places.check_many(flags.workdir)
    flags.shares = _shares(flags.shares)
    if flags.steps is not None and flags.minutes is not None:
        raise UserError("give one of --minutes=M and --steps=N")
    flags.minutes = 60.0 if flags.minutes is None else flags.minutes
    if not 0 < flags.minutes < math.inf:
        raise UserError(f"--minutes={flags.minutes:g} is impossible; it must be above 0")
    if flags.steps is not None and flags.steps < 4:
        raise UserError(f"--steps={flags.steps} is impossible; it must be at least 4")
    if not 1 <= flags.workers <= 256:
        raise UserError(f"--workers={flags.workers} is impossible; it must be in [1, 256]")
    flags.config = config_file.load(flags.config, overrides)
    return flags


def _shares(text: str) -> list[float]:
    """Percent in words to fractions."""
    try:
        shares = sorted({float(part) / 100 for part in text.split(",")})
    except ValueError:
        shares = [0.0]
    if not all(0 < share <= 1 for share in shares):
        raise UserError(f"--shares={text} must be percentages above 0 and up to 100, such as 5,10,25,50,100")
    return shares


if __name__ == "__main__":
    sys.exit(cli.run(main))
