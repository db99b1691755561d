"""Made-up photographs as JPEG files of real sizes, without a disk: they exercise decoding, cropping and streaming."""

import dataclasses
import io

import numpy as np
from PIL import Image

from vitcls.data.dataset import Source, Split
from vitcls.data.sources.synthetic import Synthetic


@dataclasses.dataclass(frozen=True)
class SyntheticJpegs:
    """JPEGs of about 500x375 pixels, each encoded when it is read; see `data.images.EncodedImages`.

    An image shows the 4x4 colours of its class, smoothly, with smaller blotches over them. Its size and blotches are a
    function of (seed, number).
    """

    patterns: np.ndarray  # float [classes, 4, 4, 3], in 0 .. 255
    labels: np.ndarray  # of all numbers, also those not in this sequence
    numbers: np.ndarray
    seed: int

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> bytes:
        number = int(self.numbers[index])
        rng = np.random.default_rng((self.seed, number))
        width, height = rng.integers(400, 601), rng.integers(300, 451)
        blotches = rng.normal(0, 40, (12, 16, 3))
        coarse = self.patterns[self.labels[number]].repeat(3, 0).repeat(4, 1) + blotches
        picture = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
        file = io.BytesIO()
        picture.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        return file.getvalue()

    def take(self, indices: np.ndarray) -> "SyntheticJpegs":
        return dataclasses.replace(self, numbers=self.numbers[indices])


@dataclasses.dataclass(frozen=True)
class SyntheticJpeg(Synthetic):
    """The same as JPEG files, which are made when they are read."""

    def load(self, config) -> Source:
        rng = np.random.default_rng(config.split_seed)
        patterns = rng.uniform(60, 195, (self.num_classes, 4, 4, 3))
        labels = rng.permutation(np.arange(self.num_examples) % self.num_classes).astype(np.int32)
        images = SyntheticJpegs(patterns, labels, np.arange(self.num_examples), config.split_seed)
        names = tuple(f"class {k}" for k in range(self.num_classes))
        return Source("synthetic_jpeg", names, {"train": Split(images, labels)}, ((300, 400, 3), (450, 600, 3)))
