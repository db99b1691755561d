"""Random resized crops on the devices."""

import jax
import numpy as np
import pytest
from PIL import Image

from vitcls.data.augment import resized_crop

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.mark.parametrize("aspect", [0.5, 1.0, 1.6])
def test_boxes_are_inside_with_area_and_shape_in_range(aspect):
    keys = jax.random.split(jax.random.key(0), 2000)
    boxes = np.asarray(jax.vmap(lambda key: resized_crop._box(key, np.float32(aspect), AREA, RATIO))(keys))
    top, left, height, width = boxes.T
    assert (boxes >= -1e-6).all() and (top + height <= 1 + 1e-5).all() and (left + width <= 1 + 1e-5).all()
    shapes = width * aspect / height
    assert shapes.min() >= RATIO[0] - 1e-4 and shapes.max() <= RATIO[1] + 1e-4
    areas = height * width
    assert areas.min() >= AREA[0] - 1e-4 and 0.4 < areas.mean() / (sum(AREA) / 2) <= 1.05
    assert areas.min() < 0.1 and np.corrcoef(top / np.maximum(1 - height, 1e-3), areas)[0, 1] < 0.1


def test_where_no_box_fits_it_is_the_middle():
    key, aspect = jax.random.key(0), np.float32(8)
    box = np.asarray(resized_crop._box(key, aspect, (0.9, 1.0), RATIO))
    np.testing.assert_allclose(box, [0, 0.5 - RATIO[1] / 16, 1, RATIO[1] / 8], atol=1e-6)


def test_a_crop_is_the_resized_box_of_the_image():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    key, smooth = (
        jax.random.key(3),
        np.asarray(jax.image.resize(image[:8, :8].astype(np.float32), (40, 40, 3), "cubic")),
    )
    smooth = np.clip(smooth, 0, 255).astype(np.uint8)
    top, left, height, width = (float(x) * 40 for x in resized_crop._box(key, np.float32(1), (0.3, 0.6), RATIO))
    found = resized_crop.random_resized_crop(key, smooth, np.float32(1), (16, 16), (0.3, 0.6), RATIO, "bilinear")
    rows = top + (np.arange(16) + 0.5) * height / 16 - 0.5
    columns = left + (np.arange(16) + 0.5) * width / 16 - 0.5
    expected = jax.scipy.ndimage.map_coordinates(
        smooth.mean(axis=2).astype(np.float32), np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest"
    )
    inner = slice(1, -1)
    assert np.abs(np.asarray(found).mean(axis=2)[inner, inner] - np.asarray(expected)[inner, inner]).max() < 12


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(9, 14), (40, 33)])
def test_crops_are_resized_as_pillow_does(interpolation, size):
    image = np.random.default_rng(0).integers(90, 160, (24, 24, 3), np.uint8)  # Pillow clips twice
    key, aspect, area = jax.random.key(1), np.float32(1), (0.3, 0.6)
    top, left, height, width = (float(x) * 24 for x in resized_crop._box(key, aspect, area, RATIO))
    found = resized_crop.random_resized_crop(key, image, aspect, size, area, RATIO, interpolation)
    box, method = (left, top, left + width, top + height), Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(image).resize(size[::-1], method, box), int)
    inner = np.s_[2:-2, 2:-2]  # at the border of a box Pillow's kernel takes pixels from the inside alone
    assert np.abs(np.asarray(found, int)[inner] - expected[inner]).max() <= 2
