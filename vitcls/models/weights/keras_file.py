"""Reads what Keras 3 saves: .weights.h5, and .keras, a ZIP file with such a file inside."""

import math
import re
import tempfile
import zipfile
import zlib
from typing import Any

import numpy as np

from vitcls.models.weights.arrays import MAX_NAMES, LazyArray, checked_shape, unusable

_WEIGHTS = "model.weights.h5"
_MAX_RATIO = 64
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
# What the numbered variables of a layer are, by its class and how many there are; of all other layers those of a dense
# layer. Inception's norms have no gamma.
_VARIABLES = {
    "batch_normalization": {4: _NORM, 3: _NORM[1:]},
    "layer_normalization": {2: _NORM[:2], 1: _NORM[:1]},
    "layer_scale": {1: ("variable",)},
    "normalization": {3: ("mean", "variance", "count")},
}
_OTHERS = ("kernel", "bias")


def read_keras(path: str) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """The arrays of a file by 'layer/variable', as they are asked for, and no metadata.

    Raises UserError for what is no such file. Links and arrays outside of it are refused.
    """
    if not zipfile.is_zipfile(path):
        return _read_h5(path, path), {}
    copy = tempfile.NamedTemporaryFile(suffix=".h5")  # noqa: SIM115 (as long as its arrays, which keep it)
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(_WEIGHTS)
            if entry.file_size > _MAX_RATIO * (entry.compress_size + 2**14):
                raise unusable(path, f"its {_WEIGHTS} claims {entry.file_size:,} bytes out of {entry.compress_size:,}")
            with archive.open(entry) as file:
                while block := file.read(2**20):
                    copy.write(block)
        copy.flush()
    except (KeyError, OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise unusable(path, f"it is no whole .keras file ({str(error)[:80]})") from None
    return _read_h5(path, copy.name, keep=copy), {}


def _read_h5(path: str, local: str, keep: Any = None) -> dict[str, LazyArray]:
    """`path` is what messages say, `local` where the file is; `keep` lives as long as the arrays."""
    import h5py

    found: dict[str, LazyArray] = {}
    try:
        with h5py.File(local, "r") as file:
            if "layers" not in file and "_layer_checkpoint_dependencies" not in file:
                raise unusable(path, "it is no .weights.h5 file of Keras 3; load it in Keras and save_weights again")
            _walk(path, local, file, "", found, keep)
    except (OSError, KeyError, ValueError, RuntimeError, RecursionError) as error:
        if str(error).startswith(path):
            raise
        raise unusable(path, f"it is no whole HDF5 file ({' '.join(str(error).split())[:80]})") from None
    if not found:
        raise unusable(path, "it holds no weights")
    return found


def _walk(
    path: str, local: str, group: Any, place: str, found: dict[str, LazyArray], keep: Any, depth: int = 0
) -> None:
    """Collects the arrays of all groups called `vars`."""
    import h5py

    if depth > 16 or len(found) > MAX_NAMES:
        raise unusable(path, "it is nested, or holds more arrays, than that of any network")
    if place.endswith("/vars"):
        _layer(path, local, group, place, found, keep)
        return
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise unusable(path, f"'{place}/{name}' is a link; save the file again without links")
        child = group[name]
        if isinstance(child, h5py.Group):
            _walk(path, local, child, f"{place}/{name}", found, keep, depth + 1)


def _layer(path: str, local: str, group: Any, place: str, found: dict[str, LazyArray], keep: Any) -> None:
    """The variables of one layer, whose name Keras keeps beside them; older versions number the layers of a class."""
    import h5py

    if any(not isinstance(group.get(name, getlink=True), h5py.HardLink) for name in group):
        raise unusable(path, f"'{place[:60]}' has a link; save the file again without links")
    numbered = place.split("/")[-2]
    layer, names = str(group.attrs.get("name", numbered)), sorted(group, key=lambda name: (len(name), name))
    kind = re.sub(r"_\d+$", "", numbered)
    variables = _VARIABLES.get(kind, {}).get(len(names), _OTHERS)
    for name, variable in zip(names, variables, strict=False):
        found[f"{layer}/{variable}"] = _dataset(path, local, group[name], f"{place}/{name}", keep)


def _dataset(path: str, local: str, dataset: Any, place: str, keep: Any) -> LazyArray:
    import h5py

    plain = isinstance(dataset, h5py.Dataset) and dataset.dtype.kind in "fiub" and not dataset.is_virtual
    if not plain or dataset.external:
        raise unusable(path, f"'{place[:60]}' is no plain array of numbers inside of the file")
    shape, dtype = checked_shape(path, place, dataset.shape), dataset.dtype
    if math.prod(shape) * dtype.itemsize > _MAX_RATIO * (dataset.id.get_storage_size() + 2**14):
        raise unusable(path, f"'{place[:60]}' claims more than the file holds")

    def read(kept=keep) -> np.ndarray:
        try:
            with h5py.File(local, "r") as file:
                return file[place][()]
        except (OSError, KeyError) as error:
            raise unusable(path, f"'{place[:60]}' is damaged ({' '.join(str(error).split())[:80]})") from None

    return LazyArray(shape, dtype, read)
