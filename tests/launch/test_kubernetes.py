"""The manifests of launch/kubernetes are what Kubernetes and JobSet read, and their pods find each other.

The schemas are those of `kubeflow-trainer-api`, the published OpenAPI of Kubernetes (Job, Pod) and of the JobSet CRD
(v1alpha2) as classes, and for what it lacks those of `kubernetes-validate`, the same of Kubernetes 1.37.
"""

import pathlib
import re

import kubernetes_validate
import pydantic
import pytest
import yaml
from kubeflow_trainer_api import models

from vitcls.core import buckets, cluster
from vitcls.serve import __main__ as serve

FOLDER = pathlib.Path(__file__).parents[2] / "launch" / "kubernetes"
MANIFESTS = ("gpu.yaml", "tpu.yaml")


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


def check(manifest):
    """Raises where a value has the wrong type or is missing, or where a key is not in the schema."""
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest  # which leaves unknown keys out


def job_of(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["name"], replicated["template"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_it_is_a_job_set_of_the_published_schema(name):
    check(read(name))


@pytest.mark.parametrize(
    ("key", "value"),
    [("completions", "two"), ("podFailurePolicy", {}), ("backOffLimit", 0), ("template", {"spec": {}})],
)
def test_the_schema_would_tell(key, value):
    manifest = read("gpu.yaml")
    job_of(manifest)[1][key] = value
    with pytest.raises((pydantic.ValidationError, AssertionError)):
        check(manifest)


@pytest.mark.parametrize("name", MANIFESTS)
def test_all_pods_start_again_together_unless_the_input_is_bad(name):
    manifest = read(name)
    _, job = job_of(manifest)
    assert job["parallelism"] == job["completions"] > 1 and job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (rule,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_pods_with_gpus_find_each_other():
    manifest = read("gpu.yaml")
    name, job = job_of(manifest)
    job_set, count = manifest["metadata"]["name"], job["completions"]
    for index in range(count):
        annotations = {"metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index)}
        (container,) = job["template"]["spec"]["containers"]
        environment = {
            entry["name"]: entry.get("value") or annotations[entry["valueFrom"]["fieldRef"]["fieldPath"]]
            for entry in container["env"]
        }
        environment |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index)}  # in every such pod
        found = cluster.find(None, None, None, environment)
        assert found[1:] == (f"{job_set}-{name}-0-0.{job_set}:1234", count, index, None)


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_data_and_the_workdir_outlive_the_pods(name):
    """Both are in buckets, or on volumes with a claim."""
    pod = job_of(read(name))[1]["template"]["spec"]
    (container,) = pod["containers"]
    claimed = {volume["name"] for volume in pod.get("volumes", []) if "persistentVolumeClaim" in volume}
    mounts = [mount["mountPath"] for mount in container.get("volumeMounts", []) if mount["name"] in claimed]
    flags = dict(argument.split("=", 1) for argument in container["args"][1:])
    for flag in ("--config.dataset.data_dir", "--workdir"):
        assert flags[flag].startswith(("gs://", *(f"{mount}/" for mount in mounts))), flag


def test_a_slice_has_as_many_pods_as_its_chips_need():
    _, job = job_of(read("tpu.yaml"))
    pod = job["template"]["spec"]
    across, down = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == across * down
    hosts = ",".join(f"vitcls-train-0-{i}.vitcls" for i in range(job["completions"]))  # as GKE sets it
    found = cluster.find(None, None, None, {"TPU_WORKER_HOSTNAMES": hosts, "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert found == cluster.Cluster("TPU pod of 4 hosts", None, None, None)


def test_what_is_installed_for_tpus_can_write_the_bucket():
    (extra,) = re.findall(r"EXTRA=(\S+)", (FOLDER / "tpu.yaml").read_text())
    (installed,) = re.findall(r"\./vitcls\[(.*)\]", (FOLDER.parent / "cloud_tpu" / "worker.sh").read_text())
    assert set(extra.split(",")) == set(installed.split(",")) == {"tpu", buckets.EXTRAS["gs"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_image_has_what_the_command_names(name):
    (container,) = job_of(read(name))[1]["template"]["spec"]["containers"]
    dockerfile = (FOLDER / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["vitcls"]' in dockerfile and "COPY configs /configs" in dockerfile
    config = container["args"][1].removeprefix("--config=/").partition(":")[0]
    assert (FOLDER.parents[1] / config).exists()
    for line in dockerfile.splitlines():
        if line.startswith("COPY "):
            assert all((FOLDER.parents[1] / source).exists() for source in line.split()[1:-1])


def validate(manifest):
    """Raises where a value has the wrong type or is missing, or where a key is not in the schema."""
    kubernetes_validate.validate(manifest, "1.37", strict=True)


@pytest.mark.parametrize(
    "spoil", [lambda spec: spec.update(replica=3), lambda spec: spec.update(replicas="two"), lambda spec: spec.clear()]
)
def test_the_schema_finds_what_is_wrong_with_a_deployment(spoil):
    deployment, _ = yaml.safe_load_all((FOLDER / "serve.yaml").read_text())
    spoil(deployment["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(deployment)


def test_the_server_is_a_deployment_that_is_ready_when_its_model_is():
    deployment, service = yaml.safe_load_all((FOLDER / "serve.yaml").read_text())
    validate(deployment)
    validate(service)
    template = deployment["spec"]["template"]
    assert deployment["apiVersion"] == "apps/v1" and deployment["spec"]["replicas"] > 1
    labels = template["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    (container,) = template["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in template["spec"]["volumes"]}
    verb, *flags = container["args"]
    known = (pathlib.Path(serve.__file__)).read_text()
    assert verb == "serve" and all(f'"{flag.partition("=")[0]}"' in known for flag in flags)
    assert not any("password" in flag.lower() for flag in flags)
