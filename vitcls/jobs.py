"""Training runs in processes of their own: what one does, or how it ends, is that run's alone.

python -m vitcls.jobs [--import=MODULE] WORKDIR [CONFIG_FILE ...] < config.json
"""

import contextlib
import json
import logging
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vitcls import cli, config_file
from vitcls import config as configs
from vitcls.core.errors import Stopped, UserError
from vitcls.train import train_and_evaluate
from vitcls.training.lock import IN_USE

LOG_FILE = "log.txt"  # in the workdir
_PERIOD = 0.5  # seconds between two looks at the processes
_LOOKS = 10  # after which `wait` returns though nothing has ended


class Ended(NamedTuple):
    """How a run ended."""

    name: str
    code: int
    seconds: float
    last_line: str  # of its log

    @property
    def in_use(self) -> bool:
        """Whether it did not begin, as another process holds the workdir."""
        return self.code == 2 and IN_USE in self.last_line


class Jobs(contextlib.AbstractContextManager):
    """At most `workers` runs at a time. SIGTERM and SIGINT reach them all, and they save."""

    def __init__(self, workers: int):
        self._workers = workers
        self._code = 0
        self.running: dict[str, tuple[pathlib.Path, subprocess.Popen, float]] = {}

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for name in self.running:
            self.stop(name)
        for _, process, _ in self.running.values():
            process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self._code = 128 + number

    @property
    def free(self) -> bool:
        return len(self.running) < self._workers

    def start(self, name: str, workdir: pathlib.Path, config: configs.ConfigDict) -> None:
        """Begins or goes on with the run of a resolved config."""
        workdir.mkdir(parents=True, exist_ok=True)
        imports = [f"--import={module}" for module in cli.imported]
        with open(workdir / LOG_FILE, "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "vitcls.jobs", *imports, "--", str(workdir), *config_file.executed()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is handed on, once
            )
        with contextlib.suppress(BrokenPipeError):  # it has ended already; `ended` says how
            process.stdin.write(json.dumps(config.to_dict()))
            process.stdin.close()
        self.running[name] = workdir, process, time.time()

    def stop(self, name: str) -> None:
        """Asks a run to save and to end."""
        self.running[name][1].terminate()

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Waits until a run ends, or a few seconds; raises Stopped after a signal."""
        for _ in range(_LOOKS):
            if any(process.poll() is not None for _, process, _ in self.running.values()):
                return
            meanwhile()
            self.pause(_PERIOD)

    def pause(self, seconds: float) -> None:
        """Sleeps; raises Stopped after a signal."""
        time.sleep(seconds)
        if self._code:
            raise Stopped(self._code, "stopped; every run is saved, and the same command goes on")

    def ended(self) -> Iterator[Ended]:
        """The runs that have ended since the last call."""
        for name, (workdir, process, since) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                yield Ended(name, process.returncode, time.time() - since, last_line(workdir))


def last_line(workdir: pathlib.Path) -> str:
    """Of the log of a run; '' where there is none."""
    with contextlib.suppress(FileNotFoundError):
        lines = (workdir / LOG_FILE).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""
    return ""


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python -m vitcls.jobs", description=__doc__.splitlines()[0])
    parser.add_argument("workdir", metavar="WORKDIR", help="directory of the run")
    parser.add_argument("files", nargs="*", metavar="CONFIG_FILE", help="one that registers parts which the run uses")
    cli.add_import_argument(parser)
    flags = parser.parse_args(argv)
    for file in flags.files:
        try:
            config_file.execute(file)
        except UserError as error:  # it has changed since, and the run may need nothing of it
            logging.getLogger("vitcls").warning("%s; what it registers is missing", error)
    config = configs.from_json(sys.stdin.read())
    cli.start_jax(cpu_devices=config.partition.cpu_devices or 1)  # others run beside this one
    train_and_evaluate(config, flags.workdir)


if __name__ == "__main__":
    sys.exit(cli.run(main))
