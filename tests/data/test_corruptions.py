"""Corruptions and curves of test images: against another package, by hand, and what they depend on.

oracles/imagecorruptions.* hold what imagecorruptions-imaug 1.1.5 makes of `textures(200)` with the strengths of
ImageNet-C: four statistics of all images, and the first two images where nothing is random.
"""

import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.data.textures import textures
from vitcls.data.corruptions import CORRUPTIONS, FAMILIES, SEVERITIES, VALIDATION, applies_to, corrupt, perturb, prepare
from vitcls.data.corruptions.curves import CURVES

ORACLES = pathlib.Path(__file__).parent / "oracles"
STATISTICS = json.loads((ORACLES / "imagecorruptions.json").read_text())["statistics"]
FIXED = np.load(ORACLES / "imagecorruptions.npz")
GRAY = np.full((40, 16, 16, 3), 128, np.uint8)


def batches(images, size=20):
    parts = [images[i : i + size] for i in range(0, len(images), size)]
    return [{"image": jnp.asarray(part), "mask": np.ones(len(part))} for part in parts]


def together(changed):
    return np.concatenate([np.asarray(batch["image"]) for batch in changed])


def corrupted(images, name, severity, size=20):
    return together(corrupt(batches(images, size), name, severity))


def as_large(images, name, severity):
    """With the strengths of ImageNet-C, whatever the size."""
    kind = CORRUPTIONS[name]
    strength = kind.large[severity - 1]
    return together(perturb(batches(images, 100), name, kind.apply, lambda h, w: kind.prepare(strength, h, w)))


def curved(images, name, level):
    curve = CURVES[name]
    return together(perturb(batches(images), name, curve.apply, lambda h, w: curve.prepare(level, h, w)))


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c.endswith("3") else pytest.mark.slow) for c in STATISTICS]
)
def test_images_are_changed_as_much_as_by_imagecorruptions(case):
    """Frost is drawn here and photographed there; imagecorruptions makes 0 of images that no drop of water fell on."""
    name, severity = case.split()
    images = textures(200)
    changed = as_large(images, name, int(severity)).astype(float)
    theirs = STATISTICS[case]
    ours = {
        "distance": np.abs(changed - images).mean(),
        "mean": changed.mean(),
        "deviation": changed.std(),
        "roughness": np.abs(np.diff(changed, axis=2)).mean(),
    }
    loose = name == "frost" or case == "spatter 1"
    for what, value in ours.items():
        assert value == pytest.approx(theirs[what], rel=0.35 if loose else 0.06, abs=0.3), what


@pytest.mark.parametrize("case", FIXED.files)
def test_what_is_not_random_is_equal_to_imagecorruptions(case):
    name, severity = case.split()
    difference = np.abs(as_large(textures(2), name, int(severity)).astype(int) - FIXED[case])
    assert difference.mean() < (1.0 if name == "jpeg_compression" else 0.2)  # libjpeg's DCT has whole numbers
    assert name == "jpeg_compression" or difference.max() <= 1


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("gaussian_noise", lambda value, strength: strength),
        ("shot_noise", lambda value, strength: (value / strength) ** 0.5),  # of Poisson's counts
        ("speckle_noise", lambda value, strength: value * strength),
    ],
)
@pytest.mark.parametrize("severity", [1, 5])
def test_noise_has_the_deviation_of_its_strength(name, deviation, severity):
    images = corrupted(GRAY, name, severity)
    assert images.dtype == np.uint8
    expected = 255 * deviation(128 / 255, CORRUPTIONS[name].small[severity - 1])
    assert np.std(images.astype(float)) == pytest.approx(expected, rel=0.03)
    assert np.mean(images) == pytest.approx(127.5, abs=0.5)  # numbers are cut off


def test_impulses_are_black_or_white_in_equal_parts():
    images = corrupted(GRAY, "impulse_noise", 5)
    black, white = np.mean(images == 0), np.mean(images == 255)
    assert black + white == pytest.approx(CORRUPTIONS["impulse_noise"].small[4], rel=0.1)
    assert black == pytest.approx(white, rel=0.2) and set(np.unique(images)) == {0, 128, 255}


def test_the_corruptions_are_the_nineteen_of_the_paper_in_their_families():
    assert len(CORRUPTIONS) == 19 and len(VALIDATION) == 4
    assert sorted(name for names in FAMILIES.values() for name in names) == sorted(CORRUPTIONS)
    assert all(len(kind.small) == len(kind.large) == 5 for kind in CORRUPTIONS.values())


def test_larger_images_get_the_strengths_of_imagenet():
    assert prepare("contrast", 1, 32, 32) == 0.75 and prepare("contrast", 1, 64, 300) == 0.75
    assert prepare("contrast", 1, 65, 300) == 0.4


@pytest.mark.by_turns
@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 13, 3), (28, 28, 1)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_small_gray_and_oblong_images_are_corrupted_too(name, shape):
    images = np.random.default_rng(0).integers(40, 216, (6, *shape), np.uint8)
    changed = corrupted(images, name, 5)
    assert changed.shape == images.shape and changed.dtype == np.uint8
    if not applies_to(name, shape):  # as a config may ask for it all the same
        assert (name, shape[-1]) == ("saturate", 1) and np.abs(changed.astype(int) - images).max() <= 1
        return
    assert np.abs(changed.astype(int) - images).mean() > 0.4


@pytest.mark.by_turns
@pytest.mark.parametrize("name", ["gaussian_noise", "snow", "glass_blur", "elastic_transform", "spatter"])
def test_what_becomes_of_an_image_depends_on_its_place_alone(name):
    images = textures(1).repeat(40, axis=0)
    twice = [corrupted(images, name, 5, size) for size in (20, 8)]
    tolerance = 1 if name == "elastic_transform" else 0  # a product of matrices depends on how many there are
    np.testing.assert_allclose(twice[0].astype(int), twice[1], rtol=0, atol=tolerance)
    assert (twice[0][0] != twice[0][1]).any()
    devices = images.reshape(2, 20, *images.shape[1:])  # as pmap has them
    mapped = next(corrupt([{"image": jnp.asarray(devices), "mask": np.ones((2, 20))}], name, 5))
    now = np.asarray(mapped["image"]).reshape(images.shape).astype(int)
    np.testing.assert_allclose(now, twice[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["occlusion", "patch_drop"])
@pytest.mark.parametrize("level", [10, 50, 90])
def test_a_share_of_the_image_is_hidden(name, level):
    hidden = (curved(np.zeros((40, 32, 32, 3), np.uint8), name, level) == 127).all(axis=-1)
    shares = hidden.mean(axis=(1, 2))
    assert np.allclose(shares, level / 100, atol=0.03) and len({row.tobytes() for row in hidden}) > 5


def test_a_shift_moves_all_pixels_alike():
    images = textures(20)
    moved = curved(images, "shift", 12.5)  # 4 pixels of 32
    for image, now in zip(images, moved, strict=True):
        inner = now[8:24, 8:24].astype(int)
        found = [
            (dy, dx)
            for dy in range(-5, 6)
            for dx in range(-5, 6)
            if np.abs(inner - image[8 - dy : 24 - dy, 8 - dx : 24 - dx]).max() <= 1
        ]
        assert len(found) == 1 and np.hypot(*found[0]) == pytest.approx(4, abs=1)


def test_a_right_angle_is_numpys():
    images = textures(20)
    turned = curved(images, "rotation", 90).astype(int)
    for image, now in zip(images, turned, strict=True):
        assert min(np.abs(now - np.rot90(image, k)).max() for k in (1, 3)) <= 1


def test_half_the_size_shows_every_second_pixel():
    images = np.arange(33, dtype=np.uint8)[None, None, :, None] * np.ones((1, 33, 1, 3), np.uint8)
    small = curved(images, "scale", 50)[0, 16, 8:25, 0]
    assert np.abs(small.astype(int) - np.arange(0, 33, 2)).max() <= 1


def test_resolution_is_that_of_means():
    """Of an image of squares which are the new pixels, their middles stay."""
    squares = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    coarse = curved(squares.repeat(4, 1).repeat(4, 2), "resolution", 25)
    near = (coarse[:, 1::4, 1::4].astype(float) + coarse[:, 2::4, 2::4]) / 2
    assert np.corrcoef(near.ravel(), squares.ravel())[0, 1] > 0.97
    assert np.abs(np.diff(coarse.astype(int), axis=2)).max() < np.abs(np.diff(squares.astype(int), axis=2)).max()


@pytest.mark.parametrize("quality", [95, 50, 10])
@pytest.mark.parametrize("size", [(32, 32), (27, 45)])
def test_jpeg_is_pillows(quality, size):
    image = textures(1, 48)[0][: size[0], : size[1]]
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    theirs = np.asarray(Image.open(file)).astype(int)
    assert np.abs(curved(image[None], "jpeg", quality)[0] - theirs).mean() < 1.3
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "JPEG", quality=quality)
    theirs = np.asarray(Image.open(file)).astype(int)
    assert np.abs(curved(image[None, ..., :1], "jpeg", quality)[0, ..., 0] - theirs).mean() < 0.4


def test_every_curve_takes_every_shape():
    for shape in ((8, 8, 1), (9, 13, 3)):
        images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
        for name, curve in CURVES.items():
            assert curved(images, name, curve.levels[-1]).shape == images.shape


def test_pure_functions_can_be_used_alone():
    image = jnp.asarray(textures(1)[0] / 255.0, jnp.float32)
    apply = CORRUPTIONS["fog"].apply
    foggy = jax.jit(apply)(jax.random.key(0), image, prepare("fog", 3, 32, 32))
    assert foggy.shape == image.shape and float(jnp.abs(foggy - image).mean()) > 0.02


def test_severities_are_five():
    assert SEVERITIES == (1, 2, 3, 4, 5)
