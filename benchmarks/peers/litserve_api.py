"""The classifier as LitServe wants it; its process unpickles the class, which has to be in a module for that."""

import base64
import pathlib

import litserve as ls
import numpy as np

from benchmarks.peers.serving import words
from vitcls.serve import model as models
from vitcls.serve.batcher import SIZES


class Classifier(ls.LitAPI):
    """Decodes in the process of the model, as LitServe does."""

    def __init__(self, workdir: pathlib.Path, **options):
        super().__init__(**options)
        self._workdir = workdir

    def setup(self, device: str) -> None:
        self._model = models.of_workdir(self._workdir)
        self._model.warm_up(SIZES)

    def decode_request(self, request: dict) -> np.ndarray:
        return self._model.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, images: np.ndarray) -> np.ndarray:
        size = next(size for size in SIZES if size >= len(images))
        return self._model.answer(images, size).probabilities

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict:
        return words(self._model, output)
