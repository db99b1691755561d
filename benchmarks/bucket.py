"""What a workdir in a bucket costs: the sending of a checkpoint, and a minute in which the bucket is away.

    python -m benchmarks.bucket --scheme=gs --seconds=60
    python -m benchmarks.bucket --scheme=s3 --workdir=runs/digits     # the last checkpoint of a run is sent, no more

The bucket is of the tests' server, on this machine, so the network costs nothing. The run is configs/vit_digits.py with
more steps, once undisturbed and once with a server that takes requests and does not answer from step 200 on; the
CPU seconds of the first include what was not compiled before.
"""

import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from benchmarks import harness
from tests import bucket
from vitcls import cli
from vitcls.core import buckets
from vitcls.training import checkpoint, places

_TRAIN = ["--config=configs/vit_digits.py", "--config.report.timing=False"]


class Course(NamedTuple):
    trained: float  # seconds from the start of the command to its last step
    ended: float
    processor: float  # CPU seconds of the command
    said: list[str]  # lines about the bucket, each with the seconds since the outage


def train(workdir: str, steps: int, server: subprocess.Popen, outage: float) -> Course:
    """Trains; from step 200 on the server stands still for `outage` seconds."""
    start, stopped, trained, said = time.perf_counter(), None, None, []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "vitcls.main", *_TRAIN, f"--config.total={steps} steps", f"--workdir={workdir}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        now = time.perf_counter()
        if outage and stopped is None and line.startswith("step 200/"):
            server.send_signal(signal.SIGSTOP)
            stopped = now
            subprocess.Popen(["sh", "-c", f"sleep {outage}; kill -CONT {server.pid}"])
        if line.startswith(f"step {steps:,}/{steps:,}  eval"):
            trained = now - start
        if "reached" in line:
            said.append(f"{now - stopped:.0f} s: {line.strip()}")
    if process.wait() or trained is None:
        raise RuntimeError(f"the run in {workdir} has failed; run it yourself: {' '.join(command)}")
    ended, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Course(trained, ended, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, said)


def save_row(scheme: str, proxy: bucket.Proxy, run: pathlib.Path, repeats: int) -> harness.Row:
    """The last checkpoint of `run`, sent to where no other is."""
    folder = run / "checkpoints" / str(max(checkpoint.steps(run / "checkpoints")))
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    seconds = []
    for i in range(repeats):
        with places.opened(f"{scheme}://runs/saved/{i}") as place, place.hold():
            shutil.copytree(folder, place.path / "checkpoints" / folder.name)
            before, start = proxy.answered, time.perf_counter()
            place.share()
            seconds.append(time.perf_counter() - start)
            requests = proxy.answered - before
    timing = harness.Timing(tuple(seconds))
    return {
        "what": f"a checkpoint of {sum(sizes) / 2**20:.1f} MiB in {len(sizes)} files is sent",
        "seconds": timing.median,
        "fastest..slowest": timing.spread(1),
        "requests": requests,
    }


def outage_rows(
    scheme: str, proxy: bucket.Proxy, server: subprocess.Popen, steps: int, seconds: int
) -> list[harness.Row]:
    """A training that nothing disturbs, and one whose bucket is away; prints what the second says of it."""
    rows = []
    for name, outage in (("undisturbed", 0), (f"its bucket away for {seconds} s", seconds)):
        before = proxy.answered
        course = train(f"{scheme}://runs/{outage}", steps, server, outage)
        print("".join(f"{line}\n" for line in course.said), end="")
        rows.append(
            {
                "what": f"training, {name}",
                "seconds": course.trained,
                "until its end": course.ended,
                "CPU seconds": course.processor,
                "requests": proxy.answered - before,
            }
        )
    return rows


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--scheme", choices=tuple(buckets.EXTRAS), default="gs")
    flags.add_argument("--steps", type=int, default=1000)
    flags.add_argument("--seconds", type=int, default=60, help="for which the bucket is away")
    flags.add_argument(
        "--workdir", default="", help="directory of a run; its last checkpoint is sent, and none trained"
    )
    args = flags.parse_args(argv)
    server, url = bucket.start_server(args.scheme)
    proxy = bucket.Proxy(url)
    os.environ.update(bucket.environment(args.scheme, proxy.url))
    if args.workdir:
        rows = [save_row(args.scheme, proxy, pathlib.Path(args.workdir), args.repeats)]
    else:
        rows = outage_rows(args.scheme, proxy, server, args.steps, args.seconds)
        with places.opened(f"{args.scheme}://runs/0") as place:
            rows.append(save_row(args.scheme, proxy, place.path, args.repeats))
    harness.publish("bucket", rows, args.out)
    proxy.close()
    server.communicate()


if __name__ == "__main__":
    sys.exit(cli.run(main))
