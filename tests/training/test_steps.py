"""train_step against the same update written out by hand."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from vitcls import config as configs
from vitcls import optim
from vitcls.core import rng
from vitcls.data import augment as augmentation
from vitcls.data.augment import to_float, views
from vitcls.tasks import Context, losses
from vitcls.tasks.classify import Classify
from vitcls.training import steps
from vitcls.training.state import create_state

NUM_CLASSES = 3
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8)
EVERY = np.ones(8, np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int32)


class Linear(nn.Module):
    """Logits are x W + b, so that every derivative is known."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(NUM_CLASSES)(images.reshape(images.shape[0], -1))


LOSS = losses.make_loss("cross_entropy", label_smoothing=0.0, focal_gamma=0.0, class_weights=np.ones(3))
TASK = Classify().build(Context(("a", "b", "c"), (4, 4, 1), LOSS, open_run=None, to_steps=None))


def no_augment(keys, images, targets):
    return images.astype(jnp.float32) / 255, targets


def build(
    *,
    model=None,
    unit=1,
    l2=0.0,
    optimizer=None,
    schedule=lambda step: 0.1,
    accumulate=1,
    augment=no_augment,
    ema_decay=0.0,
    limit=3,
    total_steps=100,
):
    optimizer, model = optimizer or optax.sgd(1.0), model or Linear()
    normalize = steps.make_normalize((0.5,), (0.25,))
    tools = steps.make_tools(model, augment=augment, normalize=normalize, num_classes=NUM_CLASSES)
    update = steps.Update(optimizer, schedule, l2, ema_decay, accumulate, unit, limit, total_steps)
    train_step = steps.make_train_step(TASK, tools, update)
    schedule_config = configs.ConfigDict({"name": "constant"})
    state = create_state(
        jax.random.key(0),
        model=model,
        image_shape=(4, 4, 1),
        optimizer=optimizer,
        ema=ema_decay > 0,
        schedule_config=schedule_config,
    )
    return jax.jit(train_step), state


def batch(mask=EVERY, images=IMAGES):
    return {"image": jnp.asarray(images), "label": jnp.asarray(LABELS), "mask": jnp.asarray(mask, jnp.float32)}


def by_hand(params, mask=EVERY, l2=0.0):
    """Loss and gradients of softmax regression in float64; L2 on the kernel alone."""
    kernel, bias = (np.asarray(params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    x = (IMAGES.reshape(8, -1) / 255 - 0.5) / 0.25
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -(mask * np.log(p[np.arange(8), LABELS])).sum() / mask.sum()
    error = (p - np.eye(3)[LABELS]) * mask[:, None] / mask.sum()
    hits = (mask * (logits.argmax(1) == LABELS)).sum()
    return loss, hits, {"kernel": x.T @ error + l2 * kernel, "bias": error.sum(0)}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("mask", [np.ones(8), np.array([1, 1, 0, 1, 0, 0, 1, 1])], ids=["full", "masked"])
def test_an_update_is_that_of_softmax_regression_with_l2_on_the_kernel(mask, accumulate):
    train_step, state = build(l2=0.3, accumulate=accumulate)
    loss, hits, grads = by_hand(state.params, mask, l2=0.3)
    new, sums = train_step(state, batch(mask), jax.random.key(1))
    for name, grad in grads.items():
        expected = np.asarray(state.params["Dense_0"][name]) - 0.1 * grad
        np.testing.assert_allclose(new.params["Dense_0"][name], expected, rtol=1e-4, atol=1e-6)
    count = mask.sum()
    np.testing.assert_allclose(sums["loss"] / count, loss, rtol=1e-5)
    penalty = 0.15 * np.sum(np.square(state.params["Dense_0"]["kernel"]))
    np.testing.assert_allclose(sums["l2"] / count, penalty, rtol=1e-5)
    assert (sums["correct"], sums["count"], sums["updates"], sums["skipped"]) == (hits, count, 1, 0)
    norm = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
    np.testing.assert_allclose(sums["gradient_norm"], norm, rtol=1e-5)


def test_the_learning_rate_is_that_of_the_step_even_after_a_skip():
    rates = jnp.array([1.0, 10.0, 100.0])
    train_step, state = build(schedule=lambda step: rates[step])
    poisoned = jax.tree.map(lambda x: x, batch(mask=np.full(8, np.nan)))
    state, _ = train_step(state, poisoned, jax.random.key(0))
    _, _, grads = by_hand(state.params)
    new, _ = train_step(state, batch(), jax.random.key(0))
    moved = np.asarray(new.params["Dense_0"]["bias"]) - np.asarray(state.params["Dense_0"]["bias"])
    np.testing.assert_allclose(moved, -10.0 * grads["bias"], rtol=1e-4)


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted():
    train_step, state = build(optimizer=optax.adam(1.0), ema_decay=0.9)
    bad = batch(mask=np.full(8, np.inf))
    new, sums = train_step(state, bad, jax.random.key(0))
    for part in ("params", "opt_state", "ema_params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, part), getattr(state, part))
    assert (new.step, new.nonfinite.streak, new.nonfinite.total, new.nonfinite.last_step) == (1, 1, 1, 0)
    assert sums["skipped"] == 1
    assert all(value == 0 for name, value in sums.items() if name != "skipped")

    new, _ = train_step(new, batch(), jax.random.key(0))
    assert (new.nonfinite.streak, new.nonfinite.total, new.nonfinite.last_step) == (0, 1, 0)
    for _ in range(3):
        new, _ = train_step(new, bad, jax.random.key(0))
    stopped, _ = train_step(new, batch(), jax.random.key(0))
    # The limit of 3 is reached: even a good batch changes nothing any more.
    jax.tree.map(np.testing.assert_array_equal, stopped.params, new.params)
    assert (stopped.nonfinite.streak, stopped.nonfinite.last_step) == (3, 4)


def test_every_step_and_every_example_has_a_key_of_its_own():
    seen = []

    def spy(keys, images, targets):
        jax.debug.callback(lambda k: seen.append(np.asarray(k)), jax.random.key_data(keys), ordered=True)
        return no_augment(keys, images, targets)

    train_step, state = build(augment=spy)
    call = steps.make_train_call(train_step, batch_fn=lambda data, step, n: lambda i: data, length=4)
    jax.block_until_ready(jax.jit(call)(state, steps.zero_sums(), batch(), jnp.int32(3)))
    jax.effects_barrier()
    keys = {tuple(key) for keys in seen for key in keys}
    assert len(seen) == 4
    assert len(keys) == 4 * 8


def test_calls_of_any_length_make_the_same_run_even_where_the_last_goes_past_its_end():
    train_step, state = build(optimizer=optax.adam(1.0), l2=0.1, total_steps=6)
    data = {name: jnp.stack([x] * 6) for name, x in batch().items()}

    def run(length):
        new, sums = state, steps.zero_sums()
        opened = lambda data, step, n: lambda i: jax.tree.map(lambda x: x[step + i], data)  # noqa: E731
        call = jax.jit(steps.make_train_call(train_step, batch_fn=opened, length=length))
        for _ in range(-(-6 // length)):
            new, sums = call(new, sums, data, jnp.int32(0))
        return new, sums

    expected = run(1)
    assert (expected[0].step, expected[1]["updates"]) == (6, 6)
    for length in (3, 4):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(length), expected)


def test_past_the_end_even_a_batch_that_is_not_finite_is_not_counted():
    train_step, state = build(total_steps=1)
    state, _ = train_step(state, batch(mask=np.full(8, np.nan)), jax.random.key(0))
    after, sums = train_step(state, batch(mask=np.full(8, np.nan)), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert not any(jax.tree.leaves(sums))


@pytest.mark.eight_devices
def test_the_average_has_the_statistics_of_averaged_parameters():
    """The running mean that is averaged follows the same weights as the parameters (the class has none: given here)."""

    class Counting(Linear):
        @nn.compact
        def __call__(self, images, *, train):
            seen = self.variable("batch_stats", "seen", lambda: jnp.full((), 7.0))
            if train:
                seen.value = seen.value + 1.0
            return Linear()(images, train=train)

    train_step, state = build(model=Counting(), ema_decay=0.5)
    expected_params, expected_seen = state.params, 7.0
    for step in range(3):
        state, _ = train_step(state, batch(), jax.random.key(step))
        weight = max(0.5, 9 / (10 + step))
        expected_params = jax.tree.map(lambda e, p, w=weight: (1 - w) * e + w * p, expected_params, state.params)
        expected_seen = (1 - weight) * expected_seen + weight * (7 + step + 1)
    chex_close(state.variables["params"], expected_params)
    assert float(state.variables["batch_stats"]["seen"]) == pytest.approx(expected_seen)
    assert float(state.batch_stats["seen"]) == 7 + 3


def chex_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)


@pytest.mark.parametrize("unit", [1, 2])
def test_a_batch_is_dealt_out_to_its_parts_with_what_belongs_together(unit):
    dealt = np.asarray(steps.split_into_parts({"x": jnp.arange(24)}, 3, unit)["x"])
    assert sorted(dealt.ravel()) == list(range(24))
    units = dealt.reshape(3, -1, unit)
    assert (np.diff(units, axis=-1) == 1).all() and (units[..., 0] % unit == 0).all()
    assert [part[0, 0] for part in units] == [0, unit, 2 * unit]


def test_parts_are_augmented_as_the_whole_batch_is_and_one_at_a_time():
    """Pairs are mixed with the same keys; and no array of floats of the whole batch is made."""
    config = configs.default_config("lenet5").augment
    config.crop.probability = config.flip.probability = config.mixup.probability = 0.5
    results, shapes = {}, {}
    for accumulate in (1, 4):
        train_step, state = build(augment=augmentation.make_augment(config), accumulate=accumulate, unit=2)
        images = np.tile(IMAGES, (16, 1, 1, 1))[:16]
        given = {"image": images, "label": np.arange(16, dtype=np.int32) % NUM_CLASSES, "mask": np.ones(16, np.float32)}
        results[accumulate] = jax.device_get(train_step(state, given, jax.random.key(1))[0].params)
        text = str(jax.make_jaxpr(train_step)(state, given, jax.random.key(1)))
        shapes[accumulate] = set(re.findall(r"f32\[(\d+),4,4,1\]", text))
    chex_close(results[4], results[1])
    assert "16" in shapes[1]
    assert shapes[4] <= {"1", "2", "4"}


def test_keys_depend_on_seed_step_and_place_and_not_on_the_layout():
    data = jax.random.key_data
    key = rng.step_key(0, jnp.int32(5))
    assert not np.array_equal(data(key), data(rng.step_key(0, jnp.int32(6))))
    assert not np.array_equal(data(key), data(rng.step_key(1, jnp.int32(5))))
    whole = data(rng.example_keys(key, 16))
    mapped = jax.pmap(lambda k: rng.example_keys(k, 2), axis_name="data")(
        jax.random.wrap_key_data(np.stack([data(key)] * 8))
    )
    np.testing.assert_array_equal(data(mapped).reshape(16, -1), whole)


def test_decay_mask_is_the_one_of_the_optimizer():
    _, state = build()
    assert optim.decay_mask(state.params) == {"Dense_0": {"kernel": True, "bias": False}}


@pytest.mark.parametrize("kind", ["mirror", "mirror_shift"])
def test_an_evaluation_adds_up_the_logits_of_the_views(kind):
    model, weights = Linear(), np.random.default_rng(1).normal(size=(16, NUM_CLASSES)).astype(np.float32)
    variables = {"params": {"Dense_0": {"kernel": weights, "bias": np.zeros(NUM_CLASSES, np.float32)}}}
    eval_step = steps.make_eval_step(
        TASK,
        model=model,
        views=lambda images: views(kind, to_float(images)),
        normalize=lambda images: images,
    )
    sums, probabilities = jax.jit(eval_step)(variables, {"image": IMAGES, "label": LABELS, "mask": EVERY})
    images = IMAGES / np.float32(255)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    mean = images if kind == "mirror" else images / 2 + padded[:, :4, :4] / 4 + padded[:, 2:, 2:] / 4
    logits = (mean + mean[:, :, ::-1]).reshape(8, -1) @ weights / 2  # the model is linear
    np.testing.assert_allclose(probabilities, scipy.special.softmax(logits, axis=1), rtol=1e-4)
    assert float(sums["loss"]) == pytest.approx(
        -np.log(np.asarray(probabilities)[np.arange(8), LABELS]).sum(), rel=1e-4
    )
