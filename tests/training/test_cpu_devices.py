"""The number of virtual devices that a CPU is for a run: which, and that no result depends on it."""

import inspect
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import make_tiny_config
from vitcls import config as configs
from vitcls.core.errors import UserError
from vitcls.training import cpu_devices


def resolved(**changes):
    config = make_tiny_config()
    config.model.hidden_dim = 32
    for key, value in changes.items():
        block, _, name = key.rpartition("__")
        (config[block] if block else config)[name] = value
    return configs.resolve(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2),
        ({"batch_size": 18}, 1),  # mixup makes pairs, and two devices would have four and a half each
        ({"batch_size": 18, "augment": {"mixup": {"probability": 0.0}}}, 2),
        ({"batch_size": 12, "optimizer__accumulate": 3}, 2),
        ({"batch_size": 12, "optimizer__accumulate": 6}, 1),
        ({"model__hidden_dim": 384}, 1),
        ({"partition__strategy": "fsdp"}, 1),
        ({"partition__strategy": "pmap", "partition__cpu_devices": 4}, 4),
        ({"model__hidden_dim": 384, "partition__cpu_devices": 2}, 2),
        ({"partition__cpu_devices": 1}, 1),
    ],
)
def test_two_devices_for_small_networks_whose_batch_they_can_share(changes, expected):
    config = resolved(**{key: value for key, value in changes.items() if key != "augment"})
    if "augment" in changes:
        with config.unlocked():
            config.augment.mixup.probability = 0.0
    assert cpu_devices.choose(config, cores=2) == expected
    assert cpu_devices.choose(config, cores=1) == (config.partition.cpu_devices or 1)


def test_other_models_and_statistics_of_each_device_stay_at_one():
    assert cpu_devices.choose(configs.resolve(configs.default_config("resnet18")), cores=2) == 1
    lenet = configs.default_config("lenet5")
    assert cpu_devices.choose(configs.resolve(lenet), cores=2) == 2
    lenet.model.norm = "local_batch"
    assert cpu_devices.choose(configs.resolve(lenet), cores=2) == 1


def test_where_the_system_does_not_say_which_cores_are_allowed(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for cores, expected in ((8, 2), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert cpu_devices.choose(resolved()) == expected


def test_an_impossible_number_is_refused():
    with pytest.raises(UserError, match=r"config\.partition\.cpu_devices=-1 is impossible; it must be in \[0, 64\]"):
        configs.validate(resolved(partition__cpu_devices=-1))


def train(tmp_path, workdir, *overrides, **variables):
    """The log of `vitcls train`, as a user starts it."""
    file = tmp_path / "config.py"
    file.write_text(inspect.getsource(make_tiny_config).replace("make_tiny_config", "get_config"))
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "-m", "vitcls.main", f"--config={file}", f"--workdir={tmp_path / workdir}", *overrides]
    ran = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def logged(workdir):
    """step -> the losses and accuracies of metrics.jsonl, and the metrics of the report."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("train/loss", "train/accuracy", "eval/loss", "eval/accuracy")
    found = {(line["step"], name): line[name] for line in lines for name in names if name in line}
    report = json.loads((workdir / "report" / "metrics.json").read_text())
    return found | {name: report[name] for name in ("accuracy", "loss")}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 8
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4, atol=1e-5)


@pytest.mark.by_turns
def test_no_result_depends_on_it_and_a_run_goes_on_with_another_number(tmp_path):
    assert "1 x cpu" in train(tmp_path, "one", "--config.partition.cpu_devices=1")
    chosen = "2 x cpu" if len(os.sched_getaffinity(0)) > 1 else "1 x cpu"
    assert chosen in train(tmp_path, "chosen")
    assert "2 x cpu" in train(tmp_path, "two", "--config.partition.cpu_devices=2")
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert_same(two, one)
    assert_same(logged(tmp_path / "chosen"), one)
    for step in (8, 12):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / str(step))
    again = train(tmp_path, "two", "--config.partition.cpu_devices=1")
    assert "1 x cpu" in again and "resumed from step 6" in again
    assert_same(logged(tmp_path / "two"), one)


@pytest.mark.by_turns
def test_the_environment_goes_first(tmp_path):
    arguments = ("--config.partition.cpu_devices=2", "--dry_run")
    assert "3 x cpu" in train(tmp_path, "a", *arguments, "--config.batch_size=18", JAX_NUM_CPU_DEVICES="3")
    flag = "--xla_force_host_platform_device_count=4"
    assert "4 x cpu" in train(tmp_path, "b", *arguments, XLA_FLAGS=f"{os.environ['XLA_FLAGS']} {flag}")


def test_where_jax_has_started_it_stays_as_it_is():
    program = (
        "import jax; jax.devices(); from vitcls import cli; cli.start_jax(cpu_devices=2); print(len(jax.devices()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "1\n"), ran.stderr
