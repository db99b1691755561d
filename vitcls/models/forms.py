"""Which form of a layer a device has, and which trains the fastest there; parameters are the same in every form.

A model keeps what its config says. A run takes it in the forms of its devices.
"""

import functools
import logging

import flax.linen as nn
import jax

from vitcls.models import attention

FIELDS = ("attention", "grouped_conv")  # of models that say it
# By platform; elsewhere 'xla'. See benchmarks/grouped_conv.py and benchmarks/attention.py.
FASTEST_GROUPED_CONV = {"cpu": "cpu"}
FASTEST_ATTENTION = {"cpu": "folded"}  # on NVIDIA's GPUs 'cudnn', where it runs
_logger = logging.getLogger("vitcls")


def for_device(model: nn.Module, device: jax.Device, *, training: bool = False) -> nn.Module:
    """`model` in forms that `device` has; in `training`, what is 'auto' becomes the form that trains the fastest there.

    What is exported stays 'auto', the plain form of every platform.
    """
    chosen = {}
    if training and getattr(model, "grouped_conv", None) == "auto":
        chosen["grouped_conv"] = FASTEST_GROUPED_CONV.get(device.platform, "xla")
    asked = getattr(model, "attention", None)
    if asked == "cudnn" or (asked == "auto" and training):
        chosen["attention"] = _attention(asked, device, model.dtype, model.hidden_dim // max(model.num_heads, 1))
    return model.clone(**chosen) if chosen else model


@functools.cache  # every command asks several times; the log says it once
def _attention(asked: str, device: jax.Device, dtype: str, head_dim: int) -> str:
    """'cudnn' where the device has it, else the best of the others, with a line in the log where it was asked for."""
    plain = FASTEST_ATTENTION.get(device.platform, "xla") if asked == "auto" else "xla"
    lacks = attention.cudnn_lacks(getattr(device, "compute_capability", ""), dtype, head_dim)
    if lacks:
        if asked == "cudnn":
            _logger.info("attention='cudnn' needs %s; computing attention by 'xla'", " and ".join(lacks))
        return plain
    if refusal := attention.cudnn_refusal(device, head_dim):
        _logger.info("fused attention does not run here, computing attention by 'xla': %s", refusal)
        return plain
    return "cudnn"
