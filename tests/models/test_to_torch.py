"""to_torch is the inverse of from_torch, to the bit."""

import jax
import numpy as np
import pytest

from tests.models.test_from_torch import CASES, CLASSES, computed, convert, every_case
from vitcls import models
from vitcls.core.errors import UserError
from vitcls.models.variables import init_variables
from vitcls.models.weights.from_torch import from_torch
from vitcls.models.weights.to_torch import to_torch


@pytest.mark.by_turns
@every_case
def test_weights_come_back_as_they_were(case):
    name, _, fields, *_ = CASES[case]
    publisher = "timm" if case.endswith("timm") else ""
    weights, found = computed(case)[1], to_torch(name, convert(case), publisher=publisher, **fields)
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(found[key], value, strict=True, err_msg=key)
        assert found[key].flags.c_contiguous


@pytest.mark.parametrize(
    ("case", "publisher"), [("vgg11", "timm"), ("convnext", "timm"), ("vit", "torchvision"), ("efficientnet", "timm")]
)
def test_variables_come_back_by_the_names_of_either_publisher(case, publisher):
    name, size, fields, *_ = CASES[case]
    variables = convert(case)
    weights = to_torch(name, variables, publisher=publisher, **fields)
    found = from_torch(name, weights, num_classes=CLASSES, image_shape=(*size, 3), **fields)
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_a_family_without_names_is_refused():
    variables = init_variables(models.create("lenet5", 10), jax.random.key(0), (32, 32, 1))
    with pytest.raises(UserError, match="lenet5 cannot take weights of PyTorch"):
        to_torch("lenet5", variables)
    with pytest.raises(UserError, match="publisher of resnet50 'tim' is not known"):
        to_torch("resnet50", {}, publisher="tim")
