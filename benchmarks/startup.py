"""Time to import, and time to the first training step without and with compiled programs from an earlier run.

    python -m benchmarks.startup

Imports are timed inside a fresh interpreter, first steps from the start of the command to the first line of
metrics.jsonl. Exit code 1 where an import takes longer than it may, or loads what it must not.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import harness
from vitcls import cli

LIMITS = {"vitcls": 0.3, "vitcls.training.steps": 2.0, "vitcls.models": 2.0, "vitcls.train": None}  # seconds
_HEAVY = ("tensorflow", "tensorflow_datasets", "orbax", "matplotlib", "sklearn")
_IMPORT = """
import sys, time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start, *(name for name in {heavy} if name in sys.modules))
"""


def import_row(module: str, repeats: int) -> harness.Row:
    code = _IMPORT.format(module=module, heavy=_HEAVY)
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(repeats + 1)
    ][1:]  # the first reads the files from the disk
    timing = harness.Timing(tuple(float(seconds) for seconds, *_ in runs))
    limit, loaded = LIMITS[module], runs[0][1:]
    good = limit is None or (timing.median < limit and not loaded)
    return {
        "what": f"import {module}",
        "seconds": timing.median,
        "fastest..slowest": timing.spread(1),
        "limit": limit,
        "loads": ", ".join(loaded) or "none of them",
        "good": good,
    }


def first_step_seconds(config: str, cache: str) -> float:
    """From the start of `vitcls.main` to the first event of training; the run is then stopped."""
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as messages:
        metrics = pathlib.Path(directory) / "run" / "metrics.jsonl"
        command = [sys.executable, "-m", "vitcls.main", f"--config={config}", f"--workdir={metrics.parent}"]
        command += ["--config.steps_per_call=1", "--config.log_every=1 steps"]
        environment = os.environ | {"VITCLS_CACHE_DIR": cache}
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=messages)
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                messages.seek(0)
                raise RuntimeError(messages.read().strip().splitlines()[-1])
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        process.terminate()
        process.wait()
        return seconds


def main(argv: list[str]) -> int:
    flags = harness.parser(__doc__)
    flags.add_argument("--config", default="configs/vit_digits.py", help="whose first step is timed")
    args = flags.parse_args(argv)
    rows = [import_row(module, args.repeats) for module in LIMITS]
    cold, warm = [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(first_step_seconds(args.config, cache))
            warm.append(first_step_seconds(args.config, cache))
    for what, seconds in (("without compiled programs", cold), ("with those of an earlier run", warm)):
        rows.append(
            {
                "what": f"first step of {args.config}, {what}",
                "seconds": statistics.median(seconds),
                "fastest..slowest": harness.Timing(tuple(seconds)).spread(1),
            }
        )
    harness.publish("startup", rows, args.out)
    return int(not all(row.get("good", True) for row in rows))


if __name__ == "__main__":
    sys.exit(cli.run(main))
