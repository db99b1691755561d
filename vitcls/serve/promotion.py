"""Which run is served for a workdir: itself, or one that was promoted; served.json in the workdir says so."""

import datetime
import json
import os
import pathlib
from typing import Any

from vitcls.core.errors import UserError
from vitcls.training import run_dir
from vitcls.training.files import CONFIG_FILE, SERVED_FILE


def current(workdir: pathlib.Path) -> pathlib.Path:
    """The run that is served for a workdir. Raises UserError where served.json is damaged or its run is gone."""
    served = _read(workdir)["served"]
    run = _place(workdir, served[-1]) if served else workdir
    if not (run / CONFIG_FILE).exists() and run != workdir:
        raise UserError(
            f"{run}, which was promoted for {workdir}, is not there; go back with vitcls retrain --rollback"
        )
    return run


def since(workdir: pathlib.Path) -> str | None:
    """When the run that is served was promoted or given back (ISO 8601, UTC); None where none ever was."""
    history = _read(workdir)["history"]
    return history[-1]["time"] if history else None


def was_withdrawn(workdir: pathlib.Path, run: pathlib.Path) -> bool:
    """Whether a run was promoted for a workdir once, and given up by `rollback`."""
    event = f"withdrew {_name(workdir, run)}"
    return any(isinstance(each, dict) and each.get("event") == event for each in _read(workdir)["history"])


def promote(workdir: pathlib.Path, challenger: pathlib.Path) -> None:
    """Has the run `challenger` served for a workdir from now on; nothing changes where it is already.

    Raises UserError for what is no run, or tells other classes apart.
    """
    ours, theirs = run_dir.open_workdir(workdir).info, run_dir.open_workdir(challenger).info
    if ours.class_names != theirs.class_names:
        raise UserError(f"{challenger} tells other classes apart than {workdir}, and cannot be served in its place")
    record, name = _read(workdir), _name(workdir, challenger)
    if name != (record["served"] or ["."])[-1]:
        _write(workdir, [*record["served"], name], record["history"], f"promoted {name}")


def rollback(workdir: pathlib.Path) -> pathlib.Path:
    """Has the run served that was before the last promotion, and returns it. Raises UserError where there was none."""
    record = _read(workdir)
    if not record["served"]:
        raise UserError(f"no run was promoted for {workdir}; there is nothing to go back to")
    *before, last = record["served"]
    _write(workdir, before, record["history"], f"withdrew {last}")
    return current(workdir)


def _read(workdir: pathlib.Path) -> dict[str, list]:
    """served: the runs that were promoted and not withdrawn, relative to the workdir; history: what happened when."""
    try:
        record: dict[str, Any] = json.loads((workdir / SERVED_FILE).read_text(encoding="utf-8"))
        served, history = record["served"], record["history"]
        if not (isinstance(history, list) and isinstance(served, list) and all(isinstance(run, str) for run in served)):
            raise ValueError("it has other types")
        return {"served": served, "history": history}
    except FileNotFoundError:
        return {"served": [], "history": []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{workdir / SERVED_FILE} cannot be used ({error}); remove it to serve {workdir}") from None


def _write(workdir: pathlib.Path, served: list[str], history: list[dict], event: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"served": served, "history": [*history, {"time": now, "event": event}]}
    run_dir.write_atomically(workdir / SERVED_FILE, json.dumps(record, indent=2) + "\n")


def _name(workdir: pathlib.Path, run: pathlib.Path) -> str:
    return os.path.relpath(run.resolve(), workdir.resolve())


def _place(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Relative, so that both may move together."""
    return pathlib.Path(os.path.normpath(workdir.resolve() / name))
