"""Features of the images of a split, float32 [N, D]: computed once, and kept by the content of what they depend on."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import traverse_util

from vitcls import data
from vitcls.core.cache import cache_dir, load_arrays, store_arrays
from vitcls.core.errors import UserError
from vitcls.data import images as image_files
from vitcls.models.variables import variable_shapes
from vitcls.training import build, run_dir
from vitcls.training.outputs import make_outputs_step

HANDCRAFTED = ("pixels", "hog", "color")
_VERSION = 1  # of the definitions below
_BATCH = 256
_CELLS = 7  # of HOG, along a side
_BINS = 16  # of a channel's histogram
_ORIENTATIONS = 9


@dataclasses.dataclass(frozen=True)
class Extractor:
    """What makes features of images uint8 [n, H, W, C], n up to 256: float32 [n, D]."""

    words: str
    digest: str  # SHA-256 of all that decides besides the images
    call: Callable[[np.ndarray], np.ndarray]


def make(what: str, prepared) -> Extractor:
    """The extractor of a name, the workdir of a run, or a file of weights for the config's model.

    `prepared` is what `vitcls.train.prepare` gives. Raises UserError for what cannot be used.
    """
    shape = prepared.info.image_shape
    if what in HANDCRAFTED:
        return Extractor(what, _digest(what, shape), {"pixels": _pixels, "hog": _hog_of(shape), "color": _color}[what])
    if os.path.isdir(what):
        trained = run_dir.open_workdir(what)
        if trained.info.image_shape != shape:
            height, width, channels = trained.info.image_shape
            raise UserError(
                f"the run in {what} takes images of {height}x{width}x{channels}, and the config gives "
                f"{'x'.join(map(str, shape))}; set --config.dataset.image_size='({height}, {width})'"
            )
        model = build.make_model(trained.config, trained.info)
        _, variables = trained.restore(model, trained.config.report.checkpoint)
        return _network(what, trained, model, variables)
    if prepared.start is None:
        raise UserError(f"--features={what} is none of {', '.join(HANDCRAFTED)}, no workdir and no file of weights")
    model = prepared.training.model
    shapes = traverse_util.flatten_dict(variable_shapes(model, shape), sep="/")
    zeros = {
        path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()
    }  # the new head, which is not asked
    variables = traverse_util.unflatten_dict(zeros | dict(prepared.start.variables), sep="/")
    return _network(what, run_dir.Workdir(None, prepared.config, prepared.info), model, variables)


def _network(what: str, trained: run_dir.Workdir, model, variables) -> Extractor:
    weights = hashlib.sha256()
    for path, leaf in sorted(traverse_util.flatten_dict(variables, sep="/").items()):
        weights.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
        weights.update(np.ascontiguousarray(leaf))
    step, variables = jax.jit(make_outputs_step(trained, model)), jax.device_put(variables)
    shape = trained.info.image_shape

    def call(images: np.ndarray) -> np.ndarray:
        padded = np.zeros((_BATCH, *shape), np.uint8)
        padded[: len(images)] = images
        return np.asarray(step(variables, padded).features[: len(images)], np.float32)

    info = trained.info.mean, trained.info.std, shape
    return Extractor(what, _digest(trained.config.model.to_dict(), weights.hexdigest(), info), call)


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps([_VERSION, jax.__version__, *parts]).encode()).hexdigest()


def _pixels(images: np.ndarray) -> np.ndarray:
    """The values in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


def _color(images: np.ndarray) -> np.ndarray:
    """The histogram of each channel in each quarter of the image, of shares."""
    height, width = images.shape[1] // 2, images.shape[2] // 2
    quarters = [images[:, y : y + height, x : x + width] for y in (0, height) for x in (0, width)]
    rows = []
    for part in quarters:
        which = part.astype(np.int64) * _BINS // 256
        counts = np.stack([(which == b).mean(axis=(1, 2)) for b in range(_BINS)], axis=-1)  # [n, C, bins]
        rows.append(counts.reshape(len(images), -1))
    return np.concatenate(rows, axis=1).astype(np.float32)


def _hog_of(shape: tuple[int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """Histograms of oriented gradients (Dalal & Triggs 2005): 7x7 cells of nine orientations, blocks of 2x2 cells."""
    cell = max(1, shape[0] // _CELLS), max(1, shape[1] // _CELLS)

    def call(images: np.ndarray) -> np.ndarray:
        try:
            from skimage.feature import hog
        except ImportError:
            raise UserError("--features=hog needs another package: pip install 'vitcls[classical]'") from None
        return np.stack(
            [
                hog(image, _ORIENTATIONS, cell, (2, 2), transform_sqrt=True, channel_axis=-1).astype(np.float32)
                for image in images
            ]
        )

    return call


def features_of(extractor: Extractor, split: data.Split, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Float32 [N, D] of a split, from the cache where these images and this extractor have been there before.

    Images are read twice, so that others are never taken for them, and no more than a batch is in memory.
    """
    digest = hashlib.sha256(extractor.digest.encode())
    for images in _images(split, image_shape):
        digest.update(images)
    file = cache_dir() / "features" / f"{digest.hexdigest()}.npz"
    kept = load_arrays(file, ["features"])
    if kept is not None:
        return kept["features"]
    features = np.concatenate([extractor.call(images) for images in _images(split, image_shape)])
    store_arrays(file, {"features": features})
    return features


def _images(split: data.Split, image_shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Images uint8 [n, H, W, C] of a split, up to 256 at a time."""
    for start in range(0, len(split.labels), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(split.labels)))
        part = split.take(rows).images
        if not isinstance(part, np.ndarray):
            size, channels = image_shape[:2], image_shape[2]
            part = image_files.decode_all(part, size=size, channels=channels, decoding=split.decoding)
        yield np.ascontiguousarray(part)
