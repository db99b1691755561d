"""Image files to arrays, through Pillow: what is not an image, or not a safe one, is told apart first."""

import io
import math
import os
import pathlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 2**26  # 67 megapixels; a file that claims more is not decoded
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such files are refused here
_WORTH_A_THREAD = 8_192  # bytes; Python holds its lock for most of the time that a smaller file takes
Box = tuple[float, float, float, float]  # left, top, width, height in pixels


class BadImage(ValueError):
    """The bytes are not an image that can be used; the message says why, in a few words."""


class EncodedImages(Protocol):
    """A sequence of encoded images that are read one at a time."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes: ...

    def take(self, indices: np.ndarray) -> "EncodedImages": ...


def examine(data: bytes) -> tuple[int, int, int]:
    """Returns (width, height, channels) of an encoded image, upright, by its header alone; channels is 1 or 3.

    Raises BadImage for what is empty, no image, or larger than MAX_PIXELS.
    """
    with _opened(data) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # orientation: turned by a quarter
            width, height = height, width
        return width, height, 1 if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16") else 3


def decode(data: bytes, *, size: int, channels: int, box: Box | None = None) -> np.ndarray:
    """Decodes an image to uint8 [size, size, channels], or with `size` 0 at its own size.

    The first frame, upright, is taken; CMYK, palettes and 16 bits are converted, transparency lies on white. It is
    cropped to its central square, or to `box`, and resized with antialiasing. Raises BadImage.
    """
    with _opened(data) as image:
        full_width = image.size[0]
        try:
            if size and image.format == "JPEG":  # decode no more pixels than the resizing needs
                enough = 2 * size / min(image.size if box is None else box[2:])
                image.draft(None, tuple(math.ceil(side * enough) for side in image.size))
            image.load()
            shrunk = image.size[0] / full_width
            picture = _to_channels(ImageOps.exif_transpose(image), channels)
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise BadImage(f"cannot be decoded ({error})") from None
    if size:
        picture = _fit(picture, size, None if box is None else tuple(value * shrunk for value in box))
    return _to_array(picture)


def random_resized_crop_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """A random box in an image (Szegedy et al. 2015): a share of its area, and width / height, both in given ranges.

    Where ten tries do not fit, the largest central box with a ratio in range.
    """
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        shape = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        w, h = round(np.sqrt(target * shape)), round(np.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * shape)), min(height, round(width / shape))
    return (width - w) // 2, (height - h) // 2, w, h


def decode_all(images: EncodedImages, *, size: int, channels: int) -> np.ndarray:
    """Decodes a whole sequence, with one thread per core where images are large: uint8 [N, size, size, channels]."""

    def one(index: int) -> np.ndarray:
        try:
            return decode(images.read(index), size=size, channels=channels)
        except BadImage as error:
            raise BadImage(f"image {index} {error}") from None

    sample = [len(images.read(index)) for index in range(min(len(images), 16))]
    if np.mean(sample) < _WORTH_A_THREAD:
        return np.stack([one(index) for index in range(len(images))])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(one, range(len(images)))))


def resize_all(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes images in memory, uint8 [N, H, W, C], as `decode` does: uint8 [N, size, size, C]."""

    def one(image: np.ndarray) -> np.ndarray:
        return _to_array(_fit(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image), size, None))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(one, images)))


def verify(path: pathlib.Path) -> tuple[int, int, int]:
    """Decodes a file completely; returns `examine` of it, or raises BadImage or OSError."""
    data = path.read_bytes()
    found = examine(data)
    decode(data, size=0, channels=found[2])
    return found


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("is empty")
    try:
        image = Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"claims more than {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError):
        start = data[:200].lstrip().lower()
        kind = "an HTML page" if start.startswith((b"<!doctype html", b"<html")) else "not an image"
        raise BadImage(f"is {kind}") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"claims {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def _fit(picture: Image.Image, size: int, box: Box | None) -> Image.Image:
    """Resizes `box` of a picture, or its central square, to [size, size]."""
    if box is None:
        side = min(picture.size)
        box = ((picture.width - side) / 2, (picture.height - side) / 2, side, side)
    left, top, width, height = box
    corners = (left, top, min(left + width, picture.width), min(top + height, picture.height))
    if corners == (0, 0, size, size) and picture.size == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=corners, reducing_gap=3.0)


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode 'L' (1 channel) or 'RGB' (3)."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more; Pillow's own conversion would clip
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode != "F" or values.max(initial=0.0) > 255 else 255.0
        image = Image.fromarray(np.clip(np.rint(values * 255 / top), 0, 255).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image, np.uint8)
    return array[..., None] if array.ndim == 2 else array
