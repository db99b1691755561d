"""One line for each run: where it is, how well it does, and whether it is alive.

vitcls status WORKDIR... [--watch] [--json]
"""

import concurrent.futures
import contextlib
import datetime
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from vitcls import cli
from vitcls.core import buckets, durations
from vitcls.core.errors import RunError, UserError
from vitcls.training import places
from vitcls.training.files import (
    CHECKPOINTS,
    CONFIG_FILE,
    DATASET_FILE,
    FAILED_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RECORD,
)
from vitcls.training.lock import HEARTBEAT, died_here

_SILENCE = 3 * HEARTBEAT  # seconds without a heartbeat after which a run is called silent
_REFRESH = 5.0  # seconds between two looks with --watch
_AT_ONCE = 16  # places that are asked at the same time
_HEAD = ("run", "step", "loss", "accuracy", "images/s", "checkpoint", "state")


def status(workdir: pathlib.Path, now: datetime.datetime, name: str = "") -> dict[str, Any]:
    """What the files of a workdir say of its run at the time `now`; None is what they do not say.

    `name` is what the workdir is called, if not by its path.

    Returns:
      workdir, step, total_steps, loss (training, of the last logging interval), accuracy (the last on the validation
      split), images_per_second, checkpoint_step, checkpoint_age_seconds, state (begun, alive, silent, stopped, failed
      or finished), silent_seconds, failure (why a run failed) and test_accuracy (of a finished run).

    Raises UserError where `workdir` is not the workdir of a run.
    """
    name = name or str(workdir)
    config, lock, failed = _config(workdir, name), _read(workdir / LOCK_FILE), _read(workdir / FAILED_FILE)
    if not (config or lock or failed):
        raise UserError(
            f"{name} is not the workdir of a run: it has no config.json; give the --workdir of vitcls train"
        )
    lines = _lines(workdir / METRICS_FILE)
    saved = _last_checkpoint(workdir / CHECKPOINTS)
    steps = [step for step in (_last(lines, "step"), saved) if step is not None]
    total = _total_steps(config, _read(workdir / DATASET_FILE))
    report = final_report(workdir, config)
    life = _life(lock, failed, now, began=bool(steps), ended=_has_ended(workdir, config, total))
    tested = life["state"] == "finished" and report.get("split") == "test"
    return {
        "workdir": name,
        "step": max(steps, default=None),
        "total_steps": total,
        "loss": _last(lines, "train/loss"),
        "accuracy": _last(lines, "eval/accuracy"),
        "images_per_second": _last(lines, "train/images_per_second"),
        "checkpoint_step": saved,
        "checkpoint_age_seconds": None if saved is None else _checkpoint_age(workdir / CHECKPOINTS / str(saved), now),
        **life,
        "test_accuracy": report.get("accuracy") if tested else None,
    }


def is_alive(workdir: pathlib.Path) -> bool:
    """Whether a run holds a directory."""
    lock = _read(workdir / LOCK_FILE)
    return _life(lock, {}, datetime.datetime.now().astimezone(), began=True, ended=False)["state"] == "alive"


def final_report(workdir: pathlib.Path, config: dict) -> dict:
    """metrics.json of the report, if it is of the checkpoint that training itself reports at its end; else {}.

    `vitcls evaluate` may have written it since, also of another checkpoint.
    """
    report = _read(workdir / "report" / "metrics.json")
    return report if _is_probe(config) or report.get("checkpoint_step") in _final_steps(workdir, config) else {}


def _final_steps(workdir: pathlib.Path, config: dict) -> list[int]:
    """The step of the checkpoint 'last' or 'best', as config.report.checkpoint says (`checkpoint.best`).

    Older versions removed the best when a run was resumed: then the steps of all that may be the best now.
    """
    folder = workdir / CHECKPOINTS
    last = _last_checkpoint(folder)
    if last is None or config.get("report", {}).get("checkpoint") != "best":
        return [] if last is None else [last]
    best, metric = _read(folder / str(last) / RECORD).get("best"), config.get("checkpoint", {}).get("metric")
    scores = {step: _read(folder / str(step) / RECORD).get("metrics") or {} for step in _checkpoints(folder)}
    scored = [step for step in scores if metric in scores[step]]
    return [step for step in scored if _number(scores[step][metric]) == _number(best)][:1] or scored


def _has_ended(workdir: pathlib.Path, config: dict, total_steps: int | None) -> bool:
    """Whether training has nothing left to do, by its last checkpoint: it has made all steps, or stopped early.

    A probe takes no steps: it has ended when its report is there, which nothing else writes.
    """
    if _is_probe(config):
        return (workdir / "report" / "metrics.json").exists()
    last = _last_checkpoint(workdir / CHECKPOINTS)
    if last is None:
        return False
    return last == total_steps or _read(workdir / CHECKPOINTS / str(last) / RECORD).get("finished") is True


def _is_probe(config: dict) -> bool:
    return bool(config.get("probe", {}).get("features"))


def _config(workdir: pathlib.Path, name: str) -> dict:
    """config.json; {} where there is none yet. Raises UserError where it is none, as it is never half written."""
    try:
        config = json.loads((workdir / CONFIG_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        config, why = None, getattr(error, "strerror", None) or str(error)
    else:
        why = "it is no config"
    blocks = ("probe", "report", "checkpoint")  # which are read here, as is the total
    if not (
        isinstance(config, dict)
        and isinstance(config.get("total"), str)
        and all(isinstance(config.get(block, {}), dict) for block in blocks)
    ):
        raise UserError(f"{CONFIG_FILE} of {name} cannot be used ({why}); restore it from a copy")
    return config


def _read(path: pathlib.Path) -> dict:
    """The JSON object in a file; {} where there is none, or one that is not whole."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def _lines(path: pathlib.Path) -> list[str]:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8").splitlines()
    return []


def _last(lines: list[str], name: str) -> float | None:
    """The last value of `name`; lines without it are not parsed, and what a killed run left half written is no line."""
    for line in reversed(lines):
        if f'"{name}"' in line:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return json.loads(line)[name]
    return None


def _last_checkpoint(folder: pathlib.Path) -> int | None:
    return max(_checkpoints(folder), default=None)


def _checkpoints(folder: pathlib.Path) -> list[int]:
    with contextlib.suppress(OSError):
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    return []


def _number(value: float | None) -> float | None:
    """None for what is not a number, which is never the best."""
    return None if value is None or math.isnan(value) else value


def _checkpoint_age(folder: pathlib.Path, now: datetime.datetime) -> float | None:
    """Seconds since Orbax committed a checkpoint."""
    committed = _read(folder / "_CHECKPOINT_METADATA").get("commit_timestamp_nsecs")
    return max(now.timestamp() - committed / 1e9, 0.0) if committed else None


def _total_steps(config: dict, dataset: dict) -> int | None:
    if _is_probe(config):  # which takes no steps
        return None
    with contextlib.suppress(KeyError, TypeError, UserError):
        count = dataset["num_examples"]["train"]
        return durations.to_steps(config["total"], batch_size=config["batch_size"], num_examples=count)
    return None


def _life(lock: dict, failed: dict, now: datetime.datetime, *, began: bool, ended: bool) -> dict[str, Any]:
    """Whether a run is alive: its lock is written anew every few seconds, and goes when it ends.

    Then it leaves failed.json if it was by an error (training/lock.py).
    """
    if not lock:
        state = "failed" if failed else "finished" if ended else "stopped" if began else "begun"
        return {"state": state, "silent_seconds": None, "failure": failed.get("failure")}
    last = lock.get("last_beat") or lock.get("since")  # 0.1.0 wrote no last_beat
    try:
        silent = max((now - datetime.datetime.fromisoformat(last)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return {"state": "silent", "silent_seconds": None, "failure": None}
    alive = silent < _SILENCE and not died_here(lock)
    return {"state": "alive" if alive else "silent", "silent_seconds": silent, "failure": None}


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Aligned lines with a head, one for each result of `status`."""
    rows = [_HEAD, *(_cells(run) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(run: dict[str, Any]) -> tuple[str, ...]:
    saved, age = run["checkpoint_step"], run["checkpoint_age_seconds"]
    ago = "" if age is None else f" ({_span(age)} ago)"
    return (
        run["workdir"],
        f"{_show(run['step'], ',')}/{_show(run['total_steps'], ',')}",
        _show(run["loss"], ".4f"),
        _show(run["accuracy"], ".2%"),
        _show(run["images_per_second"], ",.0f"),
        "-" if saved is None else f"{saved:,}{ago}",
        _state(run),
    )


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _state(run: dict[str, Any]) -> str:
    if run["state"] == "silent":
        return "silent" if run["silent_seconds"] is None else f"silent for {_span(run['silent_seconds'])}"
    if run["state"] == "finished" and run["test_accuracy"] is not None:
        return f"finished, test accuracy {run['test_accuracy']:.2%}"
    if run["state"] == "failed" and run["failure"]:
        return f"failed: {run['failure'].partition(';')[0]}"  # without the advice
    return run["state"]


def _span(seconds: float) -> str:
    """A time in its largest unit.

    >>> [_span(9), _span(90), _span(9_000), _span(900_000)]
    ['9 s', '1 min', '2 h', '10 d']
    """
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


class _Looking:
    """Runs that are looked at, perhaps again and again, each by itself: what is wrong with one hides no other.

    Places are asked at the same time, as one that is out of reach is waited for.
    """

    def __init__(self, arguments: Sequence[str], held: contextlib.ExitStack):
        self._arguments, self._held = list(dict.fromkeys(arguments)), held
        self._pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE)
        self._matched: dict[str, list[str]] = {}  # pattern -> the runs that it meant
        self._places: dict[str, places.Place] = {}
        self.wrong: list[UserError | RunError] = []

    def look(self) -> list[dict[str, Any]]:
        """What is known of the runs; of what is out of reach, as of the last look, or nothing."""
        meant = list(self._pool.map(self._names, self._arguments))
        names = dict.fromkeys(name for names, _ in meant for name in names)
        seen = list(self._pool.map(self._look_at, names))
        self.wrong = [error for _, errors in (*meant, *seen) for error in errors]
        return [run for run, _ in seen if run]

    def _names(self, argument: str) -> tuple[list[str], list[UserError | RunError]]:
        """The runs that an argument means: itself, or those that match a pattern."""
        if not (buckets.is_url(argument) and "*" in argument):
            return [argument], []
        try:
            self._matched[argument] = places.matching(argument)
        except (UserError, RunError) as error:
            return self._matched.get(argument, []), [error]
        return self._matched[argument], []

    def _look_at(self, name: str) -> tuple[dict[str, Any] | None, list[UserError | RunError]]:
        run, errors = None, []
        try:
            self._reach(name)
        except (UserError, RunError) as error:
            errors.append(error)
        if name in self._places:
            try:
                run = status(self._places[name].path, datetime.datetime.now().astimezone(), name)
            except UserError as error:
                errors.append(error)
        return run, errors

    def _reach(self, name: str) -> None:
        if name in self._places:
            self._places[name].refresh()
        else:
            self._places[name] = self._held.enter_context(places.opened(name, arrays=False))


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog=cli.program("status"), description=__doc__.splitlines()[0])
    parser.add_argument(
        "workdirs",
        nargs="+",
        metavar="WORKDIR",
        help="directory of a run, or its gs:// or s3:// URL, with * for several",
    )
    parser.add_argument("--watch", action="store_true", help=f"look again every {_REFRESH:.0f} seconds, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="one JSON object for each run")
    flags = parser.parse_args(argv)
    clear = flags.watch and not flags.json and sys.stdout.isatty()
    try:
        with contextlib.ExitStack() as held:
            looking = _Looking(flags.workdirs, held)
            while True:
                code = _show_all(looking, as_json=flags.json, clear=clear)
                if not flags.watch:
                    return code
                time.sleep(_REFRESH)
    except KeyboardInterrupt:
        if not flags.watch:
            raise
        sys.stdout.flush()
        os._exit(0)  # how --watch is ended; in order, Python would wait for buckets that are out of reach


def _show_all(looking: _Looking, *, as_json: bool, clear: bool) -> int:
    """Prints a line for each run, and what is wrong; returns the exit code."""
    runs = looking.look()
    lines = [json.dumps(run) for run in runs] if as_json else table(runs) if runs else []
    print(("\x1b[H\x1b[2J" if clear else "") + "".join(f"{line}\n" for line in lines), end="", flush=True)
    for line in dict.fromkeys(map(cli.one_line, looking.wrong)):  # of a bucket, whose runs are many, once
        print(f"error: {line}", file=sys.stderr, flush=True)
    return max((2 if isinstance(error, UserError) else 1 for error in looking.wrong), default=0)


if __name__ == "__main__":
    sys.exit(cli.run(main))
