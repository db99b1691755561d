"""What is airbench's own; that it trains, and the rest that every model does, is in test_every_model.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from vitcls.models import airbench


def patches(images):
    """The 2x2 patches of [B, H, W, C] as rows, in the order of Airbench's directions."""
    channels = images.shape[-1]
    windows = np.lib.stride_tricks.sliding_window_view(images, (2, 2), axis=(1, 2))  # [B, H-1, W-1, C, 2, 2]
    return np.moveaxis(windows, 3, 5).reshape(-1, 4 * channels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_directions_are_orthonormal(channels):
    directions = airbench.patch_directions(channels)
    np.testing.assert_allclose(directions @ directions.T, np.eye(4 * channels), atol=1e-6)


def test_whitened_patches_of_photographs_have_variance_1_and_hardly_correlate():
    photographs = np.stack([image[::2, ::2] for image in load_sample_images().images]).astype(np.float32)
    photographs = (photographs - photographs.mean((0, 1, 2))) / photographs.std((0, 1, 2))
    module = airbench.WhitenedPatches()
    variables = module.init(jax.random.key(0), photographs, False)
    whitened, _ = module.apply(variables, photographs, True, mutable=["batch_stats"])
    whitened = np.asarray(whitened)
    np.testing.assert_array_equal(whitened[..., :12], -whitened[..., 12:])

    before = np.corrcoef(patches(photographs).T) - np.eye(12)
    rows = whitened[..., :12].reshape(-1, 12)
    after = np.corrcoef(rows.T) - np.eye(12)
    assert np.sqrt(np.mean(before**2)) > 0.7
    assert np.sqrt(np.mean(after**2)) < 0.2
    variances = np.var(patches(photographs) @ airbench.patch_directions(3).T, axis=0)
    np.testing.assert_allclose(rows.var(0), variances / (variances + 5e-4), rtol=1e-3)


@pytest.mark.parametrize("inputs, outputs", [(4, 6), (6, 4)])
def test_convolutions_start_as_the_identity_of_their_first_channels(inputs, outputs):
    kernel = airbench.identity_of_first_channels(jax.random.key(0), (3, 3, inputs, outputs))
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, inputs))
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    both = min(inputs, outputs)
    np.testing.assert_allclose(y[..., :both], x[..., :both], rtol=1e-6)
    assert jnp.all(jnp.std(kernel[..., both:], axis=(0, 1, 2)) > 0)
