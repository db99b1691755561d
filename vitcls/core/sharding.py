"""How arrays and steps are laid out over devices and processes: strategies `data`, `fsdp` and `pmap`.

`data` and `fsdp` are `jax.jit` over a mesh with one axis: the batch is sharded; the state is replicated, or sharded
too (`fsdp`, as in ZeRO-3: every array of at least `min_shard_elements` along its largest divisible dimension).
`pmap` maps the same step over a leading device axis. All arrays are global; each process holds the rows of its own
devices, which need not lie next to each other: the order of devices is that of the mesh and nobody else's.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vitcls.core import rng
from vitcls.core.errors import RunError, UserError
from vitcls.core.rng import BATCH_AXIS as AXIS

STRATEGIES = ("data", "fsdp", "pmap")
PyTree = Any
T = TypeVar("T")
# Algorithms that give the same bits each time, for the price of the faster ones and of choosing by trial.
_DETERMINISTIC = {"xla_gpu_deterministic_ops": True}


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh over all devices of all processes and a strategy to use it."""

    strategy: str
    mesh: Mesh
    min_shard_elements: int = 1
    deterministic: bool = False  # the same bits on every run, on GPUs too

    @property
    def mapped(self) -> bool:
        return self.strategy == "pmap"

    @property
    def device(self) -> jax.Device:
        """One of the devices, which are all of a kind; of this process, if it has any."""
        return next(iter(self._local_devices), self.mesh.devices.flat[0])

    def sharding(self, *spec: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def check_batch_size(self, batch_size: int, *, unit: int = 1) -> None:
        """Raises UserError where a batch cannot be spread evenly, in whole units of so many examples."""
        needed = self.mesh.size * unit
        if batch_size % needed:
            of_units = f" in groups of {unit} (pairs to mix, parts to accumulate)" if unit > 1 else ""
            raise UserError(
                f"config.batch_size={batch_size} cannot be divided over {self.mesh.size} devices{of_units}; "
                f"use a multiple of {needed}, such as {-(-batch_size // needed) * needed}"
            )

    def round_up(self, batch_size: int) -> int:
        """The next batch size that can be spread evenly."""
        return -(-batch_size // self.mesh.size) * self.mesh.size

    def visible(self, batch_size: int) -> int:
        """How many examples of a global batch of `batch_size` one call of the step sees."""
        return batch_size // self.mesh.size if self.mapped else batch_size

    def constrain(self, batch: PyTree) -> PyTree:
        """Inside `jit`: keeps the examples of a batch, made there, spread over the devices."""
        return batch if self.mapped else jax.lax.with_sharding_constraint(batch, self.sharding(AXIS))

    def gather_params(self, params: PyTree) -> PyTree:
        """Inside `jit`: gathers parameters that are spread over the devices, so that only the examples of a batch are.

        Without it the compiler may move activations between devices in place of parameters. Gradients go the other
        way: summed and scattered, so that no device holds all of them.
        """
        return jax.tree.map(self._gather, params) if self.strategy == "fsdp" else params

    def _gather(self, leaf: jax.Array) -> jax.Array:
        spread = self._leaf_sharding(leaf)

        @jax.custom_vjp
        def gather(leaf):
            return jax.lax.with_sharding_constraint(leaf, self.sharding())

        def backward(_, gradient):
            return (jax.lax.with_sharding_constraint(gradient, spread),)

        gather.defvjp(lambda leaf: (gather(leaf), None), backward)
        return gather(leaf)

    def local_rows(self, batch_size: int) -> np.ndarray:
        """The rows int64 [local] of a global batch that this process feeds, in the order of its devices in the mesh."""
        owners = [device.process_index for device in self.mesh.devices.flat]
        return rows_of_process(owners, jax.process_index(), batch_size)

    def put_batch(self, rows: PyTree, *, stacked: bool = False) -> PyTree:
        """Puts this process's rows [local, ...], or with `stacked` [steps, local, ...], on its devices.

        The rows are those of `local_rows`, in that order. Under `pmap` the result has the device axis in front:
        [devices, (steps,) local / devices, ...].
        """
        devices, axis = self._local_devices, int(stacked)

        def put(x: np.ndarray) -> jax.Array:
            parts = np.split(x, len(devices), axis)
            if self.mapped:
                return jax.device_put(np.stack(parts), self._local_sharding())
            spec = (None, AXIS) if stacked else (AXIS,)
            rows = x.shape[axis] // len(devices) * self.mesh.size
            shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
            placed = jax.device_put(parts, devices)
            return jax.make_array_from_single_device_arrays(shape, self.sharding(*spec), placed)

        return jax.tree.map(put, rows)

    def replicate(self, tree: PyTree) -> PyTree:
        """Puts a host tree, the same on every process, on all devices."""
        if self.mapped:
            copies = len(self._local_devices)
            return jax.tree.map(
                lambda x: jax.device_put(np.broadcast_to(x, (copies, *np.shape(x))), self._local_sharding()), tree
            )
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(np.shape(x), self.sharding(), lambda index: np.asarray(x)[index]),
            tree,
        )

    def place(self, tree: PyTree) -> PyTree:
        """Puts a host tree on the devices as a state lies there: under 'fsdp' spread over them."""
        if self.mapped:
            return self.replicate(tree)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(
                np.shape(x), self._leaf_sharding(np.asarray(x)), lambda index: np.asarray(x)[index]
            ),
            tree,
        )

    def to_host(self, tree: PyTree) -> PyTree:
        """Fetches a replicated tree (metrics; under `pmap` any state) as numpy arrays, without the device axis."""

        def fetch(x):
            local = jax.device_get(x.addressable_shards[0].data)
            return local[0] if self.mapped else local

        return jax.tree.map(fetch, tree)

    def to_savable(self, tree: PyTree) -> PyTree:
        """A state as a checkpoint keeps it, the same for every strategy."""
        return jax.tree.map(np.asarray, self.to_host(tree)) if self.mapped else tree

    def from_savable(self, tree: PyTree) -> PyTree:
        """The state that was given to `to_savable`."""
        return self.replicate(tree) if self.mapped else tree

    def state_shardings(self, state: PyTree) -> PyTree:
        """The sharding of every array of a state given by its arrays or shapes ('data' and 'fsdp')."""
        return jax.tree.map(self._leaf_sharding, state)

    def bytes_per_device(self, state: PyTree) -> int:
        """Bytes of a state, given by its shapes, that each device holds."""
        return sum(
            math.prod(self._leaf_sharding(leaf).shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(state)
        )

    def _leaf_sharding(self, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if self.strategy != "fsdp" or leaf.size < self.min_shard_elements:
            return self.sharding()
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % self.mesh.size == 0]
        if not divisible:
            return self.sharding()
        axis = max(divisible, key=lambda axis: leaf.shape[axis])
        return self.sharding(*(None,) * axis, AXIS)

    @property
    def _local_devices(self) -> list[jax.Device]:
        return [device for device in self.mesh.devices.flat if device.process_index == jax.process_index()]

    def _local_sharding(self) -> NamedSharding:
        mesh = Mesh(np.asarray(self._local_devices), (AXIS,), axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, PartitionSpec(AXIS))

    def init(self, create: Callable[..., PyTree], key: jax.Array, *others: PyTree) -> PyTree:
        """Creates a state on the devices by create(key, *others): eval_shape -> shardings -> jitted init."""
        if self.mapped:
            return self.replicate(jax.device_get(jax.jit(create)(key, *others)))
        shardings = self.state_shardings(jax.eval_shape(create, key, *others))
        return jax.jit(create, out_shardings=shardings)(key, *others)

    def compile_update(self, update: Callable, state: PyTree, sums: PyTree, *others: PyTree) -> Callable:
        """Compiles `update(state, sums, *others) -> (state, sums)`; the state is donated.

        Under `pmap` it is compiled by its first call, before that is dispatched: several processes cannot do it ahead.
        """
        if self.mapped:
            return self._pmap(update, donate_argnums=0)
        mapped = jax.jit(update, donate_argnums=0, out_shardings=(self.state_shardings(state), self.sharding()))
        with rng.spread_over(self.mesh):
            lowered = mapped.lower(state, sums, *others)
        return lowered.compile(compiler_options=self._compiler_options)

    def compile_evaluation(self, evaluate: Callable) -> Callable:
        """Maps `evaluate(variables, batch) -> outputs`; the outputs are the same on every device."""
        if self.mapped:
            return self._pmap(evaluate)

        @functools.wraps(evaluate)
        def spread(*arguments):
            with rng.spread_over(self.mesh):
                return evaluate(*arguments)

        return jax.jit(spread, out_shardings=self.sharding(), compiler_options=self._compiler_options)

    def _pmap(self, function: Callable, **options) -> Callable:
        return jax.pmap(function, axis_name=AXIS, devices=list(self.mesh.devices.flat), **options)

    @property
    def _compiler_options(self) -> dict[str, bool]:
        return _DETERMINISTIC if self.deterministic else {}


def all_devices(strategy: str, *, min_shard_elements: int = 1, deterministic: bool = False) -> Partition:
    """The partition over all devices of all processes."""
    return over(jax.devices(), strategy, min_shard_elements=min_shard_elements, deterministic=deterministic)


def over(
    devices: Sequence[jax.Device], strategy: str, *, min_shard_elements: int = 1, deterministic: bool = False
) -> Partition:
    """The partition over these devices."""
    devices = ordered(devices)
    if strategy == "pmap":  # which wants the devices of a process side by side
        devices = np.array(sorted(devices, key=lambda device: device.process_index))
    mesh = Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))
    return Partition(strategy, mesh, min_shard_elements, deterministic)


def ordered(devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the order in which neighbours are close: slice after slice, each along its torus."""

    def slice_of(device: jax.Device) -> int:
        return getattr(device, "slice_index", None) or 0

    slices = [list(group) for _, group in itertools.groupby(sorted(devices, key=slice_of), slice_of)]
    return np.concatenate([mesh_utils.create_device_mesh((len(group),), group) for group in slices])


def rows_of_process(owners: Sequence[int], process: int, batch_size: int) -> np.ndarray:
    """The rows int64 [local] of a batch that `process` feeds; `owners` is the process of each device of the mesh.

    >>> rows_of_process([0, 1, 0, 1], 1, batch_size=8)
    array([2, 3, 6, 7])
    """
    rows = np.arange(batch_size).reshape(len(owners), -1)  # [devices, rows of a device]
    return rows[np.asarray(owners) == process].ravel()


def check_same(values: Mapping[str, Any]) -> None:
    """Raises UserError where a value, of those that JSON has, is not the same on every process."""
    if jax.process_count() == 1:
        return
    text = json.dumps(values).encode().ljust(_VALUES_BYTES, b"\0")
    first, *others = (
        json.loads(bytes(row).rstrip(b"\0")) for row in multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    )
    for process, other in enumerate(others, 1):
        for key, value in first.items():
            if other[key] != value:
                raise UserError(
                    f"{key} is {value!r} on process 0 and {other[key]!r} on process {process}; give all the same"
                )


_VALUES_BYTES = 2**15
_VERDICT_BYTES = 2_048


def to_first_process(tree: PyTree) -> PyTree:
    """The whole of arrays that lie on the devices of all processes, as numpy arrays; on process 0 alone, else None."""

    def fetch(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return multihost_utils.process_allgather(leaf, tiled=True)

    host = jax.tree.map(lambda leaf: fetch(leaf) if isinstance(leaf, jax.Array) else leaf, tree)
    return host if jax.process_index() == 0 else None


def all_or_none(action: Callable[[], T]) -> T:
    """Runs `action`, in which no process waits for another, on every process, and returns this one's result.

    Where it fails on one process all raise: its UserError as it is, any other failure as a RunError that names it. So
    nobody waits at the next collective for a process that has left.
    """
    if jax.process_count() == 1:
        return action()
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # shared first, whatever it is
        failure = error
    kind = "" if failure is None else "user" if isinstance(failure, UserError) else "other"
    text = f"{kind} {failure}".encode(errors="surrogateescape")[:_VERDICT_BYTES] if kind else b""
    verdicts = multihost_utils.process_allgather(np.frombuffer(text.ljust(_VERDICT_BYTES, b"\0"), np.uint8))
    if failure is not None:
        raise failure
    for process, verdict in enumerate(verdicts):
        kind, _, message = bytes(verdict).rstrip(b"\0").decode(errors="surrogateescape").partition(" ")
        if kind == "user":
            raise UserError(message)
        if kind:
            raise RunError(f"process {process} failed: {message}")
    return result
