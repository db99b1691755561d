"""Weights that were learned for other images, patches or classes, made to fit: NumPy alone."""

from collections.abc import Callable, Mapping

import numpy as np

from vitcls.models.weights.matching import Problems, is_head

Flat = dict[str, np.ndarray]  # by path, such as 'params/stem/kernel'
_POSITIONS = "params/position_embedding"
_CUBIC = -0.5  # Keys 1981; as in JAX, TensorFlow and, with antialiasing, PyTorch


def adapt(
    name: str, weights: Mapping[str, np.ndarray], shapes: Mapping, channels: tuple[int, int], *, head: bool
) -> tuple[Flat, list[str]]:
    """The weights as the model `name` with these `shapes` takes them, and what was done to them, in words.

    `channels` are those of the images that the weights know and of those that the model gets. Without `head` the
    classifier is left out. Raises UserError, one line, for all weights that are missing, do not fit or are too many.
    """
    problems, adapted, notes = Problems(name), {}, []
    shapes = {path: leaf.shape for path, leaf in shapes.items() if head or not is_head(path)}
    for path, shape in shapes.items():
        value = weights.get(path)
        if value is None:
            problems.missing(path, path)
            continue
        if value.shape != shape:
            made, note = _resized(path, value, shape, channels)
            if made is None:
                problems.wrong(value.shape, path, path, shape)
                continue
            value, notes = made, [*notes, note]
        adapted[path] = np.ascontiguousarray(value)
    problems.raise_any(path for path in weights if path not in shapes and (head or not is_head(path)))
    return adapted, notes


def _resized(
    path: str, value: np.ndarray, shape: tuple[int, ...], channels: tuple[int, int]
) -> tuple[np.ndarray | None, str]:
    """A weight at another shape, and what was done; None where nothing of the kind is known."""
    if path == _POSITIONS and value.ndim == len(shape) == 3 and value.shape[2] == shape[2]:
        old, new = ("x".join(map(str, size[:2])) for size in (value.shape, shape))
        return resize_positions(value, shape[:2]), f"positions resized from {old} to {new}"
    is_patches = value.ndim == 2 and path == "params/stem/kernel"
    if is_patches:
        side, new_side = (
            round((size[0] / count) ** 0.5) for size, count in zip((value.shape, shape), channels, strict=True)
        )
        if side * side * channels[0] != value.shape[0] or new_side * new_side * channels[1] != shape[0]:
            return None, ""
        value = value.reshape(side, side, channels[0], -1)
        full = (new_side, new_side, channels[1], shape[1])
    elif value.ndim == len(shape) == 4 and (value.shape[2], shape[2]) == channels:
        full = shape
    else:
        return None, ""
    notes = []
    if value.shape[2] != full[2]:
        notes.append(f"first layer from {channels[0]} to {channels[1]} channels")
        value = change_channels(value, full[2])
    if is_patches and value.shape[:2] != full[:2]:
        notes.append(f"patches resized from {value.shape[0]} to {full[0]} pixels")
        value = resize_patches(value, full[0])
    return (value.reshape(shape), ", ".join(notes)) if value.shape == full else (None, "")


def change_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """[h, w, C, F] -> [h, w, channels, F]: summed for gray images, else repeated and scaled (timm's adapt_input_conv).

    So a gray image gives what the same image in colour gave.
    """
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    return kernel[:, :, np.arange(channels) % old] * np.float32(old / channels)


def resize_positions(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[h, w, D] -> [*grid, D], bicubic (Dosovitskiy et al. 2021, section 3.2), with antialiasing where it shrinks."""
    rows, columns = (_resize_matrix(old, new, _cubic) for old, new in zip(positions.shape, grid, strict=False))
    return np.einsum("yh,hwd,xw->yxd", rows, positions, columns).astype(positions.dtype)


def resize_patches(kernel: np.ndarray, side: int) -> np.ndarray:
    """[p, p, C, F] -> [side, side, C, F] by the pseudo-inverse of resizing (FlexiViT: Beyer et al. 2023, section 3.4).

    The product with a resized patch is that of the old kernel with the patch itself, or as near to it as can be. With B
    the bilinear resizing of a patch, the kernel w becomes (B^T)^+ w; B is one matrix for each axis.
    """
    inverse = np.linalg.pinv(_resize_matrix(kernel.shape[0], side, _triangle).T)
    return np.einsum("yh,hwcf,xw->yxcf", inverse, kernel, inverse).astype(kernel.dtype)


def _resize_matrix(old: int, new: int, kernel: Callable) -> np.ndarray:
    """[new, old]: the linear map that resizes a signal, with antialiasing where it shrinks."""
    scale = new / old
    width = max(1 / scale, 1)
    centres = (np.arange(new) + 0.5) / scale - 0.5
    weights = kernel((np.arange(old)[None] - centres[:, None]) / width)
    return weights / weights.sum(axis=1, keepdims=True)


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), _CUBIC
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
