"""A run as a SavedModel: the directory that TensorFlow, TF Serving and TF's converters open."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vitcls.core import terminal
from vitcls.export.portable import without_erf

PLATFORMS = ("cpu", "cuda", "tpu")  # those of XlaCallModule
NAME = "images"  # the input of the signature
ABOUT = pathlib.PurePath("assets.extra", "about.json")  # a place that TensorFlow leaves to others


def write(
    answer: Callable,
    image_shape: tuple[int, int, int],
    about: Mapping[str, Any],
    place: pathlib.Path,
    *,
    platforms: tuple[str, ...] = PLATFORMS,
) -> None:
    """Makes the directory `place`, whose signature 'serving_default' takes `images` and gives `probabilities`."""
    terminal.quiet_tensorflow()
    import tensorflow as tf
    from jax.experimental import jax2tf

    converted = jax2tf.convert(
        without_erf(answer),
        polymorphic_shapes=["(batch, _, _, _)"],
        with_gradient=False,
        native_serialization_platforms=platforms,
    )
    images = tf.TensorSpec((None, *image_shape), tf.uint8, name=NAME)
    serve = tf.function(lambda images: {"probabilities": converted(images)}, autograph=False, input_signature=[images])
    # As a signature alone: a function of the module besides would hold all weights once more.
    tf.saved_model.save(tf.Module(), str(place), signatures={"serving_default": serve.get_concrete_function()})
    (place / ABOUT).parent.mkdir()
    (place / ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")


def load(path: str) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """answer(images) by TensorFlow, and what the file is; raises OSError or ValueError for what is none."""
    about = json.loads(pathlib.Path(path, ABOUT).read_text(encoding="utf-8"))
    terminal.quiet_tensorflow()
    import tensorflow as tf

    loaded = tf.saved_model.load(path)

    def answer(images: np.ndarray) -> np.ndarray:
        return loaded.signatures["serving_default"](**{NAME: tf.constant(images)})["probabilities"].numpy()

    return answer, about
