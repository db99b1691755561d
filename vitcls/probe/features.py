"""Images to features: the pixels, HOG, a histogram of colours, or what a network gives its classifier.

Features are kept in the cache under a hash of all that they are made of: the bytes of the images and how they are
decoded, the weights, the preprocessing and the code. So those of a changed file are never used again.
"""

import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from flax import traverse_util

import vitcls
from vitcls import data
from vitcls.core import errors, extras
from vitcls.core.cache import cache_dir, load_arrays, store_arrays
from vitcls.core.errors import RunError, UserError
from vitcls.core.progress import show_progress
from vitcls.core.sharding import Partition
from vitcls.data import DatasetInfo, Split
from vitcls.data.memory import host_memory_bytes
from vitcls.models.variables import variable_shapes
from vitcls.training import build, initial

_BINS = 8  # of a channel, in a histogram of colours
_CELLS = 8  # of HOG along the shorter side, of at least 4 pixels
_HOST_SHARE = 0.5  # of the host's memory that the features of one split may take
_LIBRARIES = ("jax", "flax", "numpy", "pillow")


class Extractor(NamedTuple):
    """A way from images to features."""

    compute: Callable[[dict], np.ndarray]  # a batch of data.EvaluationBatches -> float32 [B, D], on the host
    identity: str  # a hash of what decides them, but for the images
    variables: dict[str, np.ndarray] | None = None  # of the network, by path, without its classifier


class Features(NamedTuple):
    """The features of a split."""

    rows: np.ndarray  # float32 [N, D]
    seconds: float  # that computing them took, if it was long ago
    cached: bool


def make_extractor(config, info: DatasetInfo, start: initial.Start | None, partition: Partition) -> Extractor:
    """The extractor that `config.probe.features` names; raises UserError where it is not for these images.

    `start` has the weights of 'network', which must be those of the config's model.
    """
    kind = config.probe.features
    if kind == "network":
        return _network(config, info, start, partition)
    if kind not in _CLASSICAL:
        raise errors.unknown("--features", kind, [*_CLASSICAL, "a workdir", "a file of weights"])
    one = _CLASSICAL[kind](info.image_shape)

    def compute(batch: dict) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(one, np.asarray(batch["image"]))))

    libraries = (*_LIBRARIES, "scikit-image") if kind == "hog" else _LIBRARIES
    return Extractor(compute, _hash([kind, *map(importlib.metadata.version, libraries), _code()]))


def _pixels(image_shape: tuple[int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda image: image.astype(np.float32).ravel() / 255


def _hog(image_shape: tuple[int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """Histograms of oriented gradients (Dalal & Triggs 2005): 9 orientations, 8 cells along the shorter side, blocks
    of 2x2 cells.
    """
    with extras.needed("hog", "classical"):
        from skimage.feature import hog
    cell = max(4, min(image_shape[:2]) // _CELLS)
    if min(image_shape[:2]) < 2 * cell:
        height, width, _ = image_shape
        raise UserError(
            f"hog is for images of at least 8x8 pixels, not {height}x{width}; set config.dataset.image_size"
        )
    return lambda image: hog(image, pixels_per_cell=(cell, cell), cells_per_block=(2, 2), channel_axis=-1).astype(
        np.float32
    )


def _color(image_shape: tuple[int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """The root of the joint histogram of the channels, so that its products compare distributions (Hellinger)."""
    channels = image_shape[-1]
    places = _BINS ** np.arange(channels)

    def one(image: np.ndarray) -> np.ndarray:
        bins = (image.reshape(-1, channels) // (256 // _BINS)) @ places
        return np.sqrt(np.bincount(bins, minlength=_BINS**channels) / len(bins)).astype(np.float32)

    return one


_CLASSICAL = {"pixels": _pixels, "hog": _hog, "color": _color}
CLASSICAL = tuple(_CLASSICAL)


def _network(config, info: DatasetInfo, start: initial.Start, partition: Partition) -> Extractor:
    model = build.make_model(config, info, device=partition.device)
    given = initial.read(config, info, model, start).variables
    shapes = traverse_util.flatten_dict(variable_shapes(model, info.image_shape), sep="/")
    # The classifier is new and comes after the features.
    flat = {path: given[path] if path in given else np.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    variables = partition.replicate(traverse_util.unflatten_dict(flat, sep="/"))
    step = partition.compile_evaluation(build.make_outputs_step(config, model, info))
    made_of = [
        json.dumps(config.model.to_dict()),
        pathlib.Path(inspect.getfile(type(model))).read_bytes(),  # which may be the user's own
        f"{info.mean} {info.std} {config.matmul_precision} {partition.device.device_kind}",
        *(part for path in sorted(given) for part in (path, str(given[path].dtype), given[path])),
        *map(importlib.metadata.version, _LIBRARIES),
        _code(),
    ]
    return Extractor(lambda batch: partition.to_host(step(variables, batch)).features, _hash(made_of), given)


def features_of(
    extractor: Extractor, split: Split, image_shape: tuple[int, int, int], partition: Partition, batch_size: int
) -> Features:
    """The features of a split, from the cache if they are there.

    Raises UserError where they would take more than half of the memory of this machine, RunError where they are not
    finite.
    """
    path = cache_dir() / "features" / f"{_hash([extractor.identity, *_images(split, image_shape)])}.npz"
    kept = load_arrays(path, ("rows", "seconds"))
    if kept is not None:
        return Features(kept["rows"], float(kept["seconds"]), cached=True)
    since = time.perf_counter()
    size = partition.round_up(batch_size)
    batches = data.EvaluationBatches(split, image_shape=image_shape, partition=partition, batch_size=size, keep=False)
    count, rows = len(split.labels), None
    steps = show_progress(batches, -(-count // size), "batches of features")
    for start, batch in zip(range(0, count, size), steps, strict=True):
        part = extractor.compute(batch)
        rows = _room(count, part.shape[1]) if rows is None else rows
        rows[start : start + size] = part[: count - start]  # the last batch is padded
    if not np.isfinite(rows.sum(axis=1)).all():
        raise RunError("the network gives features that are not finite; take weights that have not diverged")
    seconds = time.perf_counter() - since
    store_arrays(path, {"rows": rows, "seconds": np.float64(seconds)})
    return Features(rows, seconds, cached=False)


def _room(count: int, width: int) -> np.ndarray:
    needed, there = 4 * count * width, host_memory_bytes()
    if needed > _HOST_SHARE * there:
        raise UserError(
            f"the features of {count:,} images, {width:,} numbers each, take {needed / 2**30:.1f} GiB of the "
            f"{there / 2**30:.1f} GiB of memory; set a smaller config.dataset.image_size or fraction"
        )
    return np.empty((count, width), np.float32)


def _images(split: Split, image_shape: tuple[int, int, int]) -> Iterable[str | bytes | np.ndarray]:
    """What decides what a network sees of the images: their bytes, and how these are decoded."""
    yield f"{image_shape}"
    if isinstance(split.images, np.ndarray):
        yield split.images
        return
    yield f"{split.decoding}"
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda i: hashlib.sha256(split.images.read(i)).digest(), range(len(split.images)))


@functools.cache
def _code() -> str:
    """A hash of the package."""
    files = sorted(pathlib.Path(vitcls.__file__).parent.rglob("*.py"))
    return _hash([sys.version, *(file.read_bytes() for file in files)])


def _hash(parts: Iterable[str | bytes | np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else np.ascontiguousarray(part)
        digest.update(str(len(part)).encode() + b" ")
        digest.update(part)
    return digest.hexdigest()[:32]
