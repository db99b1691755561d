"""Where images come from: TFDS, a folder, an .npz file, scikit-learn's digits, or made up; all checked in one place."""

import collections
import dataclasses
import logging
import os
import pathlib
import textwrap
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vitcls.core.errors import UserError
from vitcls.data import images as image_files
from vitcls.data.dataset import Dataset, Source, Split
from vitcls.data.images import BadImage, Decoding, EncodedImages
from vitcls.data.sources.folder import folder
from vitcls.data.sources.synthetic_jpeg import synthetic_jpeg
from vitcls.data.sources.tfds import tfds
from vitcls.data.splits import fold_split, stratified_split

_DEPTH_SAMPLE = 64  # training images whose headers tell whether a data set has more than 8 bits
_logger = logging.getLogger("vitcls")


def load(config, *, data_dir: str = "", max_value: float | None = None) -> Dataset:
    """Loads the data set that the block `dataset` of a config names, with its splits.

    `data_dir` is where it is, if not where the config says. `max_value` is that of an earlier run
    (`DatasetInfo.max_value`), which is kept; None takes `config.max_value`, or finds it. Raises UserError, one line
    that says what to do, where the data are not there or cannot be used. Writes nothing but the cache.
    """
    config = config.copy_and_resolve_references()
    config.data_dir = data_dir or config.data_dir
    if max_value is not None:
        config.max_value = max_value
    source = SOURCES.get(config.name, tfds)(config)
    _check(source)
    splits = dict(source.splits)
    if "test" not in splits:
        rest, held = stratified_split(
            splits["train"].labels, config.test, config.split_seed, source.class_names, split="test"
        )
        splits |= {"train": splits["train"].take(rest), "test": splits["train"].take(held)}
    labels = splits["train"].labels
    if config.num_folds:
        if "validation" in splits:
            _logger.warning(
                "config.dataset.num_folds=%d makes the folds of the training split alone: the %s images of the "
                "validation split that comes with '%s' are not used",
                config.num_folds,
                f"{len(splits['validation'].labels):,}",
                source.name,
            )
        rest, held = fold_split(labels, config.num_folds, config.fold, config.split_seed, source.class_names)
        splits |= {"train": splits["train"].take(rest), "validation": splits["train"].take(held)}
    elif "validation" not in splits and config.validation:
        rest, held = stratified_split(labels, config.validation, config.split_seed, source.class_names)
        splits |= {"train": splits["train"].take(rest), "validation": splits["train"].take(held)}
    image_shape = _image_shape(source, config.image_size)
    splits = {name: _at_size(split, image_shape, config.eval_crop) for name, split in splits.items()}
    if isinstance(splits["train"].images, np.ndarray):
        max_value = source.max_value
    elif max_value is None:
        max_value = config.max_value or _find_max_value(splits["train"].images)
    decoding = Decoding(max_value, config.eval_crop)
    splits = {name: dataclasses.replace(split, decoding=decoding) for name, split in splits.items()}
    return Dataset(
        source.name,
        source.class_names,
        splits["train"],
        splits.get("validation"),
        splits["test"],
        image_shape,
        source.skipped,
    )


def _check(source: Source) -> None:
    """Raises UserError for a set with which no classifier can be trained."""
    num_classes = len(source.class_names)
    if num_classes < 2:
        raise UserError(f"the data set '{source.name}' has {num_classes} classes; a classifier needs at least 2")
    twice = [name for name, count in collections.Counter(source.class_names).items() if count > 1]
    if twice:
        raise UserError(f"two classes of '{source.name}' have the name '{twice[0]}'; give each its own")
    for name, split in source.splits.items():
        labels = split.labels
        if not len(labels):
            raise UserError(f"the {name} split of '{source.name}' is empty{_told_of_skipped(source)}")
        if len(labels) != len(split.images):
            raise UserError(
                f"the {name} split of '{source.name}' has {len(split.images)} images and {len(labels)} labels"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            wrong = int(labels.min() if labels.min() < 0 else labels.max())
            raise UserError(
                f"the {name} split of '{source.name}' has the label {wrong}, outside 0 .. {num_classes - 1}"
            )
    counts = np.bincount(source.splits["train"].labels, minlength=num_classes)
    if not counts.all():
        empty = source.class_names[int(np.argmin(counts))]
        raise UserError(
            f"class '{empty}' of '{source.name}' has no training image; add some, or remove the class"
            + _told_of_skipped(source)
        )


def _told_of_skipped(source: Source) -> str:
    if not source.skipped:
        return ""
    count, first = len(source.skipped), source.skipped[0]
    return f" ({count} file{'s were' if count > 1 else ' was'} skipped; {first.path} {first.reason})"


def _height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """`config.dataset.image_size`, one number or two."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def _image_shape(source: Source, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
    """H, W, C as the model will see the images; those in files may be gray and in colour, which makes them colour."""
    channels = {shape[2] for shape in source.shapes}
    in_memory = isinstance(source.splits["train"].images, np.ndarray)
    if in_memory and len(channels) > 1:
        raise UserError(f"the splits of '{source.name}' differ in channels: {' and '.join(map(str, sorted(channels)))}")
    if image_size:
        return *_height_and_width(image_size), max(channels)
    sizes = sorted({shape[:2] for shape in source.shapes})
    if len(sizes) > 1:
        (h0, w0), (h1, w1) = sizes[0], sizes[-1]
        raise UserError(
            f"the images of '{source.name}' differ in size, from {h0}x{w0} to {h1}x{w1}; set config.dataset.image_size"
        )
    return *sizes[0], max(channels)


def _at_size(split: Split, image_shape: tuple[int, int, int], eval_crop: float) -> Split:
    """Images in memory are resized once; encoded ones are resized as they are decoded."""
    images = split.images
    if not isinstance(images, np.ndarray) or (images.shape[1:] == image_shape and eval_crop == 1):
        return split
    return Split(image_files.resize_all(images, image_shape[:2], eval_crop), split.labels)


def _find_max_value(images: EncodedImages) -> float:
    """The white of training images of more than 8 bits, by the largest value in any of them; 0.0 if none is met.

    Images of 8 bits cost a look at the headers of a sample, no pass over the files.
    """

    def largest(index: int, *, decode: bool = True) -> float | None:
        try:
            encoded = images.read(index)
            if image_files.is_deep(encoded):
                return image_files.largest_value(encoded) if decode else 0.0
            return None
        except (BadImage, OSError) as error:
            raise UserError(f"image {index} of the training split: {error}") from None

    sample = np.unique(np.linspace(0, len(images) - 1, _DEPTH_SAMPLE).astype(int)).tolist()
    if all(largest(index, decode=False) is None for index in sample):
        return 0.0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = max(value for value in pool.map(largest, range(len(images))) if value is not None)
    return _told_natural_maximum(found)


def _told_natural_maximum(largest: float) -> float:
    """`images.natural_maximum`, said aloud where it is not simply that of the format."""
    white = image_files.natural_maximum(largest)
    if white not in (1, 65535):
        _logger.warning(
            "images of more than 8 bits: the largest value of the training images is %.10g, so %.10g becomes white; "
            "set config.dataset.max_value to fix it",
            largest,
            white,
        )
    return white


def _digits(config) -> Source:
    """1,797 handwritten digits of 8x8 pixels that come inside scikit-learn (UCI, Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    split = Split(images, digits.target.astype(np.int32))
    return Source("digits", tuple(map(str, digits.target_names)), {"train": split}, (images.shape[1:],))


def _synthetic(config) -> Source:
    """A pattern per class under noise, by `split_seed`: learnable, endless, and worth nothing."""
    rng = np.random.default_rng(config.split_seed)
    height, width = _height_and_width(config.image_size or 32)
    patterns = rng.uniform(60, 195, (config.num_classes, 4, 4, 3))
    patterns = patterns.repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)[:, :height, :width]
    labels = rng.permutation(np.arange(config.num_examples) % config.num_classes).astype(np.int32)
    noise = rng.normal(0, 40, (config.num_examples, height, width, 3))
    images = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
    names = tuple(f"class {k}" for k in range(config.num_classes))
    return Source("synthetic", names, {"train": Split(images, labels)}, (images.shape[1:],))


_NPZ_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "validation": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


def _npz(config) -> Source:
    """An .npz file with the keys of Keras (x_train, y_train, ...) or of MedMNIST (train_images, ...)."""
    path = pathlib.Path(config.data_dir).expanduser()
    if not config.data_dir or not path.is_file():
        raise UserError(f"config.dataset.data_dir='{config.data_dir}' is not a file; give the .npz file")
    arrays = _read_npz(path)
    splits, max_value = {}, config.max_value
    for split, choices in _NPZ_KEYS.items():
        for images_key, labels_key in choices:
            if (images_key in arrays) != (labels_key in arrays):
                found, missing = sorted((images_key, labels_key), key=arrays.__contains__, reverse=True)
                raise UserError(f"{path} has '{found}' but no '{missing}'")
            if images_key in arrays:
                images = _npz_images(path, images_key, arrays[images_key])
                if split == "train" and not max_value and images.max() > _npz_natural(images):
                    max_value = _told_natural_maximum(float(images.max()))
                splits[split] = Split(
                    _npz_to_8_bits(path, images_key, images, max_value),
                    _npz_labels(path, labels_key, arrays[labels_key]),
                )
    if "train" not in splits:
        raise UserError(f"{path} has no 'x_train' or 'train_images'; it has {', '.join(arrays) or 'nothing'}")
    shapes = tuple({split.images.shape[1:] for split in splits.values()})
    names = _npz_class_names(path, arrays, splits["train"].labels)
    return Source(path.stem, names, splits, shapes, max_value=max_value)


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file that vitcls has a use for; pickles are refused."""
    wanted = {key for choices in _NPZ_KEYS.values() for pair in choices for key in pair} | {"class_names"}
    try:
        if not zipfile.is_zipfile(path):  # np.load would take other files too
            raise ValueError("it is no zip file, or cut short")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files if key in wanted}
    except Exception as error:  # a damaged zip file or array header fails in too many ways to be listed
        reason = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        raise UserError(f"{path} cannot be read as .npz without pickles: {reason}") from None


def _npz_images(path: pathlib.Path, key: str, images: np.ndarray) -> np.ndarray:
    """The images of one key as [N, H, W, C] of their own type, none of them negative."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise UserError(f"'{key}' of {path} is {images.shape}; images are [N, H, W], [N, H, W, 1] or [N, H, W, 3]")
    if images.dtype.kind not in "iuf":
        raise UserError(f"'{key}' of {path} is {images.dtype}; images are integers or floats")
    low, high = images.min(), images.max()
    if not 0 <= low <= high < np.inf:
        raise UserError(f"'{key}' of {path} is {images.dtype} from {low} to {high}; images have no negative values")
    return images


def _npz_natural(images: np.ndarray) -> float:
    return 1.0 if images.dtype.kind == "f" else 255.0


def _npz_to_8_bits(path: pathlib.Path, key: str, images: np.ndarray, max_value: float) -> np.ndarray:
    """Images of one key as uint8, white at `max_value`; with 0.0 at 255 for integers and at 1 for floats."""
    if images.dtype == np.uint8:
        return images
    natural = _npz_natural(images)
    if not max_value and images.max() > natural:
        raise UserError(
            f"'{key}' of {path} is {images.dtype} up to {images.max()}, above the {natural:g} that the training images "
            "keep to; scale it, or set config.dataset.max_value"
        )
    return np.stack([image_files.to_8_bits(image, max_value or natural) for image in images])  # one by one: less memory


def _npz_labels(path: pathlib.Path, key: str, labels: np.ndarray) -> np.ndarray:
    """The labels of one key as int32 [N]."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuf" or not np.all(labels == np.rint(labels)):
        raise UserError(f"'{key}' of {path} is {labels.dtype} {labels.shape}; labels are whole numbers [N] or [N, 1]")
    if len(labels) and not (labels.min() >= 0 and labels.max() < 2**31):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"'{key}' of {path} has the label {wrong}; labels count the classes from 0")
    return labels.astype(np.int32)


def _npz_class_names(path: pathlib.Path, arrays: dict[str, np.ndarray], labels: np.ndarray) -> tuple[str, ...]:
    """The names given, else the numbers 0, 1, ... up to the last label, every one of which must be used."""
    if "class_names" in arrays:
        names = arrays["class_names"]
        if names.ndim != 1 or names.dtype.kind not in "US":
            raise UserError(f"'class_names' of {path} is {names.dtype} {names.shape}; it is a list of strings")
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist())
    used = np.unique(labels)
    gaps = np.flatnonzero(used != np.arange(len(used)))
    if len(gaps):
        raise UserError(
            f"{path} has no training image of class {gaps[0]}; labels count the classes from 0 without gaps"
        )
    return tuple(map(str, used.tolist()))


SOURCES: dict[str, Callable] = {
    "digits": _digits,
    "synthetic": _synthetic,
    "synthetic_jpeg": synthetic_jpeg,
    "folder": folder,
    "npz": _npz,
}
