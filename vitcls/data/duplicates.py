"""The same image twice: to the bit, nearly by what it looks like, and nearly by the features of a network."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vitcls.data import images as image_files
from vitcls.data.dataset import Split

SIDE = 32  # pixels of a thumbnail
_BITS = 8  # of 64 in which the hashes of near duplicates may differ
_ALIKE = 0.98  # the least correlation of their thumbnails
_ALIKE_BY_FEATURES = 0.9
_BLANK = 2.0  # the largest deviation of an image, in levels of 255, that shows nothing
_NEIGHBORS = 5  # by features, that are looked at
_BLOCK = 256  # rows that are compared with all others at a time


class Look(NamedTuple):
    """What is known of the images of a split."""

    digests: np.ndarray  # 16 bytes [N] of the pixels, or of the file
    thumbnails: np.ndarray  # uint8 [N, 32, 32, C]
    sizes: np.ndarray  # int32 [N, 2], height and width as they came


class Pairs(NamedTuple):
    """Pairs of images, and how much their thumbnails are alike."""

    first: np.ndarray  # int64 [P]
    second: np.ndarray  # int64 [P], larger than first
    correlation: np.ndarray  # float32 [P]


def look(split: Split, channels: int) -> Look:
    """Reads each image of a split, as it came, once. Raises UserError as decoding does."""
    if isinstance(split.images, np.ndarray):
        digests = [hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest() for image in split.images]
        sizes = np.tile(np.int32(split.images.shape[1:3]), (len(digests), 1))
        return Look(_bytes(digests), image_files.resize_all(split.images, (SIDE, SIDE), whole=True), sizes)

    def one(index: int) -> tuple[bytes, tuple[int, int]]:
        content = split.images.read(index)
        width, height, _ = image_files.examine(content)
        return hashlib.blake2b(content, digest_size=16).digest(), (height, width)

    with ThreadPoolExecutor(image_files.reading_threads(split.images)) as pool:
        digests, sizes = zip(*pool.map(one, range(len(split.images))), strict=True)
    thumbnails = image_files.decode_all(
        split.images, size=(SIDE, SIDE), channels=channels, decoding=split.decoding, whole=True
    )
    return Look(_bytes(digests), thumbnails, np.array(sizes, np.int32).reshape(-1, 2))


def _bytes(digests) -> np.ndarray:
    return np.array([np.frombuffer(digest, np.uint64) for digest in digests]).reshape(-1, 2)


def exact_groups(digests: np.ndarray) -> np.ndarray:
    """For each image the first that is equal to it, int64 [N]."""
    _, first, which = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    return first[which.ravel()]


def blank(thumbnails: np.ndarray) -> np.ndarray:
    """Which images show nothing, bool [N]."""
    return thumbnails.reshape(len(thumbnails), -1).std(axis=1) < _BLANK


def perceptual_hash(thumbnails: np.ndarray) -> np.ndarray:
    """64 bits of each image, uint64 [N]: which of the 8 x 8 lowest frequencies of its brightness exceed their median.

    Zauner (2010), "Implementation and benchmarking of perceptual image hash functions", section 3.2.1.
    """
    frequencies, places = np.arange(8)[:, None], np.arange(SIDE)
    waves = np.cos(np.pi * frequencies * (2 * places + 1) / (2 * SIDE)).astype(np.float32)
    gray = thumbnails.mean(axis=-1, dtype=np.float32)
    low = (waves @ gray @ waves.T).reshape(len(gray), 64)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64).ravel()


def near_pairs(thumbnails: np.ndarray) -> Pairs:
    """Images that look the same, mirrored or not, among [N, 32, 32, C] that are all different.

    Their hashes differ in few bits, and their thumbnails are nearly proportional.
    """
    plain = perceptual_hash(thumbnails)
    unit = _unit(thumbnails)
    found = [_checked(unit, unit, _close(plain, plain), _ALIKE)]
    mirrored = thumbnails[:, :, ::-1]
    found.append(_checked(unit, _unit(mirrored), _close(plain, perceptual_hash(mirrored)), _ALIKE))
    return merged(found)


def near_pairs_by_features(features: np.ndarray, thumbnails: np.ndarray) -> Pairs:
    """Pairs of which one is among the five nearest of the other by features float32 [N, D], and looks like it."""
    unit_features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    count = min(_NEIGHBORS + 1, len(features))

    def neighbors() -> Iterator[np.ndarray]:
        for start in range(0, len(features), _BLOCK):
            products = unit_features[start : start + _BLOCK] @ unit_features.T
            nearest = np.argpartition(-products, count - 1, axis=1)[:, :count]
            rows = np.repeat(np.arange(start, start + len(products)), count)
            pairs = np.sort(np.stack([rows, nearest.ravel()], axis=1), axis=1)
            yield pairs[pairs[:, 0] < pairs[:, 1]]

    unit = _unit(thumbnails)
    return merged([_checked(unit, unit, neighbors(), _ALIKE_BY_FEATURES)])


def _close(ours: np.ndarray, theirs: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs int64 [P, 2] of hashes that differ in few bits, the first before the second."""
    for start in range(0, len(ours), _BLOCK):
        differ = np.bitwise_count(ours[start : start + _BLOCK, None] ^ theirs[None, start:])
        rows, columns = np.nonzero(differ <= _BITS)
        keep = rows < columns
        yield start + np.stack([rows[keep], columns[keep]], axis=1)


def _unit(thumbnails: np.ndarray) -> np.ndarray:
    """Without their mean and of length 1, float32 [N, D]."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _checked(ours: np.ndarray, theirs: np.ndarray, candidates: Iterator[np.ndarray], least: float) -> Pairs:
    """Those candidates of which the thumbnails are alike."""
    found = []
    for pairs in candidates:
        for start in range(0, len(pairs), 4096):
            first, second = pairs[start : start + 4096].T
            correlation = np.einsum("ij,ij->i", ours[first], theirs[second])
            keep = correlation >= least
            found.append(Pairs(first[keep], second[keep], correlation[keep]))
    return merged(found)


def merged(parts: list[Pairs]) -> Pairs:
    """Each pair once, the most alike first."""
    if not parts:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    together = Pairs(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    together = Pairs(*(part[np.argsort(-together.correlation, kind="stable")] for part in together))
    _, once = np.unique(np.stack(together[:2], axis=1), axis=0, return_index=True)
    return Pairs(*(part[np.sort(once)] for part in together))
