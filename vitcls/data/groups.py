"""Groups of the images of a split: from a CSV file, or built in."""

import csv
import os
from collections.abc import Callable, Sequence

import numpy as np

from vitcls.core import errors
from vitcls.core.errors import UserError

_COARSE_CIFAR100 = {  # Krizhevsky 2009, table 1 of the data set's page
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}


def coarse(labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """The coarse class of CIFAR-100 of each label; raises UserError where the classes are not those of CIFAR-100."""
    coarse_of = {fine: name for name, group in _COARSE_CIFAR100.items() for fine in group.split()}
    if set(class_names) != set(coarse_of):
        raise UserError("--groups=coarse is for CIFAR-100; give a CSV file with the columns file (or index) and group")
    return [coarse_of[class_names[label]] for label in labels]


def read(file: os.PathLike | str, count: int, name: Callable[[int], str] | None) -> list[str]:
    """The group of each of `count` images, of a CSV file with the columns 'file' or 'index', and 'group'.

    `name` gives the file of an image, relative to the root of the data; None where images are not files. An index is
    the place in the split. Raises UserError where the file cannot be read, an image has no group or two, or a row is of
    no image.
    """
    rows = _rows(file)
    if "file" in rows[0] and name is None:
        raise UserError(f"{file} names files, but the images of this data set are none; give the column index instead")
    key = "file" if "file" in rows[0] else "index"
    places = {name(i).replace(os.sep, "/") if key == "file" else str(i): i for i in range(count)}
    groups: list[str] = [""] * count
    for row in rows:
        written = [_index(row[key])] if key == "index" else [row[key], row[key].strip()]  # names may have outer spaces
        place = next((places[text] for name in written if (text := name.removeprefix("./")) in places), None)
        if place is None and key == "index":
            raise UserError(f"{file}: the index {row[key]!r} is none of this split's, which are 0 to {count - 1}")
        if place is None:
            raise errors.unknown(f"{file}: the {key}", row[key], list(places))
        group = row["group"].strip()
        if groups[place] not in ("", group):
            raise UserError(f"{file}: the {key} {row[key]} is in two groups, {groups[place]} and {group}")
        groups[place] = group
    missing = [i for i, group in enumerate(groups) if not group]
    if missing:
        first = next(place for place, i in places.items() if i == missing[0])
        raise UserError(f"{file} has no group for {len(missing):,} of {count:,} images, the first is {first}; add them")
    return groups


def _index(text: str) -> str:
    """A whole number as it is written here: spreadsheets have 7.0 and 007 for it, too."""
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def _rows(file: os.PathLike | str) -> list[dict[str, str]]:
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except OSError as error:
        raise UserError(f"--groups={file} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"--groups={file} is no CSV file in UTF-8: {error}") from None
    said = [text for row in rows for column, cell in row.items() if column != "file" for text in (column, cell)]
    if any("\udc80" <= letter <= "\udcff" for letter in "".join(map(str, said))):
        raise UserError(f"--groups={file} is no CSV file in UTF-8; save it as such (names of files may have any bytes)")
    columns = set(rows[0]) if rows else set()
    if "group" not in columns or not columns & {"file", "index"}:
        raise UserError(f"--groups={file} must have a head with file (or index) and group, and a row for each image")
    if any(not (row.get("group") or "").strip() or None in row.values() for row in rows):
        raise UserError(f"--groups={file} has a row without a group, or with too few cells")
    return rows
