import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from tests.models.literal import assert_near, literal_grouped_conv, normal
from vitcls.core import rng
from vitcls.models import checks, layers

DROPOUT = {"dropout": jax.random.key(7)}


class Masks(nn.Module):
    """Element-wise dropout, then whole examples dropped."""

    @nn.compact
    def __call__(self, x):
        x = layers.Dropout(0.3)(x, train=True)
        return layers.DropPath(0.4)(x, train=True)


@pytest.mark.eight_devices
def test_masks_are_the_same_on_one_device_sharded_and_mapped():
    x = np.ones((16, 5, 6), np.float32)
    one = np.asarray(jax.jit(lambda x: Masks().apply({}, x, rngs=DROPOUT))(x))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(jax.jit(lambda x: Masks().apply({}, x, rngs=DROPOUT))(spread), one)

    mapped = jax.pmap(lambda x: Masks().apply({}, x, rngs=DROPOUT), axis_name="data")
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


def normalized(x, axes, scale, shift, epsilon):
    x = x.astype(np.float64)
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * scale + shift


class Normalize(nn.Module):
    kind: str
    epsilon: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train):
        return layers.normalize(x, self.kind, train=train, epsilon=self.epsilon, dtype=self.dtype)


@pytest.mark.parametrize("channels", [6, 64])
@pytest.mark.parametrize("kind", ["batch", "layer", "group"])
def test_norms(kind, channels):
    x, scale, shift = 3 + normal(0, 4, 3, 2, channels), normal(1, channels), normal(2, channels)
    module = Normalize(kind, epsilon=0.1)
    variables = module.init(jax.random.key(0), x, True) | {"params": {"norm": {"scale": scale, "bias": shift}}}
    y, changed = module.apply(variables, x, True, mutable=["batch_stats"])
    if kind == "group":  # 2 groups of 3 channels, or 32 of 2
        grouped = x.reshape(4, 3, 2, {6: 2, 64: 32}[channels], -1)
        plain = normalized(grouped, (1, 2, 4), 1, 0, 0.1).reshape(x.shape)
        assert_near(y, plain * scale + shift)
    else:
        assert_near(y, normalized(x, {"batch": (0, 1, 2), "layer": 3}[kind], scale, shift, 0.1))
    if kind != "batch":
        assert not changed
        np.testing.assert_array_equal(module.apply(variables, x, False), y)
        return
    stats = changed["batch_stats"]["norm"]
    assert_near(stats["mean"], 0.1 * x.mean((0, 1, 2)))
    assert_near(stats["var"], 0.9 + 0.1 * x.var((0, 1, 2)))
    y, unchanged = module.apply(variables | changed, x, False, mutable=["batch_stats"])
    mean, variance = np.asarray(stats["mean"]), np.asarray(stats["var"])
    assert_near(y, (x - mean) / np.sqrt(variance + 0.1) * scale + shift)
    jax.tree.map(np.testing.assert_array_equal, unchanged, changed)


@pytest.mark.parametrize("kind", ["batch", "layer", "group"])
def test_norms_compute_statistics_in_float32_for_bfloat16(kind):
    x = 100 + normal(0, 8, 4, 4, 4)  # in bfloat16 the difference to the mean has no digits left
    y, variables = Normalize(kind, dtype="bfloat16").init_with_output(jax.random.key(0), x, True)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    expected = Normalize(kind).apply(variables, x, True, mutable=["batch_stats"])[0]
    assert_near(y.astype(jnp.float32), expected, 0.02)


def test_no_norm_returns_its_input_and_an_unknown_one_is_an_error():
    x = normal(0, 2, 3)
    assert layers.normalize(x, "none", train=True) is x
    with pytest.raises(ValueError, match=r"norm 'batsh' is not known; did you mean 'batch'"):
        layers.normalize(x, "batsh", train=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_local_batch_statistics_are_those_of_each_devices_examples(dtype):
    x = normal(0, 6, 3, 4, 5) + jnp.arange(6.0)[:, None, None, None]
    norm, whole = layers.LocalBatchNorm(0.9, 1e-5, dtype), nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=dtype)
    variables = norm.init(jax.random.key(0), x, train=False)
    jax.tree.map(np.testing.assert_array_equal, variables, whole.init(jax.random.key(0), x, use_running_average=True))
    variables["params"] = {"scale": normal(1, 5), "bias": normal(2, 5)}
    tolerance = 1e-5 if dtype == "float32" else 0.03

    def wholly(x):
        return whole.apply(variables, x, use_running_average=False, mutable=["batch_stats"])

    with rng.spread_over(jax.sharding.Mesh(jax.devices()[:3], (rng.BATCH_AXIS,))):
        y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    parts = [wholly(x[i : i + 2]) for i in (0, 2, 4)]
    assert y.dtype == dtype
    assert_near(y.astype(jnp.float32), jnp.concatenate([part for part, _ in parts]).astype(jnp.float32), tolerance)
    means = jax.tree.map(lambda *values: sum(values) / 3, *(stats for _, stats in parts))
    jax.tree.map(assert_near, updated, means)
    assert_near(
        norm.apply(variables, x, train=True, mutable=["batch_stats"])[0].astype(jnp.float32),
        wholly(x)[0].astype(jnp.float32),
        tolerance,
    )
    variables |= updated
    assert_near(
        norm.apply(variables, x, train=False).astype(jnp.float32),
        whole.apply(variables, x, use_running_average=True).astype(jnp.float32),
        tolerance,
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm", layers.NORMS)
def test_conv_norm_is_convolution_then_norm_then_activation(norm, groups):
    x = normal(0, 3, 6, 5, 4)
    unit = layers.ConvNorm(6, 3, 2, groups=groups, norm=norm, activation="tanh")
    y, variables = unit.init_with_output(jax.random.key(0), x, train=True)
    params = variables["params"]
    assert set(params["conv"]) == ({"kernel", "bias"} if norm == "none" else {"kernel"})
    assert set(params) == ({"conv"} if norm == "none" else {"conv", "norm"})
    assert set(variables) == ({"params", "batch_stats"} if norm in ("batch", "local_batch") else {"params"})
    expected, *_ = literal_grouped_conv(x, np.asarray(params["conv"]["kernel"]), groups, 2, 1, 0)
    if norm in ("batch", "local_batch"):
        expected = normalized(expected, (0, 1, 2), 1, 0, 1e-5)
    elif norm == "layer":
        expected = normalized(expected, 3, 1, 0, 1e-5)
    elif norm == "group":  # 2 groups of 3 channels
        expected = normalized(expected.reshape(3, 3, 3, 2, 3), (1, 2, 4), 1, 0, 1e-5).reshape(expected.shape)
    assert_near(y, np.tanh(expected), 1e-4)


@pytest.mark.parametrize("use_bias", [True, False])
def test_conv_norm_has_a_bias_where_it_is_asked_for(use_bias):
    for norm in ("none", "batch"):
        unit = layers.ConvNorm(6, 3, use_bias=use_bias, norm=norm)
        assert ("bias" in unit.init(jax.random.key(0), normal(0, 2, 4, 4, 2), train=True)["params"]["conv"]) is use_bias


def naive_pool(x, size, stride, padding, reduce):
    """Windows of the places inside the image only, one by one."""
    if padding == "CEIL":  # as far behind as the first window needs that reaches the end
        pads = [(0, -(-max(length - size, 0) // stride) * stride + size - length) for length in x.shape[1:3]]
    else:
        pads = [(padding, padding)] * 2
    starts = [
        range(-low, length + high - size + 1, stride) for length, (low, high) in zip(x.shape[1:3], pads, strict=True)
    ]
    return np.stack(
        [
            np.stack(
                [reduce(x[:, max(i, 0) : i + size, max(j, 0) : j + size], axis=(1, 2)) for j in starts[1]],
                axis=1,
            )
            for i in starts[0]
        ],
        axis=1,
    )


@pytest.mark.by_turns
@pytest.mark.parametrize(
    ("padding", "shape"),
    [(0, (2, 6, 7, 3)), (1, (2, 6, 7, 3)), (1, (1, 2, 1, 2)), ("CEIL", (2, 6, 7, 3)), ("CEIL", (1, 2, 1, 2))],
)
@pytest.mark.parametrize(("size", "stride"), [(3, 2), (2, 2), (3, 1)])
def test_pooling_is_over_the_places_inside_the_image(size, stride, padding, shape):
    x = normal(0, *shape) - 10  # so that a zero beside the image would win
    expected = [naive_pool(x, size, stride, padding, reduce) for reduce in (np.max, np.mean)]
    np.testing.assert_array_equal(layers.max_pool(x, size, stride, padding), expected[0])
    assert_near(layers.avg_pool(x, size, stride, padding), expected[1])


@pytest.mark.parametrize("pool", [layers.max_pool, layers.avg_pool])
def test_pooling_keeps_the_type(pool):
    assert pool(jnp.zeros((1, 4, 4, 1), jnp.bfloat16), 3, 2, 1).dtype == jnp.bfloat16


@pytest.mark.parametrize(("height", "width"), [(7, 7), (6, 6), (3, 2), (1, 1), (4, 9)])
@pytest.mark.parametrize("shape", [(2, 7, 7, 3), (2, 9, 6, 3), (1, 2, 3, 2), (1, 1, 1, 2)])
def test_resizing_by_mean_averages_windows_that_tile_the_image(shape, height, width):
    x = normal(0, *shape)
    expected = np.zeros((shape[0], height, width, shape[3]))
    for i in range(height):
        for j in range(width):
            rows = slice(math.floor(i * shape[1] / height), math.ceil((i + 1) * shape[1] / height))
            columns = slice(math.floor(j * shape[2] / width), math.ceil((j + 1) * shape[2] / width))
            expected[:, i, j] = x[:, rows, columns].astype(np.float64).mean(axis=(1, 2))
    y = layers.resize_by_mean(jnp.asarray(x), height, width)
    assert_near(y, expected, 1e-6)
    assert layers.resize_by_mean(jnp.asarray(x, jnp.bfloat16), height, width).dtype == jnp.bfloat16


@pytest.mark.parametrize(("size", "channels"), [(5, 8), (3, 8), (5, 2), (1, 4)])
def test_local_response_norm_divides_by_its_neighbours(size, channels):
    x, alpha, beta, k = 5 * normal(0, 2, 3, 2, channels), 0.1, 0.6, 1.5
    expected = np.zeros(x.shape)
    for c in range(channels):
        neighbours = [other for other in range(channels) if abs(other - c) <= size // 2]
        expected[..., c] = x[..., c] / (k + alpha * np.sum(x[..., neighbours].astype(np.float64) ** 2, -1)) ** beta
    assert_near(layers.local_response_norm(x, size=size, alpha=alpha, beta=beta, k=k), expected, 1e-6)


def test_local_response_norm_has_the_constants_of_its_paper_and_keeps_the_type():
    x = 30 * normal(0, 2, 7)
    np.testing.assert_array_equal(
        layers.local_response_norm(x), layers.local_response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0)
    )
    assert layers.local_response_norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_channels_are_rounded_to_multiples_that_lose_no_more_than_a_tenth():
    # The widths that published MobileNets have: torchvision's mobilenet_v2 at 0.35, 0.75 and 1.4, v3's gates.
    for channels, rounded in (
        (32 * 0.35, 16),
        (16 * 0.35, 8),
        (24 * 0.35, 8),
        (32 * 0.75, 24),
        (24 * 0.75, 24),
        (32 * 1.4, 48),
        (24 * 1.4, 32),
        (96 * 1.4, 136),
        (72 / 4, 24),
        (16 / 4, 8),
        (960 / 4, 240),
        (1, 8),
    ):
        assert layers.round_channels(channels) == rounded
    assert layers.round_channels(10, divisor=4) == 12
    for channels in range(1, 400):
        rounded = layers.round_channels(channels)
        assert rounded % 8 == 0 and 0.9 * channels <= rounded < channels + 8


def test_rates_grow_linearly_from_zero_to_the_last():
    np.testing.assert_allclose(layers.linear_rates(0.4, 5), [0, 0.1, 0.2, 0.3, 0.4])
    assert layers.linear_rates(0.4, 2) == [0, 0.4]
    assert layers.linear_rates(0.4, 1) == [0]
    assert layers.linear_rates(0.4, 0) == []


class Classifier(nn.Module):
    num_classes: int = 3
    dropout: float = 0.5

    @nn.compact
    def __call__(self, features, train):
        return layers.classify(self, features, train=train)


def test_the_classifier_sows_features_and_maps_them_in_float32_after_dropout():
    features = jnp.asarray(normal(0, 4, 6), jnp.bfloat16)
    variables = Classifier().init(jax.random.key(0), features, False)
    head = jax.tree.map(np.asarray, variables["params"]["head"])
    logits, sown = Classifier().apply({"params": variables["params"]}, features, False, mutable=["intermediates"])
    assert logits.dtype == jnp.float32
    assert_near(logits, np.asarray(features, np.float64) @ head["kernel"] + head["bias"])
    (kept,) = sown["intermediates"]["features"]
    assert kept.dtype == jnp.float32
    np.testing.assert_array_equal(kept, features.astype(jnp.float32))

    logits, sown = Classifier().apply(variables, features, True, rngs=DROPOUT, mutable=["intermediates"])
    dropped = layers.Dropout(0.5).apply({}, features.astype(jnp.float32), train=True, rngs=DROPOUT)
    (kept,) = sown["intermediates"]["features"]
    np.testing.assert_array_equal(kept, features.astype(jnp.float32))  # before dropout
    assert not np.array_equal(dropped, kept) and not np.allclose(logits, np.asarray(kept) @ head["kernel"])


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
    with pytest.raises(ValueError, match="hidden_dim=6 must be a multiple of 4"):
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
    x = np.linspace(-8, 8, 65, dtype=np.float32)
    expected = {
        "gelu": x * scipy.special.ndtr(x),
        "hard_swish": x * np.clip(x + 3, 0, 6) / 6,
        "linear": x,
        "relu": np.maximum(x, 0),
        "relu6": np.clip(x, 0, 6),
        "silu": x * scipy.special.expit(x),
        "tanh": np.tanh(x),
    }
    assert set(expected) == set(layers.ACTIVATIONS)
    for name, y in expected.items():
        np.testing.assert_allclose(layers.activation(name)(x), y, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="activation 'gleu' is not known; did you mean 'gelu'"):
        layers.activation("gleu")


class Checked(nn.Module):
    """Has a field of every kind that models have; its first line is the check."""

    num_classes: int = 10
    depths: tuple[int, ...] = (2, 3)
    widths: tuple[int, ...] = (8, 16)
    kind: str = "plain"
    stem: str = "standard"
    norm: str = "batch"
    activation: str = "relu"
    grouped_conv: str = "auto"
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float = 0.0
    squeeze_excite: float = 0.0
    fractions: tuple[float, ...] = (0.5,)
    remat: str = "none"
    dtype: str = "float32"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"norm": "batsh"}, "norm 'batsh' is not known; did you mean 'batch'"),
        ({"activation": "gleu"}, "activation 'gleu' is not known; did you mean 'gelu'"),
        ({"dtype": "float16"}, "dtype 'float16' is not known; did you mean 'bfloat16'"),
        ({"grouped_conv": "xml"}, "grouped_conv 'xml' is not known; did you mean 'xla'"),
        ({"kind": "plane"}, "kind 'plane' is not known; did you mean 'plain'"),
        ({"depths": (2, 0)}, "depths=(2, 0) is impossible; it must be at least 1"),
        ({"num_classes": 0}, "num_classes=0 is impossible; it must be at least 1"),
        ({"layer_scale": -0.1}, "layer_scale=-0.1 is impossible; it must be at least 0"),
        ({"fractions": (0.5, -1.0)}, "fractions=(0.5, -1.0) is impossible; it must be at least 0"),
        ({"squeeze_excite": math.nan}, "squeeze_excite=nan is impossible; it must be at least 0"),
        ({"dropout": 1.0}, "dropout=1.0 is impossible; it must be in [0, 1)"),
        ({"drop_path": -0.1}, "drop_path=-0.1 is impossible; it must be in [0, 1)"),
    ],
)
def test_fields_that_cannot_work_are_errors_that_name_them(fields, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        checks.check_fields(Checked(**fields), {"kind": ("plain", "fancy")})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "fancy", "norm": "none", "activation": "tanh", "dtype": "bfloat16", "grouped_conv": "shifted"},
        {"dropout": 0.99, "drop_path": 0.0, "layer_scale": 2.0, "squeeze_excite": 1.0, "remat": "dots"},
    ],
)
def test_fields_that_can_work_pass(fields):
    checks.check_fields(Checked(**fields), {"kind": ("plain", "fancy")})


@pytest.mark.parametrize("shape", [(1, 31, 40, 3), (1, 40, 31, 3)])
def test_images_that_are_too_small_are_an_error_that_says_what_helps(shape):
    said = (
        f"images of {shape[1]}x{shape[2]} pixels are too small for this model, whose smallest is 32x32; "
        "make them 32x32 or larger"
    )
    with pytest.raises(ValueError, match=re.escape(said) + "$"):
        checks.check_size(shape, 32)
    with pytest.raises(ValueError, match=re.escape(said) + ", or less$"):
        checks.check_size(shape, 32, ", or less")
    checks.check_size((1, 32, 32, 3), 32)


def test_the_check_of_a_stem_knows_its_names_and_sizes_and_advises_the_small_one_where_it_helps():
    smallest = {"standard": 32, "small": 8}
    with pytest.raises(ValueError, match=r"stem 'smal' is not known; did you mean 'small'"):
        checks.check_stem(Checked(stem="smal"), (1, 64, 64, 3), smallest)
    with pytest.raises(ValueError, match=r"smallest is 32x32; .* or larger, or stem='small'$"):
        checks.check_stem(Checked(), (1, 31, 31, 3), smallest)
    with pytest.raises(ValueError, match=r"smallest is 8x8; .* or larger$"):
        checks.check_stem(Checked(stem="small"), (1, 7, 7, 3), smallest)
    with pytest.raises(ValueError, match=r"smallest is 32x32; .* or larger$"):
        checks.check_stem(Checked(), (1, 31, 31, 3), {"standard": 32, "small": 32})
    checks.check_stem(Checked(), (1, 32, 32, 3), smallest)
    checks.check_stem(Checked(stem="small"), (1, 8, 8, 3), smallest)


def test_fields_with_one_entry_for_each_stage_have_the_same_length():
    checks.check_same_length(Checked(), "depths", "widths")
    checks.check_same_length(Checked(), "depths", length=2)
    said = "depths=(2, 3) and widths=(8,) must have 2 entries, one for each stage"
    with pytest.raises(ValueError, match=re.escape(said)):
        checks.check_same_length(Checked(widths=(8,)), "depths", "widths")
    with pytest.raises(ValueError, match=re.escape("depths=(2, 3) must have 3 entries")):
        checks.check_same_length(Checked(), "depths", length=3)


@pytest.mark.parametrize("size, stride, padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 2, "CEIL")])
def test_max_pooling_and_its_gradient_are_those_of_the_windows(size, stride, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.permutation(2 * 9 * 8 * 3).reshape(2, 9, 8, 3), jnp.float32)  # no two are equal
    pads = layers._pool_padding(x, size, stride, padding)
    windows = lambda x: nn.max_pool(x, (size, size), (stride, stride), pads)  # noqa: E731
    shifted = lambda x: layers.max_pool(x, size, stride, padding)  # noqa: E731
    np.testing.assert_array_equal(shifted(x), windows(x))
    weights = jnp.asarray(rng.normal(size=windows(x).shape), jnp.float32)
    gradients = [jax.grad(lambda x, pool=pool: jnp.sum(weights * pool(x)))(x) for pool in (shifted, windows)]
    np.testing.assert_allclose(*gradients, atol=1e-6)
