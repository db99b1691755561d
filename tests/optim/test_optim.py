import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from vitcls import optim
from vitcls.core.errors import UserError
from vitcls.tasks import losses

TOTAL, WARMUP, RATE = 100, 10, 0.4


def optimizer_config(**changes):
    defaults = {
        "name": "adamw",
        "learning_rate": RATE,
        "weight_decay": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "momentum": 0.9,
        "nesterov": False,
        "clip_norm": 0.0,
        "accumulate": 1,
        "ema_decay": 0.0,
        "multipliers": (),
        "base_batch_size": 0,
    }
    return ConfigDict(defaults | changes)


def schedule_config(**changes):
    defaults = {
        "name": "cosine",
        "warmup": "0 steps",
        "final": 0.0,
        "boundaries": ("50%", "75%"),
        "factor": 0.1,
        "every": "1 epochs",
        "peak": 0.3,
        "metric": "eval/loss",
        "patience": 5,
    }
    return ConfigDict(defaults | changes)


def make_schedule(*, optimizer=None, total_steps=TOTAL, **changes):
    return optim.make_schedule(
        schedule_config(**changes),
        optimizer or optimizer_config(),
        batch_size=32,
        num_examples=160,  # 5 steps in an epoch
        total_steps=total_steps,
    )


def cosine(t, start, end, begin, length):
    return end + (start - end) * (1 + np.cos(np.pi * (t - begin) / length)) / 2


AFTER_WARMUP = {  # the rate at step t >= WARMUP
    "constant": ({}, lambda t: RATE),
    "plateau": ({}, lambda t: RATE),
    "step": (
        {"boundaries": ("50%", "75 steps"), "factor": 0.2},
        lambda t: RATE if t < 50 else RATE * 0.2 if t < 75 else RATE * 0.04,
    ),
    "exponential": ({"every": "2 epochs", "factor": 0.5}, lambda t: RATE * 0.5 ** ((t - WARMUP) / 10)),
    "linear": ({"final": 0.25}, lambda t: RATE + (0.25 * RATE - RATE) * (t - WARMUP) / (TOTAL - WARMUP)),
    "cosine": ({"final": 0.1}, lambda t: cosine(t, RATE, 0.1 * RATE, WARMUP, TOTAL - WARMUP)),
}
STEPS = [0, 1, WARMUP - 1, WARMUP, WARMUP + 1, 49, 50, 51, 74, 75, 76, TOTAL - 1, TOTAL]


@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_schedules_have_their_closed_form(name):
    changes, after = AFTER_WARMUP[name]
    schedule = jax.jit(make_schedule(name=name, warmup="2 epochs", **changes))
    for step in STEPS:
        expected = RATE * step / WARMUP if step < WARMUP else after(step)
        rate = schedule(step)
        assert rate.dtype == jnp.float32 and rate.shape == ()
        np.testing.assert_allclose(rate, expected, rtol=2e-6, err_msg=f"step {step}")


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_onecycle_rises_and_falls_along_half_cosines(final):
    schedule = jax.jit(make_schedule(name="onecycle", peak=0.3, final=final))
    for step in [0, 1, 15, 29, 30, 31, 60, 99, 100, 150]:
        rise = cosine(step, RATE / 25, RATE, 0, 30)
        fall = cosine(min(step, 100), RATE, final * RATE, 30, 70)
        np.testing.assert_allclose(schedule(step), rise if step < 30 else fall, rtol=5e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["linear", "cosine", "onecycle"])
def test_the_final_rate_is_reached_at_the_total_and_kept(name):
    schedule = make_schedule(name=name, final=0.5)
    assert float(schedule(TOTAL - 1)) > 0.5 * RATE
    np.testing.assert_allclose([schedule(TOTAL), schedule(2 * TOTAL)], 0.5 * RATE, rtol=1e-6)


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("total_steps", [1, 2])
def test_very_short_runs_have_finite_rates(name, total_steps):
    warmup = "0 steps" if name == "onecycle" else "5%"
    schedule = make_schedule(name=name, warmup=warmup, total_steps=total_steps)
    rates = np.array([schedule(step) for step in range(total_steps + 1)])
    assert np.all(np.isfinite(rates)) and np.all(rates >= 0) and np.all(rates <= RATE * 1.000001)


def test_boundaries_that_round_to_one_step_all_count():
    np.testing.assert_allclose(make_schedule(name="step", total_steps=1)(1), RATE * 0.1 * 0.1, rtol=1e-6)


def test_learning_rate_scales_with_the_batch_size():
    schedule = make_schedule(name="constant", optimizer=optimizer_config(base_batch_size=256))
    np.testing.assert_allclose(schedule(0), RATE * 32 / 256, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cosin"}, "config.schedule.name 'cosin' is not known; did you mean 'cosine'?"),
        ({"warmup": "101 steps"}, "config.schedule.warmup='101 steps' is 101 steps, more than the 100"),
        ({"warmup": "5"}, "config.schedule.warmup: a duration needs a unit"),
        ({"final": 1.5}, "config.schedule.final=1.5"),
        ({"name": "linear", "final": -0.1}, "config.schedule.final=-0.1"),
        ({"name": "step", "factor": 0.0}, "config.schedule.factor=0.0"),
        ({"name": "step", "boundaries": ("75%", "50%")}, "config.schedule.boundaries=('75%', '50%')"),
        ({"name": "step", "boundaries": ("50%", "50%")}, "config.schedule.boundaries"),
        ({"name": "step", "boundaries": ("5%",), "warmup": "6 steps"}, "after the 6 steps of config.schedule.warmup"),
        ({"name": "step", "boundaries": ("5 %", "6 epoc")}, "config.schedule.boundaries: duration unit 'epoc'"),
        ({"name": "exponential", "factor": -1.0}, "config.schedule.factor=-1.0"),
        ({"name": "exponential", "every": "0 steps"}, "config.schedule.every='0 steps'"),
        ({"name": "onecycle", "peak": 0.0}, "config.schedule.peak=0.0"),
        ({"name": "onecycle", "peak": 1.0}, "config.schedule.peak=1.0"),
        ({"name": "onecycle", "final": 2.0}, "config.schedule.final=2.0"),
        ({"name": "onecycle", "warmup": "1 steps"}, "config.schedule.warmup='1 steps'"),
        ({"name": "plateau", "factor": 1.0}, "config.schedule.factor=1.0"),
        ({"name": "plateau", "patience": 0}, "config.schedule.patience=0"),
        ({"optimizer": optimizer_config(learning_rate=-0.1)}, "config.optimizer.learning_rate=-0.1"),
        ({"optimizer": optimizer_config(learning_rate=float("nan"))}, "config.optimizer.learning_rate=nan"),
        ({"optimizer": optimizer_config(base_batch_size=-1)}, "config.optimizer.base_batch_size=-1"),
    ],
)
def test_impossible_schedules(changes, message):
    with pytest.raises(UserError) as caught:
        make_schedule(**changes)
    assert message in str(caught.value)


PARAMS = {
    "patch_embedding": {"kernel": np.ones((2, 2, 3, 6)), "bias": np.ones(6)},
    "position_embedding": np.ones((1, 4, 6)),
    "block": {
        "norm": {"scale": np.ones(6), "bias": np.ones(6)},
        "dense": {"kernel": np.ones((6, 4)), "bias": np.ones(4)},
        "conv": {"kernel": np.ones((2, 2, 6, 4))},
        "depthwise": {"kernel": np.ones((3, 3, 1, 4))},
    },
    "head": {"kernel": np.ones((4, 3)), "bias": np.ones(3)},
}
DECAYED = {
    "patch_embedding": {"kernel": True, "bias": False},
    "position_embedding": False,
    "block": {
        "norm": {"scale": False, "bias": False},
        "dense": {"kernel": True, "bias": False},
        "conv": {"kernel": True},
        "depthwise": {"kernel": True},
    },
    "head": {"kernel": True, "bias": False},
}
RATES = (0.1, 0.03, 0.5)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


GRADS = [random_like(PARAMS, seed) for seed in (1, 2, 3)]


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)


def train(config, params, grads_of=lambda step, params: GRADS[step]):
    """Three steps as the train step makes them: params + rate * updates."""
    optimizer = optim.make_optimizer(config, shapes(params))

    @jax.jit
    def update(rate, grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state

    state = optimizer.init(params)
    for step, rate in enumerate(RATES):
        params, state = update(rate, grads_of(step, params), state, params)
    return params


def train_with(optimizer, params, grads_of=lambda step, params: GRADS[step]):
    """Three steps as optax makes them, the learning rate inside of the optimizer."""

    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for step in range(len(RATES)):
        params, state = update(grads_of(step, params), state, params)
    return params


def assert_trees_close(tree, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for (path, leaf), wanted in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def rate_inside(step):
    return jnp.asarray(RATES)[step]


def muon_reference(weight_decay):
    """Muon by a table of names, from three optax optimizers that decay their own parameters."""
    labels = jax.tree.map(lambda decayed: "adam, decayed" if decayed else "adam", DECAYED)
    labels["block"]["dense"]["kernel"] = "dense"
    labels["block"]["conv"]["kernel"] = "conv"

    def muon(dimension_numbers):
        return optax.contrib.muon(
            rate_inside,
            beta=0.8,
            nesterov=True,
            weight_decay=weight_decay,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: dimension_numbers, params),
            consistent_rms=0.2,
        )

    return optax.partition(
        {
            "dense": muon(optax.contrib.MuonDimensionNumbers(0, 1)),
            "conv": muon(optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)),
            "adam": optax.nadam(rate_inside),
            "adam, decayed": optax.nadamw(rate_inside, weight_decay=weight_decay),
        },
        labels,
    )


REFERENCES = {
    "adam": ({"b1": 0.8, "b2": 0.99, "eps": 1e-3}, lambda: optax.adam(rate_inside, b1=0.8, b2=0.99, eps=1e-3)),
    "adamw": (
        {"weight_decay": 0.1, "b1": 0.8, "b2": 0.99, "eps": 1e-3},
        lambda: optax.adamw(rate_inside, b1=0.8, b2=0.99, eps=1e-3, weight_decay=0.1, mask=DECAYED),
    ),
    "sgd": ({"momentum": 0.8, "nesterov": True}, lambda: optax.sgd(rate_inside, momentum=0.8, nesterov=True)),
    "lamb": (
        {"weight_decay": 0.1, "b1": 0.8, "b2": 0.99, "eps": 1e-3},
        lambda: optax.lamb(rate_inside, b1=0.8, b2=0.99, eps=1e-3, weight_decay=0.1, mask=DECAYED),
    ),
    "lion": (
        {"weight_decay": 0.1, "b1": 0.8, "b2": 0.99},
        lambda: optax.lion(rate_inside, b1=0.8, b2=0.99, weight_decay=0.1, mask=DECAYED),
    ),
    "muon": ({"weight_decay": 0.1, "momentum": 0.8, "nesterov": True}, lambda: muon_reference(0.1)),
}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_scaling_outside_equals_optax_with_the_learning_rate_inside(name):
    changes, reference = REFERENCES[name]
    params = random_like(PARAMS, 0)
    # Newton-Schulz iterations amplify the rounding of sums taken in another order.
    tolerance = 1e-4 if name == "muon" else 1e-6
    result = train(optimizer_config(name=name, **changes), params)
    assert_trees_close(result, train_with(reference(), params), atol=tolerance)


def test_adam_with_the_l2_term_by_hand():
    """PyTorch's Adam(weight_decay=l2): the gradient of a decayed parameter grows by l2 times the parameter."""
    l2, b1, b2, eps = 0.3, 0.9, 0.999, 1e-8
    params = random_like(PARAMS, 0)

    def by_hand(param, decayed, *grads):
        param, m, v = np.asarray(param, np.float64), 0.0, 0.0
        for t, (rate, grad) in enumerate(zip(RATES, grads, strict=True), start=1):
            grad = np.asarray(grad, np.float64) + (l2 * param if decayed else 0.0)
            m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
            param = param - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        return param

    def grads_of(step, params):
        penalty = jax.grad(lambda p: l2 * losses.l2_penalty(p, optim.decay_mask(p)))(params)
        return jax.tree.map(jnp.add, GRADS[step], penalty)

    result = train(optimizer_config(name="adam"), params, grads_of)
    assert_trees_close(result, jax.tree.map(by_hand, params, DECAYED, *GRADS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_decoupled_decay_by_hand(momentum):
    weight_decay = 0.2
    params = random_like(PARAMS, 0)

    def by_hand(param, decayed, *grads):
        param, velocity = np.asarray(param, np.float64), 0.0
        for rate, grad in zip(RATES, grads, strict=True):
            velocity = momentum * velocity + np.asarray(grad, np.float64)
            param = param - rate * (velocity + (weight_decay * param if decayed else 0.0))
        return param

    config = optimizer_config(name="sgd", momentum=momentum, weight_decay=weight_decay)
    assert_trees_close(train(config, params), jax.tree.map(by_hand, params, DECAYED, *GRADS))


def test_clipping_comes_first_and_is_by_the_global_norm():
    params = random_like(PARAMS, 0)
    norms = [np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads))) for grads in GRADS]
    clipped = [
        jax.tree.map(lambda g, n=norm: g * min(1, 0.5 / n), grads) for norm, grads in zip(norms, GRADS, strict=True)
    ]
    config = optimizer_config(name="adamw", weight_decay=0.1, eps=1.0)
    expected = train(config, params, lambda step, _: clipped[step])
    config.clip_norm = 0.5
    assert_trees_close(train(config, params), expected)


class EveryKind(nn.Module):
    """One of each layer that the models of vitcls are made of."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(8, (2, 2), strides=2, name="patch_embedding")(images)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.GroupNorm(2)(x).reshape(x.shape[0], -1, 8)  # [B, H, W, C] -> [B, N, C]
        x = x + self.param("position_embedding", nn.initializers.normal(), (1, *x.shape[1:]))
        class_token = self.param("class_token", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(class_token, (x.shape[0], 1, 8)), x], axis=1)
        x = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x * self.param("layer_scale", nn.initializers.ones, (1, 1, 8))
        x = x + nn.Embed(3, 8)(jnp.zeros((1, 1), jnp.int32))
        return nn.Dense(5, name="head")(x[:, 0])


def test_decay_mask_keeps_the_kernels_of_a_real_module_and_nothing_else():
    shapes = jax.eval_shape(EveryKind().init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    mask = optim.decay_mask(shapes)
    assert jax.tree.structure(mask) == jax.tree.structure(shapes)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): keep for path, keep in jax.tree.leaves_with_path(mask)
    }
    attention = "MultiHeadDotProductAttention_0"
    assert {path for path, keep in flat.items() if keep} == {
        "patch_embedding/kernel",
        "depthwise/kernel",
        "head/kernel",
        *(f"{attention}/{name}/kernel" for name in ("query", "key", "value", "out")),
    }
    left_out = {
        "class_token",
        "position_embedding",
        "layer_scale",
        "Embed_0/embedding",
        "BatchNorm_0/scale",
        "head/bias",
    }
    assert left_out | {f"{attention}/query/bias"} <= {path for path, keep in flat.items() if not keep}


def test_decay_mask_by_name():
    assert optim.decay_mask(PARAMS) == DECAYED


def test_multipliers_scale_the_learning_rate_and_the_first_match_wins():
    params = random_like(PARAMS, 0)
    multipliers = (("^block/norm", 1.0), ("^block/", 0.25), ("kernel$", 3.0))
    config = optimizer_config(weight_decay=0.1)
    plain = optim.make_optimizer(config, params)
    expected, _ = plain.update(GRADS[0], plain.init(params), params)
    config.multipliers = multipliers
    scaled = optim.make_optimizer(config, params)
    updates, _ = scaled.update(GRADS[0], scaled.init(params), params)
    for path, factor in {
        ("block", "norm", "scale"): 1.0,
        ("block", "dense", "kernel"): 0.25,
        ("block", "dense", "bias"): 0.25,
        ("head", "kernel"): 3.0,
        ("patch_embedding", "kernel"): 3.0,
        ("head", "bias"): 1.0,
    }.items():
        update, wanted = updates, expected
        for part in path:
            update, wanted = update[part], wanted[part]
        np.testing.assert_allclose(update, factor * wanted, rtol=1e-6, err_msg="/".join(path))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_multiplier_zero_freezes(name):
    """The frozen part neither moves nor decays, has no moments, and does not share in the clipped norm."""
    params = random_like(PARAMS, 0)
    weight_decay = 0.0 if name == "adam" else 0.1
    config = optimizer_config(name=name, weight_decay=weight_decay, clip_norm=0.5, multipliers=(("^(?!head)", 0),))
    result = train(config, params)
    for part in ("block", "patch_embedding", "position_embedding"):
        jax.tree.map(np.testing.assert_array_equal, result[part], params[part])
    state = optim.make_optimizer(config, shapes(params)).init(params)
    stored = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert stored <= 3 + 2 * sum(leaf.size for leaf in jax.tree.leaves(params["head"]))  # 3: Newton-Schulz coefficients

    config.multipliers = ()
    alone = train(config, {"head": params["head"]}, lambda step, _: {"head": GRADS[step]["head"]})
    assert_trees_close(result["head"], alone["head"])
    assert np.any(np.abs(result["head"]["kernel"] - params["head"]["kernel"]) > 1e-3)


def test_everything_may_be_frozen():
    params = random_like(PARAMS, 0)
    result = train(optimizer_config(weight_decay=0.1, clip_norm=1.0, multipliers=((".", 0.0),)), params)
    jax.tree.map(np.testing.assert_array_equal, result, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamm"}, "config.optimizer.name 'adamm' is not known; did you mean 'adam"),
        ({"name": "adam", "weight_decay": 0.1}, "config.loss.l2"),
        ({"weight_decay": -0.1}, "config.optimizer.weight_decay=-0.1"),
        ({"b1": 1.0}, "config.optimizer.b1=1.0"),
        ({"b2": -0.1}, "config.optimizer.b2=-0.1"),
        ({"eps": 0.0}, "config.optimizer.eps=0.0"),
        ({"name": "sgd", "momentum": 1.0}, "config.optimizer.momentum=1.0"),
        ({"clip_norm": -1.0}, "config.optimizer.clip_norm=-1.0"),
        ({"multipliers": (("encoder", 0.1),)}, "'encoder' is found in no parameter's path"),
        ({"multipliers": (("head(", 0.1),)}, "'head(' is not a regular expression"),
        ({"multipliers": (("head", -0.1),)}, "config.optimizer.multipliers=('head', -0.1)"),
        ({"multipliers": (("head", float("inf")),)}, "config.optimizer.multipliers=('head', inf)"),
        ({"multipliers": (("head",),)}, "is not a pair"),
        ({"multipliers": (("head", "slow"),)}, "is not a pair"),
        ({"multipliers": ("head", 0.1)}, "is not a pair"),
    ],
)
def test_impossible_optimizers(changes, message):
    with pytest.raises(UserError) as caught:
        optim.make_optimizer(optimizer_config(**changes), shapes(PARAMS))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_plateau_reduces_after_patience_evaluations_without_improvement(maximize, patience):
    losses_seen = [0.9, 0.8, 0.8, 0.81, 0.79999, 0.9, 0.85, float("nan"), 0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.6, 0.6, 0.6]
    config = schedule_config(name="plateau", patience=patience, factor=0.5)
    update = jax.jit(lambda state, value: optim.plateau_update(config, state, value, maximize))
    state = optim.plateau_init(config)
    types = jax.tree.map(jax.typeof, state)
    best, bad, scale = np.inf, 0, 1.0
    for loss in losses_seen:
        best, bad = (loss, 0) if loss < best else (best, bad + 1)
        if bad == patience:
            bad, scale = 0, scale * 0.5
        value = 1 - loss if maximize else loss
        state = update(state, value)
        assert float(state.scale) == scale
        assert jax.tree.map(jax.typeof, state) == types
    assert scale < 1


def test_plateau_update_takes_a_state_on_the_host():
    config = schedule_config(name="plateau", patience=1, factor=0.5)
    state = optim.plateau_init(config)
    for value in (1.0, 1.0):
        state = optim.plateau_update(config, jax.device_get(state), value, False)
    assert float(state.scale) == 0.5


def test_only_the_plateau_schedule_has_a_state():
    assert optim.plateau_init(schedule_config(name="cosine", patience=0)) is None


def test_ema_has_its_closed_form():
    params = [1.0, 5.0, -2.0, 4.0]
    ema = {"w": jnp.zeros(2)}
    expected = 0.0
    update = jax.jit(lambda ema, params, step: optim.ema_update(ema, params, 0.2, step))
    for step, value in enumerate(params):
        decay = min(0.2, [1 / 10, 2 / 11, 3 / 12, 4 / 13][step])
        expected = decay * expected + (1 - decay) * value
        ema = update(ema, {"w": jnp.full(2, value)}, step)
        assert ema["w"].dtype == jnp.float32
        np.testing.assert_allclose(ema["w"], expected, rtol=1e-6)


def test_ema_keeps_the_digits_of_a_decay_near_one():
    ema = optim.ema_update({"w": jnp.zeros(())}, {"w": jnp.ones(())}, 0.99999, 10**9)
    np.testing.assert_allclose(ema["w"], 1e-5, rtol=1e-6)
