import functools
import math
import re
from unittest import mock

import jax
import numpy as np
import pytest
from flax import traverse_util

from vitcls import models
from vitcls.data.augment import to_float
from vitcls.models.weights import load
from vitcls.models.weights.from_keras import from_keras
from vitcls.models.weights.preprocessing import BGR, preprocessing_of
from vitcls.training.steps import make_normalize

CLASSES = 10


def case(name, theirs, size=32, *, slow=False, images_of_255=False, arguments=None, **fields):
    values = (name, theirs, size, 255.0 if images_of_255 else 1.0, arguments or {}, fields)
    return pytest.param(values, id=name if size != 224 else f"{name}-224", marks=[pytest.mark.slow] * slow)


XLA = {"grouped_conv": "xla"}  # compiles faster
RAW = {"include_preprocessing": False}
ON_1X1 = {"stride_on": "1x1"}
# Sizes are small; odd ones meet every way of padding.
CASES = [
    case("vgg16", "VGG16", 47, stem="small"),
    case("vgg19", "VGG19", stem="small"),
    case("vgg16", "VGG16", 224, slow=True),  # the hidden layer over 7x7 maps
    case("resnet50", "ResNet50", 47, **ON_1X1),
    case("resnet101", "ResNet101", slow=True, **ON_1X1),
    case("resnet152", "ResNet152", slow=True, **ON_1X1),
    case("inception_v3", "InceptionV3", 75),
    case("densenet121", "DenseNet121", 51),
    case("densenet169", "DenseNet169", slow=True),
    case("densenet201", "DenseNet201", slow=True),
    case("efficientnet_b0", "EfficientNetB0", 47, images_of_255=True, **XLA),
    case("efficientnet_b1", "EfficientNetB1", images_of_255=True, slow=True, **XLA),
    case("efficientnet_b2", "EfficientNetB2", images_of_255=True, slow=True, **XLA),
    case("efficientnet_b3", "EfficientNetB3", images_of_255=True, slow=True, **XLA),
    case("mobilenet_v1", "MobileNet", **XLA),  # Keras does not pad odd maps as 'SAME' does
    case("mobilenet_v2", "MobileNetV2", 47, **XLA),
    case("mobilenet_v3_large", "MobileNetV3Large", 40, arguments=RAW, **XLA),
    case("mobilenet_v3_small", "MobileNetV3Small", 47, arguments=RAW, **XLA),
    case("convnext_tiny", "ConvNeXtTiny", 47, arguments=RAW, **XLA),
    case("convnext_small", "ConvNeXtSmall", arguments=RAW, slow=True, **XLA),
    case("convnext_base", "ConvNeXtBase", arguments=RAW, slow=True, **XLA),
]


def random_value(path, shape, draw):
    """Values of which none is trivial."""
    kind = path.rpartition("/")[2]
    if kind == "kernel":
        inputs = shape[:-2] if len(shape) == 4 and shape[-1] == 1 else shape[:-1]  # depthwise or not
        return draw.standard_normal(shape, np.float32) * math.sqrt(2 / math.prod(inputs))
    if kind in ("gamma", "moving_variance"):
        return draw.uniform(0.5, 1.5, shape)
    if kind.startswith("variable"):  # a layer scale
        return draw.uniform(0.1, 0.4, shape)
    assert kind in ("bias", "beta", "moving_mean"), path
    return 0.2 * draw.standard_normal(shape, np.float32)


def fit_running_statistics(network, images):
    """Scales those of every norm to the size of what it receives, so that no signal dies out or grows."""
    import keras

    norm = keras.layers.BatchNormalization
    original = norm.call

    def call(self, inputs, **kwargs):
        mean_square = np.mean(np.square(inputs))
        self.moving_mean.assign(self.moving_mean * np.sqrt(mean_square))
        self.moving_variance.assign(self.moving_variance * mean_square)
        return original(self, inputs, **kwargs)

    with mock.patch.object(norm, "call", call):
        network(images, training=False)


@functools.lru_cache(maxsize=1)
def build(theirs, size, scale, arguments=()):
    """Images [2, size, size, 3], weights by the names of Keras, and the logits of its model."""
    import keras

    network = getattr(keras.applications, theirs)(
        weights=None,
        input_shape=(size, size, 3),
        classes=CLASSES,
        classifier_activation=None,
        **dict(arguments),
    )
    draw = np.random.default_rng(0)
    for variable in network.variables:
        if not re.match("normalization|seed_generator", variable.path):
            variable.assign(random_value(variable.path, tuple(variable.shape), draw))
    images = (draw.normal(size=(2, size, size, 3)) + draw.normal(size=(2, 1, 1, 3))).astype(np.float32)
    fit_running_statistics(network, scale * images)
    logits = network(scale * images, training=False).numpy()
    return images, {variable.path: variable.numpy() for variable in network.variables}, logits


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, images):
    return model.apply(variables, images, train=False)


@pytest.mark.by_turns
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_keras(case):
    name, theirs, size, scale, arguments, fields = case
    images, weights, expected = build(theirs, size, scale, tuple(arguments.items()))
    variables = from_keras(name, weights, num_classes=CLASSES, image_shape=(size, size, 3), **fields)
    logits = np.asarray(forward(models.create(name, CLASSES, **fields), variables, images))
    largest = np.abs(expected).max()
    assert np.ptp(expected, axis=0).max() > 1e-2 * largest  # the images matter
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * largest)


@functools.cache
def small_resnet():
    """Fields of a ResNet with one block, and weights for it, each number of them another."""
    shapes = {"predictions/kernel": (16, 3), "predictions/bias": (3,)}
    layers = {"conv1": (7, 3, 4)}
    layers |= {f"conv2_block1_{n}": shape for n, shape in enumerate(((1, 4, 16), (1, 4, 4), (3, 4, 4), (1, 4, 16)))}
    for layer, (size, inputs, features) in layers.items():
        shapes |= {f"{layer}_conv/kernel": (size, size, inputs, features), f"{layer}_conv/bias": (features,)}
        shapes |= {f"{layer}_bn/{kind}": (features,) for kind in ("gamma", "beta", "moving_mean", "moving_variance")}
    draw = np.random.default_rng(0)
    weights = {path: draw.standard_normal(shape) for path, shape in shapes.items()}
    return {"num_classes": 3, "depths": (1,), "width": 4, "stride_on": "1x1"}, weights


def convert(change=dict, **changed_fields):
    """The variables of the small ResNet from its changed weights."""
    fields, weights = small_resnet()
    return from_keras("resnet50", change(weights), **fields | changed_fields)


def flat(variables):
    return traverse_util.flatten_dict(variables, sep="/")


def test_the_variables_are_float32_arrays_of_numpy_in_the_structure_of_the_model():
    fields, _ = small_resnet()
    model = models.create("resnet50", **fields)
    shapes = jax.eval_shape(lambda key: model.init(key, np.zeros((1, 32, 32, 3)), train=False), jax.random.key(0))
    variables = convert()
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)
    for leaf, expected in zip(jax.tree.leaves(variables), jax.tree.leaves(shapes), strict=True):
        assert isinstance(leaf, np.ndarray) and leaf.shape == expected.shape and leaf.dtype == expected.dtype


def test_a_norm_takes_the_bias_of_its_convolution():
    _, weights = small_resnet()
    expected = weights["conv2_block1_2_bn/moving_mean"] - weights["conv2_block1_2_conv/bias"]
    leaf = flat(convert())["batch_stats/stage_1_block_1/conv_2/norm/mean"]
    np.testing.assert_array_equal(leaf, expected.astype(np.float32))


@pytest.mark.by_turns
def test_layers_that_keras_numbers_count_from_any_number_and_paths_may_be_longer():
    import keras

    keras.utils.clear_session()
    network = keras.applications.InceptionV3(weights=None, input_shape=(75, 75, 3), classes=CLASSES)
    weights = {variable.path: variable.numpy() for variable in network.variables}
    assert "conv2d/kernel" in weights and "batch_normalization_93/beta" in weights

    def renamed(path):
        found = re.fullmatch(r"(conv2d|batch_normalization)(?:_(\d+))?/(.+)", path)
        return f"outer/{found[1]}_{int(found[2] or 0) + len(found[1])}/{found[3]}" if found else path

    moved = {renamed(path): value for path, value in weights.items()}
    first, second = (from_keras("inception_v3", each, num_classes=CLASSES) for each in (weights, moved))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    file = load.WeightsFile("moved.weights.h5", "keras", moved, {})
    found = load.convert("inception_v3", file, head=True)
    assert (found.num_classes, found.channels) == (CLASSES, 3)
    for path, leaf in traverse_util.flatten_dict(first, sep="/").items():
        np.testing.assert_array_equal(found.variables[path], leaf)


def without(key):
    return lambda weights: {name: value for name, value in weights.items() if name != key}


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (
            without("conv2_block1_2_conv/bias"),
            {},
            "the weights have no 'conv2_block1_2_conv/bias', which resnet50 needs for "
            "'batch_stats/stage_1_block_1/conv_2/norm/mean'",
        ),
        (
            dict,
            {"num_classes": 5},
            r"the shape \(3,\) of 'predictions/bias' does not fit 'params/head/bias' of resnet50, which is \(5,\)",
        ),
        (
            lambda weights: weights | {"conv1_conv/bias": np.ones(())},
            {},
            r"the shape \(\) of 'conv1_conv/bias' does not fit 'batch_stats/stem/norm/mean' of resnet50",
        ),
        (
            lambda weights: weights | {"predictions/kernel": np.ones((3, 16))},
            {},
            r"the shape \(3, 16\) of 'predictions/kernel' does not fit 'params/head/kernel' of resnet50",
        ),
        (
            lambda weights: weights | {"outer/extra_7/kernel": np.ones(1), "extra_8/kernel": np.ones(1)},
            {},
            "resnet50 has no place for 2 of the weights, the first of them 'outer/extra_7/kernel'",
        ),
        (dict, {"stride_on": "3x3"}, "resnet50 can take weights of Keras with stride_on='1x1' only"),
    ],
    ids=["missing", "classes", "scalar", "transposed", "unused", "stride"],
)
def test_what_does_not_fit_is_said_in_one_line(change, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        convert(change, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("googlenet", "googlenet cannot take weights of Keras: no names are known for it"),
        ("resnext50_32x4d", "resnext50_32x4d cannot take weights of Keras"),
        ("vgg16_bn", "vgg16_bn cannot take weights of Keras: no name is known for '.*/norm/"),
        ("resnet51", "config.model.name 'resnet51' is not known; did you mean"),
    ],
)
def test_models_that_keras_has_no_names_for(name, message):
    with pytest.raises(ValueError, match=message):
        from_keras(name, {})


@pytest.mark.parametrize(
    ("name", "field", "value", "theirs"),
    [
        ("mobilenet_v2", "padding", "even", "'same'"),
        ("mobilenet_v3_small", "padding", "even", "'same'"),
        ("inception_v3", "count_padding", True, "False"),
    ],
)
def test_networks_that_compute_something_else_are_refused(name, field, value, theirs):
    with pytest.raises(ValueError, match=f"{name} can take weights of Keras with {field}={theirs} only"):
        from_keras(name, {}, **{field: value})


def test_every_leaf_is_contiguous_whatever_the_weights_are():
    for leaf in jax.tree.leaves(convert(lambda weights: {path: np.asfortranarray(v) for path, v in weights.items()})):
        assert leaf.flags.c_contiguous


# The images that a user of Keras has, bytes in RGB, all the way to the logits.


def as_runs_have_them(images, found):
    """Bytes as a run normalises them for weights of this preprocessing."""
    return np.asarray(make_normalize(found.mean, found.std)(to_float(images)))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("resnet50", "resnet"),
        ("vgg16", "vgg16"),
        ("vgg19", "vgg19"),
        ("inception_v3", "inception_v3"),
        ("densenet121", "densenet"),
        ("mobilenet_v1", "mobilenet"),
        ("mobilenet_v2", "mobilenet_v2"),
    ],
)
def test_preprocessing_is_that_of_keras(name, module):
    import keras

    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    expected = getattr(keras.applications, module).preprocess_input(images.astype(np.float32))
    found = as_runs_have_them(images, preprocessing_of(name, "keras"))
    if ("keras", models.preset(name).module.__name__) in BGR:
        expected = expected[..., ::-1]  # which the first layer makes good
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.by_turns
@pytest.mark.parametrize(
    ("name", "theirs", "fields"), [("resnet50", "ResNet50", ON_1X1), ("vgg16", "VGG16", {"stem": "small"})]
)
def test_a_photo_has_the_logits_that_keras_gives_it(name, theirs, fields, tmp_path):
    import keras

    _, weights, _ = build(theirs, 47, 1.0)
    network = getattr(keras.applications, theirs)(
        weights=None, input_shape=(47, 47, 3), classes=CLASSES, classifier_activation=None
    )
    for variable, value in zip(network.variables, weights.values(), strict=True):
        variable.assign(value)
    draw = np.random.default_rng(1)
    images = np.clip(draw.normal(128, 40, (3, 47, 47, 3)) + draw.normal(0, 60, (3, 1, 1, 3)), 0, 255).astype(np.uint8)
    expected = network(keras.applications.imagenet_utils.preprocess_input(images, mode="caffe"), training=False).numpy()

    network.save_weights(tmp_path / "w.weights.h5")
    given = load.convert(name, load.open_weights(str(tmp_path / "w.weights.h5")), head=True, **fields)
    model = models.create(name, CLASSES, **fields)
    variables = traverse_util.unflatten_dict(given.variables, sep="/")
    logits = np.asarray(forward(model, variables, as_runs_have_them(images, given.preprocessing)))
    largest = np.abs(expected).max()
    assert np.ptp(expected, axis=0).max() > 1e-2 * largest
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * largest)
    swapped = np.asarray(forward(model, variables, as_runs_have_them(images[..., ::-1], given.preprocessing)))
    assert np.abs(swapped - expected).max() > 1e-2 * largest  # the order of the colours matters
