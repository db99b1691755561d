"""Which processes make up a run, by the variables that Slurm, Open MPI, Kubernetes and TPU pods set."""

import pytest

from vitcls import cli
from vitcls.core import cluster
from vitcls.core.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-08,11]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


def find(environment, *flags):
    return cluster.find(*(flags or (None, None, None)), environment)


def test_a_plain_machine_is_one_process():
    assert find({}) is None
    assert find({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None, "the shell of sbatch"
    assert find(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None
    assert find({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None, "a pod of no indexed job"
    assert find({"TPU_WORKER_HOSTNAMES": "localhost"}) is None


def test_slurm_takes_all_devices_of_a_host_and_one_where_several_tasks_share_it():
    assert find(SLURM) == ("process 1 of 2 (Slurm)", "node07:61441", 2, 1, None)
    shared = SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "1"}
    assert find(shared).local_device_ids == (1,)
    assert find(shared | {"CUDA_VISIBLE_DEVICES": "5"}).local_device_ids is None, "it is shown only its own"
    for nodes, first in (("n1", "n1"), ("n1,m2", "n1"), ("a-b[003,7-9]", "a-b003"), ("x,y[1-2]", "x")):
        assert find(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator == f"{first}:61441"


def test_slurm_agrees_with_what_jax_detects(monkeypatch):
    from jax._src.clusters.slurm_cluster import SlurmCluster

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    ours = cluster.find(None, None, None)
    assert SlurmCluster.is_env_present()
    assert ours[1:4] == (SlurmCluster.get_coordinator_address(1, None), 2, SlurmCluster.get_process_id())


def test_open_mpi_agrees_with_what_jax_detects(monkeypatch):
    from jax._src.clusters.ompi_cluster import OmpiCluster

    tcp6 = "tcp6://[fe80::b9b:ac5d:9cf0:b858,26::3:2]:43370"
    ipv4 = "1531576320.0;tcp://10.96.0.1:57027"
    for uri in (OPEN_MPI["OMPI_MCA_orte_hnp_uri"], f"1314521088.0;{tcp6}", f"{ipv4};{tcp6}"):
        for name, value in (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": uri}).items():
            monkeypatch.setenv(name, value)
        ours = cluster.find(None, None, None)
        assert ours.coordinator.replace("[", "").replace("]", "") == OmpiCluster.get_coordinator_address(1, None)
        assert ours[2:] == (4, 3, (1,))


def test_jax_variables_name_the_processes_of_a_script_or_a_kubernetes_job():
    assert find(JAX) == ("process 0 of 2 (variables JAX_*)", "a:1", 2, 0, None)
    assert find(JAX | SLURM).coordinator == "a:1", "what is said wins over what is found"


@pytest.mark.parametrize("hosts", [2, 4])
def test_a_tpu_pod_is_left_to_jax(hosts):
    found = find({"TPU_WORKER_HOSTNAMES": ",".join(f"t{i}" for i in range(hosts)), "MEGASCALE_NUM_SLICES": "2"})
    assert found == (f"TPU pod of {2 * hosts} hosts", None, None, None, None)


def test_flags_win_over_the_environment():
    assert find(SLURM, "host0:12", 3, 2) == ("process 2 of 3 (flags)", "host0:12", 3, 2, None)
    assert find(JAX, "a:1", 3, 2) == ("process 2 of 3 (flags)", "a:1", 3, 2, None), "the same said twice"


def test_a_flag_of_two_launchers_is_refused(capsys):
    parser = cli.Parser(prog="vitcls")
    cli.add_process_arguments(parser)
    assert parser.parse_args(["--coordinator=a:1", "--coordinator=a:1"]).coordinator == "a:1"
    for flag, one, other in (("--coordinator", "a:1", "b:1"), ("--num_processes", 2, 3), ("--process_id", 0, 1)):
        with pytest.raises(UserError, match=f"two of {flag}, {one} and {other}; give one"):
            parser.parse_args([f"{flag}={one}", f"{flag}={other}"])


@pytest.mark.parametrize(
    ("environment", "flags", "words"),
    [
        ({}, ("h:1", None, None), "--num_processes and --process_id missing"),
        ({}, (None, 2, 0), "--coordinator missing"),
        ({}, ("h:1", 2, None), "--process_id missing"),
        (SLURM, (None, None, 0), "--coordinator and --num_processes missing"),
        ({}, ("h:1", 2, 2), "process 2 of 2 (flags) is impossible"),
        ({}, ("h", 2, 0), "the coordinator 'h' (flags) is not one HOST:PORT"),
        ({}, ("h:65536", 2, 0), "the coordinator 'h:65536' (flags) is not one HOST:PORT"),
        ({}, ("h:0", 2, 0), "ports are 1 to 65535"),
        ({}, ("h:²", 2, 0), "ports are 1 to 65535"),
        (JAX, ("b:2", 2, 0), "two coordinators, --coordinator=b:2 and JAX_COORDINATOR_ADDRESS=a:1; give one"),
        (JAX | {"JAX_PROCESS_ID": ""}, (), "but not JAX_PROCESS_ID"),
        (SLURM | {"SLURM_PROCID": "x"}, (), "SLURM_PROCID='x' is not a number"),
        ({"MEGASCALE_NUM_SLICES": "x"}, (), "MEGASCALE_NUM_SLICES='x' is not a number"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""}, (), "Open MPI does not say where its processes meet"),
        ({"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "1"}, (), "indexed Kubernetes Job"),
    ],
)
def test_what_is_incomplete_is_refused(environment, flags, words):
    with pytest.raises(UserError) as error:
        find(environment, *flags)
    assert words in str(error.value)
