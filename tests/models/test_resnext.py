"""The improved ResNeXt50: what fusion adds to ResNeXt. The networks' own tests are in test_every_model.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vitcls import models

TINY = {"depths": (1, 1, 1), "width": 8, "groups": 4, "group_width": 2, "stem": "small", "dropout": 0.0}
TINY |= {"grouped_conv": "xla"}  # compiles faster
FORMS = {
    "kernels": {"fusion": "kernels", "fusion_kernels": (1, 3, 5, 7)},
    "stages": {"fusion": "stages", "fusion_stages": (1, 2, 3), "fusion_width": 8},
}
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


@functools.cache
def built(form):
    """A tiny network, its variables, and images -> (logits, intermediates) as a compiled function."""
    model = models.create("improved_resnext50", 5, **TINY | FORMS[form])
    variables = jax.jit(lambda key: model.init(key, IMAGES, train=False))(jax.random.key(0))
    apply = jax.jit(lambda variables: model.apply(variables, IMAGES, train=False, mutable=["intermediates"]))
    return model, {name: variables[name] for name in ("params", "batch_stats")}, apply


def with_logits(variables, logits):
    params = variables["params"] | {"fusion": variables["params"]["fusion"] | {"logits": jnp.asarray(logits)}}
    return variables | {"params": params}


def sown(apply, variables, name):
    return np.asarray(apply(variables)[1]["intermediates"][name][0])


@pytest.mark.parametrize("form", FORMS)
def test_the_fused_map_is_the_sum_of_the_scales_weighted_by_a_softmax(form):
    model, variables, apply = built(form)
    count = len(variables["params"]["fusion"]["logits"])
    alone = [sown(apply, with_logits(variables, 100.0 * np.eye(count)[i]), "fusion_map") for i in range(count)]
    assert all(np.abs(a - b).max() > 0.01 for i, a in enumerate(alone) for b in alone[:i])

    logits = np.random.default_rng(1).normal(size=count).astype(np.float32)
    alphas = np.exp(logits) / np.exp(logits).sum()
    fused = sown(apply, with_logits(variables, logits), "fusion_map")
    np.testing.assert_allclose(fused, sum(a * f for a, f in zip(alphas, alone, strict=True)), rtol=1e-4, atol=1e-5)
    learned = model.learned_weights(with_logits(variables, logits)["params"])
    np.testing.assert_allclose(list(learned.values()), alphas, rtol=1e-5)


def test_the_scales_have_the_names_a_reader_looks_for():
    names = {form: list(built(form)[0].learned_weights(built(form)[1]["params"])) for form in FORMS}
    assert names["kernels"] == [f"Fusion weight of {size}x{size}" for size in (1, 3, 5, 7)]
    assert names["stages"] == [f"Fusion weight of stage {i}" for i in (1, 2, 3)]


def test_kernel_fusion_is_added_to_the_map_of_its_stage_and_to_no_other():
    _, variables, apply = built("kernels")
    plain = models.create("resnext50_32x4d", 5, **TINY)
    kept = {name: {k: v for k, v in tree.items() if k != "fusion"} for name, tree in variables.items()}
    apply_plain = jax.jit(lambda variables: plain.apply(variables, IMAGES, train=False, mutable=["intermediates"]))
    _, without = apply_plain(kept)
    without = {name: np.asarray(value[0]) for name, value in without["intermediates"].items()}
    np.testing.assert_allclose(sown(apply, variables, "stage_1_map"), without["stage_1_map"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        sown(apply, variables, "stage_2_map"),
        without["stage_2_map"] + sown(apply, variables, "fusion_map"),
        rtol=1e-4,
        atol=1e-5,
    )


def test_stage_fusion_has_the_size_of_the_largest_map():
    _, variables, apply = built("stages")
    assert sown(apply, variables, "fusion_map").shape == (2, 16, 16, 8)


def test_without_fusion_it_is_resnext50():
    def shapes(name, **fields):
        model = models.create(name, 1000, grouped_conv="xla", **fields)
        return jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), train=False), jax.random.key(0))

    assert shapes("improved_resnext50", fusion="none") == shapes("resnext50_32x4d")
    assert models.learned_weights(models.create("resnext50_32x4d", 10), {}) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion": "kernel"}, "fusion 'kernel' is not known; did you mean 'kernels'"),
        ({"fusion": "kernels", "fusion_kernels": (1, 4)}, "must be odd numbers, each of them once"),
        ({"fusion": "kernels", "fusion_kernels": (3, 3)}, "must be odd numbers, each of them once"),
        ({"fusion": "kernels", "fusion_stage": 4}, "fusion_stage=4 must be in 1 .. 3"),
        ({"fusion": "stages", "fusion_stages": (2, 4)}, "must be stages of 1 .. 3, in their order"),
        ({"fusion": "stages", "fusion_stages": (2, 1)}, "must be stages of 1 .. 3, in their order"),
        ({"depths": ()}, "depths=() is impossible"),
        ({"groups": 3}, "cannot be divided into 3 groups"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(fields, message):
    model = models.create("improved_resnext50", 5, **TINY | fields)
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(lambda key: model.init(key, IMAGES, train=False), jax.random.key(0))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
