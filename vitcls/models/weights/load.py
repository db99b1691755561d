"""A file of published weights -> the variables of a model, whoever has named them."""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax import traverse_util

from vitcls import models
from vitcls.core.errors import UserError
from vitcls.models import efficientnet, mobilenet, vit
from vitcls.models.weights import from_keras, from_npz, from_torch, hub
from vitcls.models.weights.arrays import Arrays, unusable
from vitcls.models.weights.keras_file import read_keras
from vitcls.models.weights.npz import read_npz
from vitcls.models.weights.preprocessing import BGR, Preprocessing, preprocessing_of
from vitcls.models.weights.safetensors import read_safetensors

READERS: dict[str, tuple[str, Callable]] = {
    ".safetensors": ("safetensors", read_safetensors),
    ".npz": ("npz", read_npz),
    ".weights.h5": ("keras", read_keras),
    ".h5": ("keras", read_keras),
    ".keras": ("keras", read_keras),
}
_PICKLED = (".pth", ".pt", ".bin", ".pkl", ".pickle", ".ckpt", ".pth.tar")


class WeightsFile(NamedTuple):
    """A file that has been opened; its arrays are read when they are asked for."""

    path: str
    source: str  # 'safetensors', 'npz' or 'keras': who has named them
    arrays: Arrays
    metadata: dict[str, str]


class Given(NamedTuple):
    """The variables of a model out of a file."""

    variables: dict[str, np.ndarray]  # by path, such as 'params/stem/kernel'
    channels: int  # of the images that they know
    num_classes: int  # 0 without a classifier
    preprocessing: Preprocessing
    fields: dict[str, Any]  # of the model that takes them as they are


def open_weights(path: str) -> WeightsFile:
    """Opens a file by the ending of its name; raises UserError for what is not there or cannot be used."""
    if path.lower().endswith(_PICKLED):
        raise UserError(
            f"{path} is pickled, and opening it would run whatever is inside; convert it where you trust it: python -c "
            "\"import torch, safetensors.torch as s; d = torch.load('FILE', map_location='cpu'); "
            "s.save_file({k: v.contiguous() for k, v in d.items()}, 'FILE.safetensors')\""
        )
    reader = next((reader for ending, reader in READERS.items() if path.lower().endswith(ending)), None)
    if reader is None:
        raise UserError(
            f"{path or 'an empty path'} is of no known kind; weights are a workdir, end in {', '.join(READERS)}, or "
            "are timm/MODEL.TAG of the Hub"
        )
    source, read = reader
    try:
        if not os.path.isfile(path):
            raise UserError(f"{path} is not there, or is no file; give the file of the weights")
        arrays, metadata = read(path)
    except (OSError, MemoryError) as error:
        raise unusable(path, str(error)[:80] or "it is too large") from None
    return WeightsFile(path, source, arrays, metadata)


def check_publisher(weights: str, name: str, **fields: Any) -> None:
    """Raises UserError for a name of the Hub whose network pads otherwise than the model `name` with these `fields`.

    Shapes and names of their weights are the same.
    """
    model = models.create(name, 1, **fields)
    if not hub.is_name(weights) or not isinstance(model, efficientnet.EfficientNet | mobilenet.MobileNetV3):
        return
    theirs = "same" if hub.pads_as_tensorflow(weights) else "even"
    if getattr(model, "padding", "same") == theirs:
        return
    if isinstance(model, efficientnet.EfficientNet):
        raise UserError(f"{weights} pads as PyTorch does, and {name} as its authors do; take timm/tf_{name}...")
    raise UserError(f"{name} takes {weights} with padding='{theirs}' only")


def convert(name: str, file: WeightsFile, *, head: bool, **fields: Any) -> Given:
    """The variables of the model `name` out of a file, for the images, patches and classes for which they were learned.

    `fields` are those of the model; without `head` the classifier is left out. Raises UserError for all weights that
    are missing, do not fit or are too many.
    """
    model = models.create(name, 1, **fields)
    _check_strides(name, model, file)
    stem, classifier = _ends(name, model, file)
    channels, num_classes = _size(file, stem, 2), _size(file, classifier, -1)
    if file.source == "safetensors":
        channels, num_classes = _size(file, stem, 1), _size(file, classifier, 0)
    if head and not num_classes:
        raise UserError(f"{file.path} has no classifier '{classifier}' that could be kept; take a new head")
    if not channels:
        raise UserError(f"{file.path} holds no weights of {name}: there is no '{stem}' in it, but {_first(file)}")
    size = models.preset(name).image_shape[:2]
    if isinstance(model, vit.VisionTransformer):
        patch = _size(file, stem, -1 if file.source == "safetensors" else 0)
        fields, size = fields | {"patch_size": patch}, (_grid(file, name) * patch,) * 2
    make = {"safetensors": from_torch.from_torch, "keras": from_keras.from_keras, "npz": from_npz.from_npz}[file.source]
    variables = make(
        name, file.arrays, num_classes=num_classes or 1, image_shape=(*size, channels), head=head, **fields
    )
    flat = traverse_util.flatten_dict(variables, sep="/")
    if (file.source, type(model).__name__) in BGR:
        first = next(path for path in flat if path.endswith("kernel") and flat[path].shape[2:3] == (channels,))
        flat[first] = np.ascontiguousarray(flat[first][:, :, ::-1])
    found = dataclasses.replace(published(name, file, **fields), size=size[0])
    return Given(flat, channels, num_classes, found, fields)


def _check_strides(name: str, model: nn.Module, file: WeightsFile) -> None:
    """Raises UserError where PyTorch's network halves its maps elsewhere; not for what vitcls itself has exported."""
    halves = getattr(model, "stride_on", "3x3"), getattr(model, "block", "")
    if file.source == "safetensors" and "vitcls" not in file.metadata and halves == ("1x1", "bottleneck"):
        raise UserError(f"{name} can take weights of PyTorch with stride_on='3x3' only")


def published(name: str, file: WeightsFile, **fields: Any) -> Preprocessing:
    """How the images were prepared on which a file's weights for a model were trained; `fields` are the model's."""
    model, source = models.create(name, 1, **fields), file.source
    if source == "safetensors" and from_torch.TORCHVISION_POSITIONS in file.arrays:
        source = "torchvision"
    elif source == "safetensors" and isinstance(model, mobilenet.MobileNetV3) and model.padding == "same":
        source = "tensorflow"
    return preprocessing_of(name, source)


def _ends(name: str, model: nn.Module, file: WeightsFile) -> tuple[str, str]:
    """The keys of the kernels of the first layer and of the classifier."""
    if file.source == "npz":
        rules = from_npz.rules_for(name, model)
        return next(iter(rules.values())).keys[0], rules["head/kernel"].keys[0]
    if file.source == "keras":
        known = from_keras.names_for(name, model)
        given = from_keras.by_layer(file.arrays)
        keys = (f"{key}/kernel" for key in (next(iter(known.values()))[0], known["head"][0]))
        return tuple(given.get(key, key) for key in keys)
    known = from_torch.names_for(name, model, file.arrays)
    return f"{next(iter(known.values()))[0]}.weight", f"{known['head'][0]}.weight"


def _size(file: WeightsFile, key: str, axis: int) -> int:
    """How long an axis of an array is; 0 where there is no such array."""
    shape = file.arrays[key].shape if key in file.arrays else ()
    return shape[axis] if -len(shape) <= axis < len(shape) else 0


def _grid(file: WeightsFile, name: str) -> int:
    """Rows of the square grid of a ViT's positions, of which one is the class token's."""
    keys = (from_npz.POSITIONS, "pos_embed", from_torch.TORCHVISION_POSITIONS)
    count = next((_size(file, key, 1) for key in keys if key in file.arrays), 0)
    side = math.isqrt(max(count - 1, 0))
    if not side or side * side + 1 != count:
        raise UserError(f"{file.path} has {count} positions, which are no class token and square grid of {name}")
    return side


def _first(file: WeightsFile) -> str:
    return ", ".join(f"'{name}'" for name in list(file.arrays)[:3])
