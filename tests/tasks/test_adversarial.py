"""Adversarial training against its losses written out by hand, under every strategy and after a resume."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from vitcls import attacks
from vitcls.core.errors import UserError
from vitcls.tasks import Context
from vitcls.tasks.adversarial import Adversarial
from vitcls.tasks.base import Output, Tools
from vitcls.train import prepare, train_and_evaluate
from vitcls.training import checkpoint
from vitcls.training.metrics_log import read_history

pytestmark = pytest.mark.usefixtures("no_pictures")
B, K = 6, 3


def adversarial(config, **fields):
    """The tiny config, trained on attacked images."""
    task = Adversarial(**({"eps": 0.05, "steps": 2} | fields))
    config.task = {"name": "adversarial"} | dataclasses.asdict(task)
    config.augment.mixup.probability = 0.0
    return config


def linear():
    """Tools of a linear model whose batch statistics count the passes in training."""
    w = np.random.default_rng(0).normal(size=(8, K)).astype(np.float32)

    def logits(images):
        return images.reshape(len(images), -1) @ w

    def forward(params, stats, images, key):
        return Output(logits(images), stats + 1, {})

    def evaluate(params, stats, images):
        return logits(images)

    return logits, Tools(forward, None, lambda x: x, lambda params: params, None, None, K, evaluate)


def cross_entropy(logits, targets):
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


@pytest.mark.by_turns
@pytest.mark.parametrize("method", ["fgsm", "pgd", "trades"])
def test_the_loss_is_that_of_the_papers_on_images_within_the_ball(method):
    logits, tools = linear()
    context = Context(("a", "b", "c"), (2, 2, 2), cross_entropy, None, None)
    settings = Adversarial(method=method, eps=0.1, steps=3, beta=4.0)
    task = settings.build(context)
    images = np.random.default_rng(1).uniform(size=(B, 2, 2, 2)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), B)
    inputs = {"image": images, "target": jnp.eye(K)[np.arange(B) % K], "key": keys}
    losses, aux = task.loss(tools, {}, jnp.zeros(()), inputs, None, None, jax.random.key(1))

    z = np.asarray(logits(images), np.float64)
    log_p = scipy.special.log_softmax(z, axis=1)
    begin, loss, truth = "uniform", cross_entropy, inputs["target"]
    if method == "trades":
        begin, truth = "normal", jnp.asarray(z, jnp.float32)
        loss = lambda q, p: jnp.sum(jax.nn.softmax(p) * -jax.nn.log_softmax(q), axis=-1)  # noqa: E731 (KL + constant)
    attack = attacks.PGD("linf", 1 if method == "fgsm" else 3, 1.25 if method == "fgsm" else 0.0, begin, loss)
    attacked = attacks.perturb(attack, keys, images, truth, logits, eps=0.1)
    log_q = scipy.special.log_softmax(np.asarray(logits(attacked), np.float64), axis=1)
    classes = np.arange(B) % K
    expected = -log_q[np.arange(B), classes]
    if method == "trades":
        expected = -log_p[np.arange(B), classes] + 4 * np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert expected.mean() > -log_p[np.arange(B), classes].mean()
    assert aux.batch_stats == (2 if method == "trades" else 1)  # the attack leaves them alone
    np.testing.assert_array_equal(aux.sums["robust"], log_q.argmax(axis=1) == classes)


@pytest.mark.by_turns
@pytest.mark.parametrize(("method", "strategy"), [("pgd", "pmap"), ("trades", "fsdp")])
def test_a_run_goes_on_to_the_same_bits(method, strategy, tiny_config, tmp_path):
    config = adversarial(tiny_config, method=method)
    config.partition.strategy = strategy
    results = train_and_evaluate(config, tmp_path / "run")
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in checkpoint.steps(again / "checkpoints")[1:]:
        shutil.rmtree(again / "checkpoints" / str(step))
    resumed = train_and_evaluate(config, again)
    assert resumed["loss"] == results["loss"] and resumed["accuracy"] == results["accuracy"]
    logged = [[e["train/loss"] for e in read_history(path) if "train/loss" in e] for path in (tmp_path / "run", again)]
    assert logged[0] == logged[1]
    assert all(0 <= e["train/robust_accuracy"] <= 1 for e in read_history(again) if "train/loss" in e)


@pytest.mark.by_turns
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_every_strategy_trains_the_same(tiny_config, tmp_path):
    losses = {}
    for strategy in ("data", "fsdp", "pmap"):
        config = adversarial(tiny_config, method="trades")
        config.partition.strategy, config.partition.min_shard_elements = strategy, 16
        config.total, config.log_every, config.steps_per_call = "2 steps", "1 steps", 1
        train_and_evaluate(config, tmp_path / strategy)
        history = read_history(tmp_path / strategy)
        losses[strategy] = [event["train/loss"] for event in history if "train/loss" in event]
    assert len(losses["data"]) == 2
    np.testing.assert_allclose(losses["fsdp"], losses["data"], rtol=1e-3)
    np.testing.assert_allclose(losses["pmap"], losses["data"], rtol=1e-3)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"method": "pdg"}, "config.task.method='pdg' is impossible; it must be one of fgsm, pgd, trades"),
        ({"norm": "l1"}, "config.task.norm='l1' is impossible; it must be one of linf, l2"),
        ({"eps": 0.0}, "config.task.eps=0.0 is impossible; it must be above 0"),
        ({"eps": float("nan")}, "config.task.eps=nan is impossible"),
        ({"steps": 0}, "config.task.steps=0 is impossible"),
        ({"step_size": -0.1}, "config.task.step_size=-0.1 is impossible"),
        ({"beta": -1.0}, "config.task.beta=-1.0 is impossible"),
        ({"stepsize": 0.1}, "did you mean 'step_size'?"),
    ],
)
def test_what_it_cannot_do_is_said_with_its_key(task, words, tiny_config):
    tiny_config.task = {"name": "adversarial"} | task
    with pytest.raises(UserError, match=re.escape(words)):
        prepare(tiny_config, None, "", range(0))
