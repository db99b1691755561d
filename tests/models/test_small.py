"""LeNet-5 gives small images a frame of their own border."""

import jax
import numpy as np
import pytest

from vitcls import models
from vitcls.models.variables import init_variables


@pytest.mark.parametrize("height, width", [(28, 28), (29, 31), (28, 40)])
def test_the_frame_of_small_images_is_numpys_edge_to_the_bit(height, width):
    model = models.create("lenet5", 3, widths=(4, 8, 16), hidden_width=16)
    frame = [(0, 0), *((n // 2, n - n // 2) for n in (max(0, 32 - height), max(0, 32 - width))), (0, 0)]
    images = np.random.default_rng(0).normal(size=(5, height, width, 3)).astype(np.float32)
    framed = np.pad(images, frame, mode="edge")
    variables = init_variables(model, jax.random.key(0), framed.shape[1:])
    found, expected = (model.apply(variables, each, train=False) for each in (images, framed))
    np.testing.assert_array_equal(found, expected)
