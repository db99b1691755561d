"""Attention in several forms that compute the same: plain products of XLA, and NVIDIA's fused kernels."""

import functools
import math
import re

import jax
import jax.numpy as jnp

FORMS = ("auto", "xla", "cudnn")
_MULTIPLE = 8  # of tokens, which cuDNN's backward pass wants


def padding(tokens: int, form: str) -> int:
    """How many tokens to add for the kernels of a form."""
    return -tokens % _MULTIPLE if form == "cudnn" else 0


def attend(query: jax.Array, key: jax.Array, value: jax.Array, form: str, length: int = 0) -> jax.Array:
    """softmax(Q K^T / sqrt(D)) V of [B, N, heads, D], in one of FORMS; 'auto' is 'xla' here, see `forms`.

    With `length`, only the first so many tokens are real: nobody looks at the others, whose results mean nothing.
    """
    tokens = query.shape[1]
    implementation = "cudnn" if form == "cudnn" else "xla"
    if more := padding(tokens, form):
        query, key, value = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (query, key, value))
    lengths = {}
    if query.shape[1] != (length or tokens):
        each = jnp.full((query.shape[0],), length or tokens, jnp.int32)
        lengths = {"query_seq_lengths": each, "key_value_seq_lengths": each}
    mixed = jax.nn.dot_product_attention(query, key, value, implementation=implementation, **lengths)
    return mixed[:, :tokens] if more else mixed


def weights(query: jax.Array, key: jax.Array) -> jax.Array:
    """softmax(Q K^T / sqrt(d_k)) (improved ViT, section 2), in float32.

    Args:
      query, key: [batch, tokens, heads, d_k].
    Returns:
      [batch, heads, query tokens, key tokens]; each row sums to 1.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores / math.sqrt(query.shape[-1]), axis=-1)


def cudnn_lacks(compute_capability: str, dtype: str, head_dim: int) -> list[str]:
    """What cuDNN's fused attention needs and does not have, in words; [] where it can be used.

    `compute_capability` is that of the device: '9.0' of an H100, 'gfx90a' of a GPU of AMD, '' of what has none.
    """
    version = float(compute_capability) if re.fullmatch(r"\d+\.\d+", compute_capability) else 0.0
    widest = 256 if version >= 9 else 128
    needs = {
        "an NVIDIA GPU, Ampere or later": version >= 8,
        "dtype='bfloat16'": dtype == "bfloat16",
        f"heads of at most {widest} channels, a multiple of 8": head_dim <= widest and head_dim % 8 == 0,
    }
    return [need for need, met in needs.items() if not met]


@functools.cache  # it compiles and runs a program
def cudnn_refusal(device: jax.Device, head_dim: int) -> str:
    """Why the driver and cuDNN of a device refuse fused attention and its gradient; '' where they run.

    A device that is only compiled for is believed.
    """
    if device not in jax.local_devices():
        return ""

    def loss(query):
        return jnp.sum(attend(query, query, query, "cudnn").astype(jnp.float32))

    try:
        with jax.default_device(device), jax.transfer_guard("allow"):
            for tokens in (64, 65):  # as it is, and padded
                jax.block_until_ready(jax.jit(jax.grad(loss))(jnp.ones((1, tokens, 2, head_dim), jnp.bfloat16)))
    except Exception as error:  # whatever a driver, a library or a compiler says
        return str(error).strip().splitlines()[0][:200] or type(error).__name__
    return ""
