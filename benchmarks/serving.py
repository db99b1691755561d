"""One classifier behind `vitcls serve` and behind others: answers a second, and how long each takes.

    python -m benchmarks.serving --workdir=DIR [--clients=64] [--seconds=5] [--repeats=5] [--peers=one_by_one,litserve]

All servers run, and are asked in turns by one load generator (benchmarks.load) with the test images of the workdir as
PNG files in JSON; each answer is checked against `vitcls predict`. The first row of each server is `--clients` that ask
one thing after another, the second a single one, the third requests at half of the rate that the first has shown.
"""

import contextlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from PIL import Image

from benchmarks import harness
from vitcls import cli, data, predict
from vitcls.training.opened import open_with_data

_IMAGES = 200
_PATIENCE = 300  # seconds until a server is up
OURS = "vitcls serve"


def expected(workdir: str, folder: pathlib.Path) -> pathlib.Path:
    """A file for benchmarks.load, of test images that are written to `folder`."""
    opened = open_with_data(workdir, splits=("test",))
    split = opened.dataset.test
    images = data.pixels(split.take(range(min(_IMAGES, len(split.labels)))), opened.trained.info.image_shape)
    files = [folder / f"{i}.png" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file)
    names = opened.trained.info.class_names
    guesses = [guess.probabilities for _, guess in predict.predict(opened.trained, files)]
    rows = [[str(file), names[p.argmax()], float(p.max())] for file, p in zip(files, guesses, strict=True)]
    (folder / "expected.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "expected.json"


def command(server: str, workdir: str, port: int, folder: pathlib.Path) -> list[str]:
    if server == OURS:
        database = f"--database=sqlite:///{folder / 'feedback.db'}"
        return [sys.executable, "-m", "vitcls.serve", f"--workdir={workdir}", f"--port={port}", database]
    return [sys.executable, "-m", "benchmarks.peers.serving", server, f"--workdir={workdir}", f"--port={port}"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextlib.contextmanager
def running(servers: list[str], workdir: str, folder: pathlib.Path, wanted: pathlib.Path):
    """The port of each server; all of them are up and have answered."""
    ports = {server: free_port() for server in servers}
    processes = []
    try:
        for server, port in ports.items():
            log = open(folder / f"{server}.log", "w", encoding="utf-8")  # noqa: SIM115
            started = subprocess.Popen(command(server, workdir, port, folder), stdout=log, stderr=log, process_group=0)
            processes.append(started)
            deadline = time.monotonic() + _PATIENCE
            while not load(port, wanted, "--clients=1", "--requests=1")["answers"]:
                if started.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{server} does not answer: {(folder / f'{server}.log').read_text()[-2000:]}")
                time.sleep(1)
            load(port, wanted, "--clients=64", "--seconds=1")
        yield ports
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def load(port: int, wanted: pathlib.Path, *flags: str) -> dict:
    arguments = [f"--port={port}", f"--expected={wanted}", *flags]
    done = subprocess.run([sys.executable, "-m", "benchmarks.load", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def rows(ports: dict[str, int], wanted: pathlib.Path, flags) -> list[harness.Row]:
    """Medians over the turns, with the slowest and fastest throughput."""
    seconds = f"--seconds={flags.seconds}"
    full, alone, half = [{name: [] for name in ports} for _ in range(3)]
    for _ in range(flags.repeats):
        for name, port in ports.items():
            full[name].append(load(port, wanted, f"--clients={flags.clients}", seconds))
        for name, port in ports.items():
            alone[name].append(load(port, wanted, "--clients=1", seconds))
    for _ in range(flags.repeats):
        for name, port in ports.items():
            rate = statistics.median(one["per_second"] for one in full[name]) / 2
            half[name].append(load(port, wanted, f"--clients={flags.clients}", f"--rate={rate}", seconds))
    kinds = {f"{flags.clients} clients": full, "1 client": alone, "half of the rate": half}
    return [row(name, kind, found[name], full[OURS], full[name]) for name in ports for kind, found in kinds.items()]


def row(name: str, kind: str, found: list[dict], ours: list[dict], theirs: list[dict]) -> harness.Row:
    def median(key: str) -> float:
        return statistics.median(one[key] for one in found)

    rates = [one["per_second"] for one in found]
    ratios = [a["per_second"] / b["per_second"] for a, b in zip(ours, theirs, strict=True)]
    return {
        "server": name,
        "load": kind,
        "answers/s": median("per_second"),
        "slowest..fastest": f"{min(rates):,.0f}..{max(rates):,.0f}",
        "p50 ms": 1e3 * median("p50"),
        "p99 ms": 1e3 * median("p99"),
        "lost": sum(one["lost"] for one in found),
        "swapped": sum(one["swapped"] for one in found),
        "vitcls serve is faster by": statistics.median(ratios) if found is theirs and name != OURS else None,
    }


def main(argv: list[str]) -> int:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--peers", default="one_by_one,litserve", help="'' for none")
    flags = parser.parse_args(argv)
    servers = [OURS, *filter(None, flags.peers.split(","))]
    with tempfile.TemporaryDirectory(prefix="vitcls-serving-") as place:
        folder = pathlib.Path(place)
        wanted = expected(flags.workdir, folder)
        with running(servers, flags.workdir, folder, wanted) as ports:
            found = rows(ports, wanted, flags)
    harness.publish("serving", found, flags.out)
    return int(any(one["lost"] or one["swapped"] for one in found))


if __name__ == "__main__":
    sys.exit(cli.run(main))
