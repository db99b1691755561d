"""The variables of a model, and their shapes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

PyTree = Any
ImageShape = tuple[int, int, int]  # H, W, C


def variable_shapes(model: nn.Module, image_shape: ImageShape) -> dict[str, PyTree]:
    """The shapes of the variables of `model` for images of `image_shape`."""
    return _variable_shapes(model, image_shape)


@functools.lru_cache(maxsize=8)  # every command asks several times, and tracing a deep model takes half a second
def _variable_shapes(model: nn.Module, image_shape: ImageShape):
    return jax.eval_shape(lambda key: init_variables(model, key, image_shape), jax.random.key(0))


def init_variables(model: nn.Module, key: jax.Array, image_shape: ImageShape) -> dict[str, PyTree]:
    """Initial variables of `model` for images of `image_shape` (H, W, C)."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = model.init(key, images, train=False, mutable=True)  # with what is sown: a head may stand on it
    variables.pop("intermediates", None)
    return variables
