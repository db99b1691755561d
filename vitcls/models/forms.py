"""Which form of a layer a device has, and which trains the fastest there; parameters are the same in every form.

A model keeps what its config says. A run takes it in the forms of its devices.
"""

import functools
import logging
from collections.abc import Callable

import flax.linen as nn
import jax

from vitcls.models import attention

FIELDS = ("attention", "feed_forward", "grouped_conv")  # of models that say it
# By platform; elsewhere 'xla'. See benchmarks/grouped_conv.py and benchmarks/attention.py.
FASTEST_GROUPED_CONV = {"cpu": "cpu"}
FASTEST_ATTENTION = {
    "cpu": "folded",
    "tpu": "padded",
}  # on NVIDIA's GPUs 'cudnn', where it runs, and for feed_forward 'pallas'
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
    asked = getattr(model, "feed_forward", None)
    if asked == "pallas" or (asked == "auto" and training and device.platform == "gpu"):
        chosen["feed_forward"] = _feed_forward(asked, device, model.dtype, *_of_feed_forward(model))
    return model.clone(**chosen) if chosen else model


@functools.cache  # every command asks several times; the log says it once
def _attention(asked: str, device: jax.Device, dtype: str, head_dim: int) -> str:
    """'cudnn' where the device has it, else the best of the others, with a line in the log where it was asked for."""
    plain = FASTEST_ATTENTION.get(device.platform, "xla") if asked == "auto" else "xla"
    lacks = attention.cudnn_lacks(_capability(device), dtype, head_dim)
    if lacks:
        if asked == "cudnn":
            _logger.info("attention='cudnn' needs %s; computing attention by 'xla'", " and ".join(lacks))
        return plain
    if refusal := _refusal(device, functools.partial(attention.try_cudnn, head_dim)):
        _logger.info("fused attention does not run here, computing attention by 'xla': %s", refusal)
        return plain
    return "cudnn"


def _of_feed_forward(model: nn.Module) -> tuple[bool, str, bool, int]:
    gated = model.squeeze_excite > 0 and model.squeeze_excite_position == "hidden"
    return model.local_conv or gated, model.activation, model.aggregation == "token", model.mlp_dim


@functools.cache
def _feed_forward(
    asked: str, device: jax.Device, dtype: str, has_middle: bool, activation: str, class_token: bool, mlp_dim: int
) -> str:
    """'pallas' where the kernels of local detail run, with a line in the log where they were asked for and do not."""
    from vitcls.models import local_detail  # Pallas takes half a second

    lacks = local_detail.lacks(
        _capability(device), has_middle=has_middle, activation=activation, class_token=class_token, mlp_dim=mlp_dim
    )
    if asked == "auto" and dtype != "bfloat16":
        return "xla"
    if lacks:
        if asked == "pallas":
            _logger.info("feed_forward='pallas' needs %s; computing it by 'xla'", " and ".join(lacks))
        return "xla"
    if refusal := _refusal(device, functools.partial(local_detail.try_kernels, dtype)):
        _logger.info("the kernels of the feed-forward network do not run here, computing it by 'xla': %s", refusal)
        return "xla"
    return "pallas"


def _capability(device: jax.Device) -> str:
    """'9.0' of an H100, 'gfx90a' of a GPU of AMD, '' of what has none."""
    return getattr(device, "compute_capability", "")


def _refusal(device: jax.Device, program: Callable[[], object]) -> str:
    """Why a device with its driver and libraries refuses a program, which is compiled and run; '' where it runs.

    A device that is only compiled for is believed.
    """
    if device not in jax.local_devices():
        return ""
    try:
        with jax.default_device(device), jax.transfer_guard("allow"):
            jax.block_until_ready(program())
    except Exception as error:  # whatever a driver, a library or a compiler says
        return str(error).strip().splitlines()[0][:200] or type(error).__name__
    return ""
