"""The white of a data set whose images have more than 8 bits."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vitcls.core.errors import UserError
from vitcls.data import images as image_files
from vitcls.data.images import BadImage, EncodedImages

_DEPTH_SAMPLE = 64  # training images whose headers tell whether a data set has more than 8 bits
_logger = logging.getLogger("vitcls")


def find_max_value(images: EncodedImages) -> float:
    """The white of training images of more than 8 bits, by the largest value in any of them; 0.0 if none is met.

    Images of 8 bits cost a look at the headers of a sample, no pass over the files. What cannot be decoded is passed
    over; raises UserError for what cannot be read, and where nothing can be decoded.
    """

    def largest(index: int, *, decode: bool = True) -> float | None:
        try:
            encoded = images.read(index)
            if image_files.is_deep(encoded):
                return image_files.largest_value(encoded) if decode else 0.0
        except BadImage:
            pass  # decoding warns of it, once
        except OSError as error:
            raise UserError(f"{images.name(index)} cannot be read: {error.strerror or error}") from None
        return None

    sample = np.unique(np.linspace(0, len(images) - 1, _DEPTH_SAMPLE).astype(int)).tolist()
    if all(largest(index, decode=False) is None for index in sample):
        return 0.0
    with ThreadPoolExecutor(image_files.reading_threads(images)) as pool:
        found = [value for value in pool.map(largest, range(len(images))) if value is not None]
    if not found:
        raise UserError(f"no image of more than 8 bits can be decoded; {images.name(0)} is one of {len(images):,}")
    return announce_white(max(found))


def announce_white(largest: float) -> float:
    """`images.natural_maximum`, said aloud where it is not simply that of the format."""
    white = image_files.natural_maximum(largest)
    if white not in (1, 65535):
        _logger.warning(
            "images of more than 8 bits: the largest value of the training images is %.10g, so %.10g becomes white; "
            "set config.dataset.max_value to fix it",
            largest,
            white,
        )
    return white
