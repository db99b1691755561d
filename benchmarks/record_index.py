"""How long a data set of ImageNet's length takes to open, and how much memory: the index of its records.

    python -m benchmarks.record_index --records=1281167 --form=array_record

Records are TFDS's, with a tiny JPEG in each, in 1,024 files of a temporary directory (about 0.9 GB, which is deleted).
The first start reads every file once; real files are 150 times as long, and their disk decides. Every later start
reads the index; its first batch waits for the order of the first epoch. CPU seconds are those of all cores, and hold
where the clock's do not, on a machine that others use. Each row is a process of its own; its memory is what it has at
the end beyond what its imports took.
"""

import io
import itertools
import json
import os
import pathlib
import struct
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from benchmarks import harness
from vitcls import cli
from vitcls.data.records import FORMS

_FILES, _CLASSES, _BATCH = 1024, 1000, 64


def _example(label: int) -> bytes:
    """A record as TFDS writes them."""
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), label % 256, np.uint8)).save(file, "JPEG")
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(file.getvalue())
    example.features.feature["label"].int64_list.value.append(label)
    example.features.feature["file_name"].bytes_list.value.append(b"n01440764_10026.JPEG")
    return example.SerializeToString()


def _write_tfrecord(path: str, records: Iterator[bytes]) -> None:
    """Without the checksums of the records, which nothing reads."""
    from vitcls.data.tfrecord import crc32c

    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            checksum = crc32c(length)
            masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
            file.write(length + struct.pack("<I", masked) + record + bytes(4))


def _write_array_record(path: str, records: Iterator[bytes]) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")  # as TFDS has it
    for record in records:
        writer.write(record)
    writer.close()


def write(directory: pathlib.Path, count: int, form: str) -> list[str]:
    examples = [_example(label) for label in range(_CLASSES)]
    ends = np.linspace(0, count, _FILES + 1).astype(int)
    names = []
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        names.append(str(directory / f"imagenet-train.{form}-{number:05d}-of-{_FILES:05d}"))
        records = (examples[place % _CLASSES] for place in range(start, end))
        {"tfrecord": _write_tfrecord, "array_record": _write_array_record}[form](names[-1], records)
    return names


def open_records(names: list[str], cache: str, form: str) -> harness.Row:
    """What a start does with the records, in this process."""
    os.environ["VITCLS_CACHE_DIR"] = cache
    from benchmarks.host_input import resident_megabytes
    from vitcls.core import sharding
    from vitcls.data import images, streaming
    from vitcls.data.dataset import Split
    from vitcls.data.records import index_records
    from vitcls.data.sources.tfds import _record_parser

    parse, partition = _record_parser("image", "label"), sharding.all_devices("data")
    streaming._tensorflow()
    before, start = resident_megabytes(), _clocks()
    encoded, labels = index_records(names, parse, form=form)
    indexed = _clocks()
    memory = resident_megabytes() - before
    split = Split(encoded, labels.astype(np.int32))
    crop = streaming.Crop((0.08, 1.0), (3 / 4, 4 / 3), images.SPARE)
    shape = {"image_shape": (224, 224, 3), "num_classes": _CLASSES, "batch_size": _BATCH}
    stream = streaming.Streaming(partition, split, seed=0, balanced=False, crop=crop, **shape)
    stream.host_inputs(0, 1)
    first = _clocks()
    return {
        "form": form,
        "records": len(labels),
        "index s": indexed[0] - start[0],
        "index CPU s": indexed[1] - start[1],
        "index memory MB": memory,
        "first batch s": first[0] - indexed[0],
        "first batch CPU s": first[1] - indexed[1],
        "memory MB": resident_megabytes() - before,
        "index file MB": sum(path.stat().st_size for path in pathlib.Path(cache, "indexes").iterdir()) / 1e6,
    }


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main(argv: list[str]) -> int:
    flags = harness.parser(__doc__)
    flags.add_argument("--records", type=int, default=1_281_167)
    flags.add_argument("--form", choices=FORMS, default="tfrecord")
    flags.add_argument("--job", help="for the child process")
    args = flags.parse_args(argv)
    if args.job:
        print(json.dumps({"row": open_records(**json.loads(args.job))}))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        cache = pathlib.Path(directory, "cache")
        cache.mkdir(mode=0o700)
        names = write(pathlib.Path(directory), args.records, args.form)
        job = json.dumps({"names": names, "cache": str(cache), "form": args.form})
        for start in ("first", *["later"] * args.repeats):
            ran = harness.in_child("benchmarks.record_index", ["--job", job])
            rows.append({"start": start} | (ran.get("row") or {"error": ran.get("error")}))
    harness.publish("record_index", rows, args.out)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(cli.run(main))
