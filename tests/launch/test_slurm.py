"""launch/slurm under Slurm itself: which ends of a job bring it back into the queue."""

import pathlib
import time

import pytest

LAUNCHER = pathlib.Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"


@pytest.mark.by_turns
def test_a_run_that_saved_and_stopped_goes_back_into_the_queue(slurm, tmp_path):
    """As at the time limit, 120 seconds before which Slurm sends SIGTERM to the processes, and to them alone."""
    life = "echo ready >> $0; [ $(wc -l < $0) -le 2 ] || exit 0; trap 'exit 143' TERM; while :; do sleep 0.1; done"
    lives, log = tmp_path / "lives", tmp_path / "log"
    number = slurm.submit(log, "bash", "-c", life, lives)
    for count in (1, 2):
        slurm.wait_until(number, lambda count=count: lives.exists() and lives.read_text().count("ready") == count)
        slurm.ask("scancel", "--signal=TERM", number)
    assert slurm.wait_for_end(number) == ("COMPLETED", "0:0", "2"), log.read_text()
    assert log.read_text().count("ended with exit code 143; back into the queue") == 2
    assert "#SBATCH --signal=TERM@120\n" in LAUNCHER.read_text()  # the same signal, to the same processes


def test_what_ends_for_good(slurm, tmp_path):
    """A job that its user cancels, bad input, a failure of the run itself."""
    life = "trap 'exit 143' TERM; touch $0; while :; do sleep 0.1; done"
    cancelled = slurm.submit(tmp_path / "log", "bash", "-c", life, tmp_path / "up")
    slurm.wait_until(cancelled, lambda: (tmp_path / "up").exists())
    slurm.ask("scancel", cancelled)
    assert slurm.wait_for_end(cancelled)[::2] == ("CANCELLED", "0")
    for command, code in (([], 2), (["bash", "-c", "exit 2"], 2), (["false"], 1)):
        assert slurm.wait_for_end(slurm.submit(tmp_path / "log", *command)) == ("FAILED", f"{code}:0", "0")
    assert "error: submit a command: sbatch " in (tmp_path / "log").read_text()


@pytest.mark.parametrize("code", ["exit 2", "exec /nowhere/vitcls"])
def test_bad_input_of_one_task_ends_the_job_with_2(slurm, tmp_path, code):
    """At once, though the other task waits for it, and would be killed."""
    life, log = f"[ $SLURM_PROCID = 0 ] || {code}; exec sleep 100", tmp_path / "log"
    number = slurm.submit(log, "bash", "-c", life, tasks=2)
    began = time.monotonic()
    assert slurm.wait_for_end(number) == ("FAILED", "2:0", "0"), log.read_text()
    assert time.monotonic() - began < 60
