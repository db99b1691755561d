"""RandAugment (Cubuk et al. 2020) and TrivialAugment (Müller & Hutter 2021), made for vectors of images.

Under `vmap` every branch of a switch is computed, so the operations are few and cheap: all geometric ones are one
affine map, all that look at single values are one table of 256 entries per channel, and two blend with another image.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vitcls.core.registry import require
from vitcls.data.augment.geometry import affine, rotation_matrix
from vitcls.data.images import LUMA

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "contrast",
    "solarize",
    "posterize",
    "autocontrast",
    "equalize",
    "color",
    "sharpness",
)
# The strongest form of each operation, at level 1: shear as a slope, translation as a share of the side that it goes
# along (for TrivialAugment in pixels), rotation in degrees, enhancement as |factor - 1|, bits taken away, values
# solarized.
_RAND = {"shear": 0.3, "rotate": 30.0, "enhance": 0.9, "bits": 4.0, "solarize": 256.0}
_RAND_TRANSLATE = 150 / 331
_WIDE = {"shear": 0.99, "rotate": 135.0, "enhance": 0.99, "bits": 6.0, "solarize": 256.0}
_WIDE |= {"translate_x": 32.0, "translate_y": 32.0}
_BINS = 31  # levels of TrivialAugment


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """`num_ops` random operations, one after the other, at `magnitude` of 10 (Cubuk et al. 2020)."""

    probability: float = 0.0
    num_ops: int = 2
    magnitude: float = 9.0

    def __post_init__(self):
        require(self, "num_ops", 1 <= self.num_ops <= 32, "in [1, 32]")
        require(self, "magnitude", 0 <= self.magnitude <= 10, "in [0, 10]")

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        height, width, _ = image.shape
        ranges = _RAND | {"translate_x": _RAND_TRANSLATE * width, "translate_y": _RAND_TRANSLATE * height}
        for op_key in jax.random.split(key, self.num_ops):
            operation_key, sign_key = jax.random.split(op_key)
            operation = jax.random.randint(operation_key, (), 0, len(OPERATIONS))
            level = jnp.float32(self.magnitude / 10)
            image = apply(image, operation, level, jax.random.rademacher(sign_key, ()), ranges)
        return image


@dataclasses.dataclass(frozen=True)
class TrivialAugment:
    """One random operation at a random strength, 'wide' space (Müller & Hutter 2021)."""

    probability: float = 0.0

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        operation_key, level_key, sign_key = jax.random.split(key, 3)
        operation = jax.random.randint(operation_key, (), 0, len(OPERATIONS))
        level = jax.random.randint(level_key, (), 0, _BINS) / (_BINS - 1)
        return apply(image, operation, level, jax.random.rademacher(sign_key, ()), _WIDE)


def apply(
    image: jax.Array, operation: jax.Array, level: jax.Array, sign: jax.Array, ranges: dict[str, float]
) -> jax.Array:
    """Applies OPERATIONS[operation] at `level` in [0, 1] and `sign` of 1 or -1; whole values in [0, 255] result."""
    image = jnp.round(affine(image, _matrix(operation, level, sign, ranges)))
    factor = 1 + sign * level * ranges["enhance"]
    # The barrier: else XLA fuses the tables into the look-up and computes an entry anew for every pixel.
    tables = jax.lax.optimization_barrier(_tables(image, operation, level, factor, ranges))
    looked_up = _look_up(tables, image)
    # Both from the same image, not one after the other: else the look-up is fused into each tap of the stencil.
    base = jnp.where(_is(operation, "sharpness"), _smooth(image), jnp.round(luma(image)))
    blends = _is(operation, "sharpness") | (_is(operation, "color") & (image.shape[-1] == 3))
    return jnp.where(blends, _blend(base, image, factor), looked_up)


def luma(image: jax.Array) -> jax.Array:
    """Luma of an image (ITU-R 601, as in Pillow): [H, W, C] -> [H, W, 1]."""
    return image if image.shape[-1] == 1 else jnp.sum(image * LUMA[None, None, :], axis=-1, keepdims=True)


def _is(operation: jax.Array, name: str) -> jax.Array:
    return operation == OPERATIONS.index(name)


def _matrix(operation: jax.Array, level: jax.Array, sign: jax.Array, ranges: dict[str, float]) -> jax.Array:
    """The affine map [2, 3] of a geometric operation; of all others the identity."""
    amount = sign * level

    def entry(name: str, most: float) -> jax.Array:
        return jnp.where(_is(operation, name), amount * most, 0.0)

    moved = jnp.array(
        [
            [1.0, entry("shear_x", ranges["shear"]), entry("translate_x", ranges["translate_x"])],
            [entry("shear_y", ranges["shear"]), 1.0, entry("translate_y", ranges["translate_y"])],
        ]
    )
    return jnp.where(_is(operation, "rotate"), rotation_matrix(amount * ranges["rotate"]), moved)


def _tables(
    image: jax.Array, operation: jax.Array, level: jax.Array, factor: jax.Array, ranges: dict[str, float]
) -> jax.Array:
    """What becomes of each value of each channel, [C, 256]."""
    channels = image.shape[-1]
    values = jnp.arange(256.0)
    mean = jnp.round(jnp.mean(jnp.round(luma(image))))
    step = 2.0 ** jnp.round(level * ranges["bits"])
    threshold = 256.0 - level * ranges["solarize"]
    pointwise = jnp.select(
        [_is(operation, name) for name in ("brightness", "contrast", "solarize", "posterize")],
        [
            _blend(jnp.zeros(()), values, factor),
            _blend(mean, values, factor),
            jnp.where(values < threshold, values, 255 - values),
            jnp.floor(values / step) * step,
        ],
        values,
    )
    counts = jax.vmap(_histogram, in_axes=-1)(image)  # [C, 256]
    per_channel = jnp.where(_is(operation, "autocontrast"), jax.vmap(_stretched)(counts), jax.vmap(_equalized)(counts))
    by_channel = _is(operation, "autocontrast") | _is(operation, "equalize")
    return jnp.where(by_channel, per_channel, jnp.broadcast_to(pointwise, (channels, 256)))


def _histogram(channel: jax.Array) -> jax.Array:
    """How often each value occurs, [256]."""
    values = channel.astype(jnp.int32).ravel()
    return jax.lax.platform_dependent(values, cpu=_count_by_scatter, default=_count_by_product)


def _count_by_scatter(values: jax.Array) -> jax.Array:
    return jnp.zeros(256).at[values].add(1.0)


def _count_by_product(values: jax.Array) -> jax.Array:
    """A product over the pixels of which h and which l they have, where a value is 16 h + l.

    Exact in every precision, being of zeros and ones. For accelerators, where pixels of one value wait for each other
    in a scatter; a CPU takes 8 to 20 times as long for the product.
    """
    high, low = (jax.nn.one_hot(part, 16, dtype=jnp.bfloat16) for part in jnp.divmod(values, 16))
    return jnp.einsum("ph,pl->hl", high, low, preferred_element_type=jnp.float32).ravel()


def _stretched(counts: jax.Array) -> jax.Array:
    """Autocontrast: the lowest value becomes 0 and the highest 255 (PIL.ImageOps.autocontrast)."""
    values = jnp.arange(256.0)
    low = jnp.min(jnp.where(counts > 0, values, 255.0))
    high = jnp.max(jnp.where(counts > 0, values, 0.0))
    scale = 255.0 / jnp.where(high > low, high - low, 1.0)
    return jnp.where(high > low, jnp.clip(jnp.floor((values - low) * scale), 0, 255), values)


def _equalized(counts: jax.Array) -> jax.Array:
    """Histogram equalisation (PIL.ImageOps.equalize)."""
    values = jnp.arange(256.0)
    last = jnp.sum(jnp.where(values == jnp.max(jnp.where(counts > 0, values, 0.0)), counts, 0.0))
    step = jnp.floor((jnp.sum(counts) - last) / 255)
    below = jnp.cumsum(counts) - counts
    table = jnp.clip(jnp.floor((jnp.floor(step / 2) + below) / jnp.where(step > 0, step, 1.0)), 0, 255)
    return jnp.where(step > 0, table, values)


def _look_up(tables: jax.Array, image: jax.Array) -> jax.Array:
    look_up = jax.vmap(lambda table, channel: table[channel], in_axes=(0, -1), out_axes=-1)
    return look_up(tables, image.astype(jnp.int32))


def _smooth(image: jax.Array) -> jax.Array:
    """PIL.ImageFilter.SMOOTH: a 3x3 mean with weight 5 in the middle; the border stays, which may be all there is."""
    height, width, _ = image.shape
    if min(height, width) < 3:
        return image
    around = sum(image[row : height - 2 + row, column : width - 2 + column] for row in range(3) for column in range(3))
    inner = jnp.pad(jnp.round((around + 4 * image[1:-1, 1:-1]) / 13), ((1, 1), (1, 1), (0, 0)))
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
    border = (rows == 0) | (rows == height - 1) | (columns == 0) | (columns == width - 1)
    return jnp.where(border[..., None], image, inner)


def _blend(base: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(jnp.floor(base + (image - base) * factor), 0, 255)
