"""Certified training against its loss written out, along its ramp, after a resume and under every strategy."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from vitcls import attack, cli
from vitcls.core.errors import UserError
from vitcls.tasks import Context
from vitcls.tasks.base import Output, Tools, Updated
from vitcls.tasks.certified import Certified
from vitcls.train import prepare, train_and_evaluate
from vitcls.training import checkpoint, opened
from vitcls.training.metrics_log import read_history

pytestmark = pytest.mark.usefixtures("no_pictures")
B, K = 6, 3
STEPS = {"10%": 10, "40%": 40}


def certified(config, **fields):
    """The tiny config with a network that has bounds, trained for them."""
    config.model = {"name": "paper_cnn", "depths": (1,), "widths": (3,), "hidden_width": 4}
    config.task = {"name": "certified", "eps": 0.05, "warmup": "2 steps", "ramp": "50%"} | fields
    config.augment.mixup.probability = 0.0
    return config


def cross_entropy(logits, targets):
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def log_likelihood(z, classes):
    return scipy.special.log_softmax(z, axis=1)[np.arange(B), classes]


@pytest.mark.parametrize(("updates", "progress"), [(0, 0.0), (10, 0.0), (20, 0.25), (50, 1.0), (99, 1.0)])
def test_the_loss_is_of_the_worst_logits_along_the_ramp(updates, progress):
    w = np.random.default_rng(0).normal(size=(8, K)).astype(np.float32)

    def logits(images):
        return (2 * images - 1).reshape(len(images), -1) @ w

    tools = Tools(
        lambda params, stats, images, key: Output(images.reshape(len(images), -1) @ w, stats + 1, {}),
        None, lambda x: 2 * x - 1, None, None, None, K,
        lambda params, stats, images: images.reshape(len(images), -1) @ w,
    )  # fmt: skip
    context = Context(("a", "b", "c"), (2, 2, 2), cross_entropy, None, STEPS.get)
    task = Certified(eps=0.2, weight=0.3, warmup="10%", ramp="40%").build(context)
    images = np.random.default_rng(1).uniform(size=(B, 2, 2, 2)).astype(np.float32)
    classes = np.arange(B) % K
    inputs = {"image": images, "target": jnp.eye(K)[classes]}
    losses, aux = task.loss(tools, {}, jnp.zeros(()), inputs, jnp.asarray(updates), None, None)

    worst = np.zeros((B, K))  # each from the corner of the box, cut to [0, 1], that helps it most against the truth
    for i, truth in enumerate(classes):
        for other in range(K):
            direction = np.sign(w[:, other] - w[:, truth]).reshape(2, 2, 2)
            corner = np.clip(images[i] + 0.2 * progress * direction, 0, 1)
            at_corner = logits(corner[None].astype(np.float32))[0]
            worst[i, other] = at_corner[other] - at_corner[truth]
    weight = 1 - 0.7 * progress
    expected = -weight * log_likelihood(logits(images), classes) - (1 - weight) * log_likelihood(worst, classes)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert aux.batch_stats == 1  # bounds leave them alone
    assert task.init(None, None) == 0 and task.update(jnp.asarray(3), Updated(3, None, None, None, None)) == 4
    np.testing.assert_array_equal(aux.sums["certified"], worst.argmax(axis=1) == classes)
    np.testing.assert_array_equal(aux.sums["correct"], logits(images).argmax(axis=1) == classes)


def history(path, key):
    return [event[key] for event in read_history(path) if key in event]


def test_a_run_goes_on_along_the_ramp_to_the_same_bits_and_is_certified(tiny_config, tmp_path, capsys, monkeypatch):
    config = certified(tiny_config)
    config.log_every, config.steps_per_call = "1 steps", 1
    train_and_evaluate(config, tmp_path / "run")
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in checkpoint.steps(again / "checkpoints")[1:]:
        shutil.rmtree(again / "checkpoints" / str(step))
    train_and_evaluate(config, again)
    losses, shares = (history(tmp_path / "run", f"train/{name}") for name in ("loss", "certified_accuracy"))
    assert losses == history(again, "train/loss") and shares == history(again, "train/certified_accuracy")
    assert shares[0] == history(again, "train/accuracy")[0] and min(shares) < max(shares)  # no eps at first

    flags = ["--eps=0.001,0.9", "--steps=4", "--queries=4", "--images=12", "--attack=pgd"]
    assert cli.run(attack.main, [f"--workdir={again}", *flags]) == 0
    found = json.loads((again / "attack" / "metrics.json").read_text())
    (small, large), points = found["certified"], found["curve"]
    assert (small["eps"], large["eps"]) == (0.001, 0.9)
    assert points[1]["worst"]["value"] >= small["accuracy"]["value"] > large["accuracy"]["value"] == 0
    assert "linf eps 0.9: certified against any attack 0.00% [0.00%, " in capsys.readouterr().out
    assert "What no attack can take" in (again / "attack" / "index.html").read_text()
    rows = (again / "attack" / "certified.csv").read_text().splitlines()
    assert rows[0] == "eps,certified,certified_low,certified_high" and len(rows) == 3

    make = opened.build.make_explained

    def rounded(*run):  # so that no attack can be trusted
        network = make(*run)
        return network._replace(forward=lambda v, images: network.forward(v, jnp.round(4 * images) / 4))

    monkeypatch.setattr(opened.build, "make_explained", rounded)
    capsys.readouterr()
    assert cli.run(attack.main, [f"--workdir={again}", "--eps=0.001", *flags[1:]]) == 1
    found = json.loads((again / "attack" / "metrics.json").read_text())
    assert "robust_accuracy" not in found and len(found["certified"]) == 4
    assert "linf eps 0.001: certified against any attack " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.by_turns
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_every_strategy_trains_the_same(tiny_config, tmp_path):
    losses = {}
    for strategy in ("data", "fsdp", "pmap"):
        config = certified(tiny_config, warmup="0%", ramp="1 steps")
        config.partition.strategy, config.partition.min_shard_elements = strategy, 16
        config.total, config.log_every, config.steps_per_call = "3 steps", "1 steps", 1
        train_and_evaluate(config, tmp_path / strategy)
        losses[strategy] = history(tmp_path / strategy, "train/loss")
    np.testing.assert_allclose(losses["fsdp"], losses["data"], rtol=1e-3)
    np.testing.assert_allclose(losses["pmap"], losses["data"], rtol=1e-3)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"eps": 0.0}, "config.task.eps=0.0 is impossible; it must be above 0"),
        ({"weight": 1.5}, "config.task.weight=1.5 is impossible; it must be in [0, 1]"),
        ({"warmup": "5"}, "config.task.warmup"),
        ({"rampe": "5%"}, "did you mean 'ramp'?"),
    ],
)
def test_what_it_cannot_do_is_said_with_its_key(task, words, tiny_config):
    tiny_config.task = {"name": "certified"} | task
    with pytest.raises(UserError, match=re.escape(words)):
        prepare(tiny_config, None, "", range(0))


def test_a_network_without_bounds_is_refused_before_it_trains(tiny_config, tmp_path):
    tiny_config.task = {"name": "certified"}
    tiny_config.model = {"name": "vit_tiny_patch4"}
    with pytest.raises(UserError, match=r"cannot be trained as 'certified': its operation '.*' has no bounds"):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
