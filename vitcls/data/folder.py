"""An image folder: one directory per class, in train/val/test directories or not."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vitcls.cache import cache_dir
from vitcls.data import images as image_files
from vitcls.data.dataset import SkippedFile, Source, Split
from vitcls.data.images import BadImage
from vitcls.errors import UserError

SPLIT_FOLDERS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


@dataclasses.dataclass(frozen=True)
class FileImages:
    """Images in files; see `data.images.EncodedImages`."""

    paths: tuple[pathlib.Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def take(self, indices: np.ndarray) -> "FileImages":
        return FileImages(tuple(self.paths[index] for index in indices))


def folder(config) -> Source:
    """root/<class>/<image>, or root/{train,val,test}/<class>/<image>."""
    root = pathlib.Path(config.data_dir).expanduser()
    if not config.data_dir or not root.is_dir():
        raise UserError(f"config.dataset.data_dir='{config.data_dir}' is not a directory; give the root of the images")
    skipped: list[SkippedFile] = []
    roots = _split_roots(root)
    class_names = tuple(path.name for path in _directories(roots["train"]))
    if not class_names:
        raise UserError(f"{roots['train']} has no directories; put the images of each class in a directory of its own")

    splits, shapes = {}, set()
    verdicts = _Verdicts(root)
    for split, split_root in roots.items():
        skipped += [
            SkippedFile(path.relative_to(root).as_posix(), "is a linked directory; copy or move it here")
            for path in sorted(split_root.iterdir())
            if path.is_symlink() and path.is_dir() and not path.name.startswith(".")
        ]
        for path in _directories(split_root):
            if path.name not in class_names:
                raise UserError(f"{path} is a class that {roots['train']} does not have")
        paths, labels = [], []
        for label, class_name in enumerate(class_names):
            for path, verdict in verdicts.of(_files(split_root / class_name, root, skipped)):
                if isinstance(verdict, str):
                    skipped.append(SkippedFile(path.relative_to(root).as_posix(), verdict))
                    continue
                width, height, channels = verdict
                shapes.add((height, width, channels))
                paths.append(path)
                labels.append(label)
        splits[split] = Split(FileImages(tuple(paths)), np.asarray(labels, np.int32))
    verdicts.store()
    return Source(root.name, class_names, splits, tuple(shapes), tuple(skipped))


def _split_roots(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The directory of every split; a directory without classes in it is itself a class, whatever its name."""
    roots = {}
    for path in _directories(root):
        split = SPLIT_FOLDERS.get(path.name)
        if split and _directories(path):
            if split in roots:
                raise UserError(f"{roots[split]} and {path} are both the {split} split; keep one")
            roots[split] = path
    if roots and "train" not in roots:
        raise UserError(f"{root} has a directory '{next(iter(roots.values())).name}' but no 'train'")
    return roots or {"train": root}


def _directories(path: pathlib.Path) -> list[pathlib.Path]:
    """The real, visible directories in `path`, by name."""
    inside = sorted(path.iterdir())
    return [child for child in inside if child.is_dir() and not child.is_symlink() and not child.name.startswith(".")]


def _files(path: pathlib.Path, root: pathlib.Path, skipped: list[SkippedFile]) -> list[pathlib.Path]:
    """The visible files below a class directory, by name; links that lead out of the root are skipped."""
    real_root = os.path.realpath(root)
    found = []
    for directory, subdirectories, names in os.walk(path):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in [*names, *(name for name in subdirectories if os.path.islink(os.path.join(directory, name)))]:
            child = pathlib.Path(directory, name)
            if name.startswith("."):
                continue
            if child.is_symlink():  # os.path.realpath, since Path.resolve raises for a link to itself
                name = child.relative_to(root).as_posix()
                if not pathlib.Path(os.path.realpath(child)).is_relative_to(real_root):
                    skipped.append(SkippedFile(name, "is a link out of the folder"))
                    continue
                if not child.is_file():
                    skipped.append(SkippedFile(name, "is a link to no file"))
            if child.is_file():
                found.append(child)
    return sorted(found)


class _Verdicts:
    """Whether files can be decoded to their end: (width, height, channels), or the reason why not.

    Verdicts are kept in the cache by path, size and time, so that only new files are looked at again.
    """

    def __init__(self, root: pathlib.Path):
        name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
        self._path = cache_dir() / "folders" / f"{name}.json"
        self._known: dict[str, list] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = known if isinstance(known, dict) else {}
        self._current: dict[str, list] = {}

    def of(self, paths: list[pathlib.Path]) -> list[tuple[pathlib.Path, tuple[int, int, int] | str]]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(zip(paths, pool.map(self._verdict, paths), strict=True))

    def _verdict(self, path: pathlib.Path) -> tuple[int, int, int] | str:
        try:
            status = path.stat()
            key = f"{os.path.realpath(path)}|{status.st_size}|{status.st_mtime_ns}"
            verdict = self._known.get(key)
            if verdict is None:
                verdict = list(image_files.verify(path))
        except BadImage as error:
            verdict = str(error)
        except OSError as error:  # may pass without a change of the file: not to be kept
            return f"cannot be read ({error.strerror})"
        self._current[key] = verdict
        return verdict if isinstance(verdict, str) else tuple(verdict)

    def store(self) -> None:
        temporary = self._path.with_name(f"{self._path.stem}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # as on a full disk: the files are looked at again next time
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._current), encoding="utf-8")
            os.replace(temporary, self._path)
