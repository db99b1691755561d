"""Preemption, rehearsed: what the launchers start is killed with and without notice, and ends with the same bits."""

import os
import random
import re
import signal
import subprocess
import time

import pytest

from tests import bucket
from vitcls.core import peers
from vitcls.training import places

STARTED = re.compile(r"local.sh: process ids (\d+) (\d+)")


def read_until(stream, pattern, lines):
    """Reads lines of a stream up to one that matches."""
    for line in stream:
        lines.append(line.rstrip("\n"))
        if found := pattern.search(line):
            return found
    raise AssertionError("\n".join(lines))


def read_until_step(stream, step, lines):
    while int(read_until(stream, re.compile(r"0: step (\d+)/"), lines)[1]) < step:
        pass


@pytest.mark.by_turns("rehearsal")
def test_a_run_that_is_killed_twice_ends_with_the_same_bits(rehearsal, undisturbed, assert_same_end, monkeypatch):
    """Its workdir is in a bucket, as on machines that have no disk in common."""
    server, url = bucket.start_server()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    workdir, lines = "gs://runs/killed", []
    chosen, seed = random.Random(), random.randrange(1000)
    chosen.seed(seed)
    run = rehearsal.start(workdir, "--restarts=2")
    first = [int(pid) for pid in read_until(run.stderr, STARTED, lines).groups()]
    read_until_step(run.stderr, 20, lines)
    os.kill(chosen.choice(first), signal.SIGTERM)  # with notice: all save and stop

    second = [int(pid) for pid in read_until(run.stderr, STARTED, lines).groups()]
    assert any("ended with exit codes 143 143; starting again (1 of 2)" in line for line in lines), lines
    resumed = int(read_until(run.stderr, re.compile(r"0: resumed from step (\d+)"), lines)[1])
    read_until_step(run.stderr, resumed + 1, lines)
    gone = chosen.randrange(2)
    os.kill(second[gone], signal.SIGKILL)  # without
    killed = time.monotonic()
    verdict = read_until(run.stderr, re.compile(rf"{1 - gone}: failed: (.*)"), lines)[1]
    assert re.fullmatch(rf"process {gone} is gone \(.*\); start the run again, .* last checkpoint", verdict), seed
    read_until(run.stderr, STARTED, lines)
    assert time.monotonic() - killed < peers.HEARTBEAT + 10
    codes = "137 1" if gone == 0 else "1 137"
    assert any(f"ended with exit codes {codes}; starting again (2 of 2)" in line for line in lines), lines
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "0: test: accuracy" in out and "Traceback" not in "\n".join([*lines, err])
    assert_same_end(places.copied(workdir), undisturbed)
    server.communicate()


@pytest.mark.by_turns("rehearsal")
def test_a_task_of_slurm_that_is_killed_costs_no_bit(slurm, rehearsal, undisturbed, assert_same_end, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    environment = rehearsal.environment | {"JAX_NUM_CPU_DEVICES": "1"}
    number = slurm.submit(log, *rehearsal.command(workdir), tasks=2, **environment)
    rehearsal.wait_for_step(workdir, 50, lambda: slurm.is_alive(number))
    pids = [line.split() for line in slurm.ask("scontrol", "listpids", number).splitlines()]
    (task,) = (pid for pid, _, step, local, _ in pids if (step, local) == ("0", "0"))
    os.kill(int(subprocess.check_output(["pgrep", "--parent", task])), signal.SIGKILL)
    assert slurm.wait_for_end(number) == ("COMPLETED", "0:0", "1"), log.read_text()
    text = log.read_text()
    assert {f"{i}: several processes: process {i} of 2 (Slurm)" for i in (0, 1)} <= set(text.splitlines())
    assert "2 x cpu (cpu), 2 processes" in text and "0: resumed from step" in text
    assert "train.sbatch: ended with exit code 137; back into the queue" in text
    assert "1: failed: process 0 is gone" in text
    assert_same_end(workdir, undisturbed)
