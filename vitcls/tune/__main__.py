"""Search a space of config keys by the validation split, and write the best config.

vitcls tune --config=FILE[:PRESET] --space=configs/spaces/NAME.py --workdir=DIR [--method=tpe|random|grid] [--trials=N]
    [--pruner=none|median|hyperband] [--workers=N] [--seed=0]

Started again it goes on, with one worker to the same trials. The test split is never read.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys

from tqdm import tqdm

from vitcls import cli, config_file, jobs
from vitcls import config as configs
from vitcls.core.errors import RunError, UserError
from vitcls.metrics import higher_is_better
from vitcls.training import metrics_log, run_dir
from vitcls.tune import results, search, space
from vitcls.tune.search import Trial

LEDGER = "trials.jsonl"


class Search:
    """A search in its directory: what has ended, and what runs."""

    def __init__(self, flags: argparse.Namespace, config: configs.ConfigDict, keys: space.Space):
        self.directory = pathlib.Path(flags.workdir)
        self.flags, self.config, self.space = flags, config, keys
        self.metric = config.checkpoint.metric
        self.maximize = higher_is_better(self.metric)
        self.running: dict[str, dict] = {}  # the values of each trial
        self._scores: dict[str, dict[str, float]] = {}
        self._pruned: set[str] = set()

    @property
    def ended(self) -> list[Trial]:
        return search.read_ledger(self.directory / LEDGER)

    def run(self) -> None:
        """Runs the trials that are left; raises Stopped after a signal."""
        with jobs.Jobs(self.flags.workers) as processes, tqdm(total=self.flags.trials, disable=None) as bar:
            while True:
                ended = self.ended
                bar.n = len(ended)
                bar.refresh()
                number = self._next(ended) if processes.free else None
                if number is not None and self._start(processes, number, ended):
                    continue
                if not processes.running:
                    return
                processes.wait(functools.partial(self._watch, processes, ended))
                self._watch(processes, ended)
                for end in processes.ended():
                    self._end(end)

    def _next(self, ended: list[Trial]) -> int | None:
        """The first trial that neither has ended nor runs."""
        taken = {trial.number for trial in ended} | {int(name) for name in self.running}
        return next((number for number in range(self.flags.trials) if number not in taken), None)

    def _start(self, processes: jobs.Jobs, number: int, ended: list[Trial]) -> bool:
        """Starts a trial, or notes that its values cannot work; False where there are no more values."""
        before = [trial for trial in ended if trial.number < number] if self.flags.workers == 1 else ended
        options = {"maximize": self.maximize}
        values = search.propose(self.space, self.flags.method, self.flags.seed, number, before, **options)
        if values is None:
            return False
        name = f"{number:04d}"
        try:
            config = space.apply(self.config, values)
        except UserError as error:  # these values do not go together
            self._write(Trial(number, values, {}, "failed", error=cli.one_line(error)))
            return True
        self.running[name], self._scores[name] = values, {}
        processes.start(name, self._workdir(name), config)
        return True

    def _workdir(self, name: str) -> pathlib.Path:
        return self.directory / "trials" / name

    def _watch(self, processes: jobs.Jobs, ended: list[Trial]) -> None:
        """Looks at the validations in their order, so that when a trial is pruned does not depend on when we look."""
        for name in processes.running:
            scores = self._scores[name]
            for event in metrics_log.read_history(self._workdir(name)):
                step = str(event["step"])
                if name in self._pruned or self.metric not in event or step in scores:
                    continue
                scores[step] = event[self.metric]
                if search.should_prune(self.flags.pruner, scores, ended, maximize=self.maximize):
                    self._pruned.add(name)
                    processes.stop(name)

    def _end(self, end: jobs.Ended) -> None:
        state = "pruned" if end.name in self._pruned else "failed" if end.code else "finished"
        values, scores = self.running.pop(end.name), self._scores.pop(end.name)
        error = end.last_line if state == "failed" else ""
        self._write(Trial(int(end.name), values, scores, state, round(end.seconds, 1), error))

    def _write(self, trial: Trial) -> None:
        with open(self.directory / LEDGER, "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(trial)) + "\n")


def main(argv: list[str]) -> None:
    flags = _parse(argv)
    config = config_file.load(flags.config)
    keys = space.load(flags.space, config)
    if config.dataset.validation == 0 and not config.dataset.num_folds:
        raise UserError("a search needs a validation split; set config.dataset.validation above 0")
    space.apply(config, {})
    search.optuna()
    searching = Search(flags, config, keys)
    _begin(searching)
    searching.run()
    best = results.write(searching.directory, searching.ended, keys, searching.metric, config)
    if best is None:
        raise RunError(f"no trial has come to a score; see {searching.directory / LEDGER}")
    print(f"best: trial {best.number:04d}, {searching.metric} {best.score:.4f} on the validation split")
    print("\n".join(f"  {key} = {value!r}" for key, value in best.values.items()))
    print(f"config: {searching.directory / results.BEST_CONFIG}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog=cli.program("tune"), description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE[:PRESET]", help="the config that is varied")
    parser.add_argument("--space", required=True, metavar="FILE[:PRESET]", help="what is varied, of configs/spaces/")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the trials live")
    parser.add_argument("--method", choices=search.METHODS, default="tpe", help="default: tpe")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--pruner", choices=search.PRUNERS, default="none", help="which ends bad trials early")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trials at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the search; the runs have that of the config")
    flags = parser.parse_args(argv)
    for name in ("trials", "workers"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)} must be at least 1")
    return flags


def _begin(searching: Search) -> None:
    """Makes the directory, or checks that the search in it is this one."""
    keys = {key: repr(what) for key, what in searching.space.keys.items()}
    text = {name: getattr(searching.flags, name) for name in ("method", "pruner", "seed")}
    text = json.loads(json.dumps(text | {"config": searching.config.to_dict(), "space": keys}))
    file = searching.directory / "search.json"
    if file.exists():
        there, now = (configs.flatten(tree) for tree in (json.loads(file.read_text(encoding="utf-8")), text))
        changed = sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key))
        if changed:
            raise UserError(f"{searching.directory} holds another search: {changed[0]} differs; use another --workdir")
        return
    try:
        searching.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={searching.directory} cannot be made ({error.strerror}); use another") from None
    run_dir.write_atomically(file, json.dumps(text, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
