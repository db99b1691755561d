"""Image files to arrays, through Pillow: what is not an image, or not a safe one, is told apart first."""

import contextlib
import dataclasses
import io
import logging
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vitcls.core.errors import UserError
from vitcls.core.progress import show_progress

_logger = logging.getLogger("vitcls")
_black: set[str] = set()  # the images of which `warn_black` has told

MAX_PIXELS = 2**26  # 67 megapixels; a file that claims more is not decoded
# Only these readers see the bytes, whatever a file's name; none of them starts another program, as that of EPS does.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000")
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # integers of 16 or 32 bits, floats; all gray
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_GRAY_MODES = ("1", "L", "LA", "La", *_DEEP_MODES)
_THREADS_AFAR = 64
WORTH_A_THREAD = 8_192  # bytes; Python holds its lock for most of the time that a smaller file takes
# Bombs are refused here, and broken metadata of a good picture is of no interest. Set once: Pillow runs in threads, and
# `warnings.catch_warnings` is for one thread only.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
SPARE = 2.0  # pixels that are decoded along a side for one of the result: what resizing needs to look the same
Box = tuple[float, float, float, float]  # left, top, width, height in pixels
Size = tuple[int, int]  # height, width in pixels
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # brightness of red, green and blue by ITU-R 601, as in Pillow


class BadImage(ValueError):
    """The bytes are not an image that can be used; the message says why, in a few words."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What decoding needs to know of a data set, so that every image of it is treated alike, at prediction too.

    `max_value` is the value that becomes white (255) in images of more than 8 bits; larger ones are clipped. 0.0, where
    no training image is one, and in workdirs of version 0.1: integers have 16 bits, and floats lie in the first of
    0 .. 1, 0 .. 255, 0 .. 65535 that holds them.

    `eval_crop` is the share of its sides that is kept of the central box, where no other box is asked for: as if the
    image were resized to size / eval_crop and its centre cropped, in one step.
    """

    max_value: float = 0.0
    eval_crop: float = 1.0
    interpolation: str = "bilinear"  # or 'bicubic'


BY_FORMAT = Decoding()


@dataclasses.dataclass(frozen=True)
class Crop:
    """A random resized crop (Szegedy et al. 2015): area as a fraction of the image's, ratio width / height.

    `spare` is that of `decode`.
    """

    area: tuple[float, float]
    ratio: tuple[float, float]
    spare: float = SPARE


class EncodedImages(Protocol):
    """A sequence of encoded images that are read one at a time.

    Those that are read over a network have `afar` = True, `neighbors()`, which gives the indices of all in parts that
    lie together, and `read_together(indices)`, which reads such a part by one request: list[bytes].
    """

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str: ...

    def take(self, indices: np.ndarray) -> "EncodedImages": ...


def reading_threads(images: EncodedImages | np.ndarray) -> int:
    """How many threads read images at once: where each read waits for a network, more than there are cores."""
    return _THREADS_AFAR if _are_afar(images) else os.cpu_count()


def _are_afar(images: EncodedImages | np.ndarray) -> bool:
    return getattr(images, "afar", False)


def examine(data: bytes, most: int = MAX_PIXELS) -> tuple[int, int, int]:
    """Returns (width, height, channels) of an encoded image, upright, by its header alone; channels is 1 or 3.

    Raises BadImage for what is empty, no image, or has more than `most` pixels.
    """
    with _opened(data, most) as image:
        width, height = image.size
        if _orientation(image) in _QUARTER_TURNS:
            width, height = height, width
        return width, height, 1 if image.mode in _GRAY_MODES else 3


def is_deep(data: bytes) -> bool:
    """Whether an encoded image has integers of more than 8 bits or floats, by its header alone; raises BadImage.

    16 bits in colour are no matter of ours: Pillow reads their upper 8.
    """
    with _opened(data) as image:
        return image.mode in _DEEP_MODES


def largest_value(data: bytes) -> float:
    """The largest finite value of an encoded image, at least 0; decodes it. Raises BadImage."""
    with _opened(data) as image:
        try:
            values = np.asarray(image)
        except Exception as error:  # as in `decode`
            raise BadImage(f"cannot be decoded ({error})") from None
    return float(values.max(where=np.isfinite(values), initial=0))


def natural_maximum(largest: float) -> float:
    """The white of a data set, by its largest value: 1 or 255 if they hold it; else, of a whole number, the next
    2^n - 1 (4095 for 12 bits that reach 4080), and any other number itself.
    """
    if largest <= 255:
        return 1.0 if largest <= 1 else 255.0
    return float(2 ** int(largest).bit_length() - 1) if largest.is_integer() else largest


def to_8_bits(values: np.ndarray, max_value: float) -> np.ndarray:
    """Values in 0 .. max_value, of any type, to uint8; what is outside is clipped, NaN becomes 0."""
    return np.rint(np.clip(np.nan_to_num(values) / max_value, 0, 1) * 255).astype(np.uint8)


def decode(
    data: bytes,
    *,
    size: Size | None,
    channels: int,
    box: Box | None = None,
    decoding: Decoding = BY_FORMAT,
    spare: float = SPARE,
) -> np.ndarray:
    """Decodes an image to uint8 [*size, channels], or without `size` at its own.

    The first frame, upright, is taken; CMYK, palettes and 16 bits are converted, transparency lies on white. It is
    cropped to the largest central box of the shape of `size`, or to `box` of the upright image, and resized with
    antialiasing. A JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 at which the box still has `spare` times as
    many pixels along each side as the result. Raises BadImage.
    """
    with _opened(data) as image:
        try:
            scale, orientation = 1.0, _orientation(image)
            if size and image.format == "JPEG":  # decode no more pixels than the resizing needs
                upright_size = image.size[::-1] if orientation in _QUARTER_TURNS else image.size
                _, _, box_width, box_height = box or central_box(*upright_size, size, decoding.eval_crop)
                enough = spare * max(size[0] / box_height, size[1] / box_width)
                width = image.width
                drafted = image.draft(None, tuple(math.ceil(side * enough) for side in image.size))
                scale = drafted[1][2] / width if drafted else 1.0  # 1, 1/2, 1/4 or 1/8, though sides are rounded up
            upright = ImageOps.exif_transpose(image) if orientation != 1 else image
            upright.load()
            picture = _to_channels(upright, channels, decoding.max_value)
            if size:
                drafted_box = box and tuple(value * scale for value in box)
                kept = drafted_box or central_box(*picture.size, size, decoding.eval_crop)
                picture = _fit(picture, size, kept, decoding.interpolation)
        except Exception as error:  # Pillow's readers fail in too many ways on damaged bytes to be listed
            raise BadImage(f"cannot be decoded ({error})") from None
    return _to_array(picture)


def central_box(width: int, height: int, size: Size, share: float = 1.0) -> Box:
    """The largest box in the centre of an image that has the shape of `size`, or `share` of its height and width."""
    target_height, target_width = size
    if width * target_height <= height * target_width:  # the image is the narrower one
        box_width, box_height = float(width), width * target_height / target_width
    else:
        box_width, box_height = height * target_width / target_height, float(height)
    box_width, box_height = box_width * share, box_height * share
    return (width - box_width) / 2, (height - box_height) / 2, box_width, box_height


def random_resized_crop_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """A random box in an image (Szegedy et al. 2015): a share of its area, and width / height, both in given ranges.

    Where ten tries do not fit, the largest central box with a ratio in range. All four are whole pixels.
    """
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        shape = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        w, h = round(np.sqrt(target * shape)), round(np.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
    return (width - w) // 2, (height - h) // 2, w, h


def decode_all(
    images: EncodedImages, *, size: Size | None, channels: int, decoding: Decoding = BY_FORMAT, whole: bool = False
) -> np.ndarray:
    """Decodes a whole sequence, with one thread per core where images are large: uint8 [N, *size, channels].

    Without `size` the images keep their own; with `whole` all of each is squeezed into it, nothing cropped. An image
    that cannot be decoded is black, see `warn_black`. Raises UserError where no image can be decoded, one cannot be
    read, or the size of one is not that of the first.
    """

    def one(index: int, data: bytes) -> np.ndarray | None:
        try:
            box = (0, 0, *examine(data)[:2]) if whole else None
            return decode(data, size=size, channels=channels, box=box, decoding=decoding)
        except BadImage as error:
            return warn_black(images.name(index), error)

    def place(index: int, data: bytes) -> None:
        image = one(index, data)
        if image is None:
            decoded[index] = 0
            return
        if image.shape != decoded.shape[1:]:
            raise UserError(
                f"the images differ in size, from {first.shape[0]}x{first.shape[1]} to "
                f"{image.shape[0]}x{image.shape[1]} (image {index}); set config.dataset.image_size"
            )
        decoded[index] = image

    if not len(images):
        return np.zeros((0, *(size or (0, 0)), channels), np.uint8)
    with _in_one_line():
        found = (one(index, images.read(index)) for index in range(len(images)))
        first = next((image for image in found if image is not None), None)
        if first is None:
            raise UserError(f"none of {len(images)} images can be decoded, as {images.name(0)}")
        decoded = np.empty((len(images), *first.shape), np.uint8)
        _for_each(images, place)
    return decoded


def aspects_of(images: EncodedImages) -> np.ndarray:
    """Width / height of every image, float32 [N], by its header; 1 for what is no image."""
    aspects = np.ones(len(images), np.float32)

    def place(index: int, data: bytes) -> None:
        with contextlib.suppress(BadImage):
            width, height, _ = examine(data)
            aspects[index] = width / height

    with _in_one_line():
        _for_each(images, place)
    return aspects


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the data set cannot be read: {error}") from None


def _for_each(images: EncodedImages, act: Callable[[int, bytes], None]) -> None:
    """Calls `act(index, data)` for all images; in threads where they are large, or afar, and then in parts."""
    if _are_afar(images):
        parts = images.neighbors()

        def act_on(part: np.ndarray) -> None:
            for index, data in zip(part.tolist(), images.read_together(part), strict=True):
                act(index, data)

        with ThreadPoolExecutor(reading_threads(images)) as pool:
            for _ in show_progress(pool.map(act_on, parts), len(parts), "reading the images"):
                pass
        return
    sample = [len(images.read(index)) for index in range(min(len(images), 16))]
    if np.mean(sample) < WORTH_A_THREAD:
        for index in range(len(images)):
            act(index, images.read(index))
        return
    with ThreadPoolExecutor(reading_threads(images)) as pool:
        for _ in pool.map(lambda index: act(index, images.read(index)), range(len(images))):
            pass  # brings up the first failure


def warn_black(name: str, error: BadImage) -> None:
    """Warns, once for every name, that an image which cannot be decoded is taken as black.

    So a file that is damaged behind its header does not end a run after hours, and counts and order stay what they
    are.
    """
    if name not in _black:
        _black.add(name)
        _logger.warning("%s %s; it is taken as a black image (%s so far)", name, error, f"{len(_black):,}")


def resize_all(images: np.ndarray, size: Size, decoding: Decoding = BY_FORMAT, *, whole: bool = False) -> np.ndarray:
    """Resizes images in memory, uint8 [N, H, W, C], as `decode_all` does: uint8 [N, *size, C]."""

    def one(image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        box = (0, 0, *picture.size) if whole else central_box(*picture.size, size, decoding.eval_crop)
        return _to_array(_fit(picture, size, box, decoding.interpolation))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(one, images)))


def verify(path: pathlib.Path) -> tuple[int, int, int]:
    """Decodes a file completely; returns `examine` of it, or raises BadImage or OSError."""
    if path.stat().st_size > 8 * MAX_PIXELS:  # not to be read into memory
        raise BadImage("is too large for an image")
    data = path.read_bytes()
    found = examine(data)
    decode(data, size=None, channels=found[2])
    return found


def _opened(data: bytes, most: int = MAX_PIXELS) -> Image.Image:
    if not data:
        raise BadImage("is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"claims more than {most:,} pixels") from None
    except Exception:  # as in `decode`
        start = data[:200].lstrip().lower()
        kind = "an HTML page" if start.startswith((b"<!doctype html", b"<html")) else "not an image"
        raise BadImage(f"is {kind}") from None
    if not 0 < image.width * image.height <= most:
        raise BadImage(f"claims {image.width}x{image.height} pixels; at most {most:,} are decoded")
    return image


def _orientation(image: Image.Image) -> int:
    """How the picture is still to be turned, as EXIF counts it, 1 .. 8; 1 where nothing is said that can be read."""
    if image.format == "TIFF":  # turned by its reader
        return 1
    try:
        # Not image.getexif(): PNG's would decode the whole picture to look for EXIF data behind it.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in `decode`; the pixels may be good all the same
        return 1


def _fit(picture: Image.Image, size: Size, box: Box, interpolation: str) -> Image.Image:
    """Resizes `box` of a picture to `size`."""
    left, top, width, height = box
    corners = (left, top, min(left + width, picture.width), min(top + height, picture.height))
    width_and_height = size[::-1]
    if corners == (0, 0, *width_and_height) and picture.size == width_and_height:
        return picture
    return picture.resize(width_and_height, Image.Resampling[interpolation.upper()], box=corners, reducing_gap=3.0)


def _to_channels(image: Image.Image, channels: int, max_value: float) -> Image.Image:
    """The image in mode 'L' (1 channel) or 'RGB' (3)."""
    if image.mode in _DEEP_MODES:  # Pillow's own way would clip
        values = np.asarray(image)
        image = Image.fromarray(to_8_bits(values, max_value or _own_maximum(values)))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _own_maximum(values: np.ndarray) -> float:
    """The white of an image whose data set has none; see `Decoding`."""
    if values.dtype.kind == "f":
        return next((top for top in (1, 255) if np.nan_to_num(values).max() <= top), 65535)
    return 65535


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image, np.uint8)
    return array[..., None] if array.ndim == 2 else array


def height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """`config.dataset.image_size`, one number or two."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
