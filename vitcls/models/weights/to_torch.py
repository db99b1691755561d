"""The variables of our models -> weights that are named as in PyTorch's state dicts: the inverse of from_torch."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from vitcls import models
from vitcls.core.errors import UserError
from vitcls.models.weights.from_torch import LEAVES, names_for

# Layers that are matrices here and convolutions there: the end of their name -> pixels of a side.
_CONVOLUTIONS = {"conv_reduce": 1, "conv_expand": 1, "conv_head": 1, "pre_logits.fc2": 1}


def to_torch(name: str, variables: Mapping[str, Any], *, publisher: str = "", **fields: Any) -> dict[str, np.ndarray]:
    """The arrays of `models.create(name, num_classes, **fields)` by PyTorch's names, C-contiguous, with their bits.

    `from_torch` of them gives `variables`, nested dicts with 'params' and 'batch_stats', again. `publisher` is
    'torchvision' or 'timm', where both have names for a family; by default the one whose network is ours. Contiguous,
    since safetensors 0.8.0 writes others in the order of their memory without a word.

    Raises UserError for a model that has no names there.
    """
    model = models.create(name, 1, **fields)
    known = names_for(name, model, publisher=publisher)
    found: dict[str, list[np.ndarray]] = {}
    for path, leaf in traverse_util.flatten_dict(dict(variables), sep="/").items():
        ours = path.partition("/")[2]
        module, _, kind = ours.rpartition("/")
        if ours not in known and module not in known:
            raise UserError(f"{name} has no name for '{path}' in PyTorch")
        key, *views = known[ours] if ours in known else (f"{known[module][0]}.{LEAVES[kind]}",)
        value = np.asarray(leaf)
        value = views[1](value) if views else _in_their_layout(value, key.rpartition(".")[0], model)
        found.setdefault(key, []).append(value)
    return {
        key: np.array(np.concatenate(parts, 1) if parts[1:] else parts[0], order="C") for key, parts in found.items()
    }


def _in_their_layout(value: np.ndarray, module: str, model: nn.Module) -> np.ndarray:
    """Matrices as [out, in], convolutions as OIHW, which here may be matrices over flattened patches or maps."""
    side = next((side for end, side in _CONVOLUTIONS.items() if module.endswith(end)), 0)
    if module.endswith(("patch_embed.proj", "conv_proj")):
        side = model.patch_size
    if module.endswith("pre_logits.fc1"):
        side = 1 if model.stem == "small" else 7
    if side and value.ndim == 2:
        value = value.reshape(side, side, -1, value.shape[-1])
    return value.transpose({2: (1, 0), 4: (3, 2, 0, 1)}.get(value.ndim, range(value.ndim)))
