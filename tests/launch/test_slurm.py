"""Slurm itself, on this machine, starts two processes: they are one run.

Needs the Debian package slurm-wlm and a root user, as its daemons do.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from vitcls import config as configs

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
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES State=UP OverSubscribe=FORCE:4
"""
CONFIG = """
from vitcls import config as configs

def get_config():
    return configs.from_json(open({path!r}).read())
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def slurm(tmp_path):
    """The environment of a client of a Slurm cluster of one node."""
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


def test_two_tasks_are_one_run(tiny_config, tmp_path, slurm):
    tiny_config.partition.strategy = "fsdp"
    tiny_config.report.timing = False
    (tmp_path / "config.json").write_text(configs.to_json(configs.resolve(tiny_config)))
    (tmp_path / "config.py").write_text(CONFIG.format(path=str(tmp_path / "config.json")))
    command = [sys.executable, "-m", "vitcls.main", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"]
    done = subprocess.run(
        ["srun", "--ntasks=2", "--overcommit", "--label", *command],
        env=slurm | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert {f"{i}: several processes: process {i} of 2 (Slurm)" for i in (0, 1)} <= set(done.stderr.splitlines())
    assert "4 x cpu (cpu), 2 processes" in done.stderr
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "train/loss" in event] == [4, 8, 12]
    assert (tmp_path / "run" / "report" / "metrics.json").exists()
