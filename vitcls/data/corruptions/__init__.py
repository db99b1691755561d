"""The corruptions of Hendrycks & Dietterich (2019), "Benchmarking Neural Network Robustness", in five severities.

Fifteen that their means are of, and four for validation. Small images get the strengths of CIFAR-10-C, larger ones
those of ImageNet-C. Two things are not as there: frost is drawn, for its photos are not ours to give on, and motion
blur is computed as the package imagecorruptions does.

Each is a pure function (key, image float32 [H, W, C] in [0, 1], parameters) -> image, which may leave [0, 1].
"""

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.data.corruptions import blur, digital, noise, weather
from vitcls.data.corruptions.matrices import to_levels

SEVERITIES = (1, 2, 3, 4, 5)
_SMALL = 64  # pixels of the shorter side, and fewer


class Corruption(NamedTuple):
    """What is done to an image, and how strongly: five strengths for small images, five for large ones."""

    apply: Callable[[jax.Array, jax.Array, Any], jax.Array]
    small: tuple
    large: tuple
    prepare: Callable[[Any, int, int], Any] = lambda strength, height, width: strength  # the parameters of a size


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(noise.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption(noise.shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(noise.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": Corruption(  # radius, softness of the edge
        blur.defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        blur.disk,
    ),
    "glass_blur": Corruption(  # deviation, reach, rounds
        blur.glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        blur.glass_of,
    ),
    "motion_blur": Corruption(  # radius, deviation
        blur.motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        blur.motion_weights,
    ),
    "zoom_blur": Corruption(  # up to which zoom, in which steps
        blur.zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        blur.zoom_sides,
    ),
    "snow": Corruption(  # mean and deviation of flakes, zoom, least, radius and deviation of the wind, image kept
        weather.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        weather.snow_of,
    ),
    "frost": Corruption(  # shares of the image and of the ice
        weather.frost,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": Corruption(  # thickness, decay
        weather.fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(digital.brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(digital.contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Corruption(  # factor, smoothness, affine
        digital.elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((0.0625, 0.01, 0), (0.08125, 0.01, 0), (0.10625, 0.01, 0), (0.125, 0.01, 0), (0.15, 0.01, 0)),
        digital.cloth_of,
    ),
    "pixelate": Corruption(
        digital.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25), digital.pixel_sides
    ),
    "jpeg_compression": Corruption(  # quality
        digital.jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7), digital.jpeg_tables
    ),
    "speckle_noise": Corruption(noise.speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": Corruption(blur.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6), blur.gaussian_sides),
    "spatter": Corruption(  # mean and deviation, blur, least, opacity of water or edge of mud, mud
        weather.spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        weather.spatter_of,
    ),
    "saturate": Corruption(  # factor, addition
        digital.saturate,
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    ),
}
VALIDATION = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # no part of the mean corruption error


FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    "weather": ("snow", "frost", "fog", "brightness", "spatter"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
}


def applies_to(name: str, image_shape: tuple[int, int, int]) -> bool:
    """Whether a corruption does something to such images: gray ones have no saturation."""
    return image_shape[-1] == 3 or name != "saturate"


def prepare(name: str, severity: int, height: int, width: int) -> Any:
    """The parameters of a corruption for images of a size: numbers and matrices, arguments of a compiled function."""
    corruption = CORRUPTIONS[name]
    strengths = corruption.small if min(height, width) <= _SMALL else corruption.large
    return corruption.prepare(strengths[severity - 1], height, width)


def corrupt(batches: Iterable[dict], name: str, severity: int) -> Iterator[dict]:
    """Batches whose images uint8 [..., H, W, C] are corrupted; what becomes of an image depends on its place alone."""

    def parameters(height: int, width: int) -> Any:
        return prepare(name, severity, height, width)

    return perturb(batches, f"{name} {severity}", CORRUPTIONS[name].apply, parameters)


def perturb(
    batches: Iterable[dict], name: str, apply: Callable, parameters: Callable[[int, int], Any]
) -> Iterator[dict]:
    """Batches whose images uint8 [..., H, W, C] went through `apply(key, image, parameters(H, W))`.

    The key of an image depends on `name` and on its place alone, not on the batch that it is in.
    """
    root = jax.random.key(zlib.crc32(name.encode()))
    start, values = 0, None
    for batch in batches:
        images = batch["image"]
        values = parameters(*images.shape[-3:-1]) if values is None else values
        yield batch | {"image": _perturbed(apply, root, np.int32(start), images, values)}
        start += batch["mask"].size


@functools.partial(jax.jit, static_argnums=0)
def _perturbed(apply: Callable, root: jax.Array, start: jax.Array, images: jax.Array, parameters: Any) -> jax.Array:
    def change_one(place: jax.Array, image: jax.Array) -> jax.Array:
        return to_levels(apply(jax.random.fold_in(root, place), image / 255.0, parameters)).astype(jnp.uint8)

    flat = images.reshape(-1, *images.shape[-3:])
    return jax.vmap(change_one)(start + jnp.arange(len(flat)), flat).reshape(images.shape)
