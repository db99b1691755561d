"""Corruptions of test images in five severities (Hendrycks & Dietterich 2019), as strong as those of CIFAR-10-C.

Each is a pure function (key, image float32 [H, W, C] in [0, 1], strength) -> image, which may leave [0, 1].
"""

import zlib
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp

SEVERITIES = (1, 2, 3, 4, 5)


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


CORRUPTIONS: dict[str, tuple[Callable, tuple[float, ...]]] = {  # and their strengths, by severity
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
}


def corrupt(batches: Iterable[dict], name: str, severity: int) -> Iterator[dict]:
    """Batches whose images uint8 [..., H, W, C] are corrupted; what becomes of an image depends on its place alone."""
    function, strengths = CORRUPTIONS[name]
    root = jax.random.fold_in(jax.random.key(severity), zlib.crc32(name.encode()))

    @jax.jit
    def change(start: jax.Array, images: jax.Array) -> jax.Array:
        def change_one(place: jax.Array, image: jax.Array) -> jax.Array:
            changed = function(jax.random.fold_in(root, place), image / 255.0, strengths[severity - 1])
            return jnp.rint(255 * jnp.clip(changed, 0, 1)).astype(jnp.uint8)

        flat = images.reshape(-1, *images.shape[-3:])
        return jax.vmap(change_one)(start + jnp.arange(len(flat)), flat).reshape(images.shape)

    start = 0
    for batch in batches:
        yield batch | {"image": change(start, batch["image"])}
        start += batch["mask"].size
