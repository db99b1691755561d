"""What all benchmarks share: timing that waits for the device, and one table as text, JSON and CSV."""

import csv
import datetime
import importlib.metadata
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds of several calls."""

    median: float
    low: float  # the fastest
    high: float  # the slowest
    compile: float  # the first call less a median one: tracing and compilation


def measure(call: Callable[[], Any], *, repeats: int) -> Timing:
    """Times `repeats` calls after one that compiles and one that warms up; each waits until its result is there."""
    first = _seconds(call)
    _seconds(call)
    seconds = [_seconds(call) for _ in range(repeats)]
    median = statistics.median(seconds)
    return Timing(median, min(seconds), max(seconds), max(first - median, 0.0))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def machine() -> dict[str, str]:
    """Where and with what the numbers were taken."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def publish(name: str, rows: list[dict[str, Any]], out: str) -> None:
    """Prints the rows as a table and, where `out` is not '', writes out/name.json and out/name.csv."""
    about = machine()
    print(", ".join(about.values()))
    columns = list(rows[0])
    table = [columns, *([_text(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if out:
        directory = pathlib.Path(out)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
        with (directory / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
