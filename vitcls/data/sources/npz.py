"""An .npz file with the arrays of Keras (x_train, y_train, ...) or of MedMNIST (train_images, ...)."""

import dataclasses
import pathlib
import textwrap
import zipfile

import numpy as np

from vitcls.core.errors import UserError
from vitcls.data import images as image_files
from vitcls.data.dataset import Source, Split
from vitcls.data.depth import announce_white

_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "validation": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


@dataclasses.dataclass(frozen=True)
class Npz:
    """An .npz file with the keys of Keras (x_train, y_train, ...) or of MedMNIST (train_images, ...)."""

    def load(self, config) -> Source:
        path = pathlib.Path(config.data_dir).expanduser()
        if not config.data_dir or not path.is_file():
            raise UserError(f"config.dataset.data_dir='{config.data_dir}' is not a file; give the .npz file")
        arrays = _read(path)
        splits, max_value = {}, config.max_value
        for split, choices in _KEYS.items():
            for images_key, labels_key in choices:
                if (images_key in arrays) != (labels_key in arrays):
                    found, missing = sorted((images_key, labels_key), key=arrays.__contains__, reverse=True)
                    raise UserError(f"{path} has '{found}' but no '{missing}'")
                if images_key in arrays:
                    if split in splits:
                        raise UserError(f"{path} has '{choices[0][0]}' and '{images_key}'; leave one of them out")
                    images = _images(path, images_key, arrays[images_key])
                    if split == "train" and not max_value and images.max() > _natural(images):
                        max_value = announce_white(float(images.max()))
                    splits[split] = Split(
                        _to_8_bits(path, images_key, images, max_value),
                        _labels(path, labels_key, arrays[labels_key]),
                    )
        if "train" not in splits:
            raise UserError(f"{path} has no 'x_train' or 'train_images'; it has {', '.join(arrays) or 'nothing'}")
        shapes = tuple({split.images.shape[1:] for split in splits.values()})
        names = _class_names(path, arrays, splits["train"].labels)
        return Source(path.stem, names, splits, shapes, max_value=max_value)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file that vitcls has a use for; pickles are refused."""
    wanted = {key for choices in _KEYS.values() for pair in choices for key in pair} | {"class_names"}
    try:
        if not zipfile.is_zipfile(path):  # np.load would take other files too
            raise ValueError("it is no zip file, or cut short")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files if key in wanted}
    except Exception as error:  # a damaged zip file or array header fails in too many ways to be listed
        reason = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        raise UserError(f"{path} cannot be read as .npz without pickles: {reason}") from None


def _images(path: pathlib.Path, key: str, images: np.ndarray) -> np.ndarray:
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


def _natural(images: np.ndarray) -> float:
    return 1.0 if images.dtype.kind == "f" else 255.0


def _to_8_bits(path: pathlib.Path, key: str, images: np.ndarray, max_value: float) -> np.ndarray:
    """Images of one key as uint8, white at `max_value`; with 0.0 at 255 for integers and at 1 for floats."""
    if images.dtype == np.uint8:
        return images
    natural = _natural(images)
    if not max_value and images.max() > natural:
        raise UserError(
            f"'{key}' of {path} is {images.dtype} up to {images.max()}, above the {natural:g} that the training images "
            "keep to; scale it, or set config.dataset.max_value"
        )
    return np.stack([image_files.to_8_bits(image, max_value or natural) for image in images])  # one by one: less memory


def _labels(path: pathlib.Path, key: str, labels: np.ndarray) -> np.ndarray:
    """The labels of one key as int32 [N]."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuf" or not np.all(labels == np.rint(labels)):
        raise UserError(f"'{key}' of {path} is {labels.dtype} {labels.shape}; labels are whole numbers [N] or [N, 1]")
    if len(labels) and not (labels.min() >= 0 and labels.max() < 2**31):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"'{key}' of {path} has the label {wrong}; labels count the classes from 0")
    return labels.astype(np.int32)


def _class_names(path: pathlib.Path, arrays: dict[str, np.ndarray], labels: np.ndarray) -> tuple[str, ...]:
    """The names given, else the numbers 0, 1, ... up to the last label, every one of which must be used."""
    if "class_names" in arrays:
        names = arrays["class_names"]
        if names.ndim != 1 or names.dtype.kind not in "US":
            raise UserError(f"'class_names' of {path} is {names.dtype} {names.shape}; it is a list of strings")
        try:
            return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist())
        except UnicodeDecodeError:
            raise UserError(f"'class_names' of {path} are bytes that are not UTF-8; save them as strings") from None
    used = np.unique(labels)
    gaps = np.flatnonzero(used != np.arange(len(used)))
    if len(gaps):
        raise UserError(
            f"{path} has no training image of class {gaps[0]}; labels count the classes from 0 without gaps"
        )
    return tuple(map(str, used.tolist()))
