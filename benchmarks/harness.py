"""What all benchmarks share: timing that waits for the device, one process per row where memory is measured, one table.

Every number belongs to the run that took it; a ratio of numbers of two runs is refused.
"""

import argparse
import csv
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from vitcls import cli

Row = dict[str, Any]
RUN_VARIABLE = "VITCLS_BENCHMARK_RUN"
_LIBRARIES = ("jax", "flax", "optax", "tensorflow-cpu", "tensorflow", "keras", "torch", "timm")
OUT_OF_MEMORY = "out of memory"
RUN = os.environ.setdefault(RUN_VARIABLE, uuid.uuid4().hex[:8])  # child processes belong to the run of their parent


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of several calls, in the order in which they were made."""

    seconds: tuple[float, ...]
    run: str = RUN

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def spread(self, scale: float = 1e3) -> str:
        """'fastest..slowest', in milliseconds unless `scale` says otherwise."""
        return f"{_number(scale * min(self.seconds))}..{_number(scale * max(self.seconds))}"


def measure(call: Callable[[], Any], *, repeats: int) -> Timing:
    """Times `repeats` calls after one that compiles and one that warms up; each waits until its result is there."""
    return alternate({"": call}, repeats=repeats)[""]


def alternate(
    calls: dict[str, Callable[[], Any]],
    *,
    repeats: int,
    warm: bool = False,
    before: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, Timing]:
    """As `measure`, for calls that are to be compared: they take turns, so that what disturbs one disturbs all.

    With `warm` they are compiled and warmed up already, and every call is timed. `before` has what to do ahead of each
    turn of a call, untimed.
    """
    untimed, before = 0 if warm else 2, before or {}

    def turn(name: str) -> float:
        before.get(name, lambda: None)()
        return _seconds(calls[name])

    rounds = [{name: turn(name) for name in calls} for _ in range(untimed + repeats)]
    return {name: Timing(tuple(turn[name] for turn in rounds[untimed:])) for name in calls}


def repeated(function: Callable, calls: int) -> Callable:
    """`function` compiled, run `calls` times one after another in one program; the result is the last one's.

    One dispatch takes as long as a small kernel of a fast device: where that is timed, several kernels must share it.
    """
    import jax

    if calls == 1:
        return jax.jit(function)

    def run(*arguments):
        def again(_, carry):
            same, _ = jax.lax.optimization_barrier(carry)  # each call waits for the one before, and none is left out
            return same, function(*same)

        nothing = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))
        return jax.lax.fori_loop(0, calls, again, (arguments, nothing))[1]

    return jax.jit(run)


def _seconds(call: Callable[[], Any]) -> float:
    import jax

    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start
    finally:
        gc.enable()


def ratio(numerator: Timing, denominator: Timing) -> float:
    """The median ratio of two timings that took turns; raises ValueError for timings of different runs."""
    if numerator.run != denominator.run:
        raise ValueError(f"run {numerator.run} and run {denominator.run} cannot be compared: time both in one run")
    pairs = zip(numerator.seconds, denominator.seconds, strict=True)
    return statistics.median(above / below for above, below in pairs)


def machine() -> dict[str, str]:
    """Where and with what the numbers were taken. It starts JAX's devices."""
    import jax

    device = jax.devices()[0]
    return {
        "run": RUN,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name in _LIBRARIES if (version := _version(name))),
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def forward_and_backward(function: Callable, arguments: tuple, calls: int) -> dict[str, Callable]:
    """Calls of `function(*arguments)` and of its gradients with respect to all of them, each `repeated`."""
    import jax
    import jax.numpy as jnp

    def loss(*arguments):
        return jnp.sum(jnp.sin(function(*arguments).astype(jnp.float32)))

    gradients = jax.grad(loss, argnums=tuple(range(len(arguments))))
    return {
        "forward": functools.partial(repeated(function, calls), *arguments),
        "forward + backward": functools.partial(repeated(gradients, calls), *arguments),
    }


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that all benchmarks have."""
    flags = cli.Parser(description=description)
    flags.add_argument("--out", default="", help="directory for JSON, CSV and Markdown")
    flags.add_argument("--repeats", type=int, default=5, help="timed calls, after two that are not")
    return flags


def integers(text: str) -> list[int]:
    """'1,2,4' -> [1, 2, 4], for flags."""
    return [int(word) for word in text.split(",")]


def publish(name: str, rows: Sequence[Row], out: str, *, about: dict[str, str] | None = None) -> None:
    """Prints the rows as a table and, where `out` is not '', writes out/name.json, out/name.csv and out/name.md.

    `about` is what `machine()` says, by default of this process.
    """
    about = (about or machine()) | {"command": _command()}
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print("\n".join(f"{key:<9}{value}" for key, value in about.items()))
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if not out:
        return
    directory = pathlib.Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    table = json.dumps({"about": about, "rows": list(rows)}, indent=2) + "\n"
    (directory / f"{name}.json").write_text(table, encoding="utf-8")
    with (directory / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys([*columns, "run"]))
        writer.writeheader()
        writer.writerows({"run": RUN} | row for row in rows)
    lines = [f"| {' | '.join(line)} |" for line in cells]
    lines.insert(1, "| --- " * len(columns) + "|")
    lines += ["", *(f"- {key}: `{value}`" for key, value in about.items())]
    (directory / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _command() -> str:
    """The command as it was given, but for where the result goes."""
    words = sys.argv[1:]
    if "--out" in words:
        place = words.index("--out")
        words[place : place + 2] = []
    words = [word for word in words if not word.startswith("--out=")]
    return shlex.join(["python", "-m", f"benchmarks.{pathlib.Path(sys.argv[0]).stem}", *words])


def _text(value: Any) -> str:
    if value is None:
        return ""
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def in_child(module: str, arguments: Sequence[str], *, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs `python -m module arguments` and returns the JSON object that it printed last.

    A process of its own for a row: its peak of memory is its own, and one that runs out of memory is a row that says
    so, {'error': ...}, whether it raised or was killed.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"} | (environment or {})  # the error is the last line
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = ran.stdout.strip().splitlines()
    if ran.returncode == 0 and lines:
        return json.loads(lines[-1])
    if ran.returncode == -9 or "RESOURCE_EXHAUSTED" in ran.stderr or OUT_OF_MEMORY in ran.stderr.lower():
        return {"error": OUT_OF_MEMORY}
    words = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
    return {"error": words[-1][:200]}


if __name__ == "__main__":  # `in_child`, for a process that must leave the devices to its children
    print(json.dumps(machine()))
