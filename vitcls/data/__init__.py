"""Data: where images come from (sources), how they reach the devices (resident, streaming), how they are varied
(augment).

`load` reads a data set, `describe` measures it once; `train_batches` and `EvaluationBatches` hide the pipeline.
"""

from vitcls.data.dataset import Dataset, Split
from vitcls.data.info import DatasetInfo, describe, mean_and_std
from vitcls.data.loading import load, load_with_originals
from vitcls.data.pipelines import (
    EvaluationBatches,
    TrainBatches,
    choose_pipeline,
    decode,
    pixels,
    resident_bytes,
    train_batches,
)
from vitcls.data.streaming import read_image

__all__ = [
    "Dataset",
    "DatasetInfo",
    "EvaluationBatches",
    "Split",
    "TrainBatches",
    "choose_pipeline",
    "decode",
    "describe",
    "load",
    "load_with_originals",
    "mean_and_std",
    "pixels",
    "read_image",
    "resident_bytes",
    "train_batches",
]
