"""One line for each run: where it is, how well it does, and whether it is alive.

vitcls status WORKDIR... [--watch] [--json]
"""

import contextlib
import datetime
import json
import pathlib
import sys
import time
from typing import Any

from vitcls import cli
from vitcls.core import durations
from vitcls.core.errors import RunError, UserError
from vitcls.training import places
from vitcls.training.files import CHECKPOINTS, CONFIG_FILE, DATASET_FILE, LOCK_FILE, METRICS_FILE
from vitcls.training.lock import HEARTBEAT, died_here

_SILENCE = 3 * HEARTBEAT  # seconds without a heartbeat after which a run is called silent
_REFRESH = 5.0  # seconds between two looks with --watch
_HEAD = ("run", "step", "loss", "accuracy", "images/s", "checkpoint", "state")


def status(workdir: pathlib.Path, now: datetime.datetime, name: str = "") -> dict[str, Any]:
    """What the files of a workdir say of its run at the time `now`; None is what they do not say.

    `name` is what the workdir is called, if not by its path.

    Returns:
      workdir, step, total_steps, loss (training, of the last logging interval), accuracy (the last on the validation
      split), images_per_second, checkpoint_step, checkpoint_age_seconds, state (begun, alive, silent, stopped or
      finished), silent_seconds and test_accuracy.

    Raises UserError where `workdir` is not the workdir of a run.
    """
    name = name or str(workdir)
    config, lock = _read(workdir / CONFIG_FILE), _read(workdir / LOCK_FILE)
    if not (config or lock or (workdir / CONFIG_FILE).exists()):
        raise UserError(
            f"{name} is not the workdir of a run: it has no config.json; give the --workdir of vitcls train"
        )
    lines = _lines(workdir / METRICS_FILE)
    saved = _last_checkpoint(workdir / CHECKPOINTS)
    steps = [step for step in (_last(lines, "step"), saved) if step is not None]
    report = _read(workdir / "report" / "metrics.json")
    return {
        "workdir": name,
        "step": max(steps, default=None),
        "total_steps": _total_steps(config, _read(workdir / DATASET_FILE)),
        "loss": _last(lines, "train/loss"),
        "accuracy": _last(lines, "eval/accuracy"),
        "images_per_second": _last(lines, "train/images_per_second"),
        "checkpoint_step": saved,
        "checkpoint_age_seconds": None if saved is None else _checkpoint_age(workdir / CHECKPOINTS / str(saved), now),
        **_life(lock, report, now, began=bool(steps)),
        "test_accuracy": report.get("accuracy") if report.get("split") == "test" else None,
    }


def is_alive(workdir: pathlib.Path) -> bool:
    """Whether a run holds a directory."""
    lock = _read(workdir / LOCK_FILE)
    return _life(lock, {}, datetime.datetime.now().astimezone(), began=True)["state"] == "alive"


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
    with contextlib.suppress(OSError):
        return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=None)
    return None


def _checkpoint_age(folder: pathlib.Path, now: datetime.datetime) -> float | None:
    """Seconds since Orbax committed a checkpoint."""
    committed = _read(folder / "_CHECKPOINT_METADATA").get("commit_timestamp_nsecs")
    return max(now.timestamp() - committed / 1e9, 0.0) if committed else None


def _total_steps(config: dict, dataset: dict) -> int | None:
    if config.get("probe", {}).get("features"):  # a probe takes no steps
        return None
    with contextlib.suppress(KeyError, TypeError, UserError):
        count = dataset["num_examples"]["train"]
        return durations.to_steps(config["total"], batch_size=config["batch_size"], num_examples=count)
    return None


def _life(lock: dict, report: dict, now: datetime.datetime, *, began: bool) -> dict[str, Any]:
    """Whether a run is alive: its lock is written anew every few seconds, and goes when it ends in an orderly way."""
    if not lock:
        state = "finished" if report else "stopped" if began else "begun"
        return {"state": state, "silent_seconds": None}
    last = lock.get("last_beat") or lock.get("since")  # 0.1.0 wrote no last_beat
    try:
        silent = max((now - datetime.datetime.fromisoformat(last)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return {"state": "silent", "silent_seconds": None}
    alive = silent < _SILENCE and not died_here(lock)
    return {"state": "alive" if alive else "silent", "silent_seconds": silent}


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


def _print(runs: dict[str, places.Place], *, as_json: bool, clear: bool) -> None:
    now = datetime.datetime.now().astimezone()
    runs = [status(place.path, now, name) for name, place in runs.items()]
    lines = [json.dumps(run) for run in runs] if as_json else table(runs)
    print(("\x1b[H\x1b[2J" if clear else "") + "\n".join(lines), flush=True)


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog=cli.program("status"), description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="directory of a run, or its gs:// or s3:// URL")
    parser.add_argument("--watch", action="store_true", help=f"look again every {_REFRESH:.0f} seconds, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="one JSON object for each run")
    flags = parser.parse_args(argv)
    clear = flags.watch and not flags.json and sys.stdout.isatty()
    with contextlib.ExitStack() as held, contextlib.suppress(KeyboardInterrupt):  # how --watch is ended
        runs = {name: held.enter_context(places.opened(name, arrays=False)) for name in flags.workdirs}
        _print(runs, as_json=flags.json, clear=clear)
        while flags.watch:
            time.sleep(_REFRESH)
            away = []
            for place in runs.values():
                try:
                    place.refresh()
                except RunError as error:  # a bucket that may come back
                    away.append(str(error))
            _print(runs, as_json=flags.json, clear=clear)
            print("".join(f"{line}\n" for line in away), end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
