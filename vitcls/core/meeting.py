"""The processes of a run meet before JAX starts, at the port where its service will be.

JAX waits in silence for one that does not come, then aborts with a stack of C++, and it takes two processes of one
number, or of different counts, for a run. Here process 0 listens, each of the others says who it is, and all are told
in one line what is wrong, or that JAX may start.
"""

import contextlib
import json
import logging
import os
import socket
import time
from typing import BinaryIO

import vitcls
from vitcls.core.cluster import Cluster
from vitcls.core.errors import RunError, UserError

_PATIENCE = 300.0  # seconds, as JAX's own, until a process that is not there will not come
_SOON = 15.0  # seconds after which is said who is waited for
_PAUSE = 0.5  # seconds between two tries
_FREED = 15.0  # seconds in which the port of a run that has ended is free
_HELLO = 5.0  # seconds in which a process says who it is
_LONGEST = 2_000  # bytes of what is said
_logger = logging.getLogger("vitcls")


def meet(cluster: Cluster) -> None:
    """Returns in each process of `cluster`, whose coordinator must be known, when all have come.

    Raises UserError where they are not processes of one run, RunError where one does not come.
    """
    if cluster.process_id:
        _report(cluster)
        return
    visitors: list[socket.socket] = []
    with _listen(cluster) as listener:
        try:
            _gather(cluster, listener, visitors)
        except (RunError, UserError) as error:
            verdict = {"error": str(error), "is_users": isinstance(error, UserError)}
            _tell(visitors, verdict)
            if verdict["is_users"]:
                _turn_away(listener, cluster.num_processes - 1 - len(visitors), verdict)
            raise
    _tell(visitors, {})  # after the port is free for JAX


def _gather(cluster: Cluster, listener: socket.socket, visitors: list[socket.socket]) -> None:
    """Waits for all others; keeps those that have come in `visitors`."""
    there: dict[int, socket.socket] = {}
    wait = _Wait()
    listener.settimeout(_PAUSE)
    while True:
        missing = sorted(set(range(1, cluster.num_processes)) - there.keys())
        if not missing:
            gone = [process for process, connection in there.items() if not _is_there(connection)]
            if not gone:
                return
            for process in gone:
                there.pop(process).close()  # where it was only slow, it comes again
            continue
        who = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}{', ...' * (len(missing) > 8)}"
        if not wait.goes_on(f"{who} of {cluster.num_processes}"):
            raise RunError(
                f"{who} of {cluster.num_processes} did not come to {cluster.coordinator} in {_PATIENCE:.0f} s; "
                "look for why it has not started, and start all again"
            )
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.settimeout(_HELLO)
        with connection.makefile("rb") as file:
            hello = _heard(file)
        if not hello.keys() >= _hello(cluster).keys():
            connection.close()  # whoever looks at ports
            continue
        visitors.append(connection)
        process = hello["process_id"]
        if hello["num_processes"] != cluster.num_processes:
            raise UserError(
                f"process {process} is one of {hello['num_processes']} and process 0 one of {cluster.num_processes}; "
                "give all the same number of processes"
            )
        if hello["version"] != vitcls.__version__:
            raise UserError(
                f"process {process} has vitcls {hello['version']} and process 0 {vitcls.__version__}; install one"
            )
        if process in there and _is_there(there[process]):  # else it was started again
            raise UserError(f"two processes are number {process} of {cluster.num_processes}; number them from 0")
        there[process] = connection


def _turn_away(listener: socket.socket, count: int, verdict: dict) -> None:
    """Tells the `count` processes that are still to come, if they do within some seconds."""
    end = time.monotonic() + _SOON
    while count > 0 and time.monotonic() < end:
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            connection.settimeout(_HELLO)
            with connection.makefile("rb") as file:
                count -= bool(_heard(file))
            _tell([connection], verdict)


def _report(cluster: Cluster) -> None:
    """As one of the others."""
    host, _, port = cluster.coordinator.rpartition(":")
    wait, reason = _Wait(), ""
    while wait.goes_on(f"process 0 at {cluster.coordinator}"):
        try:
            address = host.strip("[]"), int(port)
            with socket.create_connection(address, timeout=_SOON) as connection, connection.makefile("rb") as file:
                connection.sendall(_line(_hello(cluster)))
                connection.settimeout(_PATIENCE + _SOON)  # process 0 may have come later
                while (verdict := _heard(file)).get("asked"):
                    connection.sendall(b".")
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            if verdict.get("error"):
                raise (UserError if verdict.get("is_users") else RunError)(verdict["error"])
            if verdict.get("all_there"):
                return
            reason = "another program answers, or a run that has begun"
        time.sleep(_PAUSE)
    raise RunError(
        f"process 0 was not met at {cluster.coordinator} in {_PATIENCE:.0f} s ({reason}); start all processes, "
        "with one coordinator"
    )


def _hello(cluster: Cluster) -> dict:
    return {"process_id": cluster.process_id, "num_processes": cluster.num_processes, "version": vitcls.__version__}


def _heard(file: BinaryIO) -> dict:
    """The next line that the other end says; {} where it says none of ours."""
    with contextlib.suppress(OSError, ValueError):
        said = json.loads(file.readline(_LONGEST))
        return said if isinstance(said, dict) else {}
    return {}


def _line(words: dict) -> bytes:
    return json.dumps(words).encode() + b"\n"


def _tell(visitors: list[socket.socket], verdict: dict) -> None:
    for connection in visitors:
        with contextlib.suppress(OSError), connection:
            connection.sendall(_line({"all_there": not verdict, **verdict}))


def _is_there(connection: socket.socket) -> bool:
    """Whether the process at the other end answers; it may have been killed while it waited."""
    try:
        connection.sendall(_line({"asked": True}))
        return connection.recv(1) == b"."
    except OSError:
        return False


def _listen(cluster: Cluster) -> socket.socket:
    """At the port of the coordinator, on all addresses unless JAX's variable names one."""
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or f":{cluster.coordinator.rpartition(':')[2]}"
    host, _, port = bind.rpartition(":")
    host, both = host.strip("[]").replace("::", ""), socket.has_dualstack_ipv6()
    family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if both and not host else {}
    end = time.monotonic() + _FREED
    while True:
        try:
            return socket.create_server((host, int(port)), backlog=cluster.num_processes, **family)
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"process 0 cannot listen at port {port} ({os.strerror(error.errno)}); if it is another process 0 "
                    "that does, give each process a number of its own, else choose another port"
                ) from None
            time.sleep(_PAUSE)


class _Wait:
    """For a process that may not come."""

    def __init__(self):
        self._since, self._said = time.monotonic(), False

    def goes_on(self, whom: str) -> bool:
        """Whether to wait any longer; says after a while for whom."""
        passed = time.monotonic() - self._since
        if passed > _SOON and not self._said:
            self._said = True
            _logger.info("waiting for %s", whom)
        return passed < _PATIENCE
