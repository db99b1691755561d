"""What holds for every model of the registry: the real presets by their shapes, tiny versions of them by training."""

import functools
import re
from collections.abc import Callable, Container, Iterable
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from vitcls import models
from vitcls.models import convolutions

BATCH, CLASSES = 16, 10


class Tiny(NamedTuple):
    """A version of a model that compiles and trains in seconds, and what is to be seen of it."""

    fields: dict[str, Any]  # what replaces the preset's
    size: int  # of its square images
    maps: dict[str, tuple[int, ...]]  # what it sows besides 'features' -> its shape without the batch
    native: tuple[str, int]  # a late map that the real preset sows for images of its native size, and its height
    learning_rate: float = 0.01
    any_size: bool = True  # weights for images of one size fit those of another
    float32_products: int = 1  # matrix products that stay in float32 with dtype='bfloat16'; the head's is one


def _stages(*sides_and_widths: tuple[int, int], stem: tuple[int, int] | None = None) -> dict[str, tuple[int, ...]]:
    stages = {f"stage_{i}_map": (side, side, width) for i, (side, width) in enumerate(sides_and_widths, start=1)}
    return stages if stem is None else {"stem_map": (stem[0], stem[0], stem[1])} | stages


_BASIC = Tiny(
    {"depths": (1, 2), "width": 8, "stem": "small"}, 16, _stages((16, 8), (8, 16), stem=(16, 8)), ("stage_4_map", 7)
)
_BOTTLENECK = Tiny({"depths": (1, 1), "width": 4}, 32, _stages((8, 16), (4, 32), stem=(8, 4)), ("stage_4_map", 7))
_RESNEXT = Tiny(
    {"depths": (1, 1), "width": 4, "groups": 2, "group_width": 2, "stem": "small"},
    16,
    _stages((16, 16), (8, 32), stem=(16, 4)),
    ("stage_4_map", 7),
)
_FUSED = _RESNEXT._replace(
    fields=_RESNEXT.fields | {"fusion_kernels": (1, 3), "stem_kernel": 3},
    maps=_RESNEXT.maps | {"fusion_map": (8, 8, 32)},
)
_VIT = Tiny(
    {"hidden_dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "patch_size": 4},
    16,
    {"tokens": (17, 16)},
    ("tokens", 197),
)
_IMPROVED_VIT = _VIT._replace(maps={"tokens": (16, 16)}, native=("tokens", 64), float32_products=3)
_VGG = Tiny(
    {"depths": (1, 2), "widths": (8, 16), "head_width": 32, "stem": "small"},
    16,
    _stages((16, 8), (8, 16)),
    ("stage_5_map", 14),
)
_EFFICIENT = Tiny(
    {"width_multiplier": 0.1, "depth_multiplier": 0.1, "stem": "small"},
    16,
    _stages((16, 8), (16, 8), (8, 8), (4, 8), (4, 16), (2, 24), (2, 32), stem=(16, 8)),
    ("stage_7_map", 7),
)
_ALEXNET = Tiny(
    {"widths": (8, 8, 16, 8, 8), "head_width": 32, "stem": "small"},
    16,
    {
        "conv_1_map": (16, 16, 8),
        "conv_2_map": (7, 7, 8),
        "conv_3_map": (3, 3, 16),
        "conv_4_map": (3, 3, 8),
        "conv_5_map": (3, 3, 8),
    },
    ("conv_5_map", 13),
    learning_rate=0.003,
)
_CNN = Tiny(
    {"depths": (2, 1), "widths": (8, 8), "hidden_width": 32},
    16,
    _stages((8, 8), (4, 8)),
    ("stage_2_map", 56),
    any_size=False,
)

TINY = {
    **dict.fromkeys(("resnet18", "resnet34"), _BASIC),
    **dict.fromkeys(("resnet50", "resnet101", "resnet152"), _BOTTLENECK),
    **dict.fromkeys(
        (f"resnetv2_{size}_bit" for size in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")),
        _BOTTLENECK._replace(fields={"depths": (1, 1), "width": 8}, maps=_stages((8, 32), (4, 64), stem=(8, 8))),
    ),
    **dict.fromkeys(("resnext50_32x4d", "resnext101_32x8d"), _RESNEXT),
    "resnext29_8x64d": _RESNEXT._replace(native=("stage_3_map", 8)),
    **dict.fromkeys(("improved_resnext50", "improved_resnext50_lite"), _FUSED),
    **{f"improved_vit_{size}": _IMPROVED_VIT for size in ("tiny", "small", "base")},
    **{
        f"vit_{size}_patch{patch}": _VIT._replace(native=("tokens", tokens + 1))
        for size in ("tiny", "small", "base", "large")
        for patch, tokens in ((4, 64), (16, 196), (32, 49))
    },
    **{
        f"convnext_{size}": Tiny(
            {"depths": (1, 2), "widths": (8, 16), "kernel_size": 3, "layer_scale": 0.5},
            16,
            _stages((4, 8), (2, 16), stem=(4, 8)),
            ("stage_4_map", 7),
        )
        for size in ("tiny", "small", "base")
    },
    **{f"vgg{layer_count}{suffix}": _VGG for layer_count in (11, 13, 16, 19) for suffix in ("", "_bn")},
    **{
        f"densenet{layer_count}": Tiny(
            {"depths": (2, 2), "growth_rate": 4, "stem_width": 8, "stem": "small"},
            16,
            _stages((16, 16), (8, 16), stem=(16, 8)),
            ("stage_4_map", 7),
        )
        for layer_count in (121, 169, 201)
    },
    **{f"efficientnet_b{i}": _EFFICIENT._replace(native=("stage_7_map", side)) for i, side in enumerate((7, 8, 9, 10))},
    "efficientnet_lite0": _EFFICIENT._replace(native=("stage_7_map", 7)),
    "googlenet": Tiny(
        {"width_multiplier": 0.06, "stem": "small"},
        16,
        {"stem_map": (16, 16, 12)}
        | {"inception_3a_map": (16, 16, 16), "inception_3b_map": (16, 16, 30)}
        | {f"inception_4{part}_map": (8, 8, width) for part, width in zip("abcde", (31, 31, 31, 32, 50), strict=True)}
        | {"inception_5a_map": (4, 4, 50), "inception_5b_map": (4, 4, 62)},
        ("inception_5b_map", 7),
    ),
    "inception_v3": Tiny(
        {"width_multiplier": 0.05, "stem": "small"},
        16,
        {"stem_map": (16, 16, 10)}
        | {f"mixed_{i}_map": (16, 16, width) for i, width in ((1, 13), (2, 14), (3, 14))}
        | {f"mixed_{i}_map": (7, 7, width) for i, width in ((4, 38), (5, 40), (6, 40), (7, 40), (8, 40))}
        | {f"mixed_{i}_map": (3, 3, width) for i, width in ((9, 66), (10, 102), (11, 102))},
        ("mixed_11_map", 8),
    ),
    "mobilenet_v1": Tiny(
        {"depths": (1, 2), "widths": (8, 16), "stem": "small"},
        16,
        _stages((16, 8), (16, 16), stem=(16, 32)),
        ("stage_5_map", 7),
    ),
    "mobilenet_v2": Tiny(
        {"width_multiplier": 0.1, "depths": (1,) * 7, "stem": "small"},
        16,
        _stages((16, 8), (16, 8), (8, 8), (4, 8), (4, 16), (2, 16), (2, 32), stem=(16, 8)),
        ("stage_7_map", 7),
    ),
    "mobilenet_v3_large": Tiny(
        {"width_multiplier": 0.1, "stem": "small"},
        16,
        _stages((16, 8), (16, 8), (8, 8), (4, 8), (4, 16), (2, 16), stem=(16, 8)),
        ("stage_6_map", 7),
    ),
    "mobilenet_v3_small": Tiny(
        {"width_multiplier": 0.1, "stem": "small"},
        16,
        _stages((16, 8), (8, 8), (4, 8), (4, 8), (2, 16), stem=(16, 8)),
        ("stage_5_map", 7),
    ),
    **dict.fromkeys(("alexnet", "alexnet_2012"), _ALEXNET),
    "lenet5": Tiny(
        {"widths": (4, 8, 16), "hidden_width": 16},
        32,
        {"conv_1_map": (28, 28, 4), "conv_2_map": (10, 10, 8), "conv_3_map": (1, 1, 16)},
        ("conv_3_map", 1),
        any_size=False,
    ),
    **dict.fromkeys(("paper_cnn", "paper_cnn_enhanced"), _CNN),
    "airbench94": Tiny(
        {"widths": (8, 16)},
        16,
        {"stem_map": (15, 15, 24), "group_1_map": (7, 7, 8), "group_2_map": (3, 3, 16)},
        ("group_3_map", 3),
        float32_products=2,  # and the whitening
    ),
    **dict.fromkeys(("mnist_cnn", "mnist_cnn_enhanced"), _CNN._replace(native=("stage_2_map", 7))),
}


def tiny(name: str, **fields: Any) -> nn.Module:
    """The tiny version of the model `name`, with some of every kind of dropout that it has."""
    general = {field: 0.1 for field in models.fields(name) if "drop" in field}
    return models.create(name, CLASSES, **general | TINY[name].fields | fields)


def image_shape(name: str) -> tuple[int, int, int]:
    """Of the tiny version."""
    return (TINY[name].size, TINY[name].size, models.preset(name).image_shape[-1])


KNOWN = [name for name in models.names() if name in TINY]
_FIRST_OF: dict[Any, str] = {}
FIRST = {
    name: _FIRST_OF.setdefault((tiny(name), image_shape(name)), name) for name in KNOWN
}  # of the same tiny version
SIBLINGS = {name for name in KNOWN if FIRST[name] != name}
# So many layers, or so near another model, that the fast tests trace them but do not run them.
HEAVY = {"efficientnet_b0", "efficientnet_lite0", "googlenet", "inception_v3", "mobilenet_v3_large", "resnext101_32x8d"}
# And those whose recomputed blocks another model has as well.
HEAVY_OR_ALIKE = HEAVY | {
    "alexnet",
    "improved_vit_base",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "paper_cnn",
    "resnet18",
    "vgg11",
}


def each(names: Iterable[str] = KNOWN, slow: Container[str] = ()):
    """Runs a test for each of `names`, with those in `slow` among the slow tests."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]
    )


every_model = each()
every_model_siblings_slow = each(slow=SIBLINGS)
every_model_heavy_slow = each(slow=[name for name in KNOWN if FIRST[name] in HEAVY])


def test_every_model_has_a_tiny_version():
    missing = sorted(set(models.names()) - set(TINY))
    assert not missing, f"add a tiny version of {', '.join(missing)} to TINY, so that the tests of this file see them"
    gone = sorted(set(TINY) - set(models.names()))
    assert not gone, f"TINY has {', '.join(gone)}, which are not models"


# The real presets, by their shapes alone.


@functools.cache
def trace_init(model: nn.Module, shape: tuple[int, int, int], *, train: bool):
    """(logits, variables, what was sown) of images [2, *shape], as shapes."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    def init(rngs, images):
        logits, variables = model.init_with_output(rngs, images, train=train, mutable=True)
        return logits, variables, variables.pop("intermediates")

    return jax.eval_shape(init, rngs, jax.ShapeDtypeStruct((2, *shape), jnp.float32))


class Traced(NamedTuple):
    logits: Any
    changed: Any
    operations: list[Any]  # every operation of the program, those of its parts too

    def count(self, *names: str) -> int:
        return len(self.shapes(*names))

    def shapes(self, *names: str) -> list[list[tuple[int, ...]]]:
        """Of the operands of each operation of these names."""
        chosen = [operation for operation in self.operations if operation.primitive.name in names]
        return [[operand.aval.shape for operand in operation.invars] for operation in chosen]


def plain(model: nn.Module) -> nn.Module:
    """`model` without what changes no variable."""
    fields = {"remat": "none", "dtype": "float32"}
    fields |= {field: 0.0 for field in model.__dataclass_fields__ if "drop" in field}
    return model.clone(**{field: value for field, value in fields.items() if hasattr(model, field)})


@functools.cache
def trace(
    model: nn.Module,
    shape: tuple[int, int, int],
    *,
    train: bool,
    key: bool = True,
    x64: bool = False,
    mapped: bool = False,
) -> Traced:
    """The program that applies `model` to float32 variables and images [2, *shape], with a random key or without."""
    _, variables, _ = trace_init(plain(model), shape, train=False)

    def apply(variables, images, rngs):
        return model.apply(variables, images, train=train, rngs=rngs, mutable=["batch_stats", "intermediates"])

    def walk(jaxpr):
        for operation in jaxpr.eqns:
            yield operation
            for part in jax.extend.core.jaxprs_in_params(operation.params):
                yield from walk(part)

    images, rngs = jax.ShapeDtypeStruct((2, *shape), jnp.float32), {"dropout": jax.random.key(0)} if key else {}
    axes = [("data", 2)] if mapped else []
    with jax.enable_x64(x64):
        program, shapes = jax.make_jaxpr(apply, axis_env=axes, return_shape=True)(variables, images, rngs)
    return Traced(*shapes, list(walk(program.jaxpr)))


def dtypes(*trees: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(trees)}


def assert_logits(logits, batch: int = 2) -> None:
    assert (logits.shape, logits.dtype) == ((batch, CLASSES), jnp.float32)


def real(name: str, **fields: Any) -> nn.Module:
    """The preset itself."""
    return models.create(name, CLASSES, **fields)


@functools.cache
def native(name: str):
    """The preset at its native size, in evaluation: logits, variables and what is sown, as shapes."""
    return trace_init(real(name), models.preset(name).image_shape, train=False)


def smallest_size(model: nn.Module, channels: int) -> int:
    """The smallest square image, as the error for a single pixel names it."""
    with pytest.raises(ValueError, match=r"make them") as error:
        trace_init(model, (1, 1, channels), train=False)
    return int(re.search(r"make them (\d+)x", str(error.value))[1])


@pytest.mark.by_turns
@every_model_siblings_slow
def test_the_preset_maps_images_of_its_native_size_to_float32_logits(name):
    logits, variables, sown = native(name)
    assert_logits(logits)
    assert dtypes(variables, sown) == {"float32"}
    where, side = TINY[name].native
    (late,) = sown[where]
    assert late.shape[1] == side


@pytest.mark.by_turns
@every_model_siblings_slow
def test_the_preset_trains_on_images_of_the_smallest_size_that_its_error_names(name):
    model, channels = real(name), models.preset(name).image_shape[-1]
    smallest = smallest_size(model, channels)
    for height, width in ((smallest - 1, smallest), (smallest, smallest - 1)):
        with pytest.raises(ValueError, match=rf"{height}x{width} pixels"):
            trace_init(model, (height, width, channels), train=True)

    images = jax.ShapeDtypeStruct((2, smallest, smallest, channels), jnp.float32)
    _, variables, _ = native(name) if TINY[name].any_size else trace_init(model, images.shape[1:], train=False)

    def train(variables, images, key):
        return model.apply(variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

    logits, changed = jax.eval_shape(train, variables, images, jax.random.key(0))
    assert_logits(logits)
    assert changed == {kind: stats for kind, stats in variables.items() if kind == "batch_stats"}


WITH_SMALL_STEM = [name for name in KNOWN if "stem" in models.fields(name) and "vit" not in name]


@pytest.mark.by_turns
@each(WITH_SMALL_STEM, slow=SIBLINGS)
def test_the_preset_with_a_small_stem_takes_images_of_32_pixels(name):
    logits, _, _ = trace_init(real(name, stem="small"), (32, 32, 3), train=True)
    assert_logits(logits)


@pytest.mark.by_turns
@each(WITH_SMALL_STEM)
def test_a_small_stem_keeps_more_of_a_small_image(name):
    sides = []
    for stem in ("small", "standard"):
        _, _, sown = trace_init(tiny(name, stem=stem), (96, 96, 3), train=False)
        sides.append([value[0].shape[1] for key, value in sown.items() if key in TINY[name].maps])
    small, standard = map(sorted, sides)
    if name.startswith("vgg"):  # whose small stem is that of the classifier
        assert small == standard
    else:
        assert small > standard and len(small) == len(standard)


# The tiny versions, trained on real digits. What is compiled is kept, so that models of the same tiny version share it.


@functools.cache
def digits(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [16, *shape] in -1 .. 1, made of 8x8 pixels, and labels int32."""
    images, labels = load_digits(return_X_y=True)
    images = images[:BATCH].reshape(BATCH, 8, 8, 1) / 8 - 1
    times = (1, shape[0] // 8, shape[1] // 8, 1)
    images = np.kron(images, np.ones(times))
    return np.repeat(images, shape[2], axis=-1).astype(np.float32), labels[:BATCH].astype(np.int32)


class Start(NamedTuple):
    """The first variables of a model; the parameters as one vector, so that an optimizer's step compiles at once."""

    params: np.ndarray
    stats: dict
    unravel: Callable[[jax.Array], Any]


@functools.cache
def start(model: nn.Module, shape: tuple[int, int, int]) -> Start:
    """Kernels are drawn here, with the usual variances: to compile each draw takes longer than all tests of a model."""

    def init(key):
        variables = model.init(key, jnp.zeros((1, *shape)), train=False)
        return jax.tree.map_with_path(lambda path, leaf: None if is_kernel(path) else leaf, variables)

    def is_kernel(path):
        return path[-1].key == "kernel"

    def draw(path, drawn, leaf):
        if not is_kernel(path):
            return np.asarray(drawn)
        inputs = np.prod(leaf.shape[:-1])
        return random.normal(size=leaf.shape, scale=np.sqrt((2 if len(leaf.shape) == 4 else 1) / inputs))

    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *shape)), train=False), jax.random.key(0))
    others = jax.jit(init)(jax.random.key(0))
    variables = jax.tree.map_with_path(draw, others, shapes, is_leaf=lambda leaf: leaf is None)
    leaves, tree = jax.tree.flatten(variables["params"])
    ends = np.cumsum([leaf.size for leaf in leaves])

    def unravel(params):
        parts = [params[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
        return tree.unflatten(parts)

    params = np.concatenate([leaf.ravel() for leaf in leaves], dtype=np.float32)
    return Start(params, {kind: stats for kind, stats in variables.items() if kind == "batch_stats"}, unravel)


class Trained(NamedTuple):
    loss: jax.Array
    logits: jax.Array
    stats: dict
    grads: jax.Array


@functools.cache
def training(model: nn.Module, shape: tuple[int, int, int]):
    """(parameters, statistics, key) -> Trained, on the digits."""
    unravel = start(model.clone(remat="none"), shape).unravel

    @jax.jit
    def train(params, stats, images, labels, key):
        def loss(params):
            variables = {"params": unravel(params)} | stats
            logits, changed = model.apply(variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, changed)

        (value, (logits, changed)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return Trained(value, logits, changed, grads)

    images, labels = digits(shape)
    return lambda params, stats, seed=0: train(params, stats, images, labels, jax.random.key(seed))


@functools.cache
def first_step(model: nn.Module, shape: tuple[int, int, int], seed: int = 0) -> Trained:
    variables = start(model.clone(remat="none"), shape)
    return training(model, shape)(variables.params, variables.stats, seed)


@functools.cache
def evaluation(model: nn.Module, shape: tuple[int, int, int]):
    """(parameters, statistics, images) -> logits, statistics and what was sown, without any random key."""
    unravel = start(model.clone(dtype="float32"), shape).unravel

    @jax.jit
    def evaluate(params, stats, images):
        variables = {"params": unravel(params)} | stats
        logits, changed = model.apply(variables, images, train=False, mutable=["batch_stats", "intermediates"])
        return logits, {kind: changed[kind] for kind in stats}, changed["intermediates"]

    return evaluate


@functools.cache
def evaluated(model: nn.Module, shape: tuple[int, int, int]):
    """The evaluation of a model after its first step of training."""
    variables = start(model.clone(dtype="float32"), shape)
    stats = first_step(model.clone(dtype="float32"), shape).stats
    return evaluation(model, shape)(variables.params, stats, digits(shape)[0])


def of(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    return tiny(name), image_shape(name)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.by_turns("training")
@every_model_heavy_slow
def test_every_parameter_learns(name):
    model, shape = of(name)
    grads = by_path(start(model, shape).unravel(first_step(model, shape).grads))
    assert all(np.isfinite(grad).all() for grad in grads.values())
    largest = {path: np.abs(grad).max() for path, grad in grads.items()}
    assert min(largest.values()) > 0
    dead = {path for path, grad in largest.items() if grad < 1e-6 * max(largest.values())}
    # What the mean that batch norm subtracts takes away again has no gradient but rounding: a bias right before it, and
    # a shift that only a 1x1 convolution separates from the next.
    shifts = {
        "vgg": r"\['conv_\d'\]\['conv'\]\['bias'\]$",
        "mobilenet|efficientnet": r"\['project'\]\['norm'\]\['bias'\]$",
    }
    excused = "|".join(shift for family, shift in shifts.items() if re.match(family, name)) or "nothing"
    assert not {path for path in dead if not re.search(excused, path)}


@pytest.mark.by_turns("training")
@every_model_heavy_slow
def test_running_statistics_move_in_training_only(name):
    model, shape = of(name)
    before, after = start(model, shape).stats, first_step(model, shape).stats
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert bool(before) == (models.fields(name).get("norm") == "batch")
    for path, stats in by_path(after).items():
        assert np.isfinite(stats).all()
        assert (stats != by_path(before)[path]).any(), path
    _, in_evaluation, _ = evaluated(model, shape)
    jax.tree.map(np.testing.assert_array_equal, in_evaluation, after)


@pytest.mark.by_turns("training")
@every_model_heavy_slow
def test_dropout_follows_its_key_in_training(name):
    model, shape = of(name)
    variables = start(model, shape)
    first, again, other = (training(model, shape)(variables.params, variables.stats, seed).logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert any("drop" in field for field in models.fields(name))
    assert (np.asarray(first) != np.asarray(other)).any()


@pytest.mark.by_turns
@every_model
def test_each_kind_of_dropout_acts_in_training_alone(name):
    shape = image_shape(name)
    off = {field: 0.0 for field in models.fields(name) if "drop" in field}
    assert trace(tiny(name, **off), shape, train=True, key=False).count("random_bits") == 0
    assert trace(tiny(name), shape, train=False).count("random_bits") == 0
    for field in off:
        with pytest.raises(flax.errors.InvalidRngError):
            trace(tiny(name, **off | {field: 0.5}), shape, train=True, key=False)


@pytest.mark.by_turns("training")
@every_model_heavy_slow
def test_evaluation_is_deterministic_and_treats_each_example_alone(name):
    model, shape = of(name)
    logits, _, _ = evaluated(model, shape)
    variables, stats = start(model, shape), first_step(model, shape).stats
    evaluate, (images, _) = evaluation(model, shape), digits(shape)
    np.testing.assert_array_equal(evaluate(variables.params, stats, images)[0], logits)
    others = np.concatenate([images[:4], np.zeros_like(images[4:])])
    beside_others, _, _ = evaluate(variables.params, stats, others)
    spread = np.ptp(np.asarray(logits))
    np.testing.assert_allclose(beside_others[:4], logits[:4], rtol=0, atol=1e-5 * spread)
    assert np.asarray(logits).std(axis=0).min() > 1e-3 * spread  # the examples are told apart


@pytest.mark.by_turns("training")
@every_model_heavy_slow
def test_the_documented_intermediates_are_sown(name):
    model, shape = of(name)
    _, _, sown = evaluated(model, shape)
    maps = {key: value for key, value in sown.items() if isinstance(value, tuple)}  # without those of blocks
    assert all(len(value) == 1 and np.isfinite(value[0]).all() for value in maps.values())
    (features,) = maps.pop("features")
    assert (features.ndim, features.shape[0], features.dtype) == (2, BATCH, jnp.float32)
    assert {key: value[0].shape[1:] for key, value in maps.items()} == TINY[name].maps


def loaded(name: str) -> nn.Module:
    """The tiny version with all that a large run asks for, so that its program need only be traced once."""
    return tiny(name, dtype="bfloat16", remat="block")


@every_model
def test_variables_do_not_depend_on_the_type_or_on_recomputing(name):
    _, variables, _ = trace_init(loaded(name), image_shape(name), train=False)
    assert variables == trace_init(plain(tiny(name)), image_shape(name), train=False)[1]
    assert dtypes(variables) == {"float32"}


@pytest.mark.by_turns
@every_model
def test_with_bfloat16_only_what_must_be_precise_stays_in_float32(name):
    traced = trace(loaded(name), image_shape(name), train=True, mapped=True)
    assert_logits(traced.logits)
    assert dtypes(traced.changed.get("batch_stats")) <= {"float32"}
    sown = traced.changed["intermediates"]
    assert dtypes(sown["features"]) == {"float32"}
    assert {key: dtypes(sown[key]) for key in TINY[name].maps} == {key: {"bfloat16"} for key in TINY[name].maps}
    products = [one for one in traced.operations if one.primitive.name in ("conv_general_dilated", "dot_general")]
    precise = [one for one in products if "float32" in {str(operand.aval.dtype) for operand in one.invars}]
    assert [one.primitive.name for one in precise] == ["dot_general"] * TINY[name].float32_products
    assert precise[-1] is products[-1] and precise[-1].outvars[0].aval.shape == (2, CLASSES)  # the head
    for one in precise:  # really so: by default a GPU would take TF32, a TPU bfloat16
        assert {str(operand.aval.dtype) for operand in one.invars} == {"float32"}
        assert one.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@every_model
def test_batch_norms_and_masks_span_the_devices_of_an_axis(name):
    traced = trace(loaded(name), image_shape(name), train=True, mapped=True)
    norms = len(jax.tree.leaves(traced.changed.get("batch_stats"))) // 2  # each has a mean and a variance
    assert traced.count("psum", "psum_invariant") == norms
    assert traced.count("axis_index") == traced.count("random_bits") > 0


@pytest.mark.by_turns
@every_model
def test_recomputed_blocks_do_the_same_in_the_same_order(name):
    without, recomputed = (
        trace(model, image_shape(name), train=train) for model, train in ((tiny(name), False), (loaded(name), True))
    )
    assert recomputed.count("checkpoint", "remat2") > without.count("checkpoint", "remat2")
    names = ("conv_general_dilated", "dot_general", "concatenate")
    assert without.shapes(*names) == recomputed.shapes(*names)


@pytest.mark.by_turns
@every_model
def test_no_constant_makes_the_rest_float64_where_jax_allows_it(name):
    traced = trace(tiny(name), image_shape(name), train=True, x64=True)
    assert dtypes(traced.logits, traced.changed) == {"float32"}


@pytest.mark.by_turns("training")
@every_model_heavy_slow
def test_bfloat16_logits_are_near_those_of_float32(name):
    model, shape = of(name)
    precise, coarse = (np.asarray(evaluated(model.clone(dtype=dtype), shape)[0]) for dtype in ("float32", "bfloat16"))
    assert coarse.dtype == np.float32
    assert (coarse != precise).any()
    assert np.abs(coarse - precise).max() < 0.05 * np.ptp(precise)


@pytest.mark.by_turns("training")
@each(slow=[name for name in KNOWN if FIRST[name] in HEAVY_OR_ALIKE])
def test_recomputing_in_the_backward_pass_changes_neither_logits_nor_gradients(name):
    model, shape = of(name)
    plain, recomputed = first_step(model, shape), first_step(model.clone(remat="block"), shape)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * np.abs(one).max())


@pytest.mark.by_turns
@every_model
def test_every_grouped_convolution_has_the_form_asked_for(name):
    def grouped(**fields):
        operations = trace(tiny(name, **fields), image_shape(name), train=False).operations
        return sum(operation.params.get("feature_group_count", 1) > 1 for operation in operations)

    with_groups = re.match(r"resnext|improved|convnext|efficientnet|mobilenet|alexnet_2012", name) is not None
    assert grouped(grouped_conv="shifted") == grouped(grouped_conv="cpu") == 0
    assert (grouped(grouped_conv="xla") > 0) == with_groups
    assert grouped() == grouped(grouped_conv="xla")


@pytest.mark.by_turns
@every_model
def test_every_convolution_takes_the_form_of_the_trainer(name):
    forms = set()

    def note(call, args, kwargs, context):
        if isinstance(context.module, convolutions.GroupedConv):
            forms.add(context.module.form)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        trace_init.__wrapped__(tiny(name, grouped_conv="cpu"), image_shape(name), train=False)
    assert forms == (set() if name.startswith("vit") else {"cpu"})


@functools.cache
def adam(learning_rate: float):
    optimizer = optax.adam(learning_rate)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    return optimizer.init, step


@functools.cache
def overfitted(model: nn.Module, shape: tuple[int, int, int], learning_rate: float) -> tuple[float, float, float]:
    """The first and last loss and the last accuracy of one batch, with the same masks all along.

    Ends as soon as the batch is learnt by heart, at the latest after 60 steps.
    """
    variables, (init, step), train = start(model, shape), adam(learning_rate), training(model, shape)
    params, stats, losses, accuracy = variables.params, variables.stats, [], 0.0
    state = init(params)
    while len(losses) < 60 and accuracy < 1.0 and not (losses and losses[-1] < 0.1 * losses[0]):
        trained = train(params, stats)
        losses.append(float(trained.loss))
        accuracy = float(np.mean(np.argmax(trained.logits, axis=-1) == digits(shape)[1]))
        params, state = step(params, state, trained.grads)
        stats = trained.stats
    return losses[0], losses[-1], accuracy


@pytest.mark.by_turns("training")
@every_model_heavy_slow
def test_sixty_steps_learn_a_batch_of_digits_by_heart(name):
    first, last, accuracy = overfitted(*of(name), TINY[name].learning_rate)
    assert last < 0.1 * first or accuracy == 1.0, f"loss {first:.3f} -> {last:.3f}, accuracy {accuracy:.0%}"
