"""What the processes of a run say of one that was killed, though they do not speak to each other."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
WAITING = """
import sys, time
from vitcls import cli
from vitcls.core import peers
peers.HEARTBEAT = 6

def wait(arguments):
    cli.start_jax(arguments[0], 3, int(arguments[1]))
    print("there", flush=True)
    sys.stdin.readline()

sys.exit(cli.run(wait))
"""


@pytest.fixture
def three():
    """Three processes that found each other and wait, as in a collective, until their stdin says something."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING, coordinator, str(i)], env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes
        )
        for i in range(3)
    ]
    assert [process.stdout.readline() for process in processes] == ["there\n"] * 3
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.by_turns
@pytest.mark.parametrize(("victim", "why"), [(0, "its connection is closed"), (1, "no sign of life for 6 s")])
def test_survivors_say_who_is_gone_and_end_with_1(victim, why, three):
    three[victim].send_signal(signal.SIGKILL)
    for survivor in three[:victim] + three[victim + 1 :]:
        assert survivor.wait(timeout=6 + 10) == 1
        last = survivor.stderr.read().splitlines()[-1]
        assert last == (
            f"failed: process {victim} is gone ({why}); start the run again, it goes on from its last checkpoint"
        )


@pytest.mark.by_turns
def test_the_end_of_a_run_is_no_loss(three):
    """Process 1 ends long before the others, and waits for them."""
    three[1].stdin.write("\n")
    three[1].stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        three[0].wait(timeout=9)
    for process in (three[0], three[2]):
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(timeout=20) for process in three] == [0, 0, 0]
    assert not any("gone" in process.stderr.read() for process in three)
