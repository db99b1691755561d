"""Where the model looks in one image, as a picture with its evidence."""

import base64
import io
from typing import Any

import numpy as np

from vitcls.core import errors
from vitcls.report import overlays
from vitcls.report.overlays import Drawn
from vitcls.serve.model import Served


class Explain:
    """Explains images of one model; compiles at its first call of each method."""

    def __init__(self, model: Served):
        self._model, self._explainer = model, model.explainer()

    def __call__(self, pixels: np.ndarray, method: str = "", label: str = "") -> dict[str, Any]:
        """Of pixels uint8 [H, W, C], by a method or the first sensible one, for a class or the most probable one.

        Raises UserError for an unknown class, and for a method that is unknown or that the model cannot do.
        """
        names, images = self._model.class_names, pixels[None].astype(np.float32) / 255
        (method, *_) = self._explainer.choose([method] if method else [])
        if label and label not in names:
            raise errors.unknown("class", label, names)
        probabilities = self._model.answer([pixels], 1).probabilities[0]
        k = names.index(label) if label else int(probabilities.argmax())
        classes = np.array([k], np.int32)
        heat = self._explainer.maps(method, images, classes).maps[0]
        (found,) = self._explainer.evidence(images, classes, heat[None])
        picture = overlays.overlay(pixels, Drawn(heat, (), found.better_than_random))
        return {
            "method": method,
            "methods": list(self._explainer.methods),
            "class": names[k],
            "probability": float(probabilities[k]),
            "deletion": found.deletion,
            "random_deletion": found.random("deletion"),
            "insertion": found.insertion,
            "random_insertion": found.random("insertion"),
            "p_value": found.p_value,
            "better_than_random": found.better_than_random,
            "overlay_png": _png(picture),
        }


def _png(picture) -> str:
    """As base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
