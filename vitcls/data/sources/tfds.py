"""Classification sets of TensorFlow Datasets, read without TensorFlow."""

import contextlib
import dataclasses
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from vitcls.core import buckets, errors
from vitcls.core.errors import RunError, UserError
from vitcls.data import images as image_files
from vitcls.data.dataset import Source, Split
from vitcls.data.records import FORMS, index_records

BUILT_IN = ("digits", "synthetic", "synthetic_jpeg", "folder", "npz")  # names that are not TFDS's


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A prepared classification set of TensorFlow Datasets, by name."""

    def load(self, config) -> Source:
        if buckets.is_url(config.data_dir):
            store = buckets.file_system(config.data_dir, "data_dir")
            with _descriptions(store, config) as directory:
                return self._load(config, directory, store)
        return self._load(config, config.data_dir)

    def _load(self, config, directory: str, store: Any = None) -> Source:
        """From a directory of TFDS; with `store` one that describes what config.data_dir has in a bucket."""
        builder = find_builder(config.name, directory)
        if not builder.info.splits:
            option = f" --data_dir={shlex.quote(config.data_dir)}" if config.data_dir and not store else ""
            raise UserError(
                f"the data set '{config.name}' is not prepared in {config.data_dir if store else builder.data_dir}; "
                f"prepare it with 'vitcls prepare {config.name}{option}'" + (" and copy it there" if store else "")
            )
        image_key, label_key = _tfds_keys(builder)
        available = builder.info.splits
        if "train" not in available:
            raise UserError(f"the data set '{config.name}' has no 'train' split; it has {', '.join(available)}")
        form = builder.info.file_format.value
        forms = ["tfrecord"] if store else list(FORMS)
        if form not in forms:
            where = " in a bucket" if store else ""
            raise UserError(
                f"the data set '{config.name}' is prepared as {form}, which cannot be read{where}; "
                f"prepare it as {' or '.join(forms)}"
            )
        parse = _record_parser(image_key, label_key)
        splits = {}
        for name in ("train", "validation", "test"):
            if name in available:
                files = [os.fspath(path) for path in available[name].filepaths]
                if store:
                    files = [f"{config.data_dir}/{os.path.relpath(path, directory)}" for path in files]
                with buckets.in_one_line(config.data_dir) if store else contextlib.nullcontext():
                    images, labels = index_records(files, parse, form=form, store=store)
                splits[name] = Split(images, labels.astype(np.int32))
        if "test" in splits and splits["test"].labels.min() < 0:  # as ImageNet's, whose labels are not public
            del splits["test"]
        if "test" not in splits and "validation" in splits:
            splits["test"] = splits.pop("validation")

        declared, shapes = builder.info.features[image_key].shape, set()
        if None in declared:
            # Of differing sizes: the first images tell as much as is needed to ask for config.dataset.image_size.
            for index in range(min(8, len(splits["train"].images))):
                try:
                    width, height, channels = image_files.examine(splits["train"].images.read(index))
                except OSError as error:
                    raise RunError(f"{error}; the same command tries again") from None
                except image_files.BadImage as error:
                    raise UserError(
                        f"image {index} of the train split of '{config.name}' {error}; prepare it anew"
                    ) from None
                shapes.add((height, width, declared[2] or channels))
        else:
            shapes.add(tuple(declared))
        names = tuple(builder.info.features[label_key].names)
        return Source(config.name, names, splits, tuple(shapes), complete=None not in declared)


@contextlib.contextmanager
def _descriptions(store: Any, config) -> Iterator[str]:
    """A directory with what describes a set in a bucket, in all its versions, without the records."""
    root = store._strip_protocol(config.data_dir)
    with tempfile.TemporaryDirectory() as directory:
        with buckets.in_one_line(config.data_dir):
            for path in store.find(f"{root}/{re.split('[/:]', config.name)[0]}", timeout=buckets.limit()):
                if path.endswith((".json", ".txt")):
                    copy = os.path.join(directory, os.path.relpath(path, root))
                    os.makedirs(os.path.dirname(copy), exist_ok=True)
                    store.get_file(path, copy, timeout=buckets.limit())
        yield directory


def find_builder(name: str, data_dir: str):
    """The TFDS builder of a data set, prepared or not; raises UserError for a name that nobody knows."""
    if re.match(r"[\w.-]+:[a-zA-Z]", name):  # not NAME:VERSION
        raise UserError(
            f"the data set '{name}' has a namespace, from which TFDS would fetch more than data; name one of its own "
            "sets, or make a folder of images of it (config.dataset.name='folder')"
        )
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"the data set '{name}' is one of TensorFlow Datasets, which cannot be imported here ({error}); "
            f"install tensorflow and tensorflow-datasets, or use one of {', '.join(BUILT_IN)}"
        ) from None
    try:
        return tensorflow_datasets.builder(name, data_dir=data_dir or None)
    except (ValueError, AttributeError, AssertionError, TypeError, ImportError):  # unknown set, config, version, ...
        known = [*BUILT_IN, *tensorflow_datasets.list_builders(with_community_datasets=False)]
        error = str(errors.unknown("data set", name, known)).partition(" Known:")[0]
        raise UserError(f"{error} (built in: {', '.join(BUILT_IN)}; else any classification set of TFDS)") from None


def _tfds_keys(builder) -> tuple[str, str]:
    """The names of the image and the label among the features of a TFDS set."""
    import tensorflow_datasets

    features = builder.info.features
    labels = [key for key, feature in features.items() if isinstance(feature, tensorflow_datasets.features.ClassLabel)]
    images = [key for key, feature in features.items() if isinstance(feature, tensorflow_datasets.features.Image)]
    supervised = builder.info.supervised_keys or (None, None)
    label = supervised[1] if supervised[1] in labels else (labels[0] if len(labels) == 1 else None)
    image = supervised[0] if supervised[0] in images else (images[0] if len(images) == 1 else None)
    if image is None or label is None:
        raise UserError(
            f"the data set '{builder.name}' is not for image classification; its features are {', '.join(features)}"
        )
    return image, label


def _record_parser(image_key: str, label_key: str) -> Callable[[bytes], tuple[bytes, int]]:
    from tensorflow_datasets.proto import tf_example_pb2

    def parse(record: bytes) -> tuple[bytes, int]:
        # Two fields of the protocol buffer; TFDS's own `deserialize_example_np` reads all, ten times as slowly.
        features = tf_example_pb2.Example.FromString(record).features.feature
        return features[image_key].bytes_list.value[0], features[label_key].int64_list.value[0]

    return parse
