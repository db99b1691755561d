"""The real weights of EfficientNet-Lite0, against the logits that timm gave for them once; skipped without the file."""

import pathlib

import jax
import numpy as np
import pytest

from vitcls import models
from vitcls.models.weights.from_torch import from_torch
from vitcls.models.weights.safetensors import read_safetensors

_PLACES = (parent / "shared" / "data" / "pretrained" for parent in pathlib.Path(__file__).parents)
FOLDER = next(filter(pathlib.Path.is_dir, _PLACES), pathlib.Path("missing"))
FILE = FOLDER / "tf_efficientnet_lite0.safetensors"

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the published weights are not here")


def test_logits_of_the_published_weights_are_those_of_timm():
    with np.load(FOLDER / "tf_efficientnet_lite0_golden.npz") as golden:
        expected, features = golden["logits"], golden["features"]
    images = np.random.default_rng(0).standard_normal((2, 224, 224, 3)).astype(np.float32)
    model = models.create("efficientnet_lite0", 1000)
    variables = from_torch("efficientnet_lite0", read_safetensors(str(FILE))[0])
    apply = jax.jit(lambda variables: model.apply(variables, images, train=False, mutable=["intermediates"]))
    logits, sown = apply(variables)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    found = sown["intermediates"]["features"][0]
    np.testing.assert_allclose(found, features, rtol=0, atol=1e-5 * np.abs(features).max())
