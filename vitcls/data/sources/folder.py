"""An image folder: one directory per class, in train/val/test directories or not."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vitcls.core.errors import UserError
from vitcls.core.progress import show_progress
from vitcls.data.dataset import SkippedFile, Source, Split
from vitcls.data.verdicts import verdicts

SPLIT_FOLDERS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_LINKED = "is a linked directory; copy or move it here"


@dataclasses.dataclass(frozen=True)
class FileImages:
    """Images in files; see `data.images.EncodedImages`. As bytes, names are small and need not be UTF-8."""

    root: str
    names: np.ndarray  # [N], bytes: paths below the root

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def read(self, index: int) -> bytes:
        with open(self.name(index), "rb", buffering=0) as file:
            return file.read()

    def take(self, indices: np.ndarray) -> "FileImages":
        return FileImages(self.root, self.names[indices])


@dataclasses.dataclass(frozen=True)
class Folder:
    """root/<class>/<image>, or root/{train,val,test}/<class>/<image>."""

    def load(self, config) -> Source:
        root = pathlib.Path(config.data_dir).expanduser()
        if not config.data_dir or not os.path.isdir(root):
            raise UserError(
                f"config.dataset.data_dir='{config.data_dir}' is not a directory; give the root of the images"
            )
        roots = _split_roots(root)
        class_names = tuple(path.name for path in _directories(roots["train"]))
        if not class_names:
            raise _without_classes(roots["train"])

        for path in itertools.chain(*map(_directories, roots.values())):
            if path.name not in class_names:
                link = "; there it is a link, which is not followed" if (roots["train"] / path.name).is_dir() else ""
                raise UserError(f"{path} is a class that {roots['train']} does not have{link}")
        listings = _list_classes(root, roots, class_names)
        names, keys, stamps = (
            np.concatenate([getattr(files, part) for files in listings]) for part in ("names", "keys", "stamps")
        )
        shapes, reasons = verdicts(root, names, keys, stamps)

        splits, skipped, end = {}, [], 0
        usable = shapes[:, 2] > 0
        for number, split in enumerate(roots):
            skipped += _linked_directories(roots[split], root)
            chosen = []
            for files in listings[number * len(class_names) : (number + 1) * len(class_names)]:
                rows = np.arange(end, end := end + len(files.names))
                skipped += files.skipped
                skipped += [SkippedFile(os.fsdecode(names[row]), reasons[row]) for row in rows[~usable[rows]].tolist()]
                chosen.append(rows[usable[rows]])
            labels = np.repeat(np.arange(len(class_names), dtype=np.int32), list(map(len, chosen)))
            splits[split] = Split(FileImages(str(root), names[np.concatenate(chosen)]), labels)
        widths, heights, channels = shapes[usable].T.tolist()
        distinct = set(zip(heights, widths, channels, strict=True))
        return Source(root.name, class_names, splits, tuple(distinct), tuple(skipped))


def _split_roots(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The directory of every split.

    A directory without classes in it is itself a class, whatever its name, where others beside it are no splits.
    Raises UserError for what is a split by its name, and cannot be taken as one.
    """
    roots, directories = {}, _directories(root)
    for linked in _linked_directories(root, root):
        if linked.path in SPLIT_FOLDERS and _directories(root / linked.path):
            raise UserError(f"{root / linked.path} {linked.reason}")
    for path in directories:
        split = SPLIT_FOLDERS.get(path.name)
        if split and _directories(path):
            if split in roots:
                raise UserError(f"{roots[split]} and {path} are both the {split} split; keep one")
            roots[split] = path
    named = [path for path in directories if path.name.lower() in SPLIT_FOLDERS]
    if roots or (len(named) > 1 and len(named) == len(directories)):
        for path in named:
            if path.name != path.name.lower():
                raise UserError(f"{path} is no split by its name; call it '{path.name.lower()}'")
            if path not in roots.values() and any(not child.name.startswith(".") for child in path.iterdir()):
                raise _without_classes(path)
    if roots and "train" not in roots:
        raise UserError(f"{root} has a directory '{next(iter(roots.values())).name}' but no 'train'")
    return roots or {"train": root}


def _without_classes(path: pathlib.Path) -> UserError:
    if linked := _linked_directories(path, path):
        return UserError(f"{path / linked[0].path} {linked[0].reason}")
    return UserError(f"{path} has no directories; put the images of each class in a directory of its own")


def _directories(path: pathlib.Path) -> list[pathlib.Path]:
    """The real, visible directories in `path`, by name."""
    inside = sorted(path.iterdir())
    return [child for child in inside if child.is_dir() and not child.is_symlink() and not child.name.startswith(".")]


def _linked_directories(split_root: pathlib.Path, root: pathlib.Path) -> list[SkippedFile]:
    return [
        SkippedFile(path.relative_to(root).as_posix(), _LINKED)
        for path in sorted(split_root.iterdir())
        if path.is_symlink() and path.is_dir() and not path.name.startswith(".")
    ]


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The visible files below a class directory, by name, as `data.verdicts` takes them."""

    names: np.ndarray
    keys: np.ndarray
    stamps: np.ndarray
    skipped: list[SkippedFile]


def _list_classes(root: pathlib.Path, roots: dict[str, pathlib.Path], class_names: Sequence[str]) -> list[_Listing]:
    """One listing for each class of each split, in threads, for file systems that take long to answer."""
    directories = [split_root / name for split_root in roots.values() for name in class_names]
    with ThreadPoolExecutor() as pool:
        listings = pool.map(lambda directory: _list_files(str(directory), str(root)), directories)
        return list(show_progress(listings, len(directories), "listing the directories of classes"))


def _list_files(directory: str, root: str) -> _Listing:
    """Lists a class directory, which may be missing; links that lead out of the root, or to no file, are skipped."""
    real_root, below_root = os.path.realpath(root), len(os.path.join(root, ""))
    rows, skipped, waiting = [], [], [] if os.path.islink(directory) else [directory]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except FileNotFoundError:
            continue
        except OSError as error:
            skipped.append(SkippedFile(here[below_root:], f"cannot be read ({error.strerror})"))
            continue
        waiting += sorted((entry.path for entry in visible if entry.is_dir(follow_symlinks=False)), reverse=True)
        # Skipped files keep their order, which dataset.json of a run holds: linked directories are last, by name.
        for entry in sorted(visible, key=lambda entry: entry.path if _is_linked_directory(entry) else ""):
            name = key = entry.path[below_root:]
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if problem := _link_problem(target, real_root):
                    skipped.append(SkippedFile(name, problem))
                    continue
                key = os.path.relpath(target, real_root)
            if entry.is_file():
                rows.append((name, key, *_stamp(entry)))
    rows.sort(key=lambda row: row[0].split(os.sep))
    names, keys = (np.array([os.fsencode(row[part]) for row in rows], "S") for part in (0, 1))
    return _Listing(names, keys, np.array([row[2:] for row in rows], np.int64).reshape(-1, 2), skipped)


def _is_linked_directory(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and os.path.isdir(entry.path)


def _link_problem(target: str, real_root: str) -> str:
    if not pathlib.Path(target).is_relative_to(real_root):
        return "is a link out of the folder"
    return "" if os.path.isfile(target) else "is a link to no file"


def _stamp(entry: os.DirEntry) -> tuple[int, int]:
    """Size and time of change; of no file where that cannot be told, so that opening it says why."""
    try:
        status = entry.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
