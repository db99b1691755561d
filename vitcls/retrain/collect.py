"""Feedback as the folder of corrections of a new run: what trains, what judges, and what it replaces."""

import hashlib
import json
import os
import pathlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vitcls import data
from vitcls.core.errors import UserError
from vitcls.data import corrections
from vitcls.data import images as image_files
from vitcls.data.images import BadImage
from vitcls.feedback import folder
from vitcls.feedback.store import Store
from vitcls.training.run_dir import Workdir

_HELD_OUT = 0.2  # of the images, which judge


def is_held_out(sha256: str) -> bool:
    """Whether an image judges and never trains: by its hash alone, so that it stays so in every later run."""
    return int(sha256[:8], 16) < _HELD_OUT * 2**32


def collect(store: Store, champion: Workdir, place: str, root: pathlib.Path) -> dict[str, Any]:
    """Writes the folder `root` of corrections (data/corrections.py), whole or not at all, and returns its record.

    An image that is in the training split with another label, or is held out, replaces it there, and in the validation
    split any; one that is in the test split is left out, and so is one without a majority, of a class that the run does
    not have, or that cannot be read. Files of the same pixels are one image: held out where one of them is, and without
    a majority where they have several labels.

    Args:
      champion: the run whose data they are added to, which are in `place`.

    Raises UserError where too little is left to train on and to judge by.
    """
    votes = folder.count_votes(store.rows())
    known = {image: label for image, label in votes.labels.items() if label in champion.info.class_names}
    digests = {image: digest for image in known if (digest := _upload(store, image, champion)) is not None}
    config = champion.config.dataset.copy_and_resolve_references()
    config.corrections = ""
    dataset = data.load(config, data_dir=place, max_value=champion.info.max_value)
    found = {name: _find(dataset, name, set(digests.values())) for name in dataset.num_examples}
    pictures: dict[bytes, list[str]] = {}  # the files of each that can be used
    for image, digest in sorted(digests.items()):
        if digest not in found["test"]:
            pictures.setdefault(digest, []).append(image)
    held_out = {digest for digest, images in pictures.items() if any(map(is_held_out, images))}
    disputed = {digest for digest, images in pictures.items() if len({known[image] for image in images}) > 1}
    used = {images[0]: known[images[0]] for digest, images in pictures.items() if digest not in disputed}
    parts = {
        corrections.TRAIN: {image: label for image, label in used.items() if digests[image] not in held_out},
        corrections.HELD_OUT: {image: label for image, label in used.items() if digests[image] in held_out},
    }
    for part, images in parts.items():
        if not images:
            raise UserError(
                f"{store.url} has {len(used):,} images with feedback that can be used, of which none is for '{part}' "
                "(four fifths train, one fifth is held out, by their hashes); collect more"
            )
    numbers = {digests[image]: champion.info.class_names.index(label) for image, label in used.items()}
    record = {
        "database": store.url,
        "images": {part: len(images) for part, images in parts.items()},
        "replaced": {name: _replaced(dataset, name, found, numbers, held_out) for name in corrections.REPLACED},
        "left_out": {
            "even votes": [*votes.ties, *(image for digest in disputed for image in pictures[digest])],
            "other classes": sorted(set(votes.labels) - set(known)),
            "unreadable": sorted(set(known) - set(digests)),
            "test images": sorted(image for image, digest in digests.items() if digest in found["test"]),
        },
    }
    _write(store, parts, record, root)
    return record


def _upload(store: Store, image: str, run: Workdir) -> bytes | None:
    """The digest of an uploaded image as the model sees it; None where it cannot be read."""
    height, width, channels = run.info.image_shape
    try:
        content = store.image(image)
        return _digest(image_files.decode(content, size=(height, width), channels=channels, decoding=run.decoding))
    except (KeyError, BadImage):
        return None


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()


def _find(dataset: data.Dataset, name: str, wanted: set[bytes]) -> dict[bytes, list[int]]:
    """Where the images with these digests are in a split."""
    split = getattr(dataset, name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        count = range(len(split.labels))
        every = pool.map(lambda i: _digest(data.read_image(split, i, dataset.image_shape)), count, chunksize=256)
        found: dict[bytes, list[int]] = {}
        for place, digest in enumerate(every):
            if digest in wanted:
                found.setdefault(digest, []).append(place)
    return found


def _replaced(
    dataset: data.Dataset, name: str, found: dict[str, dict], numbers: dict[bytes, int], held_out: set[bytes]
) -> list[int]:
    """Places in a split whose label is another, or which judge; in the validation split all, as nothing may train and
    steer.
    """
    labels = getattr(dataset, name).labels if name in found else ()
    return sorted(
        place
        for digest, label in numbers.items()
        for place in found.get(name, {}).get(digest, ())
        if name == "validation" or digest in held_out or labels[place] != label
    )


def _write(store: Store, parts: dict[str, dict[str, str]], record: dict[str, Any], root: pathlib.Path) -> None:
    temporary = root.with_name(root.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for part, images in parts.items():
            folder.write(store, images, temporary / part)
        (temporary / corrections.RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, root)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
