"""Which processes make up a run: said by flags, or found in the environment.

Slurm, Open MPI, Kubernetes and TPU pods are found by the variables that `jax.distributed.initialize` looks for. What
differs: a process takes all devices of its host unless its host runs several, and a set of flags or variables that is
incomplete is refused.
"""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from vitcls.core.errors import UserError


class Cluster(NamedTuple):
    """The processes of a run. What is None is left to JAX, which asks the TPU's or Kubernetes' own service."""

    found: str  # in words, for the user
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    local_device_ids: tuple[int, ...] | None = None  # None for all of the host


def find(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The cluster that the flags or the environment describe; None for a single process.

    Raises UserError for a set of flags, or of variables, that is incomplete or impossible.
    """
    flags = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in flags.values()):
        return _from_flags(flags, environment)
    for detect in (_from_variables, _from_slurm, _from_open_mpi, _from_tpu, _from_kubernetes):
        cluster = detect(environment)
        if cluster is not None:
            return None if cluster.num_processes == 1 else cluster
    return None


def _from_flags(flags: dict, environment: Mapping[str, str]) -> Cluster:
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: several processes need --coordinator=HOST:PORT, --num_processes and "
            "--process_id together; give none of them under Slurm, Open MPI, Kubernetes or on a TPU pod"
        )
    other = environment.get("JAX_COORDINATOR_ADDRESS") or flags["coordinator"]
    if other != flags["coordinator"]:
        raise UserError(
            f"two coordinators, --coordinator={flags['coordinator']} and JAX_COORDINATOR_ADDRESS={other}; give one"
        )
    return _checked("flags", flags["coordinator"], flags["num_processes"], flags["process_id"])


def _checked(found: str, coordinator: str, num_processes: int, process_id: int) -> Cluster:
    host, _, port = coordinator.rpartition(":")
    known = re.fullmatch(r"[\w.-]+|\[[\w.:%]+\]", host) and re.fullmatch(r"[0-9]{1,5}", port)
    if not known or not 0 < int(port) < 2**16:
        raise UserError(
            f"the coordinator '{coordinator}' ({found}) is not one HOST:PORT, such as host0:1234; ports are 1 to 65535"
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"process {process_id} of {num_processes} ({found}) is impossible; processes count from 0 to "
            f"{max(num_processes, 1) - 1}"
        )
    return Cluster(f"process {process_id} of {num_processes} ({found})", coordinator, num_processes, process_id)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except KeyError:
        raise UserError(
            f"the environment variable {name} is missing, so the processes of the run are not known"
        ) from None
    except ValueError:
        raise UserError(f"the environment variable {name}='{environment[name]}' is not a number") from None


def _from_variables(environment: Mapping[str, str]) -> Cluster | None:
    """JAX's own variables, which a script or a Kubernetes job sets."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if environment.get(name)]
    if not given:
        return None
    if len(given) < len(names):
        raise UserError(f"{' and '.join(given)} set, but not {' and '.join(sorted(set(names) - set(given)))}; set all")
    numbers = (_number(environment, name) for name in names[1:])
    return _checked("variables JAX_*", environment[names[0]], *numbers)


def _from_slurm(environment: Mapping[str, str]) -> Cluster | None:
    """A job step of Slurm with several tasks; the shell of `salloc` or `sbatch` is no step."""
    if "SLURM_JOB_ID" not in environment or "SLURM_STEP_NODELIST" not in environment:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    count, process = _number(environment, tasks), _number(environment, "SLURM_PROCID")
    # As JAX does: a port that belongs to the job, on the first host of the step.
    port = environment.get("JAX_COORDINATOR_PORT") or str(_number(environment, "SLURM_JOB_ID") % 2**12 + 2**16 - 2**12)
    cluster = _checked("Slurm", f"{_first_host(environment['SLURM_STEP_NODELIST'])}:{port}", count, process)
    hosts = environment.get("SLURM_STEP_NUM_NODES", "")
    shared = not hosts.isdecimal() or count > int(hosts)
    return _of_shared_host(cluster, _number(environment, "SLURM_LOCALID"), environment) if shared else cluster


def _first_host(nodes: str) -> str:
    """The first of 'node1', 'node1,node2' or 'node[001-015],other'."""
    head, _, rest = nodes.partition("[")
    if "," in head or not rest:
        return nodes.partition(",")[0]
    digits = rest.replace("-", ",").replace("]", ",").partition(",")[0]
    return head + digits


def _from_open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    count, process = _number(environment, "OMPI_COMM_WORLD_SIZE"), _number(environment, "OMPI_COMM_WORLD_RANK")
    if count == 1:
        return Cluster("Open MPI", None, 1, 0)
    cluster = _checked("Open MPI", _open_mpi_coordinator(environment), count, process)
    if _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") > 1:
        return _of_shared_host(cluster, _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"), environment)
    return cluster


def _open_mpi_coordinator(environment: Mapping[str, str]) -> str:
    """The host of mpirun: 'JOB.0;tcp://10.0.0.1,10.1.0.1:PORT;tcp6://[ADDRESS]:PORT', one of the two or both."""
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    job, _, addresses = uri.partition(";")
    _, _, address = addresses.partition(";")[0].partition("://")
    host = address.strip("[").partition("]")[0] if address.startswith("[") else address.rpartition(":")[0]
    host = host.partition(",")[0]
    if not host:
        raise UserError(
            "Open MPI does not say where its processes meet; set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID, or give --coordinator, --num_processes and --process_id"
        )
    number = job.partition(".")[0]
    port = environment.get("JAX_COORDINATOR_PORT") or str(
        (int(number) // 2**12 if number.isdecimal() else 0) % 2**12 + 61440
    )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _from_tpu(environment: Mapping[str, str]) -> Cluster | None:
    """A TPU pod: its own service, or Kubernetes, names the workers, and JAX asks it."""
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    slices = _number(environment, "MEGASCALE_NUM_SLICES") if environment.get("MEGASCALE_NUM_SLICES") else 1
    if workers:
        if len(workers.split(",")) * slices == 1:
            return Cluster("a TPU host", None, 1, 0)
        return Cluster(f"TPU pod of {len(workers.split(',')) * slices} hosts", None, None, None)
    if not _is_tpu_vm() or "TPU_SKIP_MDS_QUERY" in environment:
        return None
    return Cluster("Cloud TPU", None, None, None)


def _is_tpu_vm() -> bool:
    from jax._src import cloud_tpu_init  # what JAX's own detection asks: libtpu and the chips are there

    return bool(cloud_tpu_init.running_in_cloud_tpu_vm)


def _from_kubernetes(environment: Mapping[str, str]) -> Cluster | None:
    """An indexed Kubernetes Job or JobSet; JAX asks Kubernetes itself, through the package `kubernetes`."""
    if "KUBERNETES_SERVICE_HOST" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    try:
        import kubernetes  # noqa: F401
    except ImportError:
        raise UserError(
            "this is a pod of an indexed Kubernetes Job; set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID in it, or install 'kubernetes', through which JAX finds the other pods"
        ) from None
    return Cluster("Kubernetes", None, None, None)


def _of_shared_host(cluster: Cluster, local_id: int, environment: Mapping[str, str]) -> Cluster:
    """With several processes on a host each takes one device, unless it is shown only its own."""
    visible = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("ROCR_VISIBLE_DEVICES") or ""
    if visible and "," not in visible:
        return cluster
    return cluster._replace(local_device_ids=(local_id,))
