import flax.linen as nn
import jax
import numpy as np
import pytest

from vitcls import models
from vitcls.data import DatasetInfo
from vitcls.models import flops, summary
from vitcls.models.variables import variable_shapes


def info(size):
    return DatasetInfo("test", ("a", "b"), (size, size, 3), (0.5,) * 3, (0.2,) * 3, {"train": 10}, (5, 5), ())


class Net(nn.Module):
    """One of each thing that is counted: a convolution, a grouped one, a product in a loop, and one outside modules."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(8, (3, 3), name="conv")(images)  # 2 * 6 * 6 * 8 * 3 * 3 * 3
        x = nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False, name="grouped")(x)  # 2 * 6 * 6 * 8 * 3 * 3 * 2
        x = nn.Dense(5, use_bias=False, name="dense")(x.reshape(1, -1))  # 2 * 288 * 5
        x, _ = jax.lax.scan(lambda x, _: (x @ np.ones((5, 5), np.float32), None), x, length=7)  # 7 * 2 * 5 * 5
        return x


def test_flops_are_counted_by_part():
    shapes = jax.eval_shape(lambda: Net().init(jax.random.key(0), np.zeros((1, 6, 6, 3), np.float32), train=False))
    image = jax.ShapeDtypeStruct((1, 6, 6, 3), np.float32)
    traced = jax.make_jaxpr(lambda variables, images: Net().apply(variables, images, train=False))(shapes, image)
    assert flops.count(traced.jaxpr) == {
        "conv": 2 * 6 * 6 * 8 * 27 + 6 * 6 * 8,  # and the bias
        "grouped": 2 * 6 * 6 * 8 * 18,
        "dense": 2 * 288 * 5,
        "itself": 7 * 2 * 25,
    }
    assert flops.count(traced.jaxpr, products_only=True)["conv"] == 2 * 6 * 6 * 8 * 27


@pytest.mark.parametrize(("name", "size"), [("vit_base_patch16", 224), ("improved_vit_tiny", 32)])
def test_the_total_is_near_what_xla_counts(name, size):
    model = models.create(name, 2)
    variables = variable_shapes(model, info(size).image_shape)
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    lowered = jax.jit(lambda variables, images: model.apply(variables, images, train=False)).lower(variables, image)
    assert summary.flops_per_image(model, info(size).image_shape) == pytest.approx(
        lowered.cost_analysis()["flops"], rel=0.1
    )


def test_the_table_adds_up_and_joins_numbered_parts():
    model = models.create("improved_vit_tiny", 2, depth=3)
    table = summary.parameter_table(model, info(32).image_shape)
    shapes = variable_shapes(model, info(32).image_shape)
    assert f"{summary.count_parameters(shapes['params']):,}" in table.splitlines()[-1]
    assert "block x 3" in table
