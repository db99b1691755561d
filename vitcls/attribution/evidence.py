"""Whether a map is true: what removing its places does, against random maps; and what the map depends on."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from vitcls.attribution.network import PyTree

RANDOM_MAPS = 19  # for a map; one that beats them all has p = 0.05
STEPS = 10  # of a curve
LEVEL = 0.05
STAGES = ("head", "upper half", "all")  # of the randomisation, from the classifier down


class Evidence(NamedTuple):
    """What supports a map: the areas under its curves, in probability, and those of random maps."""

    deletion: float  # the class's mean probability while the map's places are removed, the highest first; low is good
    insertion: float  # while they are put into an empty image; high is good
    random_deletion: np.ndarray  # float [R]
    random_insertion: np.ndarray  # float [R]

    @property
    def p_value(self) -> float:
        """Of the chance that a random map has as much insertion less deletion (a Monte Carlo test)."""
        beaten = self.random_insertion - self.random_deletion < self.insertion - self.deletion
        return float((1 + np.sum(~beaten)) / (1 + len(beaten)))

    @property
    def better_than_random(self) -> bool:
        return self.p_value <= LEVEL

    def random(self, kind: str) -> dict[str, float]:
        """value, low and high of 'deletion' or 'insertion' of random maps: their mean, and where 95 % of them lie."""
        areas = self.random_deletion if kind == "deletion" else self.random_insertion
        low, high = np.quantile(areas, [0.025, 0.975])
        return {"value": float(areas.mean()), "low": float(low), "high": float(high)}


def ranks(maps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The place of each pixel in the order of its map [M, H, W], 0 for the highest; equal ones by lot. int32."""
    flat = maps.reshape(len(maps), -1)
    order = np.lexsort((rng.random(flat.shape), -flat), axis=1)
    found = np.empty(flat.shape, np.int32)
    np.put_along_axis(found, order, np.arange(flat.shape[1], dtype=np.int32)[None], axis=1)
    return found.reshape(maps.shape)


def random_maps(heat: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Maps as smooth as `heat` [H, W] that know nothing of the image, [count, H, W].

    With its amplitude at each frequency and random phases (surrogate data, Theiler et al. 1992, section 2.4.1).
    """
    phases = np.fft.fft2(rng.standard_normal((count, *heat.shape)))
    spectrum = np.abs(np.fft.fft2(heat))[None] * phases / np.maximum(np.abs(phases), 1e-12)
    return np.fft.ifft2(spectrum).real


def curves(
    probability: Callable, images: jax.Array, order: jax.Array, baseline: jax.Array, steps: int = STEPS
) -> tuple[jax.Array, jax.Array]:
    """The deletion and the insertion curve of each image (Petsiuk et al. 2018, section 4.1), [B, steps + 1] each.

    At step i the first i / steps of the pixels by `order` int [B, H, W] are removed, or are all that is there; what is
    not there is `baseline` [1, 1, 1, C]. `probability` is that of the class asked about: images -> [B].
    """
    deletion, insertion = [], []
    for i in range(steps + 1):
        first = (order * steps < i * order[0].size)[..., None]
        deletion.append(probability(jnp.where(first, baseline, images)))
        insertion.append(probability(jnp.where(first, images, baseline)))
    return jnp.stack(deletion, axis=1), jnp.stack(insertion, axis=1)


def area(curve: np.ndarray) -> np.ndarray:
    """Under curves [..., steps + 1] over 0 .. 1, by the trapezoidal rule: [...]."""
    return np.trapezoid(curve, dx=1 / (curve.shape[-1] - 1), axis=-1)


def randomised(forward: Callable, variables: PyTree, images: jax.Array, stage: str, seed: int = 0) -> PyTree:
    """`variables` of which the upper parameters are dealt anew among their places (Adebayo et al. 2018, section 3).

    Shuffled, and not drawn again: an array that starts as zeros or as the identity would be no weights at all. Which
    are the upper ones, the order says in which the program first needs them. Stages are those of STAGES.
    """
    leaves, tree = jax.tree.flatten(variables["params"])
    order = _order_of_use(forward, variables, images)
    count = {"head": 2, "upper half": -(-len(order) // 2), "all": len(order)}[stage]  # the head: a kernel and a bias
    rng, new = np.random.default_rng(seed), list(leaves)
    for i in sorted(order[-count:]):
        flat = np.asarray(leaves[i]).ravel()
        new[i] = jnp.asarray(rng.permutation(flat).reshape(leaves[i].shape))
    return variables | {"params": tree.unflatten(new)}


def _order_of_use(forward: Callable, variables: PyTree, images: jax.Array) -> list[int]:
    """The leaves of the parameters in the order in which a forward pass first needs them."""
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    traced = jax.make_jaxpr(lambda params: forward({"params": params} | rest, images))(variables["params"]).jaxpr
    first = {}
    for place, equation in enumerate(traced.eqns):
        for one in equation.invars:
            if not isinstance(one, core.Literal):
                first.setdefault(one, place)
    return sorted(range(len(traced.invars)), key=lambda i: first.get(traced.invars[i], -1))


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of two maps; 0 where one of them is constant, and so says nothing of the other."""
    from scipy.stats import spearmanr

    one, other = np.ravel(one), np.ravel(other)
    return 0.0 if np.ptp(one) == 0 or np.ptp(other) == 0 else float(spearmanr(one, other).statistic)


class Mosaic(NamedTuple):
    """An image made of four others at half their size, of four classes: it is known where each class is."""

    image: np.ndarray  # float32 [H, W, C]
    classes: np.ndarray  # int [4]; of the tiles, row by row


def mosaics(images: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator) -> list[Mosaic]:
    """For the pointing game on a grid (Boehle et al. 2021, section 4.1), of images float32 [N, H, W, C].

    [] where there are fewer than four classes, or images too small to halve.
    """
    if len(np.unique(labels)) < 4 or min(images.shape[1:3]) < 4:
        return []
    return [_mosaic(images, labels, rng) for _ in range(count)]


def _mosaic(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Mosaic:
    classes = rng.choice(np.unique(labels), 4, replace=False)
    chosen = [images[rng.choice(np.flatnonzero(labels == k))] for k in classes]
    image = np.empty_like(images[0])
    for tile, (rows, columns) in zip(chosen, tiles(image.shape[:2]), strict=True):
        shape = (rows.stop - rows.start, columns.stop - columns.start, image.shape[2])
        image[rows, columns] = jax.image.resize(tile, shape, "linear")  # antialiased
    return Mosaic(image, classes)


def tiles(size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """The four of a mosaic of H x W pixels, row by row."""
    halves = [(slice(0, side // 2), slice(side // 2, side)) for side in size]
    return [(rows, columns) for rows in halves[0] for columns in halves[1]]


def pointed(heat: np.ndarray, tile: tuple[slice, slice], rng: np.random.Generator) -> tuple[bool, float]:
    """Whether the highest place of a map [H, W] is in the tile, and the tile's share of all above 0; equals by lot."""
    inside = np.zeros(heat.shape, bool)
    inside[tile] = True
    highest = np.flatnonzero(heat.ravel() == heat.max())
    positive = np.maximum(heat, 0)
    share = positive[inside].sum() / positive.sum() if positive.sum() > 0 else inside.mean()
    return bool(inside.ravel()[rng.choice(highest)]), float(share)
