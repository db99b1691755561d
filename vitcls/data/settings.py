"""Keys of `config.dataset` whatever the data set."""

import dataclasses
import math

from vitcls.core.registry import local_path, require, require_choice, require_range

INTERPOLATIONS = ("bilinear", "bicubic")
PIPELINES = ("auto", "resident", "streaming")
_LARGEST_SIDE = 8_192  # pixels


@dataclasses.dataclass(frozen=True)
class DatasetSettings:
    """Where the data are, and what is made of them on the host."""

    data_dir: str = ""  # folder: its root; npz: the file; TFDS: data directory ('' = TFDS's own default)
    pipeline: str = "auto"  # 'resident', 'streaming' or 'auto' (by size)
    # Pixels: one number, or (height, width); 0 keeps the native size, which all images must then share.
    image_size: int | tuple = 0
    max_value: float = 0.0  # what becomes white where there are more than 8 bits; 0 finds it in training images
    validation: float = 0.1  # of train, carved off where the source has no validation split; 0 for none
    test: float = 0.2  # fraction carved off for test where the source has no test split
    split_seed: int = 0
    # k-fold cross-validation: with k > 1, fold `fold` of train is the validation split; one that comes with the data
    # set is not used, and a line of the log says so.
    num_folds: int = 0
    fold: int = 0
    fraction: float = 1.0  # of what is left for training, of every class alike, that is used
    # What users have corrected, as `vitcls retrain` writes it (data/corrections.py); each image is trained on
    # `correction_weight` times an epoch.
    corrections: str = local_path()
    correction_weight: int = 1
    sampling: str = "uniform"  # 'uniform' or 'balanced' (every class equally often)
    mean: tuple = ()  # per channel, in [0, 1]; () computes it from the training split
    std: tuple = ()
    # The central crop, as a share of the image resized to image_size / eval_crop: of evaluation, prediction, and of
    # training images too unless they are cropped at random.
    eval_crop: float = 1.0
    interpolation: str = "bilinear"  # or 'bicubic': how images are resized, with antialiasing
    random_resized_crop: bool = False  # of training images, on the devices where they stay there, else on the host
    # Of random crops on the host: a JPEG is decoded at 1/2, 1/4 or 1/8 as soon as that has the pixels asked for, not
    # twice as many along each side. It changes them a little; evaluation and prediction do not know it.
    fast_decode: bool = False
    crop_area: tuple = (0.08, 1.0)  # of the image
    crop_ratio: tuple = (3 / 4, 4 / 3)  # width / height

    def __post_init__(self):
        require_choice(self, "pipeline", PIPELINES)
        require_choice(self, "interpolation", INTERPOLATIONS)
        require_choice(self, "sampling", ("uniform", "balanced"))
        require_range(
            self,
            max_value=(0, math.inf),
            validation=(0, 0.9),
            test=(0.01, 0.9),
            split_seed=(0, 2**31 - 1),
            fraction=(1e-6, 1),
            num_folds=(0, math.inf),
            correction_weight=(1, 1_000),
        )
        size = self.image_size
        sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
        whole = all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in sides)
        expected = f"0, a number of pixels, or (height, width), of up to {_LARGEST_SIDE}"
        require(self, "image_size", whole or (type(size) is int and size == 0), expected)
        require(
            self, "fast_decode", self.random_resized_crop or not self.fast_decode, "False without random_resized_crop"
        )
        require(self, "eval_crop", 0 < self.eval_crop <= 1, "in (0, 1]")
        if self.num_folds == 1 or not 0 <= self.fold < max(self.num_folds, 1):
            raise ValueError(
                f"fold={self.fold} of config.dataset.num_folds={self.num_folds}: num_folds must be 0 or at least 2, "
                "and fold one of 0 .. num_folds - 1"
            )
        self._check_numbers("mean", -1e3, 1e3)
        self._check_numbers("std", 1e-6, 1e3)
        self._check_numbers("crop_area", 1e-6, 1, count=2)
        self._check_numbers("crop_ratio", 1e-3, 1e3, count=2)

    def _check_numbers(self, field: str, low: float, high: float, count: int = 0) -> None:
        """Numbers of a range: any number of them, or `count` in order."""
        value = getattr(self, field)
        numbers = [part for part in value if isinstance(part, int | float) and low <= part <= high]
        right = len(numbers) == len(value) and (not count or (len(value) == count and list(value) == sorted(value)))
        form = f"{count} numbers in order, each" if count else "empty or numbers, each"
        require(self, field, right, f"{form} in [{low:g}, {high:g}]")
