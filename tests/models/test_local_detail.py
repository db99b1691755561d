"""The kernels of the feed-forward network, interpreted, against its plain form; and as they are lowered for a GPU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import special

from vitcls import models
from vitcls.core import rng, sharding
from vitcls.models import forms, local_detail, vit

DIM = 6
SHAPES = {
    "odd batch": (3, (2, 3), 24),
    "two groups of images": (16, (3, 2), 8),
    "one column": (1, (4, 1), 32),
    "wide": (2, (1, 5), 8),
}
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def layer(grid, width, *, form, squeeze_excite=0.5, dtype="float32"):
    design = vit.Design(
        2, width, local_conv=True, squeeze_excite=squeeze_excite, feed_forward=form, grouped_conv="xla", dtype=dtype
    )
    return vit.FeedForward(design, grid)


def inputs(batch, grid, width, squeeze_excite=0.5):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(batch, math.prod(grid), DIM)).astype(np.float32)
    plain = layer(grid, width, form="xla", squeeze_excite=squeeze_excite)
    shapes = jax.eval_shape(lambda key: plain.init(key, x, train=False), jax.random.key(0))["params"]
    return x, jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)


@functools.partial(compiled, static_argnums=0)
def value_and_gradients(module, params, x):
    """The output, and the gradients of a loss that weighs all of it, by parameters and input."""

    def loss(params, x):
        y = module.apply({"params": params}, x, train=True)
        return jnp.sum(y.astype(jnp.float32) * jnp.sin(jnp.arange(y.size)).reshape(y.shape)), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, gradients


def assert_near(ours, theirs, tolerance):
    """Each array within `tolerance` of its largest value."""

    def near(one, other):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())

    jax.tree.map(near, ours, theirs)


@pytest.mark.by_turns
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_and_their_written_gradient_are_those_of_the_plain_form(shape):
    batch, grid, width = SHAPES[shape]
    x, params = inputs(batch, grid, width)
    ours = value_and_gradients(layer(grid, width, form="pallas"), params, x)
    assert_near(ours, value_and_gradients(layer(grid, width, form="xla"), params, x), 5e-5)


def test_without_a_gate_too():
    x, params = inputs(2, (2, 2), 8, squeeze_excite=0.0)
    assert "squeeze_excite" not in params
    ours = value_and_gradients(layer((2, 2), 8, form="pallas", squeeze_excite=0.0), params, x)
    assert_near(ours, value_and_gradients(layer((2, 2), 8, form="xla", squeeze_excite=0.0), params, x), 5e-5)


def test_in_bfloat16_kernels_are_no_further_from_float32_than_the_plain_form():
    batch, grid, width = SHAPES["odd batch"]
    x, params = inputs(batch, grid, width)
    exact = value_and_gradients(layer(grid, width, form="xla"), params, x)
    ours, theirs = (
        value_and_gradients(layer(grid, width, form=form, dtype="bfloat16"), params, x) for form in ("pallas", "xla")
    )
    assert ours[0].dtype == theirs[0].dtype == jnp.bfloat16

    def error(found):
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        return max(float(jnp.abs(one.astype(jnp.float32) - two).max() / jnp.abs(two).max()) for one, two in pairs)

    assert 1e-4 < error(ours) < 1.2 * error(theirs) < 0.25


@pytest.mark.eight_devices
def test_each_device_computes_its_own_images():
    partition = sharding.all_devices("data")
    x, params = inputs(8, (2, 2), 8)
    module = layer((2, 2), 8, form="pallas")
    with rng.spread_over(partition.mesh):
        spread = jax.jit(lambda params, x: value_and_gradients.__wrapped__(module, params, x))
        placed = jax.device_put(x, NamedSharding(partition.mesh, PartitionSpec(rng.BATCH_AXIS)))
        program = spread.lower(params, placed).compile()
    assert "all-gather" not in program.as_text() and "all-reduce" in program.as_text()
    assert_near(
        program(jax.device_put(params, partition.sharding()), placed), value_and_gradients(module, params, x), 2e-6
    )


@pytest.mark.by_turns
def test_a_model_has_the_same_parameters_and_gradients_in_either_form():
    """Two blocks, of which one has the convolution, the other a gate alone; computed again as `remat` says."""
    fields = {"patch_size": 2, "stem": "patch", "hidden_dim": 8, "depth": 2, "num_heads": 2, "mlp_dim": 32}
    model = models.create(
        "improved_vit_tiny", 3, **fields, local_conv_blocks="first_half", drop_path=0.0, remat="block"
    )
    images = np.random.default_rng(1).normal(size=(3, 6, 4, 3)).astype(np.float32)

    def init(key):
        return model.clone(feed_forward="pallas").init(key, images, train=False)["params"]

    params = jax.jit(init)(jax.random.key(0))
    ours, theirs = (
        value_and_gradients(model.clone(feed_forward=form, grouped_conv="xla"), params, images)
        for form in ("pallas", "xla")
    )
    assert_near(ours, theirs, 1e-5)
    text = str(
        jax.make_jaxpr(lambda x: model.clone(feed_forward="pallas").apply({"params": params}, x, train=False))(images)
    )
    assert text.count("local_detail_result") == 2 * 2  # in both blocks, each for NVIDIA and interpreted


@pytest.mark.skipif(jax.__version_info__ > (0, 10, 2), reason="later ones need CUDA's plugin to lower")
@pytest.mark.parametrize("grid", [(8, 8), (14, 14)])
def test_all_kernels_are_lowered_for_nvidia(grid):
    module = layer(grid, 256, form="pallas", dtype="bfloat16")
    x = jax.ShapeDtypeStruct((8, math.prod(grid), DIM), "bfloat16")
    plain = layer(grid, 256, form="xla")
    params = jax.eval_shape(lambda x: plain.init(jax.random.key(0), x, train=False), x)["params"]
    program = jax.jit(value_and_gradients.__wrapped__, static_argnums=0).trace(module, params, x)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 4
    for name in ("means", "result", "factors_gradient", "gradient"):
        assert f'name = "local_detail_{name}"' in text


@pytest.mark.parametrize(
    ("compute_capability", "fields", "lacks"),
    [
        ("9.0", {}, []),
        ("8.6", {"mlp_dim": 1536}, []),
        ("7.5", {}, ["an NVIDIA GPU, Ampere or later"]),
        ("gfx90a", {}, ["an NVIDIA GPU, Ampere or later"]),
        ("9.0", {"has_middle": False}, ["local_conv=True, or squeeze_excite of the hidden layer"]),
        (
            "9.0",
            {"activation": "silu", "class_token": True},
            ["activation='gelu'", "an aggregation without class token"],
        ),
        ("9.0", {"mlp_dim": 24}, ["an mlp_dim that is a multiple of 32"]),
    ],
)
def test_what_the_kernels_lack(compute_capability, fields, lacks):
    usual = {"has_middle": True, "activation": "gelu", "class_token": False, "mlp_dim": 64}
    assert local_detail.lacks(compute_capability, **usual | fields) == lacks


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere they may run")
def test_where_they_do_not_run_the_plain_form_does_and_the_log_says_so(monkeypatch):
    forms._feed_forward.cache_clear()
    lines = []
    monkeypatch.setattr(forms._logger, "info", lambda text, *values: lines.append(text % values))
    asked = models.create("improved_vit_tiny", 3, feed_forward="pallas")
    assert forms.for_device(asked, jax.devices()[0]).feed_forward == "xla"
    auto = models.create("improved_vit_tiny", 3)
    assert forms.for_device(auto, jax.devices()[0], training=True).feed_forward == "auto"
    assert lines == ["feed_forward='pallas' needs an NVIDIA GPU, Ampere or later; computing it by 'xla'"]


def test_the_kernels_gelu_and_its_slope_are_those_of_scipy():
    x = np.concatenate([np.linspace(-9, 9, 4001), [0.0, -1e-30, 40.0, -40.0]])
    value, slope = local_detail._gelu(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(value, x * special.ndtr(x), atol=1e-6)
    np.testing.assert_allclose(slope, special.ndtr(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi), atol=1e-6)
