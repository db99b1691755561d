"""A run that mpirun starts finds its processes, and is the run of launch/local.sh."""

import shutil
import subprocess

import pytest


@pytest.mark.by_turns("rehearsal")
def test_mpirun_makes_the_same_run(rehearsal, undisturbed, assert_same_end, tmp_path):
    if not shutil.which("mpirun"):
        pytest.skip("needs mpirun (Debian package openmpi-bin)")
    processes = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]
    run = subprocess.run(
        [*processes, *rehearsal.command(tmp_path / "run")],
        env=rehearsal.environment | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert {"process 0 of 2 (Open MPI)", "process 1 of 2 (Open MPI)"} <= {
        line.removeprefix("several processes: ") for line in run.stderr.splitlines()
    }
    assert_same_end(tmp_path / "run", undisturbed)
