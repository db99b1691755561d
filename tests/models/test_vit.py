import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
import scipy.special
from jax.sharding import AxisType, PartitionSpec
from PIL import Image

from vitcls import evaluate, models, predict, train
from vitcls.models import attention, forms, layers, vit
from vitcls.models.variables import variable_shapes
from vitcls.training import run_dir

TINY = {"patch_size": 2, "hidden_dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
IMPROVED = TINY | {"qk_norm": True, "layer_scale": 0.5, "drop_path": 0.3, "dropout": 0.2, "attention_dropout": 0.2}
IMAGES = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)  # a 4x4 grid of patches


def plain(**fields):
    return models.create("vit_tiny_patch4", 5, **TINY | fields)


def improved(**fields):
    return models.create("improved_vit_tiny", 5, **IMPROVED | fields)


def random_params(model, images=IMAGES, seed=0):
    """Weights that hide nothing: no norm is the identity, no bias is zero."""
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))["params"]
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.3 * draw.normal(size=leaf.shape) + 0.1).astype(np.float32), shapes)


# The compiler's time is most of this file's: unoptimised programs are ready five times sooner.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(compiled, static_argnames=("model", "train"))
def forward(model, params, images, key=None, *, train=False):
    return model.apply({"params": params}, images, train=train, rngs=None if key is None else {"dropout": key})


@functools.partial(compiled, static_argnames="model")
def forward_with_intermediates(model, params, images):
    logits, sown = model.apply({"params": params}, images, train=False, mutable=["intermediates"])
    return logits, sown["intermediates"]


# The equations, in numpy and float64.


def dense(x, params):
    return x @ params["kernel"].astype(np.float64) + params["bias"]


def layer_norm(x, params):
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-6)
    return normed * params["scale"] + params.get("bias", 0)


def gelu(x):
    return x * scipy.special.ndtr(x)


def self_attention(x, params, heads):
    """One head and one example at a time: softmax(Q K^T / sqrt(d_k)) V. Returns the output and the weights."""
    width = x.shape[-1] // heads
    qkv, mixed, weights = dense(x, params["qkv"]), np.zeros_like(x), np.zeros((len(x), heads, x.shape[1], x.shape[1]))
    for example in range(len(x)):
        for head in range(heads):
            query, key, value = (
                qkv[example, :, part + head * width :][:, :width] for part in np.arange(3) * x.shape[-1]
            )
            if "query_norm" in params:
                query, key = layer_norm(query, params["query_norm"]), layer_norm(key, params["key_norm"])
            weights[example, head] = scipy.special.softmax(query @ key.T / math.sqrt(width), axis=1)
            mixed[example, :, head * width : (head + 1) * width] = weights[example, head] @ value
    return dense(mixed, params["project"]), weights


def squeeze_excite(x, params):
    squeezed = np.maximum(dense(x.mean(axis=1), params["reduce"]), 0)
    return x * scipy.special.expit(dense(squeezed, params["expand"]))[:, None]


def feed_forward(x, params, grid):
    gated = params["squeeze_excite"]["expand"]["bias"].size if "squeeze_excite" in params else 0
    if gated == x.shape[-1]:  # which is not that of the hidden layer
        x = squeeze_excite(x, params["squeeze_excite"])
    hidden = gelu(dense(x, params["expand"]))
    if "local_conv" in params:
        kernel, bias = params["local_conv"]["kernel"], params["local_conv"]["bias"]
        first = x.shape[1] - math.prod(grid)  # a class token stays as it is
        local = np.zeros_like(hidden)
        for example in range(len(x)):
            for channel in range(hidden.shape[-1]):
                picture = hidden[example, first:, channel].reshape(grid)
                conv = scipy.signal.correlate2d(picture, kernel[:, :, 0, channel], mode="same") + bias[channel]
                local[example, first:, channel] = gelu(conv).ravel()
        hidden = hidden + local
    if gated == hidden.shape[-1]:
        hidden = squeeze_excite(hidden, params["squeeze_excite"])
    return dense(hidden, params["project"])


def encoder(tokens, params, *, depth, heads, grid):
    for i in range(depth):
        block = params[f"block_{i}"]
        branch, _ = self_attention(layer_norm(tokens, block["attention_norm"]), block["attention"], heads)
        tokens = tokens + branch * block.get("attention_scale", {"scale": 1})["scale"]
        branch = feed_forward(layer_norm(tokens, block["feed_forward_norm"]), block["feed_forward"], grid)
        tokens = tokens + branch * block.get("feed_forward_scale", {"scale": 1})["scale"]
    return layer_norm(tokens, params["norm"])


def patch_tokens(images, params, patch_size):
    rows, columns = images.shape[1] // patch_size, images.shape[2] // patch_size
    patches = [
        images[:, patch_size * row :][:, :patch_size, patch_size * column :][:, :, :patch_size].reshape(len(images), -1)
        for row in range(rows)
        for column in range(columns)
    ]
    tokens = dense(np.stack(patches, axis=1).astype(np.float64), params["stem"])
    tokens = tokens + params["position_embedding"].reshape(rows * columns, -1)
    if "class_token" not in params:
        return tokens
    first = params["class_token"] + params["class_position_embedding"]
    return np.concatenate([np.repeat(first, len(images), axis=0), tokens], axis=1)


AGGREGATIONS = {
    "token": lambda h, params: h[:, 0],
    "mean": lambda h, params: h.mean(axis=1),
    "gem": lambda h, params: np.mean(np.maximum(h, 1e-4) ** gem_power(params), axis=1) ** (1 / gem_power(params)),
    "attention": lambda h, params: attention_pool(h, params["aggregation"]["query"]),
    "mean_attention": lambda h, params: h.mean(axis=1) + attention_pool(h, params["aggregation"]["query"]),
}


def gem_power(params):
    return 1 + np.logaddexp(0, np.float64(params["aggregation"]["power"]))


def attention_pool(h, query):
    weights = scipy.special.softmax(h @ query / math.sqrt(h.shape[-1]), axis=1)
    return np.einsum("bn,bnd->bd", weights, h)


@pytest.mark.parametrize("images", [IMAGES[:2], IMAGES[:2, :, :4]], ids=["square", "wide"])
def test_plain_vit_is_that_of_dosovitskiy_et_al(images):
    model = plain()
    params = random_params(model, images)
    tokens = encoder(patch_tokens(images, params, 2), params, depth=2, heads=2, grid=None)
    expected = dense(tokens[:, 0], params["head"])
    np.testing.assert_allclose(forward(model, params, images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_improved_encoder_and_every_aggregation(aggregation):
    model = improved(stem="patch", aggregation=aggregation, depth=1)
    params, images = random_params(model), IMAGES[:2]
    tokens = encoder(patch_tokens(images, params, 2), params, depth=1, heads=2, grid=(4, 4))
    features = layer_norm(AGGREGATIONS[aggregation](tokens, params), params["head_norm"])
    logits, sown = forward_with_intermediates(model, params, images)
    np.testing.assert_allclose(sown["tokens"][0], tokens, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sown["features"][0], features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, dense(features, params["head"]), rtol=1e-4, atol=1e-4)
    assert ("class_token" in params) == (aggregation == "token")


@pytest.mark.by_turns
@pytest.mark.parametrize(
    ("blocks", "local"),
    [("all", [0, 1, 2]), ("first_half", [0, 1]), ("second_half", [2]), ("alternate", [0, 2])],
)
@pytest.mark.parametrize("position", ["hidden", "input"])
def test_local_detail_in_some_blocks_and_a_gate_of_either_layer(blocks, local, position):
    model = improved(
        stem="patch", aggregation="mean", depth=3, local_conv_blocks=blocks, squeeze_excite_position=position
    )
    params, images = random_params(model), IMAGES[:2]
    assert [i for i in range(3) if "local_conv" in params[f"block_{i}"]["feed_forward"]] == local
    gate = params["block_0"]["feed_forward"]["squeeze_excite"]
    assert gate["expand"]["bias"].size == {"hidden": model.mlp_dim, "input": model.hidden_dim}[position]
    tokens = encoder(patch_tokens(images, params, 2), params, depth=3, heads=2, grid=(4, 4))
    _, sown = forward_with_intermediates(model, params, images)
    np.testing.assert_allclose(sown["tokens"][0], tokens, rtol=1e-4, atol=1e-4)


def test_self_attention_and_its_weights():
    x = np.random.default_rng(1).normal(size=(3, 5, 12)).astype(np.float32)
    layer = vit.SelfAttention(vit.Design(num_heads=3, qk_norm=True))
    shapes = jax.eval_shape(lambda key: layer.init(key, x, train=False), jax.random.key(0))["params"]
    assert shapes["qkv"]["kernel"].shape == (12, 36)  # one matrix, for optimizers that work on matrices
    draw = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)
    expected, weights = self_attention(x, params, heads=3)
    fused = layer.apply({"params": params}, x, train=False)
    explicit, sown = layer.apply({"params": params}, x, train=False, mutable=["intermediates"])
    np.testing.assert_allclose(fused, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(explicit, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sown["intermediates"]["attention_weights"][0], weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sown", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_float32_on_every_platform(dtype, sown):
    model = plain(depth=1, dtype=dtype)
    params, mutable = random_params(model), ["intermediates"] if sown else False
    trace = jax.make_jaxpr(lambda params: model.apply({"params": params}, IMAGES, train=False, mutable=mutable))(params)
    products = [operation for operation in trace.eqns if operation.primitive.name == "dot_general"]
    (scores,) = (one for one in products if one.outvars[0].aval.size == 8 * 2 * 17 * 17)
    assert {str(operand.aval.dtype) for operand in scores.invars} == {dtype}
    assert scores.outvars[0].aval.dtype == scores.params["preferred_element_type"] == jnp.float32
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert (scores.params["precision"] == highest) == (dtype == "float32")
    assert (products[-1].outvars[0].aval.shape, products[-1].params["precision"]) == ((8, 5), highest)  # the head


def test_conv_stem_makes_the_grid_of_patches_in_three_layers():
    stem = vit.ConvStem(4, 16, "gelu", "float32")
    images = np.zeros((2, 32, 32, 3), np.float32)
    out, variables = jax.eval_shape(lambda key: stem.init_with_output(key, images), jax.random.key(0))
    assert out.shape == (2, 8, 8, 16)
    kernels = {name: leaf["kernel"].shape for name, leaf in variables["params"].items() if "kernel" in leaf}
    assert kernels == {"conv_0": (3, 3, 3, 8), "conv_1": (3, 3, 8, 16), "project": (3, 3, 16, 16)}


def test_intermediates_cost_nothing_unless_asked_for():
    model = improved()
    params = random_params(model)
    logits, sown = forward_with_intermediates(model, params, IMAGES)
    np.testing.assert_allclose(logits, forward(model, params, IMAGES), rtol=1e-4, atol=1e-4)
    assert sown["features"][0].shape == (8, 16) and sown["tokens"][0].shape == (8, 16, 16)
    for i in range(2):
        weights = sown[f"block_{i}"]["attention"]["attention_weights"][0]
        assert weights.shape == (8, 2, 16, 16)
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-5)
    quiet = plain(position_embedding="none")
    shapes = jax.eval_shape(lambda key: quiet.init(key, IMAGES, train=False), jax.random.key(0))
    assert set(shapes) == {"params"}


def test_permuting_the_batch_permutes_the_logits():
    model, order = improved(), np.random.default_rng(3).permutation(8)
    params = random_params(model)
    logits = forward(model, params, IMAGES)
    np.testing.assert_allclose(forward(model, params, IMAGES[order]), logits[order], rtol=1e-5, atol=1e-5)
    assert np.ptp(logits, axis=0).min() > 1e-3


def test_bfloat16_is_close_and_keeps_parameters_and_logits_in_float32():
    model = improved(depth=1)
    half = model.clone(dtype="bfloat16")
    params = random_params(model)
    logits, sown = forward_with_intermediates(half, params, IMAGES)
    assert logits.dtype == jnp.float32
    assert sown["tokens"][0].dtype == jnp.bfloat16
    assert sown["block_0"]["attention"]["attention_weights"][0].dtype == jnp.float32
    expected = forward(model, params, IMAGES)
    assert np.abs(logits - expected).max() < 0.05 * np.ptp(expected)
    np.testing.assert_allclose(forward(half, params, IMAGES), logits, atol=0.05 * np.ptp(expected))
    shapes = jax.eval_shape(lambda key: half.init(key, IMAGES, train=False), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.fixture
def said(monkeypatch):
    """What the log says of attention, as if this process had said nothing before."""
    forms._attention.cache_clear()
    logger, lines = logging.getLogger("vitcls"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    before = logger.level
    logger.setLevel(logging.INFO)
    yield lambda: [line for line in lines if "cudnn" in line]
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("compute_capability", "dtype", "head_dim", "lacks"),
    [
        ("9.0", "bfloat16", 64, []),
        ("8.6", "bfloat16", 128, []),
        ("10.0", "bfloat16", 256, []),
        ("7.5", "bfloat16", 64, ["an NVIDIA GPU, Ampere or later"]),
        ("gfx90a", "bfloat16", 64, ["an NVIDIA GPU, Ampere or later"]),
        ("9.0", "float32", 64, ["dtype='bfloat16'"]),
        ("8.0", "bfloat16", 192, ["heads of at most 128 channels, a multiple of 8"]),
        ("9.0", "bfloat16", 12, ["heads of at most 256 channels, a multiple of 8"]),
        ("", "float32", 64, ["an NVIDIA GPU, Ampere or later", "dtype='bfloat16'"]),
    ],
)
def test_what_fused_attention_lacks(compute_capability, dtype, head_dim, lacks):
    assert attention.cudnn_lacks(compute_capability, dtype, head_dim) == lacks


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere cuDNN may be there")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_cudnn_attention_is_that_of_xla_and_the_log_says_so_once(said, dtype):
    ours, fused = plain(dtype=dtype), plain(dtype=dtype, attention="cudnn")
    fused = forms.for_device(fused, jax.devices()[0])
    params = random_params(fused)
    np.testing.assert_array_equal(forward(fused, params, IMAGES), forward(ours, params, IMAGES))
    (line,) = said()
    assert "needs an NVIDIA GPU" in line and "'xla'" in line
    assert ("dtype='bfloat16'" in line) == (dtype == "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folded_attention_and_its_written_gradient_are_those_of_jax(dtype):
    draw = np.random.default_rng(0)
    inputs = [jnp.asarray(draw.normal(size=(2, 5, 3, 4)), dtype) for _ in range(3)]

    def gradients(form):
        def loss(*inputs):
            mixed = attention.attend(*inputs, form)
            return jnp.sum(jnp.sin(mixed.astype(jnp.float32))), mixed

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)

    (_, ours), of_ours = gradients("folded")
    (_, theirs), of_theirs = gradients("xla")
    assert ours.dtype == dtype
    for one, other in zip((ours, *of_ours), (theirs, *of_theirs), strict=True):
        tolerance = 1e-5 if dtype == "float32" else 3e-2
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.by_turns
@pytest.mark.parametrize("build", [plain, improved], ids=["once for all blocks", "in each attention"])
def test_tokens_that_are_added_for_a_kernel_are_seen_by_nobody(build, monkeypatch):
    """The network with its tokens padded, as fused attention wants them, by products that run anywhere."""
    model = build(aggregation="token")
    params = random_params(model)
    labels = jnp.arange(len(IMAGES)) % model.num_classes

    def loss(params):
        logits = model.apply({"params": params}, IMAGES, train=False)
        return jnp.mean(-jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]), logits

    (_, expected), expected_gradients = jax.value_and_grad(loss, has_aux=True)(params)
    seen = []
    real = jax.nn.dot_product_attention

    def spy(query, key, value, **options):
        seen.append((query.shape[1], "key_value_seq_lengths" in options))
        return real(query, key, value, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    monkeypatch.setattr(attention, "padding", lambda tokens, form: -tokens % 8)
    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    assert seen and all(tokens % 8 == 0 and masked for tokens, masked in seen)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "tokens", "more"),
    [("cudnn", 197, 3), ("cudnn", 65, 7), ("padded", 197, 3), ("padded", 200, 0), ("padded", 65, 0), ("xla", 197, 0)],
)
def test_how_many_tokens_a_form_adds(form, tokens, more):
    assert attention.padding(tokens, form) == more


def test_tokens_padded_as_for_a_tpu_change_no_number():
    images = np.random.default_rng(0).normal(size=(2, 14, 14, 3)).astype(np.float32)
    model = plain(patch_size=1, depth=2, attention="xla")  # 197 tokens
    params = random_params(model, images)

    @functools.partial(compiled, static_argnums=0)
    def value_and_gradients(model, params):
        return jax.value_and_grad(lambda params: jnp.sum(model.apply({"params": params}, images, train=True) ** 2))(
            params
        )

    padded = model.clone(attention="padded")
    trace = jax.make_jaxpr(lambda params: padded.apply({"params": params}, images, train=True))(params)
    assert "f32[2,200,16]" in str(trace) and "f32[2,2,200,200]" in str(trace)
    ours, theirs = value_and_gradients(padded, params), value_and_gradients(model, params)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4 * abs(two).max()), ours, theirs
    )


def test_gelu_is_that_of_the_paper_and_so_is_its_slope():
    x = np.linspace(-6, 6, 121)
    cdf = 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))
    slope = cdf + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    values, slopes = jax.vmap(jax.value_and_grad(layers.gelu))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(values, x * cdf, atol=1e-6)
    np.testing.assert_allclose(slopes, slope, atol=1e-6)
    half = layers.gelu(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(half, np.float32),
        np.asarray(layers.gelu(jnp.asarray(jnp.asarray(x, jnp.bfloat16), jnp.float32))),
        rtol=1e-2,
        atol=1e-6,
    )


@pytest.mark.by_turns
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere cuDNN may be there")
@pytest.mark.usefixtures("no_pictures")
def test_a_run_with_fused_attention_trains_evaluates_and_predicts_on_a_cpu(said, tiny_config, tmp_path):
    tiny_config.model.update(attention="cudnn", dtype="bfloat16", num_heads=2)
    trained = train.train_and_evaluate(tiny_config, tmp_path / "run")
    again = evaluate.evaluate(tmp_path / "run")
    for key in ("loss", "accuracy"):  # the run evaluates with the convolutions that it trains with
        assert again[key] == pytest.approx(trained[key], rel=1e-3)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "black.png")
    ((_, (probabilities, _)),) = predict.predict(run_dir.open_workdir(tmp_path / "run"), [tmp_path / "black.png"])
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-3)
    assert len(said()) == 1


@pytest.mark.parametrize("field", ["dropout", "attention_dropout", "drop_path"])
def test_every_source_of_randomness_acts_in_training_alone_and_follows_the_key(field):
    off = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0}
    model, sure = improved(**off | {field: 0.5}), improved(**off)
    params = random_params(model)
    evaluation = [
        jax.make_jaxpr(lambda x, m=m: m.apply({"params": params}, x, train=False))(IMAGES) for m in (model, sure)
    ]
    assert str(evaluation[0]) == str(evaluation[1])
    expected = forward(sure, params, IMAGES)
    first, second, again = (forward(model, params, IMAGES, jax.random.key(seed), train=True) for seed in (0, 1, 0))
    assert np.abs(first - expected).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, again)


@pytest.mark.eight_devices
def test_mapped_and_whole_batches_drop_the_same():
    whole = improved()
    params, key = random_params(whole), jax.random.key(5)

    def one_device(images):
        return whole.apply({"params": params}, images, train=True, rngs={"dropout": key})

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    parts = compiled(jax.shard_map(one_device, mesh=mesh, in_specs=spec, out_specs=spec))(IMAGES)
    expected = forward(whole, params, IMAGES, key, train=True)
    np.testing.assert_allclose(parts, expected, rtol=1e-3, atol=1e-4)


def gradients(model, params):
    """Of the distance to random logits, in training."""
    target = np.random.default_rng(4).normal(size=(8, 5)).astype(np.float32)

    def loss(params):
        logits = model.apply({"params": params}, IMAGES, train=True, rngs={"dropout": jax.random.key(0)})
        return jnp.mean((logits - target) ** 2)

    return compiled(jax.grad(loss))(params)


@pytest.mark.parametrize(
    "model",
    [
        improved(depth=1, dropout=0.0, attention_dropout=0.0),
        plain(depth=1, aggregation="gem"),
        plain(depth=1),
    ],
    ids=["improved", "gem", "token"],
)
def test_every_parameter_learns(model):
    params = random_params(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(model, params)):
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf), path


def test_remat_changes_memory_only():
    model = plain(depth=1, dropout=0.2)
    recomputed = model.clone(remat="block")
    params = random_params(model)
    expected = gradients(model, params)
    for got, leaf in zip(jax.tree.leaves(gradients(recomputed, params)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-3, atol=1e-4 * max(1, np.abs(leaf).max()))
    jaxpr = str(jax.make_jaxpr(lambda params: recomputed.apply({"params": params}, IMAGES, train=False))(params))
    assert "remat" in jaxpr


def test_learned_positions_are_interpolated_to_another_size():
    model = plain(aggregation="mean")
    images = np.random.default_rng(6).normal(size=(2, 24, 24, 3)).astype(np.float32)
    params = random_params(model, images[:, :16, :16])  # an 8x8 grid, used on 12x12
    channels = np.moveaxis(params["position_embedding"], -1, 0)
    resized = [Image.fromarray(channel).resize((12, 12), Image.Resampling.BICUBIC) for channel in channels]
    tokens = patch_tokens(images, params | {"position_embedding": np.stack(resized, axis=-1)}, 2)
    features = encoder(tokens, params, depth=2, heads=2, grid=None).mean(axis=1)
    np.testing.assert_allclose(forward(model, params, images), dense(features, params["head"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("stem", "patch", "conv_0"),
        ("position_embedding", "none", "position_embedding"),
        ("position_embedding", "sincos2d", "position_embedding"),
        ("qk_norm", False, "query_norm"),
        ("layer_scale", 0.0, "attention_scale"),
        ("activation", "relu", None),
        ("local_conv", False, "local_conv"),
        ("squeeze_excite", 0.0, "squeeze_excite"),
        ("aggregation", "mean", "class_token"),
        ("head_norm", False, "head_norm"),
    ],
)
def test_each_improvement_can_be_turned_off_by_itself(field, value, part):
    full = improved(aggregation="token", depth=1)
    without = full.clone(**{field: value})
    params = random_params(without)
    logits = forward(without, params, IMAGES)
    assert logits.shape == (8, 5) and np.isfinite(logits).all()
    if part:
        assert part in str(jax.tree.structure(random_params(full))) and part not in str(jax.tree.structure(params))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_tiny_grey_images(patch_size):
    grey = IMAGES[:1, ..., :1]
    model = models.create("improved_vit_tiny", 10, **TINY | {"patch_size": patch_size, "depth": 1})
    logits = forward(model, random_params(model, grey), grey)
    assert logits.shape == (1, 10) and np.isfinite(logits).all()


def test_a_whole_number_is_a_fraction_too_where_one_is_asked_for():
    fields = ("dropout", "layer_scale", "drop_path")
    whole, fractions = (variable_shapes(plain(**dict.fromkeys(fields, zero)), (8, 8, 3)) for zero in (0, 0.0))
    assert whole == fractions


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"patch_size": 4}, (30, 33), "patch_size=4 does not divide images of 30x33 pixels; make them 32x32"),
        ({"patch_size": 16}, (6, 8), "patch_size=16 does not divide images of 6x8 pixels; make them 16x16"),
        ({"num_heads": 3}, (8, 8), "hidden_dim=16 cannot be divided over num_heads=3"),
        ({"stem": "conv", "patch_size": 3}, (9, 9), "patch_size=3 must be a power of two"),
        ({"hidden_dim": 18, "position_embedding": "sincos2d"}, (8, 8), "hidden_dim=18 must be a multiple of 4"),
        ({"attention": "cudn"}, (8, 8), "attention 'cudn' is not known; did you mean 'cudnn'"),
        ({"dropout": 1}, (8, 8), r"dropout=1 is impossible; it must be in \[0, 1\)"),
        ({"dropout": 1.0}, (8, 8), r"dropout=1.0 is impossible; it must be in \[0, 1\)"),
        ({"depth": 0}, (8, 8), "depth=0 is impossible; it must be at least 1"),
        ({"layer_scale": -1.0}, (8, 8), "layer_scale=-1.0 is impossible; it must be at least 0"),
        ({"dtype": "float61"}, (8, 8), "dtype 'float61' is not known"),
        ({"stem": "patches"}, (8, 8), "stem 'patches' is not known; did you mean 'patch'"),
        ({"aggregation": "max"}, (8, 8), "aggregation 'max' is not known"),
        ({"activation": "gleu"}, (8, 8), "activation 'gleu' is not known; did you mean 'gelu'"),
        ({"local_conv_blocks": "half"}, (8, 8), "local_conv_blocks 'half' is not known"),
        ({"squeeze_excite_position": "output"}, (8, 8), "squeeze_excite_position 'output' is not known"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(fields, shape, message):
    model = plain(**fields)
    with pytest.raises(ValueError, match=message) as caught:
        jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *shape, 3)), train=False), jax.random.key(0))
    assert "\n" not in str(caught.value)
