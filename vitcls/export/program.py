"""The whole of a run as one program: bytes in, probabilities out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from vitcls.core.errors import UserError
from vitcls.export import compress
from vitcls.metrics.scaling import Identity, Isotonic, Scaling, Temperature, Vector
from vitcls.training import build
from vitcls.training.opened import Opened

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_TINY = float(np.finfo(np.float32).tiny)  # as in metrics.scaling
PyTree = Any


def make_answer(opened: Opened, scale: Scaling | None, stored: PyTree) -> Callable[[jax.Array], jax.Array]:
    """answer(images uint8 [B, H, W, C]) -> probabilities float32 [B, K].

    Everything is inside: normalisation, the weights as they are `stored` (compress.py), test-time augmentation, and
    what calibration makes of the probabilities.

    Raises UserError for a task without a classifier.
    """
    opened.require_classifier()
    config, info = opened.trained.config, opened.trained.info
    predict, calibrate = build.make_predict(config, opened.model, info), _calibrate(scale)

    def answer(images: jax.Array) -> jax.Array:
        logits = predict(compress.restore(stored), images)
        return calibrate(jax.nn.softmax(logits.astype(jnp.float32), axis=-1))

    return answer


def compiled(answer: Callable, image_shape: tuple[int, int, int]) -> bytes:
    """A StableHLO program for all platforms and batches of any size, as jax.export writes it."""
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
    return bytes(export.export(jax.jit(answer), platforms=PLATFORMS)(images).serialize())


def _calibrate(scale: Scaling | None) -> Callable[[jax.Array], jax.Array]:
    """Probabilities [B, K] -> those of calibration; see metrics.scaling for what each does."""
    if isinstance(scale, Temperature):
        return lambda p: jax.nn.softmax(_log(p) / scale.temperature, axis=-1)
    if isinstance(scale, Vector):
        weights, biases = (np.array(values, np.float32)[None] for values in (scale.weights, scale.biases))
        return lambda p: jax.nn.softmax(weights * _log(p) + biases, axis=-1)
    if isinstance(scale, Isotonic):

        def isotonic(p: jax.Array) -> jax.Array:
            lines = enumerate(zip(scale.places, scale.values, strict=True))
            columns = [_along(jax.lax.slice_in_dim(p, k, k + 1, axis=1), *line) for k, line in lines]
            raised = jnp.concatenate(columns, axis=1)
            return raised / raised.sum(axis=1, keepdims=True)

        return isotonic
    if scale is None or isinstance(scale, Identity):
        return lambda p: p
    raise UserError(f"a calibration by {type(scale).__name__} cannot be exported")


def _along(p: jax.Array, places: tuple[float, ...], values: tuple[float, ...]) -> jax.Array:
    """np.interp of p [B, 1]: all steps up to p, added up. (TFLite can neither search for the right one nor gather.)"""
    x, y = np.float32(places)[None], np.float32(values)[None]
    widths = np.diff(x)
    way = (p - x[:, :-1]) / np.where(widths > 0, widths, 1)
    parts = jnp.where(widths > 0, jnp.clip(way, 0, 1), (way > 0).astype(jnp.float32))
    return y[:, :1] + (np.diff(y) * parts).sum(axis=1, keepdims=True)


def _log(probabilities: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(probabilities, _TINY))
