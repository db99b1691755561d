"""What users have corrected, as a part of the training split.

ROOT/train/CLASS/IMAGE        are trained on
ROOT/held_out/CLASS/IMAGE     judge the result
ROOT/corrections.json         which images of the data set they replace, by their places in its splits
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from vitcls.core.errors import UserError
from vitcls.data import images as image_files
from vitcls.data.dataset import Split
from vitcls.data.images import Decoding, EncodedImages
from vitcls.data.sources.folder import FileImages

TRAIN, HELD_OUT, RECORD = "train", "held_out", "corrections.json"
REPLACED = ("train", "validation")  # the splits of which images are replaced; the test split stays as it is


@dataclasses.dataclass(frozen=True)
class Joined:
    """Encoded images of two sources, as one; see `data.images.EncodedImages`."""

    first: EncodedImages
    second: EncodedImages
    rows: np.ndarray  # int64 [N], from len(first) on of the second

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes:
        images, row = self._place(index)
        return images.read(row)

    def name(self, index: int) -> str:
        images, row = self._place(index)
        return images.name(row)

    def take(self, indices: np.ndarray) -> "Joined":
        return dataclasses.replace(self, rows=self.rows[indices])

    def _place(self, index: int) -> tuple[EncodedImages, int]:
        row = int(self.rows[index])
        return (self.first, row) if row < len(self.first) else (self.second, row - len(self.first))


def read(root: pathlib.Path, part: str, class_names: Sequence[str], decoding: Decoding) -> Split:
    """The images of a part (TRAIN or HELD_OUT), by class and name; raises UserError where it is not there."""
    if not (root / part).is_dir():
        raise UserError(f"config.dataset.corrections={root} has no directory '{part}'; vitcls retrain makes it")
    files = [path.relative_to(root) for path in sorted((root / part).glob("*/*"))]
    for path in files:
        if path.parts[1] not in class_names:
            raise UserError(f"{root / path} is of a class that the data do not have")
    number = {name: i for i, name in enumerate(class_names)}
    labels = np.array([number[path.parts[1]] for path in files], np.int32)
    return Split(FileImages(str(root), np.array([os.fsencode(path) for path in files], "S")), labels, decoding)


def apply(
    splits: dict[str, Split], config, class_names: Sequence[str], image_shape: tuple[int, int, int]
) -> dict[str, Split]:
    """The splits without what was corrected, and with `config.correction_weight` times each correction in training."""
    root = pathlib.Path(config.corrections)
    corrected = read(root, TRAIN, class_names, splits["train"].decoding)
    kept = dict(splits)
    for name, places in _replaced(root).items():
        if name in kept and places:
            count = len(kept[name].labels)
            if max(places) >= count:
                raise UserError(f"{root / RECORD} is of other data: their {name} split has {count:,} images")
            kept[name] = kept[name].take(np.setdiff1d(np.arange(count), places))
    kept["train"] = _joined(kept["train"], corrected, config.correction_weight, image_shape)
    return kept


def _joined(train: Split, corrected: Split, weight: int, image_shape: tuple[int, int, int]) -> Split:
    labels = np.concatenate([train.labels, np.tile(corrected.labels, weight)])
    if not isinstance(train.images, np.ndarray):
        repeated = np.tile(len(train.images) + np.arange(len(corrected.images)), weight)
        rows = np.concatenate([np.arange(len(train.images)), repeated])
        return dataclasses.replace(train, images=Joined(train.images, corrected.images, rows), labels=labels)
    *size, channels = image_shape
    decoded = image_files.decode_all(corrected.images, size=tuple(size), channels=channels, decoding=train.decoding)
    images = np.concatenate([train.images, np.tile(decoded, (weight, 1, 1, 1))])
    return dataclasses.replace(train, images=images, labels=labels)


def _replaced(root: pathlib.Path) -> dict[str, list[int]]:
    """Places in each split, as RECORD has them. Raises UserError where it cannot be used."""
    try:
        replaced = json.loads((root / RECORD).read_text(encoding="utf-8"))["replaced"]
        return {name: [int(place) for place in replaced[name]] for name in REPLACED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / RECORD} cannot be used ({type(error).__name__}: {error})") from None
