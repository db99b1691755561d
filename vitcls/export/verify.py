"""What an exported file answers in a process of its own, and how fast.

    python -m vitcls.export.verify FILE IMAGES.npy ANSWERS.npy

IMAGES are uint8 [N, H, W, C]. Writes the probabilities float32 [N, K], and prints the seconds of batches of 1 and 32.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vitcls.export import artefact, compress

BATCHES = (1, 32)
_RUNS = 7
_BATCH = 100  # images that are answered at a time; the last batch is smaller


def opened(path: str) -> Callable[[np.ndarray], np.ndarray]:
    """images -> probabilities, by what the file alone says."""
    return _by_weights(path) if path.endswith(".safetensors") else artefact.load(path).answer


class Weights(NamedTuple):
    """What a file of weights says."""

    config: Any
    info: Any  # a DatasetInfo
    variables: Any  # of the model, float32


def read_weights(path: str) -> Weights:
    """The variables that `from_torch` makes of a file, by the config that goes with them."""
    from vitcls import config as configs
    from vitcls.data import DatasetInfo
    from vitcls.models.weights.from_torch import from_torch
    from vitcls.models.weights.safetensors import read_safetensors

    arrays, metadata = read_safetensors(path)
    config, info = configs.from_json(metadata["config"]), DatasetInfo.from_json(metadata["dataset"])
    fields = {key: value for key, value in config.model.items() if key != "name"}
    shape = info.image_shape
    variables = from_torch(config.model.name, arrays, num_classes=info.num_classes, image_shape=shape, **fields)
    return Weights(config, info, compress.restore(variables))


def _by_weights(path: str) -> Callable[[np.ndarray], np.ndarray]:
    import jax

    from vitcls.training import build

    config, info, variables = read_weights(path)
    predict = jax.jit(build.make_predict(config, build.make_model(config, info), info))
    return lambda images: np.asarray(jax.nn.softmax(predict(variables, images), axis=-1))


def main(argv: list[str]) -> int:
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # TensorFlow would import Keras, a third of its start
    path, images_path, answers_path = argv
    answer, images = opened(path), np.load(images_path, allow_pickle=False)
    answers = [answer(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
    np.save(answers_path, np.concatenate(answers))
    print(json.dumps({str(size): _seconds(answer, images, size) for size in BATCHES}))
    return 0


def _seconds(answer: Callable, images: np.ndarray, size: int) -> float:
    """The median time of a batch, from bytes to probabilities."""
    batch = np.resize(images, (size, *images.shape[1:]))
    answer(batch)
    seconds = []
    for _ in range(_RUNS):
        since = time.perf_counter()
        answer(batch)
        seconds.append(time.perf_counter() - since)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
