"""What tests of sources begin with."""

from vitcls.config import default_config
from vitcls.data.images import decode_all


def config(**values):
    """The block `dataset` of a config."""
    block = default_config("improved_vit_tiny").dataset
    block.update(values)
    return block


def decoded(split, dataset):
    return decode_all(split.images, size=dataset.image_shape[:2], channels=dataset.image_shape[2])
