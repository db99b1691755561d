"""Handwritten digits of 8x8 pixels."""

import dataclasses
import importlib.util
import pathlib

import numpy as np

from vitcls.data.dataset import Source, Split


@dataclasses.dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits of 8x8 pixels that come inside scikit-learn (UCI, Alpaydin & Kaynak 1998)."""

    def load(self, config) -> Source:
        # The file of `sklearn.datasets.load_digits`, without the second that its import takes.
        folder = pathlib.Path(importlib.util.find_spec("sklearn").origin).parent
        rows = np.loadtxt(
            folder / "datasets" / "data" / "digits.csv.gz", delimiter=","
        )  # 64 pixels from 0 to 16, label
        images = np.rint(rows[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        split = Split(images, rows[:, -1].astype(np.int32))
        return Source("digits", tuple(map(str, range(10))), {"train": split}, (images.shape[1:],))
