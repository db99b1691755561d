"""From a config to a data set: the source, checked, split, and at the size asked for."""

import collections
import dataclasses
import logging

import numpy as np

from vitcls.core.errors import UserError
from vitcls.data import corrections
from vitcls.data import images as image_files
from vitcls.data.dataset import Dataset, Source, Split
from vitcls.data.depth import find_max_value
from vitcls.data.images import Decoding, height_and_width
from vitcls.data.sources import load_source
from vitcls.data.splits import fold_split, stratified_split

_logger = logging.getLogger("vitcls")


def load(config, *, data_dir: str = "", max_value: float | None = None) -> Dataset:
    """Loads the data set that the block `dataset` of a config names, with its splits.

    `data_dir` is where it is, if not where the config says. `max_value` is that of an earlier run
    (`DatasetInfo.max_value`), which is kept; None takes `config.max_value`, or finds it. Raises UserError, one line
    that says what to do, where the data are not there or cannot be used. Writes nothing but the cache.
    """
    return load_with_originals(config, data_dir=data_dir, max_value=max_value)[0]


def load_with_originals(
    config, *, data_dir: str = "", max_value: float | None = None
) -> tuple[Dataset, dict[str, Split]]:
    """As `load`, and besides its splits as they came: images in memory not yet resized, and without corrections."""
    config = config.copy_and_resolve_references()
    config.data_dir = data_dir or config.data_dir
    if max_value is not None:
        config.max_value = max_value
    source = load_source(config)
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
    if config.fraction < 1:
        train = splits["train"]
        kept, _ = stratified_split(
            train.labels, 1 - config.fraction, config.split_seed, source.class_names, split="unused"
        )
        splits["train"] = train.take(kept)
    image_shape = _image_shape(source, config.image_size)
    decoding = Decoding(eval_crop=config.eval_crop, interpolation=config.interpolation)
    in_memory = isinstance(splits["train"].images, np.ndarray)
    if in_memory:
        max_value = source.max_value
    elif max_value is None:
        max_value = config.max_value or find_max_value(splits["train"].images)
    decoding = dataclasses.replace(decoding, max_value=max_value)
    originals = {name: dataclasses.replace(split, decoding=decoding) for name, split in splits.items()}
    splits = {name: _at_size(split, image_shape) for name, split in originals.items()}
    whole = None
    if in_memory and config.random_resized_crop and config.eval_crop < 1:  # whose boxes are of whole images
        uncropped = dataclasses.replace(decoding, eval_crop=1.0)
        whole = _at_size(dataclasses.replace(originals["train"], decoding=uncropped), image_shape)
    if config.corrections:
        splits = corrections.apply(splits, config, source.class_names, image_shape)
        whole = whole and corrections.apply({"train": whole}, config, source.class_names, image_shape)["train"]
    dataset = Dataset(
        source.name,
        source.class_names,
        splits["train"],
        splits.get("validation"),
        splits["test"],
        image_shape,
        source.skipped,
        source.largest,
        whole,
    )
    return dataset, originals


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
            raise UserError(f"the {name} split of '{source.name}' is empty{_skipped_hint(source)}")
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
            + _skipped_hint(source)
        )


def _skipped_hint(source: Source) -> str:
    if not source.skipped:
        return ""
    count, first = len(source.skipped), source.skipped[0]
    return f" ({count} file{'s were' if count > 1 else ' was'} skipped; {first.path} {first.reason})"


def _image_shape(source: Source, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
    """H, W, C as the model will see the images; those in files may be gray and in colour, which makes them colour."""
    channels = {shape[2] for shape in source.shapes}
    in_memory = isinstance(source.splits["train"].images, np.ndarray)
    if in_memory and len(channels) > 1:
        raise UserError(f"the splits of '{source.name}' differ in channels: {' and '.join(map(str, sorted(channels)))}")
    if image_size:
        return *height_and_width(image_size), max(channels)
    sizes = sorted({shape[:2] for shape in source.shapes})
    if len(sizes) > 1:
        (h0, w0), (h1, w1) = sizes[0], sizes[-1]
        raise UserError(
            f"the images of '{source.name}' differ in size, from {h0}x{w0} to {h1}x{w1}; set config.dataset.image_size"
        )
    return *sizes[0], max(channels)


def _at_size(split: Split, image_shape: tuple[int, int, int]) -> Split:
    """Images in memory are resized once; encoded ones are resized as they are decoded."""
    images = split.images
    if not isinstance(images, np.ndarray) or (images.shape[1:] == image_shape and split.decoding.eval_crop == 1):
        return split
    return dataclasses.replace(split, images=image_files.resize_all(images, image_shape[:2], split.decoding))
