import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.models import reference
from vitcls import models
from vitcls.models.weights.from_torch import from_torch

CLASSES = 5

_VGG = {"widths": (4, 8, 8, 16, 16), "head_width": 32}
_DENSENET = {"depths": (2, 3, 2), "growth_rate": 8}
_CONVNEXT = {"depths": (1, 2), "widths": (8, 16)}
_BIT = {"depths": (1, 2), "width": 16}
_VIT = {"patch_size": 8, "hidden_dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48}

# test id -> model, (height, width), fields of ours, network of the reference, its arguments
CASES = {
    "resnext50": ("resnext50_32x4d", (64, 64), {}, "resnet", {"groups": 32, "group_width": 4}),
    "alexnet": ("alexnet", (63, 79), {}, "alexnet", {}),
    "alexnet_2012": ("alexnet_2012", (95, 63), {"head_width": 64}, "alexnet_2012", {"head_width": 64}),
    "googlenet": ("googlenet", (64, 47), {}, "googlenet", {}),  # with and without parts of windows at the edge
    "inception_v3": ("inception_v3", (75, 83), {"count_padding": True}, "inception_v3", {}),
    "resnet18": ("resnet18", (40, 33), {}, "resnet", {"depths": (2, 2, 2, 2), "kind": "basic"}),
    "resnet50": ("resnet50", (33, 40), {"depths": (1, 2, 1, 1)}, "resnet", {"depths": (1, 2, 1, 1)}),
    "resnetv2": ("resnetv2_50x1_bit", (33, 40), _BIT, "resnetv2", _BIT),
    "vgg11": ("vgg11", (70, 32), _VGG, "vgg", _VGG | {"depths": (1, 1, 2, 2, 2), "norm": False}),
    "vgg13_bn": ("vgg13_bn", (224, 255), _VGG, "vgg", _VGG | {"depths": (2, 2, 2, 2, 2), "norm": True}),
    "densenet": ("densenet121", (48, 72), _DENSENET, "densenet", _DENSENET),
    "convnext": ("convnext_tiny", (40, 24), _CONVNEXT, "convnext", _CONVNEXT),
    "mobilenet_v2": ("mobilenet_v2", (64, 45), {"padding": "even"}, "mobilenet_v2", {"timm": False}),
    "mobilenet_v2_timm": ("mobilenet_v2", (64, 45), {"padding": "even"}, "mobilenet_v2", {"timm": True}),
    "mobilenet_v3": ("mobilenet_v3_small", (64, 45), {}, "mobilenet_v3_small", {}),
    "efficientnet": (
        "efficientnet_b0",
        (64, 45),
        {"depth_multiplier": 0.5},
        "efficientnet",
        {"depths": (1, 1, 1, 2, 2, 2, 1)},
    ),
    "vit": ("vit_tiny_patch16", (32, 16), _VIT, "vit", _VIT),
}
# What torchvision 0.29.1 and timm 1.0.31 say (PyTorch 2.14.1, float64, 2026-11-30) of the images and weights of
# `computed`, taken up by load_state_dict without a key too many or too few, and how far they are off in float32. timm
# says the same of the ViT's weights as `named_as_in_augreg` has them.
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())
every_case = pytest.mark.parametrize("case", CASES)


@functools.cache
def computed(case):
    """Images [2, H, W, 3], weights by PyTorch's names, and the logits of the reference."""
    _, size, _, network, arguments = CASES[case]
    draw = np.random.default_rng(0)
    images = (draw.normal(size=(2, *size, 3)) + 2 * draw.normal(size=(2, 1, 1, 3))).astype(np.float32)
    weights = reference.Weights()
    logits = getattr(reference, network)(weights, np.moveaxis(images, -1, 1), CLASSES, **arguments)
    return images, dict(weights), logits


def convert(case, weights=None, **fields):
    name, size, case_fields, *_ = CASES[case]
    weights = computed(case)[1] if weights is None else weights
    return from_torch(name, weights, num_classes=CLASSES, image_shape=(*size, 3), **case_fields | fields)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, variables, images):
    return model.apply(variables, images, train=False)


@pytest.mark.by_turns
@every_case
def test_logits_are_those_of_the_reference(case):
    images, _, expected = computed(case)
    name, _, fields, *_ = CASES[case]
    logits = np.asarray(forward(models.create(name, CLASSES, **fields), convert(case), images))
    scale = np.abs(expected).max()
    assert np.ptp(expected, axis=0).max() > 0.1 * scale  # the images matter
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.by_turns
@pytest.mark.parametrize("case", GOLDEN)
def test_logits_are_those_of_the_source(case):
    images, _, _ = computed(case)
    name, _, fields, *_ = CASES[case]
    logits = np.asarray(forward(models.create(name, CLASSES, **fields), convert(case), images))
    expected, theirs = np.array(GOLDEN[case]["logits"]), GOLDEN[case]["float32_error"]
    tolerance = max(1e-5, 2 * theirs)  # float32 costs torchvision itself 5e-5 in MobileNet v2
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.by_turns
@every_case
def test_every_leaf_comes_from_one_weight_and_every_number_is_used_once(case):
    images, weights, _ = computed(case)
    name, _, fields, *_ = CASES[case]
    marked = {key: np.full(value.shape, i, np.float32) for i, (key, value) in enumerate(weights.items())}
    variables = convert(case, marked)

    model, used = models.create(name, CLASSES, **fields), np.zeros(len(marked), int)
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)
    for leaf, expected in zip(jax.tree.leaves(variables), jax.tree.leaves(shapes), strict=True):
        assert isinstance(leaf, np.ndarray) and leaf.shape == expected.shape and leaf.dtype == expected.dtype
        assert leaf.flags.c_contiguous  # safetensors writes others in the order of their memory
        assert np.ptp(leaf) == 0
        used[int(leaf.flat[0])] += leaf.size
    assert used.tolist() == [value.size for value in marked.values()]


@pytest.mark.parametrize(
    ("case", "path", "key"),
    [
        ("resnext50", "params/stage_2_block_3/conv_2/conv/kernel", "layer2.2.conv2.weight"),
        ("resnext50", "params/stage_3_block_1/shortcut/norm/scale", "layer3.0.downsample.1.weight"),
        ("resnext50", "batch_stats/stage_4_block_1/conv_3/norm/mean", "layer4.0.bn3.running_mean"),
        ("resnext50", "batch_stats/stage_4_block_1/conv_3/norm/var", "layer4.0.bn3.running_var"),
        ("resnetv2", "params/stage_2_block_1/shortcut/conv/kernel", "stages.1.blocks.0.downsample.conv.weight"),
        ("resnetv2", "params/head_norm/scale", "norm.weight"),
        ("googlenet", "params/inception_4e/5x5_2/conv/kernel", "inception4e.branch3.1.conv.weight"),
        ("inception_v3", "params/stem_4/conv/kernel", "Conv2d_3b_1x1.conv.weight"),
        ("inception_v3", "batch_stats/mixed_9/7x7_4/norm/var", "Mixed_7a.branch7x7x3_4.bn.running_var"),
        ("inception_v3", "params/mixed_11/3x3_twice_3_right/conv/kernel", "Mixed_7c.branch3x3dbl_3b.conv.weight"),
        ("vgg13_bn", "params/stage_2/conv_1/conv/bias", "features.7.bias"),
        ("densenet", "params/transition_2/kernel", "features.transition1.conv.weight"),
        ("mobilenet_v3", "params/hidden/kernel", "conv_head.weight"),
        ("vit", "params/block_1/feed_forward/project/kernel", "blocks.1.mlp.fc2.weight"),
    ],
)
def test_where_a_weight_goes_and_how_its_axes_are_ordered(case, path, key):
    leaf, weight = traverse_util.flatten_dict(convert(case), sep="/")[path], computed(case)[1][key]
    axes = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[weight.ndim]
    np.testing.assert_array_equal(leaf, weight.transpose(axes).reshape(leaf.shape))


def test_a_matrix_over_a_flattened_map_sees_our_order_of_channels():
    _, weights, _ = computed("vgg11")
    kernel = convert("vgg11")["params"]["hidden_1"]["kernel"]
    features = np.random.default_rng(1).normal(size=(2, 7, 7, 16))
    expected = np.moveaxis(features, -1, 1).reshape(2, -1) @ weights["classifier.0.weight"].T
    np.testing.assert_allclose(features.reshape(2, -1) @ kernel, expected, rtol=1e-4, atol=1e-4)


def test_auxiliary_classifiers_and_counts_of_batches_are_left_out():
    extra = {"conv1.bn.num_batches_tracked": np.int64(7), "aux1.fc1.weight": np.zeros((1024, 2048), np.float32)}
    assert "aux1" not in str(jax.tree.structure(convert("googlenet", computed("googlenet")[1] | extra)))


def without(weights, key):
    return {name: value for name, value in weights.items() if name != key}


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        (
            {},
            lambda weights: without(weights, "layer2.0.conv2.weight"),
            "the weights have no 'layer2.0.conv2.weight', which resnet50 needs for "
            "'params/stage_2_block_1/conv_2/conv/kernel'",
        ),
        (
            {},
            lambda weights: weights | {"fc.weight": np.zeros((CLASSES + 1, 2048), np.float32)},
            r"the shape \(6, 2048\) of 'fc.weight' does not fit 'params/head/kernel' of resnet50, which is \(2048, 5\)",
        ),
        (
            {},
            lambda weights: weights | {"bn1.running_var": np.ones((), np.float32)},
            r"the shape \(\) of 'bn1.running_var' does not fit 'batch_stats/stem/norm/var' of resnet50",
        ),
        (
            {},
            lambda weights: weights | {"conv1.weight": weights["conv1.weight"].transpose(2, 3, 1, 0)},
            r"the shape \(7, 7, 3, 64\) of 'conv1.weight' .*, which is \(7, 7, 3, 64\): its axes are in another order",
        ),
        (
            {},
            lambda weights: weights | {"conv1.weight": weights["conv1.weight"].astype(np.int16)},
            "'conv1.weight' has numbers of type int16, not floating-point ones",
        ),
        (
            {},
            lambda weights: weights | {"fc.bias": np.float32([1, 2, np.nan, 4, 5])},
            "'fc.bias' has numbers that are not finite",
        ),
        (
            {},
            lambda weights: weights | {"layer5.0.conv1.weight": np.zeros(1), "fc2.bias": np.zeros(1)},
            r"resnet50 has no place for 2 of the weights, the first of them 'layer5.0.conv1.weight'",
        ),
        (
            {"depths": (1, 1, 1, 1)},
            dict,
            "has no place for 15 of the weights, the first of them 'layer2.1.conv1.weight'",
        ),
    ],
    ids=["missing", "shape", "scalar", "axes", "whole numbers", "nan", "unused", "fewer blocks"],
)
def test_what_does_not_fit_is_said_in_one_line(fields, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        convert("resnet50", change(computed("resnet50")[1]), **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenet5", "lenet5 cannot take weights of PyTorch"),
        ("mobilenet_v2", "mobilenet_v2 can take weights of PyTorch with padding='even' only"),
        ("mobilenet_v1", "mobilenet_v1 cannot take weights of PyTorch"),
        ("inception_v3", "inception_v3 can take weights of PyTorch with count_padding=True only"),
        ("improved_resnext50", "improved_resnext50 .* no name is known for '.*/fusion/"),
        ("resnext51", "config.model.name 'resnext51' is not known; did you mean"),
    ],
)
def test_models_that_pytorch_has_no_names_for(name, message):
    with pytest.raises(ValueError, match=message):
        from_torch(name, {})


def test_positions_of_another_size_do_not_fit():
    name, _, fields, *_ = CASES["vit"]
    message = r"the shape \(1, 9, 32\) of 'pos_embed' does not fit 'params/position_embedding'"
    with pytest.raises(ValueError, match=message):
        from_torch(name, computed("vit")[1], num_classes=CLASSES, image_shape=(32, 32, 3), **fields)
