"""Feedback as an image folder, CLASS/SHA256.EXTENSION, that the data source `folder` reads."""

import collections
import io
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from PIL import Image

from vitcls.core.errors import UserError
from vitcls.data import images as image_files
from vitcls.feedback.store import Row, Store


class Votes(NamedTuple):
    """What the clients together say of images, by SHA-256 of their files."""

    labels: dict[str, str]  # the class that most of them name
    ties: tuple[str, ...]  # of which no class is named most often


def count_votes(rows: Iterable[Row]) -> Votes:
    """A client has one vote on an image, as the store sees to it."""
    votes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for row in rows:
        votes[row.image][row.label] += 1
    labels, ties = {}, []
    for image, counts in votes.items():
        (first, most), *others = counts.most_common(2)
        if others and others[0][1] == most:
            ties.append(image)
        else:
            labels[image] = first
    return Votes(labels, tuple(ties))


def write(store: Store, labels: Mapping[str, str], root: pathlib.Path) -> list[str]:
    """Writes images into the directories of their classes; returns those that cannot be used, which are left out.

    An image that was forgotten meanwhile is one of them. Raises UserError for a class that cannot be a directory and
    a root that cannot be written.
    """
    unusable = []
    for label in sorted(set(labels.values())):
        if label in ("", ".", "..") or label.startswith(".") or set(label) & set("/\\\0"):
            raise UserError(f"the class {label!r} cannot be the name of a directory, which an image folder needs")
    for image, label in labels.items():
        try:
            content = store.image(image)
            name = f"{image}.{_extension(content)}"
        except (KeyError, image_files.BadImage):
            unusable.append(image)
            continue
        try:
            (root / label).mkdir(parents=True, exist_ok=True)
            (root / label / name).write_bytes(content)
        except OSError as error:
            raise UserError(f"{root} cannot be written: {error.strerror or error}") from None
    return unusable


def _extension(content: bytes) -> str:
    image_files.examine(content)
    with Image.open(io.BytesIO(content)) as image:
        return {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}.get(image.format, image.format.lower())
