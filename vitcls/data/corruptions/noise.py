"""Corruptions that change each value for itself."""

import jax
import jax.numpy as jnp


def gaussian_noise(key: jax.Array, image: jax.Array, std: float) -> jax.Array:
    """Adds to every value a normal number."""
    return image + std * jax.random.normal(key, image.shape)


def shot_noise(key: jax.Array, image: jax.Array, photons: float) -> jax.Array:
    """Counts photons, of which a white value has so many in the mean."""
    return jax.random.poisson(key, image * photons).astype(jnp.float32) / photons


def impulse_noise(key: jax.Array, image: jax.Array, share: float) -> jax.Array:
    """Makes this share of the values black or white, as many of each."""
    which, salt = jax.random.uniform(key, (2, *image.shape))
    return jnp.where(which < share, jnp.where(salt < 0.5, 0.0, 1.0), image)


def speckle_noise(key: jax.Array, image: jax.Array, std: float) -> jax.Array:
    """Adds to every value a normal number that grows with it."""
    return image * (1 + std * jax.random.normal(key, image.shape))
