"""BiT's .npz files, against timm's network with the same weights."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from vitcls import adopt, models
from vitcls.core.errors import UserError
from vitcls.models.variables import variable_shapes
from vitcls.models.weights import from_npz, load
from vitcls.models.weights.to_torch import to_torch

FIELDS = {"depths": (1, 2), "width": 32}
# Of timm 1.0.31 with torch 2.13.0, ResNetV2(layers=(1, 2), channels=(128, 256), stem_chs=32, num_classes=5,
# stem_type='fixed', conv_layer=partial(StdConv2d, eps=1e-8)), after its load_pretrained() of `drawn()` as .npz.
LOGITS = [
    [1.9767573, -0.11226061, -1.9445944, 2.0048637, -0.5995921],
    [3.5637197, -3.8744261, -0.4961419, 0.66809773, -0.28668943],
]


def drawn():
    """The arrays of a tiny BiT by their names, none of them trivial, and images [2, 33, 24, 3]."""
    draw, arrays = np.random.default_rng(0), {}

    def conv(name, *shape):
        kernel = draw.standard_normal(shape) / 10 + 0.02
        arrays[f"resnet/{name}/standardized_conv2d/kernel"] = kernel.astype(np.float32)

    def norm(name, width):
        arrays[f"resnet{name}/group_norm/gamma"] = draw.uniform(0.5, 1.5, width).astype(np.float32)
        arrays[f"resnet{name}/group_norm/beta"] = (0.1 * draw.standard_normal(width)).astype(np.float32)

    conv("root_block", 7, 7, 3, 32)
    inputs = 32
    for stage, (depth, inner) in enumerate(((1, 32), (2, 64)), start=1):
        for unit in range(1, depth + 1):
            name = f"block{stage}/unit{unit:02}"
            if unit == 1:
                conv(f"{name}/a/proj", 1, 1, inputs, 4 * inner)
            for part, width, shape in (
                ("a", inputs, (1, 1, inputs, inner)),
                ("b", inner, (3, 3, inner, inner)),
                ("c", inner, (1, 1, inner, 4 * inner)),
            ):
                norm(f"/{name}/{part}", width)
                conv(f"{name}/{part}", *shape)
            inputs = 4 * inner
    norm("", inputs)
    arrays["resnet/head/conv2d/kernel"] = draw.standard_normal((1, 1, inputs, 5)).astype(np.float32)
    arrays["resnet/head/conv2d/bias"] = draw.standard_normal(5).astype(np.float32)
    return arrays, draw.standard_normal((2, 33, 24, 3)).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / "BiT-M-tiny.npz", **drawn()[0])
    return str(tmp_path / "BiT-M-tiny.npz")


def test_logits_of_a_file_are_those_of_timm(file):
    given = load.convert("resnetv2_50x1_bit", load.open_weights(file), head=True, **FIELDS)
    assert (given.channels, given.num_classes) == (3, 5)
    assert (given.preprocessing.mean, given.preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)
    variables = traverse_util.unflatten_dict(given.variables, sep="/")
    model = models.create("resnetv2_50x1_bit", 5, **FIELDS)
    logits = jax.jit(lambda variables: model.apply(variables, drawn()[1], train=False))(variables)
    np.testing.assert_allclose(logits, LOGITS, rtol=0, atol=1e-5 * np.abs(LOGITS).max())


def test_names_of_timm_are_those_of_bit_in_another_layout(file):
    given = load.convert("resnetv2_50x1_bit", load.open_weights(file), head=True, **FIELDS)
    weights = to_torch("resnetv2_50x1_bit", traverse_util.unflatten_dict(given.variables, sep="/"), **FIELDS)
    arrays = drawn()[0]
    assert len(weights) == len(arrays)
    for theirs, bit in (
        ("stem.conv.weight", "resnet/root_block/standardized_conv2d/kernel"),
        ("stages.1.blocks.0.downsample.conv.weight", "resnet/block2/unit01/a/proj/standardized_conv2d/kernel"),
        ("stages.1.blocks.1.conv2.weight", "resnet/block2/unit02/b/standardized_conv2d/kernel"),
        ("head.fc.weight", "resnet/head/conv2d/kernel"),
    ):
        np.testing.assert_array_equal(weights[theirs], arrays[bit].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(
        weights["stages.0.blocks.0.norm3.bias"], arrays["resnet/block1/unit01/c/group_norm/beta"]
    )


def test_what_a_file_lacks_is_said_at_once(tmp_path):
    arrays = drawn()[0]
    del arrays["resnet/block2/unit02/b/standardized_conv2d/kernel"], arrays["resnet/group_norm/beta"]
    np.savez(tmp_path / "w.npz", **arrays, extra=np.zeros(1))
    with pytest.raises(UserError, match=r"no 'resnet/group_norm/beta'.*no 'resnet/block2.*no place for 1.*'extra'"):
        load.convert("resnetv2_50x1_bit", load.open_weights(str(tmp_path / "w.npz")), head=True, **FIELDS)
    with pytest.raises(UserError, match=r"resnet50 cannot take weights of an \.npz file of Google's"):
        load.convert("resnet50", load.open_weights(str(tmp_path / "w.npz")), head=True)


@pytest.mark.by_turns
def test_a_whole_file_is_known_by_its_names_and_shapes(tmp_path):
    model = models.create("resnetv2_50x1_bit", 7)
    shapes = traverse_util.flatten_dict(variable_shapes(model, (224, 224, 3))["params"], sep="/")
    draw, arrays = np.random.default_rng(0), {}
    for path, rule in from_npz.rules_for("resnetv2_50x1_bit", model).items():
        if path in shapes:
            arrays[rule.keys[0]] = draw.random(shapes[path].shape, np.float32).astype(np.float16)
    np.savez(tmp_path / "w.npz", **arrays)
    (found,) = adopt.identify(load.open_weights(str(tmp_path / "w.npz")))
    assert (found.model, found.given.num_classes) == ("resnetv2_50x1_bit", 7)
    assert "mean (0.500, 0.500, 0.500)" in "\n".join(adopt.describe(load.open_weights(str(tmp_path / "w.npz")), found))
