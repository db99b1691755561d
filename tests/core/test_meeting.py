"""Processes that are one run meet; those that are not are told why, each in the same line."""

import concurrent.futures
import json
import socket
import threading
import time

import pytest

from vitcls.core import meeting
from vitcls.core.cluster import Cluster
from vitcls.core.errors import RunError, UserError


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(meeting, "_PAUSE", 0.02)
    monkeypatch.setattr(meeting, "_FREED", 0.1)
    monkeypatch.setattr(meeting, "_PATIENCE", 20.0)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def meet(address, *processes):
    """What becomes of (process, count) that meet at once, each None or its error."""

    def outcome(process, count):
        try:
            return meeting.meet(Cluster("", address, count, process))
        except (RunError, UserError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(outcome, *zip(*processes, strict=True)))


def test_all_have_come_when_they_go_on(address):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        early = [pool.submit(meet, address, (process, 3)) for process in (2, 0)]
        time.sleep(0.3)
        assert not any(process.done() for process in early)
        assert meet(address, (1, 3)) == [None]
        assert [process.result() for process in early] == [[None]] * 2
    with socket.create_server(("localhost", int(address.rpartition(":")[2]))):
        pass  # the port is free for JAX


def test_who_comes_late_or_again_is_waited_for(address):
    """Process 0 begins last; process 1 ends while it waits, and is started once more."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        two = pool.submit(meet, address, (2, 3))
        time.sleep(0.2)
        zero = pool.submit(meet, address, (0, 3))
        time.sleep(0.2)
        with socket.create_connection(("localhost", int(address.rpartition(":")[2]))) as killed:
            killed.sendall(json.dumps(meeting._hello(Cluster("", address, 3, 1))).encode() + b"\n")
        assert meet(address, (1, 3)) == [None] and zero.result() == two.result() == [None]


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        (((0, 3), (1, 3), (1, 3)), "two processes are number 1 of 3; number them from 0"),
        (((0, 2), (1, 3)), "process 1 is one of 3 and process 0 one of 2; give all the same number of processes"),
    ],
)
def test_processes_that_are_no_run_are_told_so(address, processes, message):
    outcomes = meet(address, *processes)
    assert {type(outcome) for outcome in outcomes} == {UserError} and {*map(str, outcomes)} == {message}


def test_who_comes_after_the_verdict_is_told_it_too(address):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        early = pool.submit(meet, address, (0, 3), (1, 2))
        time.sleep(0.5)
        outcomes = [*meet(address, (2, 3)), *early.result()]
    assert {type(outcome) for outcome in outcomes} == {UserError} and len({*map(str, outcomes)}) == 1


def test_versions_differ(address, monkeypatch):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        zero = pool.submit(meet, address, (0, 2))
        hello = {"process_id": 1, "num_processes": 2, "version": "0.0.1"}
        monkeypatch.setattr(meeting, "_hello", lambda cluster: hello)
        for outcome in (*meet(address, (1, 2)), *zero.result()):
            assert str(outcome).startswith("process 1 has vitcls 0.0.1 and process 0 ")


def test_who_does_not_come_is_named(address, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(meeting, "_PATIENCE", 1.0)
    monkeypatch.setattr(meeting, "_SOON", 0.3)
    zero, one = meet(address, (0, 4), (1, 4))
    assert type(zero) is RunError and str(zero) == str(one)
    assert str(zero).startswith(f"processes 2, 3 of 4 did not come to {address} in 1 s; ")
    assert "waiting for processes 2, 3 of 4" in caplog.text
    (one,) = meet(address, (1, 2))
    assert type(one) is RunError and f"not met at {address} in 1 s (Connection refused); start all" in str(one)


def test_a_port_that_is_taken(address, monkeypatch):
    """By another process 0, or by a run that has begun, which is no process 0 that waits."""
    with socket.create_server(("", int(address.rpartition(":")[2]))) as other:
        (zero,) = meet(address, (0, 2))
        assert type(zero) is UserError and "cannot listen at port" in str(zero) and "another process 0" in str(zero)
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        monkeypatch.setattr(meeting, "_PATIENCE", 0.5)
        monkeypatch.setattr(meeting, "_SOON", 0.1)
        (one,) = meet(address, (1, 2))
        assert type(one) is RunError


def test_who_looks_at_ports_is_no_process(address):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        zero = pool.submit(meet, address, (0, 2))
        time.sleep(0.2)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"process_id": 1}\n', b""):
            with socket.create_connection(("localhost", int(address.rpartition(":")[2]))) as stranger:
                stranger.sendall(said)
        assert meet(address, (1, 2)) == [None] and zero.result() == [None]
