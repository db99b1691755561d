"""What the table claims, for every model: by shapes, and that its cut gives its own logits."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_every_model import HEAVY, KNOWN, SIBLINGS, image_shape, start, tiny
from vitcls import explain
from vitcls.attribution import cam
from vitcls.attribution.explainer import METHODS, Explainer, _program
from vitcls.attribution.network import features, make_network
from vitcls.models.variables import variable_shapes

ROOT = pathlib.Path(__file__).parents[2]
EACH = [name for name in KNOWN if name not in SIBLINGS]
QUICK = ("airbench94", "lenet5", "vit_base_patch16", "convnext_base")


def network_of(name):
    shape = image_shape(name)
    return make_network(tiny(name), lambda images: 2 * images - 1, (0.5,) * shape[2]), shape


@pytest.mark.by_turns
@pytest.mark.parametrize("name", EACH)
def test_every_method_of_a_model_can_run(name):
    network, shape = network_of(name)
    explainer = Explainer(network, variable_shapes(tiny(name), shape), shape)
    wanted = set(METHODS) - (set() if "vit" in name else {"rollout", "attention"})
    assert set(explainer.methods) == wanted
    images, classes = jax.ShapeDtypeStruct((2, *shape), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    for method in explainer.methods:
        if METHODS[method].needs:
            maps = jax.eval_shape(_program(method, network), explainer.variables, images, classes)
            assert (maps.shape, maps.dtype) == ((2, *shape[:2]), jnp.float32)
    maps, slopes = jax.eval_shape(
        functools.partial(cam.maps_and_gradients, network), explainer.variables, images, classes
    )
    assert maps.shape == slopes.shape and min(maps.shape[1:3]) >= 2


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EACH if name not in HEAVY]
)
def test_the_cut_of_a_model_gives_its_own_logits(name):
    network, shape = network_of(name)
    made = start(tiny(name), shape)
    variables = {"params": made.unravel(made.params)} | made.stats
    images = np.random.default_rng(0).random((2, *shape)).astype(np.float32)

    @jax.jit
    def both(variables, images):
        cut = features(network, variables, images)
        return cut.head(cut.maps), network.forward(variables, images)

    again, logits = both(variables, images)
    np.testing.assert_allclose(again, logits, rtol=0, atol=1e-4 * np.abs(logits).max())


@pytest.mark.by_turns
def test_the_table_of_the_docs_is_that_of_the_code():
    assert explain.table() in (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
