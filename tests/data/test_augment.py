"""Augmentation against Pillow, scipy, colorsys and what the papers say."""

import colorsys
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vitcls.config import default_config
from vitcls.core.errors import UserError
from vitcls.data.augment import make_augment, randaugment, to_float, views
from vitcls.data.augment.geometry import affine, rotation_matrix

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def block(**blocks):
    """The block `augment` of a config, all off but for what is given."""
    config = default_config("improved_vit_tiny").augment
    for name, fields in blocks.items():
        config[name].update(fields)
    return config


def keys_of(count, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def targets_of(count, classes=4):
    return np.eye(classes, dtype=np.float32)[np.arange(count) % classes]


def pictures(count, size=8, channels=3, seed=0):
    """Smooth ones with some noise, in a part of the range, so that every operation has something to do."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 180, size)[None, :, None, None] * rng.uniform(0.3, 1, (count, 1, 1, channels))
    waves = 30 * np.sin(np.linspace(0, 6, size))[None, None, :, None] * rng.uniform(-1, 1, (count, 1, 1, channels))
    return np.clip(ramp + waves + rng.integers(25, 50, (count, size, size, channels)), 0, 230).astype(np.uint8)


def run(config, images, targets=None, seed=0):
    """Augmented images, in [0, 255], and targets."""
    targets = targets_of(len(images)) if targets is None else targets
    images, targets = jax.jit(make_augment(config))(keys_of(len(images), seed), images, targets)
    assert images.dtype == targets.dtype == jnp.float32
    assert images.min() >= 0 and images.max() <= 1
    return np.asarray(images) * 255, np.asarray(targets)


def assert_share(chosen, probability):
    """The share of `chosen` is within four standard errors of `probability`."""
    assert abs(np.mean(chosen) - probability) < 4 * np.sqrt(probability * (1 - probability) / len(chosen))


EVERYTHING = block(
    crop={"probability": 0.9, "padding": 2},
    flip={"probability": 0.5},
    rotate={"probability": 0.5},
    scale={"probability": 0.5},
    color={"probability": 0.5},
    noise={"probability": 0.5},
    erase={"probability": 0.5},
    randaugment={"probability": 0.9, "num_ops": 1},
    mixup={"probability": 0.4},
    cutmix={"probability": 0.4},
)


@pytest.fixture(scope="module")
def everything():
    return jax.jit(make_augment(EVERYTHING))


@pytest.mark.parametrize("channels", [1, 3])
def test_probability_zero_is_the_identity_and_costs_nothing(channels):
    images, targets = jnp.asarray(pictures(4, channels=channels)), targets_of(4)
    augment = make_augment(block())
    varied, mixed = augment(keys_of(4), images, targets)
    np.testing.assert_allclose(varied, np.asarray(images) / 255, rtol=2e-7)
    np.testing.assert_array_equal(varied, to_float(images))
    np.testing.assert_array_equal(mixed, targets)
    operations = {str(equation.primitive) for equation in jax.make_jaxpr(augment)(keys_of(4), images, targets).eqns}
    assert operations <= {"convert_element_type", "div"}


@pytest.mark.parametrize("fill, mode", [("zero", "constant"), ("reflect", "reflect")])
def test_crop_gives_every_shift_of_the_padded_image_and_no_other(fill, mode):
    image = np.arange(1, 37, dtype=np.uint8).reshape(1, 6, 6, 1)
    varied, _ = run(block(crop={"probability": 1.0, "padding": 2, "fill": fill}), np.repeat(image, 1000, 0))
    padded = np.pad(image[0, ..., 0], 2, mode)
    valid = {padded[row : row + 6, column : column + 6].tobytes() for row in range(5) for column in range(5)}
    seen = [np.rint(picture[..., 0]).astype(np.uint8).tobytes() for picture in varied]
    assert set(seen) == valid
    counts = [seen.count(shift) for shift in valid]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_views_are_mirror_images_and_diagonal_shifts():
    images = np.random.default_rng(0).uniform(size=(2, 5, 4, 3)).astype(np.float32)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    shifted = [padded[:, :5, :4], padded[:, 2:, 2:]]
    mirrored = lambda pictures: [view for image in pictures for view in (image, np.flip(image, 2))]  # noqa: E731
    for kind, weights, expected in (
        ("none", [1.0], [images]),
        ("mirror", [0.5, 0.5], mirrored([images])),
        ("mirror_shift", [0.25, 0.25, 0.125, 0.125, 0.125, 0.125], mirrored([images, *shifted])),
    ):
        found = views(kind, jnp.asarray(images))
        assert [weight for weight, _ in found] == weights
        np.testing.assert_array_equal([view for _, view in found], expected)


def test_flip_mirrors_at_its_rate():
    images = pictures(1000, size=4)
    varied, _ = run(block(flip={"probability": 0.3}), images)
    mirrored = np.abs(varied - images[:, :, ::-1]).max((1, 2, 3)) < 0.01
    same = np.abs(varied - images).max((1, 2, 3)) < 0.01
    assert np.all(mirrored | same)
    assert_share(mirrored, 0.3)


def test_rotation_by_right_angles_is_exact():
    image = pictures(1)[0].astype(np.float32)
    for quarters in (1, 2, 3):
        turned = affine(image, rotation_matrix(jnp.float32(90 * quarters)))
        np.testing.assert_allclose(turned, np.rot90(image, quarters), atol=1e-2)


@pytest.mark.parametrize(
    "matrix",
    [[[1, 0.3, 0], [0, 1, 0]], [[1, 0, 0], [-0.9, 1, 0]], [[1, 0, 2.5], [0, 1, -3]], [[0.8, -0.5, 1], [0.4, 1.3, 0]]],
)
def test_affine_is_scipys(matrix):
    image = pictures(1, size=9)[0, :7].astype(np.float32)  # not square
    matrix = np.array(matrix, np.float32)
    linear, moved = matrix[::-1, 1::-1], matrix[::-1, 2]  # (x, y) -> (row, column)
    center = (np.array(image.shape[:2]) - 1) / 2
    expected = np.stack(
        [
            scipy.ndimage.affine_transform(
                image[..., c], linear, center + moved - linear @ center, order=1, mode="grid-constant"
            )
            for c in range(3)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(affine(image, jnp.asarray(matrix)), expected, atol=1e-2)


def test_rotate_and_scale_draw_from_their_ranges():
    size, slope = 9, 6
    ramp = (80 + slope * (np.arange(size) - size // 2))[None, None, :, None]  # grows to the right
    images = np.broadcast_to(ramp, (800, size, size, 1)).astype(np.uint8)
    config = block(rotate={"probability": 0.6, "degrees": 40.0}, scale={"probability": 0.7, "low": 0.8, "high": 1.25})
    varied, _ = run(config, images)
    right = (varied[:, 4, 5, 0] - varied[:, 4, 3, 0]) / 2 / slope
    down = (varied[:, 5, 4, 0] - varied[:, 3, 4, 0]) / 2 / slope
    degrees, factors = np.rad2deg(np.arctan2(-down, right)), 1 / np.hypot(right, down)
    turned, scaled = np.abs(degrees) > 1e-3, np.abs(factors - 1) > 1e-4
    assert_share(turned, 0.6)
    assert_share(scaled, 0.7)
    assert scipy.stats.kstest(degrees[turned], scipy.stats.uniform(-40, 80).cdf).pvalue > 1e-3
    assert scipy.stats.kstest(factors[scaled], scipy.stats.uniform(0.8, 0.45).cdf).pvalue > 1e-3


def color_only(images, **limits):
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    return run(block(color={"probability": 1.0, **off, **limits}), images)[0]


def luma(images):
    return images @ np.array([0.299, 0.587, 0.114])


def assert_factors_in(factors, low, high):
    """One factor per image, [B, pixels], from all over [low, high]."""
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1], factors.shape), atol=1e-3)
    assert scipy.stats.kstest(factors[:, 0], scipy.stats.uniform(low, high - low).cdf).pvalue > 1e-3


@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_brightness_multiplies(limit):
    images = np.full((300, 2, 2, 3), 60, np.uint8)
    assert_factors_in(color_only(images, brightness=limit).reshape(300, -1) / 60, max(0, 1 - limit), 1 + limit)


def test_contrast_stretches_about_the_mean_luma():
    images = pictures(300, size=4) // 4 + 90
    mean = luma(images).mean((1, 2))[:, None]
    varied = color_only(images, contrast=0.5).reshape(300, -1)
    base = images.reshape(300, -1) - mean
    # varied = mean + factor * base, also where base is near 0
    factors = np.sum((varied - mean) * base, 1, keepdims=True) / np.sum(base**2, 1, keepdims=True)
    np.testing.assert_allclose(varied, mean + factors * base, atol=1e-2)
    assert_factors_in(factors, 0.5, 1.5)


def test_saturation_and_hue_are_colorsys():
    images = pictures(40, size=3) // 2 + 60
    pale = color_only(images, saturation=0.5)
    np.testing.assert_allclose(luma(pale), luma(images), atol=1e-2)
    ratio = (pale - luma(pale)[..., None]) / (images - luma(images)[..., None])
    ratio = ratio.reshape(40, -1)
    np.testing.assert_allclose(ratio, np.broadcast_to(np.median(ratio, 1, keepdims=True), ratio.shape), atol=0.05)
    assert ratio.min() >= 0.49 and ratio.max() <= 1.51 and np.ptp(ratio) > 0.7

    def hsv(pixels):
        return np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels.reshape(-1, 3)]).reshape(40, -1, 3)

    before, after = hsv(images / 255), hsv(color_only(images, hue=0.3) / 255)
    np.testing.assert_allclose(after[..., 1:], before[..., 1:], atol=1e-3)
    turn = (after[..., 0] - before[..., 0] + 0.5) % 1 - 0.5
    np.testing.assert_allclose(turn, np.broadcast_to(turn[:, :1], turn.shape), atol=1e-3)
    assert turn.min() >= -0.301 and turn.max() <= 0.301 and turn.min() < -0.2 and turn.max() > 0.2


def test_gray_images_have_no_saturation_or_hue():
    images = pictures(8, channels=1)
    np.testing.assert_allclose(color_only(images, saturation=0.5, hue=0.3), images, atol=1e-3)


def test_noise_has_its_standard_deviation():
    images = np.full((64, 8, 8, 3), 128, np.uint8)
    noise = (run(block(noise={"probability": 1.0, "std": 0.05}), images)[0] - 128) / 255
    assert abs(noise.mean()) < 0.002 and abs(noise.std() - 0.05) < 0.002


@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_erase_fills_one_box_of_a_random_area(fill):
    size = 24
    images = np.full((400, size, size, 3), 255, np.uint8)
    varied, _ = run(block(erase={"probability": 1.0, "min_area": 0.1, "max_area": 0.3, "fill": fill}), images)
    erased = varied.min(-1) < 255
    rows, columns = erased.any(2), erased.any(1)
    np.testing.assert_array_equal(erased, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        assert np.all(np.abs(np.diff(side.astype(int), axis=1)).sum(1) <= 2)  # in one piece
    height, width = rows.sum(1), columns.sum(1)
    area = height * width / size**2
    assert 0.09 < area.min() < 0.12 and 0.28 < area.max() < 0.32 and abs(area.mean() - 0.2) < 0.01
    assert 0.27 < (width / height).min() < 0.5 and 2 < (width / height).max() < 3.7
    if fill == "zero":
        assert np.all(varied[erased] == 0)
    else:
        assert abs(varied[erased].mean() - 127.5) < 2 and abs(varied[erased].std() - 255 / 12**0.5) < 2


def pillow(name, image, level, sign):
    """An operation of RandAugment by Pillow; `image` a PIL.Image."""
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "color": ImageEnhance.Color,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in enhance:
        return enhance[name](image).enhance(1 + sign * 0.9 * level)
    return {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * level)),
        "solarize": lambda: ImageOps.solarize(image, 256 - 256 * level),
    }[name]()


@pytest.fixture(scope="module")
def apply():
    ranges = randaugment._RAND | {"translate_x": 20 * 150 / 331, "translate_y": 20 * 150 / 331}
    return jax.jit(jax.vmap(lambda *args: randaugment.apply(*args, ranges), (0, None, None, None)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "name", [name for name in randaugment.OPERATIONS if not re.match("shear|translate|rotate", name)]
)
def test_randaugment_values_are_pillows(apply, name, channels):
    images = pictures(4, size=40, channels=channels)  # enough pixels for steps above 1 in equalize
    images[3] = 77  # nothing to stretch or to equalize
    for level, sign in ((0.5, 1), (0.9, -1), (1.0, 1)):
        ours = np.asarray(apply(images.astype(np.float32), randaugment.OPERATIONS.index(name), level, float(sign)))
        for image, varied in zip(images, ours, strict=True):
            theirs = np.asarray(pillow(name, Image.fromarray(image.squeeze()), level, sign)).reshape(image.shape)
            # one grey level for a rounding at a half
            assert np.abs(varied - theirs).max() <= (0 if name in ("equalize", "posterize", "solarize") else 1)


@pytest.mark.parametrize("shape", [(12, 12), (1, 12), (12, 2)])
def test_sharpness_blends_with_pillows_smooth(shape):
    image = pictures(1, size=12)[0, : shape[0], : shape[1]]
    smooth = randaugment._smooth(jnp.asarray(image, jnp.float32))
    np.testing.assert_array_equal(smooth, np.asarray(Image.fromarray(image).filter(ImageFilter.SMOOTH)))


@pytest.mark.parametrize(
    "name, matrix",
    [
        ("shear_x", [[1, 0.15, 0], [0, 1, 0]]),
        ("shear_y", [[1, 0, 0], [0.15, 1, 0]]),
        ("translate_x", [[1, 0, 10 * 150 / 331], [0, 1, 0]]),
        ("translate_y", [[1, 0, 0], [0, 1, 10 * 150 / 331]]),
    ],
)
def test_randaugment_moves_are_pillows(apply, name, matrix):
    image = pictures(1, size=20)[0]
    ours = apply(image[None].astype(np.float32), randaugment.OPERATIONS.index(name), 0.5, 1.0)[0]
    linear, moved = np.array(matrix)[:, :2], np.array(matrix)[:, 2]
    offset = 10 + moved - linear @ [10, 10]  # Pillow counts from the corner of the first pixel
    data = (*linear[0], offset[0], *linear[1], offset[1])
    theirs = Image.fromarray(image).transform((20, 20), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    inside = np.s_[6:-6, 6:-6]  # at the border Pillow repeats the last pixel, ours fades to black
    np.testing.assert_allclose(np.asarray(ours)[inside], np.asarray(theirs)[inside], atol=1)


def test_randaugment_applies_every_operation_with_both_signs(apply):
    images = np.repeat(pictures(1, size=20), 600, 0)
    varied, _ = run(block(randaugment={"probability": 1.0, "num_ops": 1, "magnitude": 9.0}), images)
    possible = {
        (name, sign): np.asarray(apply(images[:1].astype(np.float32), number, 0.9, sign))[0]
        for number, name in enumerate(randaugment.OPERATIONS)
        for sign in (-1.0, 1.0)
    }
    distances = np.stack([np.abs(varied - picture).max((1, 2, 3)) for picture in possible.values()])
    assert distances.min(0).max() < 1.01
    nearest = distances.argmin(0)
    signless = ("identity", "solarize", "posterize", "autocontrast", "equalize")
    for index, (name, sign) in enumerate(possible):
        if name not in signless:
            assert_share(nearest == index, 1 / 28)
        elif sign < 0:  # both signs look the same, and the first is found
            assert_share(nearest == index, 1 / 14)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_randaugment_moves_by_shares_of_both_sides(shape):
    config = block(randaugment={"probability": 1.0, "num_ops": 1, "magnitude": 9.0})
    varied, _ = run(config, np.full((300, *shape, 1), 200, np.uint8))
    for across in (1, 2):  # most rows, then columns, that are left black
        assert (varied[..., 0].max(across) == 0).mean(1).max() == pytest.approx(0.9 * 150 / 331, abs=0.1)


def test_trivialaugment_draws_its_strength():
    images = np.full((1500, 3, 3, 1), 100, np.uint8)
    varied, _ = run(block(trivialaugment={"probability": 1.0}), images)
    center = np.floor(varied[:, 1, 1, 0] + 0.01)
    exact = {100 * (1 + sign * 0.99 * level / 30) for level in range(31) for sign in (-1, 1)}
    possible = {np.floor(value + last_bit) for value in exact for last_bit in (-0.01, 0.01)}
    possible |= {100 // 2**bits * 2**bits for bits in range(7)} | {155.0}  # posterize, solarize
    assert set(center) <= possible | {0.0}
    assert len(set(center)) > 40
    assert center.min() <= 3 and center.max() >= 195  # the 'wide' space


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_is_a_convex_combination_and_lambda_is_beta(alpha):
    images = np.tile(np.array([0, 255], np.uint8), 1500)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    targets = np.tile(np.eye(2, dtype=np.float32), (1500, 1))
    varied, mixed = run(block(mixup={"probability": 1.0, "alpha": alpha}), images, targets)
    share = varied[:, 0, 0, 0] / 255  # of the white image
    np.testing.assert_allclose(varied, np.broadcast_to(varied[:, :1, :1], varied.shape))
    np.testing.assert_allclose(mixed[:, 1], share, atol=1e-6)
    np.testing.assert_allclose(mixed.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(share[0::2] + share[1::2], 1, atol=1e-6)
    assert scipy.stats.kstest(share[1::2], scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert alpha < 1 or len(np.unique(share[1::2])) > 1400  # not a few steps


def test_mixup_mixes_neighbours_pixel_by_pixel():
    images, targets = pictures(6), np.random.default_rng(0).dirichlet(np.ones(3), 6).astype(np.float32)
    varied, mixed = run(block(mixup={"probability": 1.0, "alpha": 1.0}), images, targets)
    for one in range(6):
        own, other = images[one].astype(float), images[one ^ 1].astype(float)
        share = np.sum((varied[one] - other) * (own - other)) / np.sum((own - other) ** 2)
        np.testing.assert_allclose(varied[one], share * own + (1 - share) * other, atol=1e-2)
        np.testing.assert_allclose(mixed[one], share * targets[one] + (1 - share) * targets[one ^ 1], atol=1e-4)


def paper_cutmix_shares(alpha, size, count, seed):
    """What an image keeps, by the code of Yun et al. 2019."""
    rng = np.random.default_rng(seed)
    cut = np.sqrt(1 - rng.beta(alpha, alpha, count)) * size
    half = cut.astype(int) // 2
    sides = []
    for _ in range(2):
        center = rng.integers(0, size, count)
        sides.append(np.clip(center + half, 0, size) - np.clip(center - half, 0, size))
    return 1 - sides[0] * sides[1] / size**2


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmix_pastes_one_box_and_weighs_labels_by_its_pixels(alpha):
    count, size = 1000, 32
    images = np.tile(np.array([0, 255], np.uint8), count)[:, None, None, None] * np.ones((1, size, size, 1), np.uint8)
    targets = np.tile(np.eye(2, dtype=np.float32), (count, 1))
    varied, mixed = run(block(cutmix={"probability": 1.0, "alpha": alpha}), images, targets)
    assert set(np.unique(varied)) == {0.0, 255.0}
    np.testing.assert_array_equal(mixed[:, 1], np.mean(varied == 255, axis=(1, 2, 3), dtype=np.float32))
    np.testing.assert_array_equal(varied[0::2] + varied[1::2], 255)  # what one loses the other gets
    box = varied[0::2, ..., 0] == 255
    np.testing.assert_array_equal(box, box.any(2)[:, :, None] & box.any(1)[:, None, :])
    kept = mixed[0::2, 0]
    oracle = paper_cutmix_shares(alpha, size, 20_000, seed=1)
    assert abs(kept.mean() - oracle.mean()) < 0.05 and abs(kept.std() - oracle.std()) < 0.04


def test_a_pair_gets_mixup_or_cutmix_or_neither():
    images = np.tile(np.array([0, 255], np.uint8), 1000)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    config = block(mixup={"probability": 0.3, "alpha": 5.0}, cutmix={"probability": 0.5, "alpha": 5.0})
    varied, _ = run(config, images, np.tile(np.eye(2, dtype=np.float32), (1000, 1)))
    first = varied[0::2].reshape(1000, -1)
    blended = np.any((first > 0) & (first < 255), axis=1)
    cut = ~blended & (first == 255).any(1)
    assert np.all(np.ptp(first[blended], axis=1) == 0)  # no box besides
    assert_share(blended, 0.3)
    assert_share(cut, 0.5)


def test_an_odd_batch_cannot_be_mixed():
    augment = make_augment(block(mixup={"probability": 1.0}))
    with pytest.raises(ValueError, match="odd"):
        augment(keys_of(3), pictures(3), targets_of(3))


def assert_same(images, expected):
    """Up to the pixels, few, that a rounding of the last bit takes over a step between grey levels."""
    assert np.mean(np.abs(np.asarray(images) - np.asarray(expected)) > 1e-5) < 1e-3


@pytest.mark.by_turns
def test_an_example_depends_on_its_pair_alone(everything):
    images, targets, keys = pictures(16), targets_of(16), keys_of(16)
    order = np.random.default_rng(0).permutation(8)[:, None] * 2 + np.arange(2)[None, :]  # of the pairs
    order = order.ravel()
    whole, mixed = everything(keys, images, targets)
    other, other_mixed = everything(keys[order], images[order], targets[order])
    assert_same(other, whole[order])
    np.testing.assert_array_equal(other_mixed, mixed[order])


def test_other_keys_give_other_images(everything):
    images, targets, keys = pictures(16), targets_of(16), keys_of(16)
    first, other = everything(keys, images, targets)[0], everything(keys_of(16, seed=1), images, targets)[0]
    assert np.all(np.abs(np.asarray(first) - np.asarray(other)).max((1, 2, 3)) > 0)
    assert len(np.unique(everything(keys, np.repeat(images[:1], 16, 0), targets)[0], axis=0)) == 16


def test_halves_of_a_batch_and_raw_keys_give_the_same():
    images, targets, keys = pictures(8), targets_of(8), keys_of(8)
    augment = jax.jit(make_augment(block(crop={"probability": 0.5}, cutmix={"probability": 0.9})))
    whole, raw = augment(keys, images, targets), augment(jax.random.key_data(keys), images, targets)
    jax.tree.map(np.testing.assert_array_equal, whole, raw)
    halves = [augment(keys[half], images[half], targets[half]) for half in (np.s_[:4], np.s_[4:])]
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(lambda *parts: np.concatenate(parts), *halves))


@pytest.mark.eight_devices
def test_a_sharded_batch_needs_no_collective_and_gives_the_same(everything):
    images, targets, keys = pictures(16), targets_of(16), keys_of(16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    args = jax.device_put((keys, images, targets), sharding)
    compiled = everything.lower(*args).compile()
    assert not re.findall(COLLECTIVES, compiled.as_text())
    sharded, mixed = compiled(*args)
    assert sharded.sharding.is_equivalent_to(sharding, sharded.ndim)
    whole, expected = everything(keys, images, targets)
    assert_same(sharded, whole)
    np.testing.assert_array_equal(mixed, expected)


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("crop", "probability", 1.5),
        ("flip", "probability", -0.1),
        ("mixup", "probability", float("nan")),
        ("crop", "padding", -1),
        ("rotate", "degrees", -1.0),
        ("rotate", "degrees", float("inf")),
        ("scale", "low", 2.0),
        ("scale", "low", 0.0),
        ("color", "contrast", -0.1),
        ("color", "hue", 0.6),
        ("noise", "std", -0.1),
        ("erase", "min_area", 0.9),
        ("erase", "min_area", 0.0),
        ("erase", "max_area", 1.0),
        ("erase", "fill", "mean"),
        ("randaugment", "num_ops", 0),
        ("randaugment", "magnitude", 10.5),
        ("mixup", "alpha", 0.0),
        ("cutmix", "alpha", -1.0),
    ],
)
def test_impossible_values_are_named(name, field, value):
    with pytest.raises(UserError, match=rf"^config\.augment\.{name}\.{field}") as caught:
        make_augment(block(**{name: {field: value}}))
    assert "\n" not in str(caught.value) and str(value) in str(caught.value)


def test_mixup_and_cutmix_are_at_most_one_together():
    for percent in range(1, 101):
        mixup = {"probability": percent / 100}
        make_augment(block(mixup=mixup, cutmix={"probability": (100 - percent) / 100}))  # no sum is rounded above 1
        with pytest.raises(UserError, match=r"config\.augment\.mixup\.probability.* add up to 1\.01"):
            make_augment(block(mixup=mixup, cutmix={"probability": (101 - percent) / 100}))


def test_a_check_of_the_config_touches_no_device():
    code = (
        "from vitcls.config import default_config; from vitcls.data.augment import make_augment;"
        "config = default_config('improved_vit_tiny').augment\n"
        "for name in config: config[name].probability = 0.5\n"
        "make_augment(config)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}  # the first touch of a device would raise
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("count", [randaugment._count_by_scatter, randaugment._count_by_product])
def test_pixels_are_counted_exactly_in_both_forms(count):
    values = np.random.default_rng(0).integers(0, 256, 70_000).astype(np.int32) // 7 * 7
    np.testing.assert_array_equal(count(values), np.bincount(values, minlength=256))
