"""A PostgreSQL of this machine, in a directory of its own and with a password, for as long as some tests."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest

PASSWORD = "s3cret/horse@battery"
_QUOTED = "s3cret%2Fhorse%40battery"


class Server:
    """The server, which can be stopped and started; `url` has the password in it."""

    def __init__(self, programs: pathlib.Path, directory: pathlib.Path):
        self._programs, self._directory, self._process = programs, directory, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql://vitcls:{_QUOTED}@127.0.0.1:{self.port}/postgres"
        self.public = f"postgresql://vitcls@127.0.0.1:{self.port}/postgres"
        (directory / "password").write_text(PASSWORD)
        options = ("--auth=scram-sha-256", "--username=vitcls", f"--pwfile={directory}/password", "--no-sync")
        done = self._start("initdb", "-D", f"{directory}/data", *options)
        assert done.wait(60) == 0, (directory / "log").read_text()

    def start(self) -> None:
        import psycopg

        options = ("fsync=off", "listen_addresses=127.0.0.1", f"unix_socket_directories={self._directory}")
        flags = [flag for option in options for flag in ("-c", option)]
        self._process = self._start("postgres", "-D", f"{self._directory}/data", "-p", str(self.port), *flags)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url).close()
                return
            assert time.monotonic() < deadline, (self._directory / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        """At once, as a crash."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(60)

    def _start(self, program: str, *arguments: str) -> subprocess.Popen:
        """Runs a program of PostgreSQL, which refuses root."""
        user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        log = open(self._directory / "log", "a")  # noqa: SIM115 (the process has it)
        with log:
            command = [str(self._programs / program), *arguments]
            return subprocess.Popen(command, cwd=self._directory, stdout=log, stderr=log, **user)


@contextlib.contextmanager
def server():
    """A running server; skips the test where Debian's package is not installed."""
    pytest.importorskip("psycopg")
    found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        pytest.skip("PostgreSQL (Debian package postgresql) is not installed")
    directory = pathlib.Path(tempfile.mkdtemp(prefix="vitcls-postgres-"))
    if os.getuid() == 0:
        shutil.chown(directory, "postgres", "postgres")
    try:
        running = Server(found[-1].parent, directory)
        running.start()
        yield running
        running.stop()
    finally:
        shutil.rmtree(directory)
