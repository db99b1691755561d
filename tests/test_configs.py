"""Every config trains: by shapes alone in the fast suite, one epoch on real images in the slow one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from vitcls import cli, main

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
ARGUMENTS = {  # config -> presets that are tried
    "vit_digits": [""],
    "vit_cifar100": [":tiny", ":muon"],
    "sprint_cifar10": [""],
    "resnext_cifar10": ["", ":small"],
    "cnn_mnist": ["", ":enhanced"],
    "lenet_mnist": [""],
    "alexnet_cifar10": [""],
    "baseline": [":resnet18,synthetic", ":vgg11_bn,synthetic", ":lenet5,synthetic"],
}
SHARED_DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


def run(config, *arguments, timeout=600):
    command = [sys.executable, "-m", "vitcls.main", f"--config={CONFIGS}/{config}", *arguments]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def test_every_config_is_tried():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("argument", ["", ":resnet50", ":,cifar10", ":resnet5O,cifar10"])
def test_a_baseline_names_a_model_and_a_data_set(argument, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # the command sets it
    assert cli.run(main.main, [f"--config={CONFIGS}/baseline.py{argument}", "--workdir=never", "--dry_run"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1, err


def real_subset(name, directory):
    """An npz file of the first images of a data set beside the repository."""
    unpack = SHARED_DATA / "unpack.py"
    if not unpack.exists():
        pytest.skip("no data beside the repository")
    command = [sys.executable, str(unpack), name, "--limit", "1000", "--format", "npz", "--out", str(directory)]
    subprocess.run(command, check=True, capture_output=True)
    return next(directory.rglob("*.npz"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "data"),
    [
        ("resnext_cifar10.py:small", "cifar10"),
        ("cnn_mnist.py", "mnist"),
        ("lenet_mnist.py", "mnist"),
        ("alexnet_cifar10.py", "cifar10"),
        ("sprint_cifar10.py", "cifar10"),
        ("baseline.py:resnet18,cifar10", "cifar10"),
        ("baseline.py:mobilenet_v2,cifar10", "cifar10"),
        ("baseline.py:efficientnet_b0,cifar10", "cifar10"),
    ],
)
def test_one_epoch_on_real_images(config, data, tmp_path):
    subset = real_subset(data, tmp_path)
    ran = run(
        config,
        f"--workdir={tmp_path / 'run'}",
        "--config.dataset.name=npz",
        f"--config.dataset.data_dir={subset}",
        "--config.total=1 epochs",
        "--config.batch_size=50",
        "--config.steps_per_call=1",
        timeout=1200,
    )
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    assert results["num_examples"] == 1000
    if config.startswith("resnext"):
        weights = results["learned_weights"]
        assert list(weights) == [f"Fusion weight of {k}x{k}" for k in (1, 3, 5)]
        assert sum(weights.values()) == pytest.approx(1.0)
        assert "Fusion weight of 3x3" in (tmp_path / "run" / "report" / "index.html").read_text()
