"""Images that are made up, in memory."""

import dataclasses

import numpy as np

from vitcls.core.registry import require_range
from vitcls.data.dataset import Source, Split
from vitcls.data.images import height_and_width


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """A pattern per class under noise, by `split_seed`: learnable, endless, and worth nothing."""

    num_examples: int = 1000
    num_classes: int = 10

    def __post_init__(self):
        require_range(self, num_examples=(1, 10_000_000), num_classes=(2, 10_000))

    def load(self, config) -> Source:
        rng = np.random.default_rng(config.split_seed)
        height, width = height_and_width(config.image_size or 32)
        patterns = rng.uniform(60, 195, (self.num_classes, 4, 4, 3))
        patterns = patterns.repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)[:, :height, :width]
        labels = rng.permutation(np.arange(self.num_examples) % self.num_classes).astype(np.int32)
        noise = rng.normal(0, 40, (self.num_examples, height, width, 3))
        images = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
        names = tuple(f"class {k}" for k in range(self.num_classes))
        return Source("synthetic", names, {"train": Split(images, labels)}, (images.shape[1:],))
