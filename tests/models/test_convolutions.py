"""Convolutions in all their forms against the sum written out, and against XLA's."""

import functools
import itertools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from ml_collections import config_dict

from tests.models.literal import assert_near, literal_grouped_conv, normal
from vitcls import config as configs
from vitcls import data, models
from vitcls.core import sharding
from vitcls.models import convolutions, forms
from vitcls.training import build

# Channels, features, groups: depthwise, depthwise that makes two of each channel, groups of several, one group.
GROUPINGS = {"depthwise": (4, 4, 4), "multiplied": (3, 6, 3), "grouped": (4, 6, 2), "ungrouped": (3, 2, 1)}


def grouped_conv_cases():
    """All kernels, strides, groupings and paddings; those that only take longer to compile are slow."""
    for size, stride, grouping in itertools.product((1, 3, 5, 7), (1, 2), GROUPINGS):
        fast, slow = ("SAME", "VALID", size // 2, 2), ()
        if size > 3:
            fast, slow = (("SAME",), fast[1:]) if grouping in ("depthwise", "grouped") else ((), fast)
        for paddings, marks in ((fast, ()), (slow, pytest.mark.slow)):
            if paddings:
                yield pytest.param(size, stride, grouping, paddings, marks=marks)


@pytest.mark.by_turns
@pytest.mark.parametrize(("size", "stride", "grouping", "paddings"), list(grouped_conv_cases()))
def test_all_forms_of_a_grouped_convolution_are_the_concatenation_over_groups(size, stride, grouping, paddings):
    channels, features, groups = GROUPINGS[grouping]
    x, kernel = normal(0, 2, 8, 7, channels), normal(1, size, size, channels // groups, features)  # even and odd
    cases = {
        (padding, form): convolutions.GroupedConv(features, size, groups, stride, padding, form=form)
        for padding in paddings
        for form in ("xla", "shifted", *(("mixed", "merged", "dense") if size == 3 else ()))
    }
    expected = {padding: literal_grouped_conv(x, kernel, groups, stride, padding, 2) for padding, _ in cases}

    @jax.jit
    def run(x, kernel):
        def outputs_and_gradients(conv, cotangent):
            y, pull = jax.vjp(lambda x, kernel: conv.apply({"params": {"kernel": kernel}}, x), x, kernel)
            return y, *pull(cotangent)

        return [outputs_and_gradients(conv, expected[padding][1]) for (padding, _), conv in cases.items()]

    for (padding, _), got in zip(cases, run(x, kernel), strict=True):
        y, _, input_grad, kernel_grad = expected[padding]
        for one, other in zip(got, (y, input_grad, kernel_grad), strict=True):
            assert_near(one, other)


@pytest.mark.parametrize("form", convolutions.GROUPED_CONV_FORMS)
def test_a_grouped_convolution_has_the_parameters_of_flax(form):
    x, init = normal(0, 2, 5, 4, 6), nn.initializers.he_normal()
    ours = convolutions.GroupedConv(8, 3, 2, 2, use_bias=True, form=form)
    flax = nn.Conv(8, (3, 3), 2, feature_group_count=2, kernel_init=init)
    params = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, flax.init(jax.random.key(0), x))

    params = jax.tree.map(lambda leaf: normal(1, *leaf.shape), params)
    assert_near(ours.apply(params, x), flax.apply(params, x))
    without = convolutions.GroupedConv(8, 3, 2, 2, form=form).init(jax.random.key(0), x)["params"]
    assert set(without) == {"kernel"}


@pytest.mark.parametrize("form", ["xla", "shifted", "mixed"])
def test_a_grouped_convolution_computes_in_its_type_and_keeps_float32_parameters(form):
    x = normal(0, 2, 5, 4, 4)
    conv = convolutions.GroupedConv(4, 3, 4, use_bias=True, form=form, dtype="bfloat16")
    y, variables = conv.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert_near(y.astype(jnp.float32), conv.clone(dtype="float32").apply(variables, x), 0.03)


def test_merged_groups_have_64_channels_and_do_not_see_each_other():
    x, kernel = normal(0, 1, 3, 3, 128), normal(1, 3, 3, 4, 256)

    def loss(form, x, kernel):
        return jnp.sum(
            jnp.sin(convolutions.GroupedConv(256, 3, 32, form=form).apply({"params": {"kernel": kernel}}, x))
        )

    program = str(jax.make_jaxpr(functools.partial(loss, "merged"))(x, kernel))
    assert re.findall(r"feature_group_count=(\d+)", program) == ["2"]
    results = [jax.value_and_grad(functools.partial(loss, form), (0, 1))(x, kernel) for form in ("merged", "xla")]
    jax.tree.map(assert_near, *results)


def test_a_grouped_convolution_is_one_of_xla_unless_another_form_is_named():
    x = normal(0, 1, 4, 4, 4)

    def uses_xla(**form):
        conv = convolutions.GroupedConv(4, 3, 4, **form)
        return "conv_general_dilated" in str(jax.make_jaxpr(lambda x: conv.init_with_output(jax.random.key(0), x))(x))

    assert uses_xla()
    forms = ("auto", "xla", "mixed", "merged", "dense", "shifted", "cpu")
    assert [uses_xla(form=form) for form in forms] == [True, True, True, True, True, False, False]


@pytest.mark.parametrize(
    "images, groups, dense",
    [
        ((32, 16, 16, 128), 32, True),
        ((32, 32, 32, 24), 4, True),
        ((32, 32, 32, 64), 4, False),  # more than 2^20 numbers
        ((4, 32, 32, 256), 32, False),  # more than 128 channels
        ((32, 8, 8, 128), 32, False),  # fewer than 4,096 places
        ((32, 16, 16, 96), 96, False),  # depthwise
    ],
)
def test_groups_of_few_channels_in_many_places_are_one_convolution_on_a_cpu(images, groups, dense):
    layer = convolutions.GroupedConv(images[-1], 3, groups, form="cpu")
    x = jax.ShapeDtypeStruct(images, jnp.float32)
    program = str(jax.make_jaxpr(lambda x: layer.init_with_output(jax.random.key(0), x))(x))
    assert re.findall(r"feature_group_count=(\d+)", program) == ["1"] * dense


RESNEXT = {"depths": (1, 1), "width": 8, "groups": 4, "group_width": 2, "stem": "small"}


@pytest.mark.by_turns
def test_the_trainer_takes_the_form_of_the_platform_for_its_step_alone(tiny_config, monkeypatch):
    """On a CPU the training step has no grouped convolution; what is evaluated and exported is the model as it is."""
    tiny_config.model = config_dict.ConfigDict({"name": "improved_resnext50", **RESNEXT})
    config = configs.resolve(tiny_config)
    dataset = data.load(config.dataset)
    info = data.describe(dataset, config.dataset)
    plan = build.make_plan(config, info)
    batch = {"image": np.zeros((16, *info.image_shape), np.uint8)}
    batch |= {"label": np.zeros(16, np.int32), "mask": np.ones(16, np.float32)}

    def grouped(**form):
        config.model.update(form)
        training = build.make_training(config, info, plan, sharding.all_devices("data"))
        state = jax.eval_shape(training.create_state, jax.random.key(0))
        evaluation = build.make_eval_step(config, training.model, info)
        programs = (
            jax.make_jaxpr(training.train_step)(state, batch, jax.random.key(0)),
            jax.make_jaxpr(evaluation)(state.variables, batch),
        )
        return [len(re.findall("feature_group_count=4", str(program))) for program in programs]

    monkeypatch.setattr(forms, "FASTEST_GROUPED_CONV", {jax.default_backend(): "cpu"})
    in_training, in_evaluation = grouped()
    assert in_training == 0 < in_evaluation
    assert grouped(grouped_conv="auto") == [0, in_evaluation]
    assert min(grouped(grouped_conv="xla")) == in_evaluation
    monkeypatch.setattr(forms, "FASTEST_GROUPED_CONV", {})
    assert min(grouped(grouped_conv="auto")) == in_evaluation
    assert forms.for_device(nn.Dense(3), jax.devices()[0], training=True) == nn.Dense(3)  # a module without forms


@pytest.mark.by_turns
def test_an_exported_model_takes_any_batch_by_grouped_convolutions():
    model = models.create("improved_resnext50", 5, **RESNEXT)
    images = normal(0, 3, 16, 16, 3)
    variables = model.init(jax.random.key(0), images, train=False)
    (batch,) = export.symbolic_shape("batch")
    apply = jax.jit(lambda images: model.apply(variables, images, train=False))
    exported = export.export(apply)(jax.ShapeDtypeStruct((batch, 16, 16, 3), jnp.float32))
    # One in each of two blocks, three in the fusion, of which that of 1x1 is grouped as well.
    assert exported.mlir_module().count("feature_group_count = 4") == 5
    np.testing.assert_allclose(exported.call(images), apply(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "features", "groups"), [(6, 8, 4), (8, 6, 4)])
def test_channels_that_groups_do_not_divide_are_an_error(channels, features, groups):
    said = f"{channels} channels to {features} cannot be divided into {groups} groups"
    with pytest.raises(ValueError, match=said):
        convolutions.GroupedConv(features, 3, groups).init(jax.random.key(0), normal(0, 1, 4, 4, channels))


def test_an_unknown_form_of_grouped_convolution_is_an_error():
    with pytest.raises(ValueError, match=r"grouped_conv 'shift' is not known; did you mean 'shifted'"):
        convolutions.GroupedConv(4, 3, 2, form="shift").init(jax.random.key(0), normal(0, 1, 4, 4, 4))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [None, 0, 1, "SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_pads_half_the_kernel_on_every_side_unless_told_otherwise(stride, padding, groups):
    x = normal(0, 2, 6, 5, 4)
    conv = convolutions.conv(6, 3, stride=stride, padding=padding, groups=groups, name="any")
    y, variables = conv.init_with_output(jax.random.key(0), x)
    (kernel,) = jax.tree.leaves(variables)  # and no bias
    expected, *_ = literal_grouped_conv(x, np.asarray(kernel), groups, stride, 1 if padding is None else padding, 0)
    assert_near(y, expected)
    assert convolutions.conv(6, 3, groups=groups, use_bias=True).init(jax.random.key(0), x)["params"]["bias"].shape == (
        6,
    )


def test_conv_takes_kernels_that_are_not_square():
    x = normal(0, 2, 6, 5, 3)
    y, variables = convolutions.conv(4, (1, 7)).init_with_output(jax.random.key(0), x)
    assert variables["params"]["kernel"].shape == (1, 7, 3, 4)
    assert_near(y, nn.Conv(4, (1, 7), padding="SAME", use_bias=False).apply(variables, x))


@pytest.mark.parametrize("groups", [1, 8])
def test_convolutions_start_so_that_a_relu_keeps_the_variance(groups):
    conv = convolutions.conv(256, 3, groups=groups)
    kernel = conv.init(jax.random.key(0), jnp.zeros((1, 3, 3, 64)))["params"]["kernel"]
    inputs = 9 * 64 // groups
    np.testing.assert_allclose(np.std(kernel), math.sqrt(2 / inputs), rtol=0.02)


@pytest.mark.parametrize(
    "side, stride, form, shifted",
    [
        *((2, 1, "cpu", True), (4, 2, "cpu", True), (8, 1, "cpu", False)),
        *((2, 1, form, False) for form in ("auto", "xla", "shifted", "mixed")),
    ],
)
def test_an_ungrouped_convolution_is_shifted_only_where_its_result_is_smaller_than_its_kernel(
    side, stride, form, shifted
):
    layer = convolutions.conv(4, 3, stride=stride, grouped_conv=form)
    x = jnp.zeros((1, side, side, 4))
    variables = layer.init(jax.random.key(0), x)
    assert ("conv_general_dilated" not in str(jax.make_jaxpr(layer.apply)(variables, x))) == shifted


@pytest.mark.parametrize("stride, padding", [(1, 1), (2, "SAME"), (1, "VALID")])
def test_gradients_of_a_convolution_are_those_of_xla_though_a_cpu_shifts_them(stride, padding):
    x = jax.random.normal(jax.random.key(0), (80, 17 * stride, 16 * stride, 4))

    def gradients(form):
        layer = convolutions.GroupedConv(32, 3, 1, stride, padding, form=form)
        variables = layer.init(jax.random.key(1), x[:1])
        function = jax.value_and_grad(lambda v, x: jnp.mean(jnp.sin(layer.apply(v, x))), argnums=(0, 1))
        return jax.jit(function)(variables, x), str(jax.make_jaxpr(function)(variables, x))

    (ours, jaxpr), (expected, jaxpr_of_xla) = gradients("cpu"), gradients("xla")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), ours, expected)
    assert [text.count("conv_general_dilated[") for text in (jaxpr, jaxpr_of_xla)] == [1, 3]
