"""Serve a run, or an exported program, over HTTP with a page.

vitcls serve --workdir=DIR|--artefact=FILE [--host=127.0.0.1] [--port=8000] [--token_file=FILE] [--database=URL]
    [--workers=N] [--checkpoint=last|best|STEP] [--proxy=IP]

/ is the page, /docs the routes. Answers are kept as receipts and feedback as corrections in a database: feedback.db in
the workdir, or sqlite:///FILE or postgresql://... SIGTERM lets requests end and then stops with exit code 0. Another
address than this machine's own needs a token. Needs pip install "vitcls[serve]".
"""

import argparse
import asyncio
import functools
import importlib
import ipaddress
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from vitcls import cli
from vitcls.core import buckets, extras
from vitcls.core.errors import UserError
from vitcls.export import artefact
from vitcls.serve import databases, promotion
from vitcls.serve.limits import is_loopback
from vitcls.training import checkpoint, run_dir
from vitcls.training.files import CHECKPOINTS

_logger = logging.getLogger("vitcls")
_DRAIN = 30  # seconds that requests have to end after SIGTERM
_CONNECTIONS = 4096  # more at once get a 503
_RESTARTS = 1.0  # seconds before a worker that has died is started again


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog=cli.program("serve"), description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="", metavar="DIR", help="directory of the run")
    parser.add_argument("--artefact", default="", metavar="FILE", help="a program of vitcls export")
    parser.add_argument("--checkpoint", default="", metavar="STEP", help="'last', 'best' or a step of the workdir")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--token_file", default="", metavar="FILE", help="the token that whoever asks must bear")
    parser.add_argument("--database", default="", metavar="URL", help="of receipts and feedback")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine")
    parser.add_argument("--proxy", default="", metavar="IP", help="of your proxy, whose X-Forwarded-For is believed")
    parser.add_argument("--listen_fd", type=int, default=-1, help=argparse.SUPPRESS)  # from the process above
    cli.add_import_argument(parser)
    flags = parser.parse_args(argv)
    with extras.needed("vitcls serve", "serve"):
        for module in ("fastapi", "multipart", "prometheus_client", "sqlalchemy", "uvicorn"):
            importlib.import_module(module)
    if bool(flags.workdir) == bool(flags.artefact):
        raise UserError("give one of --workdir=DIR and --artefact=FILE")
    if flags.workers < 1:
        raise UserError(f"--workers={flags.workers} must be at least 1")
    token = _token(flags.token_file)
    _check_proxy(flags.proxy)
    if not is_loopback(flags.host) and not token:
        raise UserError(f"--host={flags.host} can be reached from other machines: give --token_file=FILE with a token")
    listening = _listening(flags)
    _check_what(flags)
    database = _database(flags)
    if flags.workers > 1 and flags.listen_fd < 0:
        _announce(flags.host, listening)
        return _supervise(listening, argv, flags.workers)
    if flags.listen_fd >= 0:
        threading.Thread(target=_end_with_supervisor, daemon=True).start()
    cli.start_jax()
    with asyncio.Runner(loop_factory=_fast_loop()) as runner:
        return runner.run(_serve(flags, listening, database, token))


def _fast_loop():
    """uvloop's where it is installed: it is not for Windows."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _token(file: str) -> str:
    """What is in the file; raises UserError where that is no token."""
    if not file:
        return ""
    try:
        token = pathlib.Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--token_file={file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(token) < 16 or not token.isprintable() or " " in token:
        raise UserError(f"--token_file={file} must have one word of at least 16 letters or digits")
    return token


def _check_proxy(addresses: str) -> None:
    for address in filter(None, addresses.split(",")):
        try:
            ipaddress.ip_network(address)
        except ValueError:
            raise UserError(f"--proxy={addresses}: '{address}' is not an IP address, as 10.0.0.2") from None


def _check_what(flags) -> None:
    """Raises UserError for what can be seen at once to be nothing to serve, before a database is made beside it."""
    if flags.artefact:
        artefact.check(flags.artefact)
    elif not buckets.is_url(flags.workdir):
        workdir = pathlib.Path(flags.workdir)
        trained = run_dir.open_workdir(workdir if flags.checkpoint else promotion.current(workdir))
        which = flags.checkpoint or trained.config.report.checkpoint
        there = checkpoint.steps(trained.path / CHECKPOINTS)
        if not there or which not in ("last", "best"):  # which a run that is alive may replace at this moment
            trained.find_step(which)


def _listening(flags) -> socket.socket:
    """A socket on the address; raises UserError where it is taken or is none of this machine."""
    if flags.listen_fd >= 0:
        return socket.socket(fileno=flags.listen_fd)
    try:
        family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
        listening = socket.create_server((flags.host, flags.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host={flags.host} --port={flags.port} cannot be listened on: {reason}") from None
    return listening


def _announce(host: str, listening: socket.socket) -> None:
    host = f"[{host}]" if ":" in host else host
    _logger.info("listening on http://%s:%d", host, listening.getsockname()[1])


def _database(flags) -> str:
    """The URL of the database; raises UserError where there is no place for one."""
    if flags.database:
        return flags.database
    if buckets.is_url(flags.workdir):
        raise UserError(f"--workdir={flags.workdir} is a bucket: give --database=sqlite:///FILE or postgresql://...")
    beside = pathlib.Path(f"{pathlib.Path(flags.artefact)}.feedback.db")
    file = databases.of_workdir(pathlib.Path(flags.workdir)) if flags.workdir else beside
    return databases.url(file)


async def _serve(flags, listening: socket.socket, database: str, token: str) -> int:
    """One process, until SIGTERM or Ctrl-C."""
    import uvicorn

    from vitcls.serve.app import make_app
    from vitcls.serve.opened import open_service

    sys.setswitchinterval(5e-4)  # the event loop does not wait for threads that decode for Python's 5 ms
    service = open_service(flags, database)
    app = make_app(service, token=token, loopback=is_loopback(flags.host))
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_DRAIN,
        proxy_headers=bool(flags.proxy),
        forwarded_allow_ips=flags.proxy or None,
    )
    server = uvicorn.Server(config)

    def drain(number: int, frame) -> None:
        service.draining = True
        server.force_exit = server.should_exit  # the second time
        server.should_exit = True

    server.handle_exit = drain
    running = asyncio.create_task(service.run())
    remembering = asyncio.create_task(_remember(service, database))
    if flags.listen_fd < 0:
        _announce(flags.host, listening)
    else:  # the others answer meanwhile
        await asyncio.wait((running, asyncio.create_task(service.started.wait())), return_when=asyncio.FIRST_COMPLETED)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    await asyncio.wait((serving, running), return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    running.cancel()
    remembering.cancel()
    try:
        await running
    except asyncio.CancelledError:
        pass
    finally:
        service.close()
    return 0


async def _remember(service, database: str) -> None:
    """Once it has a model: a start that fails leaves nothing to replay."""
    await service.started.wait()
    databases.remember(database)


def _end_with_supervisor() -> None:
    """Drains when the process above is gone, however it died: it holds the other end of this process's input."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _supervise(listening: socket.socket, argv: list[str], count: int) -> int:
    """Keeps `count` processes on one socket alive until SIGTERM; their counters are one."""
    listening.set_inheritable(True)
    with tempfile.TemporaryDirectory(prefix="vitcls-metrics-") as metrics:
        command = [sys.executable, "-m", "vitcls.serve", *argv, f"--listen_fd={listening.fileno()}"]
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": metrics}
        pass_fds = [listening.fileno()]
        start = functools.partial(subprocess.Popen, command, env=environment, pass_fds=pass_fds, stdin=subprocess.PIPE)
        workers, ending = [start() for _ in range(count)], False

        def end(number: int, frame) -> None:
            nonlocal ending
            ending = True
            listening.close()  # whoever comes now is refused as soon as the workers have closed it too
            for worker in workers:
                worker.send_signal(signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        while True:
            codes = [worker.poll() for worker in workers]
            if ending and None not in codes:
                return max(0 if code == -signal.SIGTERM else abs(code) for code in codes)  # some were not up yet
            if 2 in codes and not ending:  # what is wrong with one is wrong with all
                end(signal.SIGTERM, None)
            for i, (worker, code) in enumerate(zip(workers, codes, strict=True)):
                if code is not None and not ending:
                    _logger.warning("worker %d has ended with exit code %d; starting another", i, code)
                    time.sleep(_RESTARTS)
                    workers[i] = worker if ending else start()
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(cli.run(main))
