"""The exponential moving average of parameters and batch statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


def ema_update(ema: PyTree, params: PyTree, decay: float, step: jax.Array | int) -> PyTree:
    """Returns d * ema + (1 - d) * params with d = min(decay, (1 + step) / (10 + step)).

    `step` counts from 0: the update that made `params`. The warm-up of d forgets the initial parameters, which a
    constant decay would keep for 1 / (1 - decay) steps (as `ExponentialMovingAverage` of TensorFlow does).
    """
    # 1 - d, written so that a decay near 1 loses no digits in float32.
    weight = jnp.maximum(1 - decay, 9 / (10 + step))
    return optax.incremental_update(params, ema, weight)
