"""A run of two processes, small enough to be started several times, and what its end is compared by."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from vitcls.training import checkpoint
from vitcls.training.metrics_log import read_history

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 160
CONFIG = f"""
from vitcls.config import default_config

def get_config():
    config = default_config("improved_vit_tiny")
    config.batch_size, config.total, config.steps_per_call = 16, "{STEPS} steps", 2
    config.log_every, config.eval_every, config.checkpoint_every = "10 steps", "80 steps", "40 steps"
    config.dataset.update(name="synthetic", num_examples=120, num_classes=3, image_size=8)
    config.model.update(stem="patch", patch_size=2, hidden_dim=16, depth=1, num_heads=2, mlp_dim=16, drop_path=0.1)
    config.augment.mixup.probability = 0.5
    config.report.timing = False
    return config
"""


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What the launchers start: a command and its environment."""

    config: pathlib.Path

    def command(self, workdir):
        return [sys.executable, "-m", "vitcls.main", f"--config={self.config}", f"--workdir={workdir}"]

    @property
    def environment(self):
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "JAX_PLATFORMS": "cpu"}

    def start(self, workdir, *flags):
        """Two processes through launch/local.sh; what they write can be read from its pipes."""
        return subprocess.Popen(
            [ROOT / "launch" / "local.sh", "--processes=2", *flags, "--", *self.command(workdir)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def wait_for_step(workdir, step, alive, *, seconds=120):
        """Returns when the run has passed `step`."""
        deadline = time.monotonic() + seconds
        while not any(event["step"] >= step for event in read_history(workdir)):
            assert alive(), "the run has ended"
            assert time.monotonic() < deadline, f"step {step} was not reached in {seconds} s"
            time.sleep(0.05)


def end_of(workdir):
    """The arrays of the last checkpoint, byte for byte, and the metrics without timings."""
    step = checkpoint.latest_whole(workdir / "checkpoints", quarantine=False)
    folder = workdir / "checkpoints" / str(step) / "tree"
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        shapes = reader.metadata(folder).item_metadata.tree
        arguments = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))
    timed = ("train/images_per_second", "train/seconds")
    events = [{key: value for key, value in e.items() if key not in timed} for e in read_history(workdir)]
    return step, {jax.tree_util.keystr(k): np.asarray(x).tobytes() for k, x in jax.tree.leaves_with_path(tree)}, events


def _assert_same_end(workdir, expected):
    step, arrays, events = end_of(workdir)
    assert step == expected[0] == STEPS
    assert events == expected[2] and len(events) == STEPS // 10 + 2
    assert arrays.keys() == expected[1].keys() and len(arrays) > 20
    assert [name for name in arrays if arrays[name] != expected[1][name]] == []
    assert json.loads((workdir / "report" / "metrics.json").read_text())["checkpoint_step"] == STEPS


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory):
    config = tmp_path_factory.mktemp("rehearsal") / "config.py"
    config.write_text(CONFIG)
    return Rehearsal(config)


@pytest.fixture(scope="session")
def undisturbed(rehearsal):
    """The end of a run that nobody killed."""
    workdir = rehearsal.config.parent / "undisturbed"
    run = rehearsal.start(workdir, "--restarts=0")
    _, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    end = end_of(workdir)
    shutil.rmtree(workdir)
    return end


@pytest.fixture
def assert_same_end():
    """Asserts that the run in a workdir has ended as `undisturbed`."""
    return _assert_same_end


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


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A cluster of one node, this one; `environment` is that of its clients."""

    environment: dict

    def ask(self, *command):
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=True, timeout=60)
        return done.stdout.strip()

    def submit(self, log, *command, tasks=1, **environment):
        """The id of a job of launch/slurm with `tasks` processes on the one node."""
        flags = ["--parsable", "--nodes=1", f"--ntasks-per-node={tasks}", "--overcommit", f"--output={log}"]
        launcher = ROOT / "launch" / "slurm" / "train.sbatch"
        return dataclasses.replace(self, environment=environment | self.environment).ask(
            "sbatch", *flags, launcher, *command
        )

    def job(self, number):
        """What Slurm knows of a job, such as JobState, Restarts and ExitCode."""
        return dict(word.partition("=")[::2] for word in self.ask("scontrol", "show", "job", number).split())

    def is_alive(self, number):
        return self.job(number)["JobState"] in ("PENDING", "RUNNING", "COMPLETING")

    def wait_until(self, number, condition, *, seconds=120):
        """Returns when `condition()` holds; a job waits in the queue for two seconds, where Slurm wants two minutes."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.job(number)
            if self.job(number)["Reason"] == "BeginTime":
                time.sleep(2)  # a node that has just heard of the end takes a new start for an old one
                self.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(0.3)

    def wait_for_end(self, number):
        """(state, exit code, how often it was started again) of a job."""
        self.wait_until(number, lambda: not self.is_alive(number))
        job = self.job(number)
        return job["JobState"], job["ExitCode"], job["Restarts"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Slurm itself, for as long as a file of tests."""
    if not (shutil.which("slurmctld") and shutil.which("slurmd") and shutil.which("srun")) or os.getuid() != 0:
        pytest.skip("Slurm (Debian package slurm-wlm) is not installed, or this is not root, as its daemons want")
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
    yield Slurm(environment)
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(30)
