"""A network with one hidden layer and images that it classifies, both a function of a seed alone."""

import jax
import jax.numpy as jnp
import numpy as np

SHAPE, CLASSES, COUNT = (8, 8, 2), 4, 1000


def _parts():
    rng = np.random.default_rng(0)
    size = np.prod(SHAPE)
    first = rng.normal(size=(*SHAPE, 24)).astype(np.float32) / np.sqrt(size)
    first[-1], first[:, -1] = 0, 0  # where ART's Square never looks
    first = first.reshape(size, 24)
    second = rng.normal(size=(24, CLASSES)).astype(np.float32)
    images = rng.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
    return first, second, images


FIRST, SECOND, IMAGES = _parts()


def forward(images):
    """Logits float32 [B, 4] of images float32 [B, 8, 8, 2]."""
    hidden = jnp.tanh(4 * (images.reshape(len(images), -1) - 0.5) @ FIRST)
    return hidden @ SECOND


def images():
    """(images float32 [1000, 8, 8, 2] in [0, 1], the classes int32 that the network gives all but every tenth)."""
    labels = np.asarray(jax.jit(forward)(IMAGES)).argmax(axis=1).astype(np.int32)
    labels[::10] = (labels[::10] + 1) % CLASSES
    return IMAGES, labels
