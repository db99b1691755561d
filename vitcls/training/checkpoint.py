"""Checkpoints that can be trusted: Orbax, asynchronous, each with a manifest of SHA-256 sums; the only Orbax file.

A checkpoint is a folder `<step>/`. Orbax writes it under a temporary name and renames it when it is complete; the
manifest is written just before that rename, so a folder with a plain number and a matching manifest is whole. A
folder that does not match (a bad disk, a torn copy) is passed over for the next older one.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vitcls.core import sharding
from vitcls.core.errors import RunError
from vitcls.metrics.table import higher_is_better
from vitcls.training.files import MANIFEST, RECORD

PyTree = Any
_UNSTABLE = "_CHECKPOINT_METADATA"  # Orbax stamps it with the time of the commit, after the manifest
_SMALLEST_SLICE = 2**22  # bytes of a replicated array that a device saves on its own, beside the others
_logger = logging.getLogger("vitcls")


def _is_news(record: logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax logs of what it raises as well."""
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_news)


@contextlib.contextmanager
def _full_disk_in_short() -> Iterator[None]:
    """Raises as OSError what TensorStore says of a full disk, in a paragraph of its own."""
    try:
        yield
    except ValueError as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if f"[os_error_code='{number}']" in str(error):
                raise OSError(number, os.strerror(number)) from None
        raise


def _score(metrics: dict[str, float], metric: str) -> float:
    """The value to compare; what is not a number (or was saved as null) is worse than any other."""
    value = metrics[metric]
    if value is None or math.isnan(value):
        return -math.inf if higher_is_better(metric) else math.inf
    return value


def _first_best(metrics: dict[int, dict[str, float] | None], metric: str) -> int | None:
    """Of steps, oldest first, that with the best `metric`, of equals the first; None where no step has metrics."""
    scores = {step: _score(values, metric) for step, values in metrics.items() if values is not None}
    return (max if higher_is_better(metric) else min)(scores, key=scores.get, default=None)


@dataclasses.dataclass
class _KeepBest(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint that `best` finds.

    Orbax's own `BestN` keeps the last of equals, and none that an earlier process wrote: their metrics are in our
    records, not in its files.
    """

    metric: str
    earlier: dict[int, dict[str, float]]  # step -> metrics of the best that was there when this process began

    def should_preserve(self, checkpoints, *, context):
        best = _first_best(
            {each.step: each.metrics or self.earlier.get(each.step) for each in checkpoints}, self.metric
        )
        return [each.step == best for each in checkpoints]


class Checkpoints(contextlib.AbstractContextManager):
    """Writes checkpoints under `directory`: the last `keep`, and the best by `metric`.

    All processes write their parts of it; where it is not `shared` by them, process 0 writes the whole.
    """

    def __init__(self, directory: os.PathLike | str, *, keep: int, metric: str, shared: bool = True):
        self._directory = pathlib.Path(directory).absolute()
        self._alone = not shared and jax.process_count() > 1
        self._writes = not self._alone or jax.process_index() == 0
        if not self._writes:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        self._saving: int | None = None
        earlier = {step: _metrics(self._directory / str(step))} if (step := best(directory, metric)) is not None else {}
        policy = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(keep), _KeepBest(metric, earlier)]
        )
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers={"tree": _tree_handler(), "record": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                create=False,
                best_mode="max" if higher_is_better(metric) else "min",
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=0, active_processes={0}, barrier_sync_key_prefix="alone"
                )
                if self._alone
                else ocp.options.MultiprocessingOptions(),
            ),
        )

    def save(self, step: int, tree: PyTree, *, record: dict, metrics: dict[str, float] | None) -> None:
        """Starts to save a tree of arrays and a small JSON record; returns when the arrays are copied to the host.

        `metrics`: of an evaluation of just this tree, else None; they decide which checkpoint is the best.
        """
        if self._alone:
            tree = sharding.to_first_process(tree)
        if tree is None or step in self._manager.all_steps():
            return
        self.wait()
        self._saving = step
        with _full_disk_in_short():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.PyTreeSave(tree), record=ocp.args.JsonSave(record | {"metrics": metrics})
                ),
                metrics=metrics,
                force=True,
            )

    def wait(self) -> None:
        """Returns when everything is on disk."""
        if self._writes:
            with _full_disk_in_short():
                self._manager.wait_until_finished()

    def __exit__(self, *error) -> None:
        if self._writes:
            with _full_disk_in_short():
                self._manager.close()  # waits

    def _write_manifest(self) -> None:
        """Runs in Orbax's thread, when all files of a checkpoint are written and before it takes its final name."""
        if jax.process_index():
            return
        (folder,) = self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        text = json.dumps(_digests(folder), indent=1, sort_keys=True)
        with open(folder / MANIFEST, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Saves arrays that every device has from one of them, unless they are large.

    By default each device saves a slice of every array, however small: eight dispatches and eight chunks in place of
    one, for a bias of 64 numbers.
    """
    handlers = ocp.type_handlers
    arrays = handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SMALLEST_SLICE)
    numbers = handlers.ScalarHandler()
    registry = handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, handlers.NumpyHandler()), (np.number, numbers)
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def steps(directory: os.PathLike | str) -> list[int]:
    """The steps of which there is a finished checkpoint, oldest first."""
    directory = pathlib.Path(directory)
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal()) if directory.is_dir() else []


def damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the checkpoint in `folder`, or None where every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    digests = _digests(folder)
    for name, digest in manifest.items():
        if digests.get(name) != digest:
            return f"{name} is {'damaged' if name in digests else 'missing'}"
    return None


def latest_whole(directory: os.PathLike | str, *, quarantine: bool) -> int | None:
    """The newest step whose checkpoint is whole, None where there is no checkpoint at all.

    With `quarantine`, damaged newer ones are renamed to `<step>.damaged`, so that the run can write theirs again, and
    what a killed run was writing is removed; no other run may be alive. Raises RunError where there are checkpoints,
    but none is whole.
    """
    directory = pathlib.Path(directory)
    if quarantine:
        for unfinished in directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    found = steps(directory)
    for step in reversed(found):
        folder = directory / str(step)
        problem = damage(folder)
        if problem is None:
            return step
        _logger.warning("checkpoint %s is passed over: %s", folder, problem)
        if quarantine:
            folder.rename(_free_name(folder))
    if found:
        raise RunError(f"no checkpoint in {directory} is whole; restore one from a copy, or start in another workdir")
    return None


def best(directory: os.PathLike | str, metric: str) -> int | None:
    """The step with the best `metric` among the whole checkpoints saved with one; of equals the first."""
    directory = pathlib.Path(directory)
    metrics = {step: _metrics(directory / str(step)) for step in steps(directory)}
    while (step := _first_best(metrics, metric)) is not None and damage(directory / str(step)):
        del metrics[step]
    return step


def restore(directory: os.PathLike | str, step: int, template: PyTree) -> tuple[PyTree, dict]:
    """Reads the tree and the record of `step`.

    `template` gives the structure, shapes, dtypes and shardings (arrays, or ShapeDtypeStructs); it may leave out
    parts of what was saved.
    """
    folder = pathlib.Path(directory).absolute() / str(step)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(
            folder / "tree",
            args=ocp.args.PyTreeRestore(
                item=template,
                restore_args=ocp.checkpoint_utils.construct_restore_args(template),
                partial_restore=True,
            ),
        )
    return tree, _record(folder)


def has(directory: os.PathLike | str, step: int, *path: str) -> bool:
    """Whether the tree saved at `step` has the part `path`, which older versions may not have saved."""
    folder = pathlib.Path(directory).absolute() / str(step) / "tree"
    part = ocp.PyTreeCheckpointHandler().metadata(folder)
    for name in path:
        if name not in part:
            return False
        part = part[name]
    return True


def _record(folder: pathlib.Path) -> dict:
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def _metrics(folder: pathlib.Path) -> dict[str, float] | None:
    """Of the evaluation of a checkpoint, if there was one; None also where its record is damaged."""
    try:
        return _record(folder)["metrics"]
    except (OSError, ValueError):
        return None


def _digests(folder: pathlib.Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name != _UNSTABLE and name != MANIFEST:
            with open(path, "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _free_name(folder: pathlib.Path) -> pathlib.Path:
    names = (folder.with_name(f"{folder.name}.damaged{suffix}") for suffix in ("", *range(2, 1000)))
    return next(name for name in names if not name.exists())
