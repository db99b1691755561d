"""Attention in several forms that compute the same.

'xla'     JAX's own, plain products
'folded'  products of [B * heads, N, D], with a written gradient: on a CPU, where 'xla' moves axes before each product
'padded'  'xla', for tokens that the model has padded to a multiple of 8, which is how TPUs lay them out
'cudnn'   NVIDIA's fused kernels
'auto'    'xla', which a run replaces by what trains the fastest on its devices: `forms.for_device`
"""

import math
import re

import jax
import jax.numpy as jnp

FORMS = ("auto", "xla", "folded", "padded", "cudnn")
_MULTIPLE = 8  # of tokens, which cuDNN's backward pass wants, and TPUs
_PADDED_SHARE = 1 / 32  # of the tokens that 'padded' adds at most: what all blocks compute in vain


def padding(tokens: int, form: str) -> int:
    """How many tokens a model adds, once for all of its blocks."""
    more = -tokens % _MULTIPLE
    return more if form == "cudnn" or (form == "padded" and more <= tokens * _PADDED_SHARE) else 0


def attend(query: jax.Array, key: jax.Array, value: jax.Array, form: str, length: int = 0) -> jax.Array:
    """softmax(Q K^T / sqrt(D)) V of [B, N, heads, D], in one of FORMS.

    With `length`, only the first so many tokens are real: nobody looks at the others, whose results mean nothing.
    """
    batch, tokens, heads, dim = query.shape
    if form == "folded" and length in (0, tokens):

        def fold(x):
            return x.transpose(0, 2, 1, 3).reshape(batch * heads, tokens, dim)

        return _folded(fold(query), fold(key), fold(value)).reshape(batch, heads, tokens, dim).transpose(0, 2, 1, 3)
    implementation = "cudnn" if form == "cudnn" else "xla"
    more = 0 if form == "padded" else padding(tokens, form)
    if more:
        query, key, value = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (query, key, value))
    lengths = {}
    if query.shape[1] != (length or tokens):
        each = jnp.full((batch,), length or tokens, jnp.int32)
        lengths = {"query_seq_lengths": each, "key_value_seq_lengths": each}
    mixed = jax.nn.dot_product_attention(query, key, value, implementation=implementation, **lengths)
    return jax.lax.slice_in_dim(mixed, 0, tokens, axis=1) if more else mixed


@jax.custom_vjp
def _folded(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of [G, N, D], the scores and their softmax in float32."""
    return _folded_forward(query, key, value)[0]


def _folded_forward(query: jax.Array, key: jax.Array, value: jax.Array):
    scores = jnp.einsum("gnd,gmd->gnm", query, key, preferred_element_type=jnp.float32)
    probabilities = jax.nn.softmax(scores / math.sqrt(query.shape[-1]), axis=-1).astype(value.dtype)
    return probabilities @ value, (query, key, value, probabilities)


def _folded_backward(saved, gradient: jax.Array):
    query, key, value, probabilities = saved
    of_value = jnp.einsum("gnm,gnd->gmd", probabilities, gradient)
    of_probabilities = jnp.einsum("gnd,gmd->gnm", gradient, value, preferred_element_type=jnp.float32)
    mean = jnp.sum(of_probabilities * probabilities, axis=-1, keepdims=True)
    of_scores = (probabilities * (of_probabilities - mean) / math.sqrt(query.shape[-1])).astype(query.dtype)
    return jnp.einsum("gnm,gmd->gnd", of_scores, key), jnp.einsum("gnm,gnd->gmd", of_scores, query), of_value


_folded.defvjp(_folded_forward, _folded_backward)


def weights(query: jax.Array, key: jax.Array) -> jax.Array:
    """softmax(Q K^T / sqrt(d_k)) (improved ViT, section 2), in float32.

    Args:
      query, key: [batch, tokens, heads, d_k].
    Returns:
      [batch, heads, query tokens, key tokens]; each row sums to 1.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores / math.sqrt(query.shape[-1]), axis=-1)


def nvidia_version(compute_capability: str) -> float:
    """9.0 of '9.0'; 0 of what is no GPU of NVIDIA, such as 'gfx90a'."""
    return float(compute_capability) if re.fullmatch(r"\d+\.\d+", compute_capability) else 0.0


def cudnn_lacks(compute_capability: str, dtype: str, head_dim: int) -> list[str]:
    """What cuDNN's fused attention needs and does not have, in words; [] where it can be used.

    `compute_capability` is that of the device: '9.0' of an H100, 'gfx90a' of a GPU of AMD, '' of what has none.
    """
    version = nvidia_version(compute_capability)
    widest = 256 if version >= 9 else 128
    needs = {
        "an NVIDIA GPU, Ampere or later": version >= 8,
        "dtype='bfloat16'": dtype == "bfloat16",
        f"heads of at most {widest} channels, a multiple of 8": head_dim <= widest and head_dim % 8 == 0,
    }
    return [need for need, met in needs.items() if not met]


def try_cudnn(head_dim: int) -> list[jax.Array]:
    """Fused attention and its gradient on the default device, which may refuse it."""

    def loss(query):
        return jnp.sum(attend(query, query, query, "cudnn").astype(jnp.float32))

    lengths = (64, 65)  # as it is, and padded
    return [jax.jit(jax.grad(loss))(jnp.ones((1, tokens, 2, head_dim), jnp.bfloat16)) for tokens in lengths]
