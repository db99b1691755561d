"""Every config trains: by shapes alone in the fast suite, one epoch on real images in the slow one."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

from vitcls import cli, main, models
from vitcls import config as configs

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
ARGUMENTS = {  # config -> presets that are tried
    "vit_digits": [""],
    "vit_cifar100": [":tiny", ":muon"],
    "sprint_cifar10": [""],
    "resnext_cifar10": ["", ":small"],
    "cnn_mnist": ["", ":enhanced"],
    "lenet_mnist": [""],
    "robust_mnist": [":fgsm", ":trades", ":certified", ":plain"],
    "alexnet_cifar10": [""],
    "imagenet": [":smoke", ":vit_tiny_patch16,smoke", ":mobilenet_v2,smoke"],
    "transfer": [],  # which needs a folder: tests/test_transfer.py
    "baseline": [":resnet18,synthetic", ":vgg11_bn,synthetic", ":lenet5,synthetic"],
}
SHARED_DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


def run(config, *arguments, timeout=600):
    command = [sys.executable, "-m", "vitcls.main", f"--config={CONFIGS}/{config}", *arguments]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def test_every_config_is_tried():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize(
    "preset",
    [f"baseline.py{argument}" for argument in ("", ":resnet50", ":,cifar10", ":resnet5O,cifar10")]
    + [f"imagenet.py{argument}" for argument in ("", ":resnet50,smok", ":resnet5O", ":,smoke")]
    + [f"transfer.py{argument}" for argument in ("", ":resnet50,heed", ":resnet5O", ":,head")],
)
def test_a_recipe_for_any_model_names_it(preset, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # the command sets it
    assert cli.run(main.main, [f"--config={CONFIGS}/{preset}", "--workdir=never", "--dry_run"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1, err


def test_every_model_can_be_fine_tuned_by_every_method():
    get_config = runpy.run_path(str(CONFIGS / "transfer.py"))["get_config"]
    for name in models.names():
        for method in ("", ",full", ",head", ",layer_decay"):
            configs.validate(configs.resolve(get_config(name + method)))
    head, decayed = get_config("vit_tiny_patch16,head"), get_config("vit_tiny_patch16,layer_decay")
    frozen = [get_config(name).init.freeze_norm for name in ("resnet50", "efficientnet_lite0", "vit_tiny_patch16")]
    assert frozen == [True, True, False]
    bit = get_config("resnetv2_50x1_bit").optimizer
    assert (bit.name, bit.learning_rate, bit.weight_decay) == ("sgd", 0.003, 0.0)
    assert (head.init.train, head.model.drop_path, decayed.init.layer_decay) == ("head", 0.0, 0.75)


def test_every_model_has_an_imagenet_recipe():
    get_config = runpy.run_path(str(CONFIGS / "imagenet.py"))["get_config"]
    for name in models.names():
        for argument in (name, f"{name},smoke"):
            config = configs.resolve(get_config(argument))
            configs.validate(config)
            assert config.model.name == name
    named = ("vit_small_patch16", "resnet50", "vgg16", "resnetv2_50x1_bit")
    chosen = [configs.resolve(get_config(name)) for name in named]
    rates = [c.optimizer.learning_rate * c.batch_size / c.optimizer.base_batch_size for c in chosen]
    assert rates == pytest.approx([1e-3, 0.4, 0.04, 0.12])  # 5e-4 per 512, 0.1 per 256 (and a tenth of it), 0.03


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
