"""Search a space of config keys by the validation split, and write the best config.

vitcls tune --config=FILE[:PRESET] --space=configs/spaces/NAME.py --workdir=DIR [--method=tpe|random|grid] [--trials=N]
    [--pruner=none|median|hyperband] [--workers=N] [--storage=URL] [--seed=0] [--config.KEY=VALUE ...]

Started again it goes on, with one worker to the same trials; the same command on other machines, with
--storage=postgresql://... and a directory that all of them see, shares the work. The test split is never read.
"""

import argparse
import functools
import json
import logging
import pathlib
import sys
from collections.abc import Mapping

from tqdm import tqdm

from vitcls import cli, config_file, jobs, ledger, status
from vitcls import config as configs
from vitcls.core import errors
from vitcls.core.errors import RunError, UserError
from vitcls.metrics import METRICS, higher_is_better
from vitcls.training import metrics_log, places, run_dir
from vitcls.tune import results, search, space
from vitcls.tune.search import Trial

_TRIALS = 20  # of a search that has no end of its own
_logger = logging.getLogger("vitcls")


class Search:
    """A search in its directory, and what runs."""

    def __init__(self, flags: argparse.Namespace, config: configs.ConfigDict, keys: space.Space):
        self.directory = pathlib.Path(flags.workdir)
        self.flags, self.config, self.space = flags, config, keys
        self.metric = config.checkpoint.metric
        self.maximize = higher_is_better(self.metric)
        self._names: list[str] = []  # of all trials
        self._processes = jobs.Jobs(flags.workers)
        self._values: dict[str, dict] = {}  # of what runs
        self._scores: dict[str, dict[str, float]] = {}
        self._pruned: set[str] = set()

    def run(self) -> list[Trial]:
        """Runs the trials that are left; returns all once they have ended, or raises Stopped after a signal."""
        queue = ledger.start(self.flags.storage, self.directory, self._processes.pause)
        _begin(self)
        self._names = [f"{number:04d}" for number in range(_count(self.flags, self.space))]
        with queue, self._processes, tqdm(total=len(self._names), disable=None) as bar:
            while True:
                entries = queue.entries()
                ended = search.ended_of(entries)
                bar.n = len(ended)
                bar.refresh()
                if {trial.number for trial in ended}.issuperset(map(int, self._names)):
                    return ended
                name = self._next(queue, entries)
                if name and self._start(queue, name, ended):
                    continue
                self._processes.wait(functools.partial(self._watch, ended))
                self._watch(ended)
                for end in self._processes.ended():
                    self._end(queue, end)

    def _next(self, queue: ledger.Ledger, entries: Mapping[str, ledger.Entry]) -> str | None:
        """The first trial that nobody has; None while it is not sure which that is.

        A worker that was killed just now looks alive, so each must have given a sign of life since this one began; and
        its trial, which may live on, must end before others are proposed, which depend on it.
        """
        others = [entry for name, entry in entries.items() if entry.held and name not in self._values]
        if not self._processes.free or any(entry.beat < queue.began for entry in others):
            return None
        for name in self._names:
            entry = entries.get(name)
            if name not in self._values and (entry is None or (entry.code is None and not entry.held)):
                return None if status.is_alive(self._workdir(name)) else name
        return None

    def _start(self, queue: ledger.Ledger, name: str, ended: list[Trial]) -> bool:
        """Starts a trial, or notes that its values cannot work; False where another worker was faster."""
        before = [trial for trial in ended if trial.number < int(name)]
        flags, maximize = self.flags, self.maximize
        values = search.propose(self.space, flags.method, flags.seed, int(name), before, maximize=maximize)
        data = queue.claim(name, {"values": values})
        if data is None:
            return False
        self._values[name], self._scores[name] = data["values"], {}
        try:
            config = space.apply(self.config, data["values"], timing=self.space.cost == "latency_ms")
        except UserError as error:  # these values do not go together
            self._end(queue, jobs.Ended(name, 2, 0.0, cli.one_line(error)))
            return True
        self._processes.start(name, self._workdir(name), config)
        return True

    def _workdir(self, name: str) -> pathlib.Path:
        return self.directory / "trials" / name

    def _watch(self, ended: list[Trial]) -> None:
        """Looks at the validations in their order, so that when a trial is pruned does not depend on when we look."""
        for name in self._processes.running:
            scores = self._scores[name]
            for event in metrics_log.read_history(self._workdir(name)):
                step = str(event["step"])
                if name in self._pruned or self.metric not in event or step in scores:
                    continue
                scores[step] = event[self.metric]
                if search.should_prune(self.flags.pruner, scores, ended, maximize=self.maximize):
                    self._pruned.add(name)
                    self._processes.stop(name)

    def _end(self, queue: ledger.Ledger, end: jobs.Ended) -> None:
        values, scores = self._values.pop(end.name), self._scores.pop(end.name)
        if end.in_use:
            queue.release(end.name)
            return
        state = "pruned" if end.name in self._pruned else "failed" if end.code else "finished"
        data = {"values": values, "scores": scores, "state": state, "cost": None}
        if state == "finished" and self.space.cost:
            data["cost"] = results.cost(self._workdir(end.name), self.space.cost)
        queue.end(end.name, end.code, end.seconds, end.last_line, data)


def main(argv: list[str]) -> None:
    flags, config = _parse(argv)
    keys = space.load(flags.space, config)
    if config.dataset.validation == 0 and not config.dataset.num_folds:
        raise UserError("a search needs a validation split; set config.dataset.validation above 0")
    space.apply(config, {})
    known = [f"eval/{name}" for name in METRICS]
    if config.checkpoint.metric not in known:
        raise errors.unknown("config.checkpoint.metric", config.checkpoint.metric, known)
    search.optuna()
    if keys.cost and flags.pruner != "none":
        raise UserError(f"--pruner={flags.pruner} goes by one objective, and the space has a cost too; leave it out")
    searching = Search(flags, config, keys)
    trials = searching.run()
    best = results.write(searching.directory, trials, keys, searching.metric, config)
    if best is None:
        raise RunError(f"no trial has come to a score; see {searching.directory / results.TABLE}")
    print(f"best: trial {best.number:04d}, {searching.metric} {best.score:.4f} on the validation split")
    print("\n".join(f"  {key} = {value!r}" for key, value in best.values.items()))
    print(f"config: {searching.directory / results.BEST_CONFIG}")
    if keys.cost:
        print(f"Pareto front of {searching.metric} and {keys.cost}: {searching.directory / results.FRONT}")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, configs.ConfigDict]:
    rest, overrides = config_file.split_overrides(argv)
    parser = cli.Parser(prog=cli.program("tune"), description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE[:PRESET]", help="the config that is varied")
    parser.add_argument("--space", required=True, metavar="FILE[:PRESET]", help="what is varied, of configs/spaces/")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the trials live")
    parser.add_argument("--method", choices=search.METHODS, default="tpe", help="default: tpe")
    parser.add_argument("--trials", type=int, metavar="N", help=f"default: all of a grid, else {_TRIALS}")
    parser.add_argument("--pruner", choices=search.PRUNERS, default="none", help="which ends bad trials early")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trials at a time")
    parser.add_argument("--storage", default="", metavar="URL", help=ledger.HELP)
    parser.add_argument("--seed", type=int, default=0, help="of the search; the runs have that of the config")
    cli.add_import_argument(parser)
    flags = parser.parse_args(rest)
    places.check_many(flags.workdir)
    for name in ("trials", "workers"):
        if (number := getattr(flags, name)) is not None and number < 1:
            raise UserError(f"--{name}={number} must be at least 1")
    return flags, config_file.load(flags.config, overrides)


def _count(flags: argparse.Namespace, keys: space.Space) -> int:
    """How many trials: as many as are asked for, else all of a grid, and 20 by the other methods; none twice."""
    if flags.method != "grid":
        asked, most = flags.trials or _TRIALS, search.combinations(keys)
        if asked > most:
            _logger.warning("the space has %s combinations, each of which is tried once", f"{most:,}")
        return min(asked, most)
    count = len(search.grid(keys))
    if flags.trials and flags.trials < count:
        _logger.warning("the grid has %s combinations, of which the first %s are tried", f"{count:,}", flags.trials)
    return min(flags.trials or count, count)


def _begin(searching: Search) -> None:
    """Notes what is searched; raises UserError where the directory holds another search."""
    keys = {key: repr(what) for key, what in searching.space.keys.items()}
    text = {name: getattr(searching.flags, name) for name in ("method", "pruner", "seed")}
    text |= {"config": searching.config.to_dict(), "space": keys, "cost": searching.space.cost}
    text = json.loads(json.dumps(text))
    file = searching.directory / "search.json"
    if not file.exists():  # another worker may write it meanwhile
        run_dir.write_atomically(file, json.dumps(text, indent=2) + "\n", once=True)
    try:
        there, now = (configs.flatten(tree) for tree in (json.loads(file.read_text(encoding="utf-8")), text))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read ({cli.one_line(error)}); remove it, if the config and the space are this search's"
        ) from None
    changed = sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key))
    if changed:
        raise UserError(f"{searching.directory} holds another search: {changed[0]} differs; use another --workdir")


if __name__ == "__main__":
    sys.exit(cli.run(main))
