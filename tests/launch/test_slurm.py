"""Slurm itself, on this machine, starts two processes: they are one run, which goes on after it was killed.

Needs the Debian package slurm-wlm and a root user, as its daemons do.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import pytest

pytestmark = pytest.mark.skipif(
    not (shutil.which("slurmctld") and shutil.which("slurmd") and shutil.which("srun")) or os.getuid() != 0,
    reason="Slurm (Debian package slurm-wlm) is not installed, or this is not root",
)
CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd.pid
SlurmctldLogFile={path}/slurmctld.log
SlurmdLogFile={path}/slurmd.log
SchedulerParameters=batch_sched_delay=0
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES State=UP OverSubscribe=FORCE:4
"""


LAUNCHER = pathlib.Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a client of a Slurm cluster of one node."""
    tmp_path = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    conf = tmp_path / "slurm.conf"
    host, cpus = socket.gethostname(), os.cpu_count()
    conf.write_text(CONF.format(ports=free_ports(2), path=tmp_path, host=host, cpus=cpus))
    environment = os.environ | {"SLURM_CONF": str(conf)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    daemons = [subprocess.Popen([name, "-D", "-f", str(conf)], **quiet) for name in ("slurmctld", "slurmd")]
    deadline = time.monotonic() + 60
    while b"idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, env=environment).stdout:
        assert time.monotonic() < deadline, (tmp_path / "slurmd.log").read_text() + (
            tmp_path / "slurmctld.log"
        ).read_text()
        time.sleep(0.5)
    yield environment
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(30)


def ask(slurm, *command):
    return subprocess.run(command, capture_output=True, text=True, env=slurm, check=True, timeout=60).stdout.strip()


def submit(slurm, log, *command, tasks=1):
    """The id of a job of `tasks` processes on the one node."""
    flags = ["--parsable", "--nodes=1", f"--ntasks-per-node={tasks}", "--overcommit", f"--output={log}"]
    return ask(slurm, "sbatch", *flags, LAUNCHER, *command)


def job(slurm, number):
    """What Slurm knows of a job, such as JobState, Restarts and ExitCode."""
    return dict(word.partition("=")[::2] for word in ask(slurm, "scontrol", "show", "job", number).split())


def start_now(slurm, number):
    """Spares a job the two minutes that Slurm lets it wait after it was queued again, but two seconds."""
    if job(slurm, number)["Reason"] == "BeginTime":
        time.sleep(2)  # a node that has just heard of the end takes a new start for an old one
        ask(slurm, "scontrol", "update", f"JobId={number}", "StartTime=now")
    time.sleep(0.3)


def wait_until(slurm, number, condition, *, seconds=120):
    """Returns when `condition` holds of what Slurm knows of a job; starts it whenever it waits in the queue."""
    deadline = time.monotonic() + seconds
    while not condition(now := job(slurm, number)):
        assert time.monotonic() < deadline, now
        start_now(slurm, number)


def wait_for_end(slurm, number):
    """(state, exit code, how often it was started again) of a job."""
    wait_until(slurm, number, lambda now: now["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
    now = job(slurm, number)
    return now["JobState"], now["ExitCode"], now["Restarts"]


def test_a_task_that_is_killed_costs_no_bit(slurm, rehearsal, undisturbed, assert_same_end, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    environment = rehearsal.environment | slurm | {"JAX_NUM_CPU_DEVICES": "1"}
    number = submit(environment, log, *rehearsal.command(workdir), tasks=2)
    rehearsal.wait_for_step(workdir, 50, lambda: job(slurm, number)["JobState"] in ("PENDING", "RUNNING"))
    pids = [line.split() for line in ask(slurm, "scontrol", "listpids", number).splitlines()]
    (task,) = (pid for pid, _, step, local, _ in pids if (step, local) == ("0", "0"))
    os.kill(int(task), signal.SIGKILL)
    assert wait_for_end(slurm, number) == ("COMPLETED", "0:0", "1"), log.read_text()
    text = log.read_text()
    assert {f"{i}: several processes: process {i} of 2 (Slurm)" for i in (0, 1)} <= set(text.splitlines())
    assert "2 x cpu (cpu), 2 processes" in text and "0: resumed from step" in text
    assert "train.sbatch: ended with exit code 137; back into the queue" in text
    assert "1: failed: process 0 is gone" in text
    assert_same_end(workdir, undisturbed)


def test_a_run_that_saved_and_stopped_goes_back_into_the_queue(slurm, tmp_path):
    """As at the time limit, 120 seconds before which Slurm sends SIGTERM to the processes, and to them alone."""
    life = "echo ready >> $0; [ $(wc -l < $0) -le 2 ] || exit 0; trap 'exit 143' TERM; while :; do sleep 0.1; done"
    lives, log = tmp_path / "lives", tmp_path / "log"
    number = submit(slurm, log, "bash", "-c", life, lives)
    for count in (1, 2):
        wait_until(slurm, number, lambda now, count=count: lives.exists() and lives.read_text().count("ready") == count)
        ask(slurm, "scancel", "--signal=TERM", number)
    assert wait_for_end(slurm, number) == ("COMPLETED", "0:0", "2"), log.read_text()
    assert log.read_text().count("ended with exit code 143; back into the queue") == 2
    assert "#SBATCH --signal=TERM@120\n" in LAUNCHER.read_text()  # the same signal, to the same processes


def test_what_ends_for_good(slurm, tmp_path):
    """A job that its user cancels, bad input, a failure of the run itself."""
    cancelled = submit(
        slurm, tmp_path / "log", "bash", "-c", "trap 'exit 143' TERM; touch $0; sleep 60 & wait", tmp_path / "up"
    )
    wait_until(slurm, cancelled, lambda now: (tmp_path / "up").exists())
    ask(slurm, "scancel", cancelled)
    assert wait_for_end(slurm, cancelled)[::2] == ("CANCELLED", "0")
    for command, code in (([], 2), (["bash", "-c", "exit 2"], 2), (["false"], 1)):
        assert wait_for_end(slurm, submit(slurm, tmp_path / "log", *command)) == ("FAILED", f"{code}:0", "0")
    assert "error: there is no command" in (tmp_path / "log").read_text()
