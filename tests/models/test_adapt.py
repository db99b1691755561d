"""Weights for other images, patches and classes."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.models import test_from_torch
from vitcls import models
from vitcls.core.errors import UserError
from vitcls.models.variables import variable_shapes
from vitcls.models.weights.adapt import adapt, change_channels, resize_patches, resize_positions

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("grid", [(7, 7), (20, 11), (14, 14), (3, 30)])
def test_positions_are_resized_as_jax_resizes_images(grid):
    positions = DRAW.normal(size=(14, 14, 5)).astype(np.float32)
    expected = jax.image.resize(positions, (*grid, 5), "bicubic")
    np.testing.assert_allclose(resize_positions(positions, grid), expected, atol=1e-5)


def test_a_gray_image_gives_what_it_gave_in_colour():
    kernel, gray = DRAW.normal(size=(3, 3, 3, 4)), DRAW.normal(size=(3, 3, 1))
    expected = np.einsum("hwc,hwcf->f", np.repeat(gray, 3, axis=2), kernel)
    np.testing.assert_allclose(np.einsum("hwc,hwcf->f", gray, change_channels(kernel, 1)), expected)
    four = np.einsum("hwc,hwcf->f", np.repeat(gray, 6, axis=2), change_channels(kernel, 6))
    np.testing.assert_allclose(four, expected)


@pytest.mark.parametrize("side", [12, 16, 32])
def test_larger_patches_have_the_same_products(side):
    """FlexiViT: where B has full rank, <Bx, (B^T)^+ w> = <x, w> exactly."""
    kernel, patch = DRAW.normal(size=(8, 8, 3, 5)), DRAW.normal(size=(8, 8, 3))
    resized = jax.image.resize(patch.astype(np.float32), (side, side, 3), "bilinear")
    found = np.einsum("hwc,hwcf->f", resized, resize_patches(kernel, side))
    np.testing.assert_allclose(found, np.einsum("hwc,hwcf->f", patch, kernel), rtol=1e-3, atol=1e-3)


def test_smaller_patches_are_the_nearest_by_least_squares():
    kernel = DRAW.normal(size=(8, 8, 1, 2))
    basis = np.stack([jax.image.resize(unit.reshape(8, 8), (4, 4), "bilinear").ravel() for unit in np.eye(64)], 1)
    expected = np.linalg.pinv(basis.T) @ kernel.reshape(64, 2)
    np.testing.assert_allclose(resize_patches(kernel, 4).reshape(16, 2), expected, atol=1e-5)


def flat_case(case):
    return traverse_util.flatten_dict(test_from_torch.convert(case), sep="/")


def shapes_of(name, image_shape, classes=test_from_torch.CLASSES, **fields):
    model = models.create(name, classes, **fields)
    return model, traverse_util.flatten_dict(variable_shapes(model, image_shape), sep="/")


def test_a_vit_moves_to_other_patches_another_grid_and_gray_images():
    name, _, fields, *_ = test_from_torch.CASES["vit"]
    _, shapes = shapes_of(name, (48, 32, 1), classes=3, **fields | {"patch_size": 4})
    found, notes = adapt(name, flat_case("vit"), shapes, (3, 1), head=False)
    assert {path: leaf.shape for path, leaf in found.items()} == {
        path: leaf.shape for path, leaf in shapes.items() if "/head/" not in path
    }
    assert sorted(notes) == [
        "first layer from 3 to 1 channels, patches resized from 8 to 4 pixels",
        "positions resized from 4x2 to 12x8",
    ]
    np.testing.assert_array_equal(found["params/class_token"], flat_case("vit")["params/class_token"])


def test_patches_scaled_with_their_images_give_the_same_tokens():
    name, size, fields, *_ = test_from_torch.CASES["vit"]
    given, images = flat_case("vit"), test_from_torch.computed("vit")[0]
    model, shapes = shapes_of(name, (64, 32, 3), **fields | {"patch_size": 16})
    found, _ = adapt(name, given, shapes, (3, 3), head=True)
    larger = np.concatenate(  # patch by patch, so that no patch sees another
        [
            np.concatenate(
                [
                    jax.image.resize(images[:, y : y + 8, x : x + 8], (2, 16, 16, 3), "bilinear")
                    for x in range(0, size[1], 8)
                ],
                axis=2,
            )
            for y in range(0, size[0], 8)
        ],
        axis=1,
    )
    logits = model.apply(traverse_util.unflatten_dict(found, sep="/"), larger, train=False)
    expected = test_from_torch.computed("vit")[2]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_what_does_not_fit_is_listed_at_once():
    name = test_from_torch.CASES["resnet18"][0]
    given = flat_case("resnet18")
    given["params/extra/kernel"] = np.zeros(3)
    del given["params/stem/norm/bias"]
    given["params/stem/norm/scale"] = np.zeros(5)
    _, shapes = shapes_of(name, (40, 33, 3))
    with pytest.raises(UserError) as caught:
        adapt(name, given, shapes, (3, 3), head=True)
    for part in ("no 'params/stem/norm/bias'", r"the shape (5,) of 'params/stem/norm/scale'", "'params/extra/kernel'"):
        assert part in str(caught.value)
