"""Handwritten digits of 8x8 pixels."""

import dataclasses

import numpy as np

from vitcls.data.dataset import Source, Split


@dataclasses.dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits of 8x8 pixels that come inside scikit-learn (UCI, Alpaydin & Kaynak 1998)."""

    def load(self, config) -> Source:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        split = Split(images, digits.target.astype(np.int32))
        return Source("digits", tuple(map(str, digits.target_names)), {"train": split}, (images.shape[1:],))
