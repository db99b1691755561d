"""What the registry knows of a model: its module, the fields that make it, and what it was made for."""

from typing import Any, NamedTuple

import flax.linen as nn


class Preset(NamedTuple):
    """One named model."""

    module: type[nn.Module]
    fields: dict[str, Any]  # what differs from the module's defaults; plain JSON values and tuples
    paper: str
    image_shape: tuple[int, int, int] = (224, 224, 3)  # the native size [H, W, C]
    num_classes: int = 1000  # of the paper's own task
