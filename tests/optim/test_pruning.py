"""Magnitude pruning: the schedule against the formula of its paper, and weights that stay 0, also after a resume."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import make_tiny_config
from vitcls import optim
from vitcls.core import durations
from vitcls.core.errors import UserError
from vitcls.optim.pruning import keep_pruned, magnitude_masks, prune
from vitcls.train import train_and_evaluate
from vitcls.training import build, run_dir


def test_the_smallest_of_each_kernel_go():
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": rng.normal(size=(4, 5)), "bias": np.zeros(5)},
        "b": {"kernel": rng.normal(size=(2, 3, 7))},
    }
    masks = magnitude_masks(params, 0.5)
    for name in ("a", "b"):
        kernel, mask = np.abs(params[name]["kernel"]).ravel(), np.asarray(masks[name]["kernel"]).ravel()
        assert set(np.flatnonzero(~mask)) == set(np.argsort(kernel)[: kernel.size // 2])
    assert masks["a"]["bias"].shape == () and masks["a"]["bias"]
    assert all(leaf.all() for leaf in jax.tree.leaves(magnitude_masks(params, 0.0)))


def test_the_share_of_zeros_is_that_of_the_paper():
    """At steps 2, 4, ..., 12 the share is 0.8 (1 - (1 - (t - 2) / 10)^3); between and behind them it stands."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(20, 50)), jnp.float32)}
    optimizer = prune(optax.sgd(1.0), 0.8, begin=2, end=12, every=2)
    state, shares = optimizer.init(params), []
    for step in range(16):
        gradients = {"kernel": jnp.asarray(np.random.default_rng(step).normal(size=(20, 50)), jnp.float32)}
        updates, state = optimizer.update(gradients, state, params)
        params = keep_pruned(optax.apply_updates(params, jax.tree.map(lambda u: 0.01 * u, updates)), state)
        shares.append(float(np.mean(params["kernel"] == 0)))
    steps = [min(max(step - step % 2, 2), 12) for step in range(16)]
    expected = [0.8 * (1 - (1 - (step - 2) / 10) ** 3) for step in steps]
    np.testing.assert_allclose(shares, expected, atol=1e-3)


def test_what_is_frozen_is_not_pruned():
    """By a multiplier of 0; its mask has the shape that checkpoints of before have."""
    params = {"stem": {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}, "head": {"kernel": jnp.ones((2, 4))}}
    config = make_tiny_config().optimizer
    config.update(
        multipliers=(("stem", 0.0),), prune=0.5, prune_begin="0 steps", prune_end="1 steps", prune_every="1 steps"
    )
    to_steps = functools.partial(durations.to_steps, batch_size=1, num_examples=9, total_steps=9)
    optimizer = optim.make_optimizer(config, params, to_steps=to_steps)
    state, before = optimizer.init(params), params
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = keep_pruned(optax.apply_updates(params, updates), state)
    np.testing.assert_array_equal(params["stem"]["kernel"], before["stem"]["kernel"])
    assert not params["head"]["kernel"].all() and state.masks["stem"]["kernel"].shape == (2, 4)


@pytest.mark.by_turns
def test_half_of_a_trained_network_is_zero_also_where_it_went_on(tmp_path, no_pictures):
    """Of the averaged weights too, which are the ones in use; and a run that lost its end makes the same again."""
    config = make_tiny_config()
    config.optimizer.update(prune=0.5, prune_end="6 steps", prune_every="2 steps")
    whole, again = tmp_path / "whole", tmp_path / "again"
    train_and_evaluate(config, whole)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "12")
    assert max(int(path.name) for path in (again / "checkpoints").iterdir()) == 8
    train_and_evaluate(config, again)
    found = [weights(path) for path in (whole, again)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    kernel = np.asarray(found[0]["block_0"]["feed_forward"]["expand"]["kernel"])
    assert np.mean(kernel == 0) == 0.5
    assert np.all(np.asarray(found[0]["norm"]["scale"]) != 0)


@pytest.mark.by_turns
def test_what_is_best_and_what_stops_early_is_as_sparse_as_was_asked(tmp_path, no_pictures):
    config = make_tiny_config()
    config.optimizer.update(prune=0.5, prune_end="6 steps", prune_every="2 steps")
    config.eval_every = "2 steps"
    config.early_stopping.update(patience=1, min_delta=100.0)  # the second evaluation that counts ends the run
    assert train_and_evaluate(config, tmp_path)["checkpoint_step"] == 10
    for which in ("best", "last"):
        assert np.mean(np.asarray(weights(tmp_path, which)["block_0"]["feed_forward"]["expand"]["kernel"]) == 0) == 0.5


def weights(path, which="last"):
    opened = run_dir.open_workdir(path)
    return opened.restore(build.make_model(opened.config, opened.info), which)[1]["params"]


def test_pruning_must_leave_time_for_fine_tuning(tiny_config, tmp_path):
    tiny_config.optimizer.update(prune=0.5, prune_end="12 steps")
    with pytest.raises(UserError, match="prune_end='12 steps' is impossible"):
        train_and_evaluate(tiny_config, tmp_path / "run")
