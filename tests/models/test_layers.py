import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from vitcls.errors import UserError
from vitcls.models import layers

DROPOUT = {"dropout": jax.random.key(7)}


class Masks(nn.Module):
    """Element-wise dropout, then whole examples dropped."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = layers.Dropout(0.3, axis_name=self.axis_name)(x, train=True)
        return layers.DropPath(0.4, axis_name=self.axis_name)(x, train=True)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_masks_are_the_same_on_one_device_sharded_and_mapped():
    x = np.ones((16, 5, 6), np.float32)
    one = np.asarray(jax.jit(lambda x: Masks().apply({}, x, rngs=DROPOUT))(x))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(jax.jit(lambda x: Masks().apply({}, x, rngs=DROPOUT))(spread), one)

    mapped = jax.pmap(lambda x: Masks("data").apply({}, x, rngs=DROPOUT), axis_name="data")
    np.testing.assert_array_equal(mapped(x.reshape(8, 2, 5, 6)).reshape(x.shape), one)
    assert len({row.tobytes() for row in one if row.any()}) > 4  # the examples differ


def test_an_example_keeps_its_mask_in_a_larger_batch():
    x = np.ones((8, 20), np.float32)
    drop = layers.Dropout(0.5)
    whole, part = (drop.apply({}, batch, train=True, rngs=DROPOUT) for batch in (x, x[:4]))
    np.testing.assert_array_equal(whole[:4], part)


def test_dropout_differs_between_keys_and_is_off_outside_of_training():
    x = normal(0, 4, 200)
    drop = layers.Dropout(0.25)
    first, second = (drop.apply({}, x, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
    assert (np.asarray(first) != np.asarray(second)).any()
    np.testing.assert_array_equal(drop.apply({}, x, train=False), x)
    np.testing.assert_array_equal(layers.Dropout(0.0).apply({}, x, train=True), x)
    kept = np.asarray(first) != 0
    np.testing.assert_allclose(np.asarray(first)[kept], x[kept] / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / x.size)


def test_drop_path_drops_whole_examples_and_keeps_the_expectation():
    x = np.broadcast_to(normal(0, 1, 2, 3), (4000, 2, 3))
    y = np.asarray(layers.DropPath(0.2).apply({}, x, train=True, rngs=DROPOUT))
    kept = y.any(axis=(1, 2))
    np.testing.assert_allclose(y[kept], x[kept] / 0.8, rtol=1e-6)
    assert abs(kept.mean() - 0.8) < 4 * math.sqrt(0.8 * 0.2 / len(x))
    np.testing.assert_allclose(y.mean(axis=0), x[0], rtol=0.04)
    np.testing.assert_array_equal(layers.DropPath(0.2).apply({}, x, train=False), x)


def test_layer_scale_is_one_factor_per_channel():
    x, scale = normal(0, 2, 3, 4), normal(1, 4)
    y, variables = layers.LayerScale(0.1).init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y, 0.1 * x, rtol=1e-6)
    assert variables["params"]["scale"].shape == (4,)
    y = layers.LayerScale(0.1).apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(y, x * scale[None, None], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 9, 6), (2, 3, 3, 6)])
def test_squeeze_excite(shape):
    x = normal(0, *shape)
    reduce, expand = normal(1, 6, 4), normal(2, 4, 6)
    reduce_bias, expand_bias = normal(3, 4), normal(4, 6)
    params = {"reduce": {"kernel": reduce, "bias": reduce_bias}, "expand": {"kernel": expand, "bias": expand_bias}}
    mean = x.reshape(2, 9, 6).astype(np.float64).mean(axis=1)
    gate = scipy.special.expit(np.maximum(mean @ reduce + reduce_bias, 0) @ expand + expand_bias)
    expected = (x.reshape(2, 9, 6) * gate[:, None]).reshape(shape)
    np.testing.assert_allclose(layers.SqueezeExcite(4).apply({"params": params}, x), expected, rtol=1e-5)


def test_depthwise_convolution_is_that_of_scipy():
    x, kernel, bias = normal(0, 2, 4, 5, 3), normal(1, 3, 3, 1, 3), normal(2, 3)
    y = layers.DepthwiseConv3x3().apply({"params": {"kernel": kernel, "bias": bias}}, x)
    for example in range(2):
        for channel in range(3):
            expected = scipy.signal.correlate2d(x[example, ..., channel], kernel[:, :, 0, channel], mode="same")
            np.testing.assert_allclose(y[example, ..., channel], expected + bias[channel], rtol=1e-4, atol=1e-5)


def test_depthwise_convolution_has_the_parameters_and_gradients_of_flax():
    x = normal(0, 2, 4, 4, 6)
    ours, flax = layers.DepthwiseConv3x3(), nn.Conv(6, (3, 3), feature_group_count=6)
    params = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, flax.init(jax.random.key(0), x))

    def gradients(module):
        return jax.jit(jax.grad(lambda params, x: jnp.sum(jnp.sin(module.apply(params, x))), argnums=(0, 1)))(params, x)

    for got, expected in zip(jax.tree.leaves(gradients(ours)), jax.tree.leaves(gradients(flax)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("raw_power", [-1.0, 0.5, 4.0])
def test_generalized_mean(raw_power):
    x = np.abs(normal(0, 2, 7, 3)) + 0.1
    x[:, :3] *= -1  # counts as eps
    power = 1 + np.logaddexp(0, raw_power)
    expected = np.mean(np.maximum(x, 1e-4).astype(np.float64) ** power, axis=1) ** (1 / power)
    y = layers.GeneralizedMean().apply({"params": {"power": jnp.float32(raw_power)}}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_generalized_mean_starts_at_the_cube_and_stays_finite_for_large_powers_and_negative_channels():
    x = -np.abs(normal(0, 2, 7, 3))  # every channel is at eps
    pool = layers.GeneralizedMean()
    start = pool.init(jax.random.key(0), x)
    np.testing.assert_allclose(1 + np.logaddexp(0, start["params"]["power"]), 3.0, rtol=1e-6)

    value_and_grad = jax.jit(jax.value_and_grad(lambda params, x: pool.apply(params, x).sum(), argnums=(0, 1)))
    for scale in (1.0, -1e4):
        value, grads = value_and_grad({"params": {"power": jnp.float32(60.0)}}, scale * x)
        assert np.isfinite(value) and value > 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_attention_pool():
    x, query = normal(0, 2, 7, 6), 3 * normal(1, 6)
    weights = scipy.special.softmax(x.astype(np.float64) @ query / math.sqrt(6), axis=1)
    y = layers.AttentionPool().apply({"params": {"query": query}}, x)
    np.testing.assert_allclose(y, np.sum(weights[..., None] * x, axis=1), rtol=1e-4, atol=1e-6)


def test_sincos_positions_are_sine_and_cosine_of_column_and_row():
    positions = layers.sincos_position_embedding(2, 3, 8)
    for row in range(2):
        for column in range(3):
            expected = [
                wave(place / 10_000 ** (i / 2))
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for i in (0, 1)
            ]
            np.testing.assert_allclose(positions[row * 3 + column], expected, atol=1e-6)
    with pytest.raises(UserError, match="hidden_dim=6 must be a multiple of 4"):
        layers.sincos_position_embedding(2, 2, 6)


@pytest.mark.parametrize("size", [(12, 12), (12, 9), (5, 4)])
def test_positions_are_interpolated_as_pictures_are(size):
    stored = normal(0, 8, 8, 3)
    resized = layers.interpolate_position_embedding(stored, *size)
    for channel in range(3):
        expected = Image.fromarray(stored[..., channel]).resize(size[::-1], Image.Resampling.BICUBIC)
        np.testing.assert_allclose(resized[..., channel], np.asarray(expected), atol=1e-5)
    assert layers.interpolate_position_embedding(stored, 8, 8) is stored


def test_activations():
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    expected = {
        "gelu": x * scipy.special.ndtr(x),
        "relu": np.maximum(x, 0),
        "silu": x * scipy.special.expit(x),
    }
    assert set(expected) == set(layers.ACTIVATIONS)
    for name, y in expected.items():
        np.testing.assert_allclose(layers.activation(name)(x), y, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="activation 'gleu' is not known; did you mean 'gelu'"):
        layers.activation("gleu")
