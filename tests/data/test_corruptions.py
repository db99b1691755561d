"""Corruptions of test images: their statistics, and what they depend on."""

import jax.numpy as jnp
import numpy as np
import pytest

from vitcls.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt

GRAY = np.full((40, 16, 16, 3), 128, np.uint8)


def corrupted(images, name, severity, size=20):
    parts = [images[i : i + size] for i in range(0, len(images), size)]
    batches = [{"image": jnp.asarray(part), "mask": np.ones(len(part))} for part in parts]
    return np.concatenate([np.asarray(batch["image"]) for batch in corrupt(batches, name, severity)])


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
    expected = 255 * deviation(128 / 255, CORRUPTIONS[name][1][severity - 1])
    assert np.std(images.astype(float)) == pytest.approx(expected, rel=0.03)
    assert np.mean(images) == pytest.approx(128, abs=0.5)


def test_impulses_are_black_or_white_in_equal_parts():
    images = corrupted(GRAY, "impulse_noise", 5)
    black, white = np.mean(images == 0), np.mean(images == 255)
    assert black + white == pytest.approx(CORRUPTIONS["impulse_noise"][1][4], rel=0.1)
    assert black == pytest.approx(white, rel=0.2) and set(np.unique(images)) == {0, 128, 255}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_more_severe_is_farther_from_the_image(name):
    distances = [np.abs(corrupted(GRAY, name, severity).astype(float) - 128).mean() for severity in SEVERITIES]
    assert distances == sorted(distances) and distances[0] > 0


def test_what_becomes_of_an_image_depends_on_its_place_alone():
    twice = [corrupted(GRAY, "gaussian_noise", 3, size) for size in (20, 8)]
    np.testing.assert_array_equal(*twice)
    assert (twice[0][0] != twice[0][1]).any()
    devices = GRAY.reshape(2, 20, 16, 16, 3)  # as pmap has them
    mapped = next(corrupt([{"image": jnp.asarray(devices), "mask": np.ones((2, 20))}], "gaussian_noise", 3))
    np.testing.assert_array_equal(np.asarray(mapped["image"]).reshape(GRAY.shape), twice[0])
