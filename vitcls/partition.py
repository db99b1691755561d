"""How arrays and steps are laid out over devices and processes: strategies `data`, `fsdp` and `pmap`.

`data` and `fsdp` are `jax.jit` over a mesh with one axis: the batch is sharded; the state is replicated, or sharded
too (`fsdp`, as in ZeRO-3: every array of at least `min_shard_elements` along its largest divisible dimension).
`pmap` maps the same step over a leading device axis. All arrays are global; each process holds its own rows.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vitcls.errors import UserError

AXIS = "data"
STRATEGIES = ("data", "fsdp", "pmap")
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh over all devices of all processes and a strategy to use it."""

    strategy: str
    mesh: Mesh
    min_shard_elements: int

    @property
    def mapped(self) -> bool:
        return self.strategy == "pmap"

    @property
    def axis_name(self) -> str | None:
        """The axis that collectives inside a step name; None where the step sees the global batch."""
        return AXIS if self.mapped else None

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

    def whole(self, params: PyTree) -> PyTree:
        """Inside `jit`: gathers parameters that are spread over the devices, so that only the examples of a batch are.

        Without it the compiler may move activations between devices in place of parameters.
        """
        return jax.lax.with_sharding_constraint(params, self.sharding()) if self.strategy == "fsdp" else params

    def local_rows(self, batch_size: int) -> slice:
        """The rows of a global batch that this process feeds."""
        size = batch_size // jax.process_count()
        return slice(jax.process_index() * size, (jax.process_index() + 1) * size)

    def put_batch(self, rows: PyTree, *, stacked: bool = False) -> PyTree:
        """Puts this process's rows [local, ...], or with `stacked` [steps, local, ...], on its devices.

        Under `pmap` the result has the device axis in front: [devices, (steps,) local / devices, ...].
        """

        def put(x):
            if self.mapped:
                axis = int(stacked)
                devices = jax.local_device_count()
                x = x.reshape(*x.shape[:axis], devices, x.shape[axis] // devices, *x.shape[axis + 1 :])
                x = np.moveaxis(x, axis, 0)
                return jax.make_array_from_process_local_data(self._local_sharding(), x)
            spec = (None, AXIS) if stacked else (AXIS,)
            return jax.make_array_from_process_local_data(self.sharding(*spec), x)

        return jax.tree.map(put, rows)

    def replicate(self, tree: PyTree) -> PyTree:
        """Puts a host tree, the same on every process, on all devices."""
        if self.mapped:
            devices = jax.local_device_count()
            return jax.tree.map(
                lambda x: jax.device_put(np.broadcast_to(x, (devices, *np.shape(x))), self._local_sharding()), tree
            )
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(np.shape(x), self.sharding(), lambda index: np.asarray(x)[index]),
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
        return self.to_host(tree) if self.mapped else tree

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

    def _local_sharding(self) -> NamedSharding:
        mesh = Mesh(np.asarray(jax.local_devices()), (AXIS,), axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, PartitionSpec(AXIS))

    def init(self, create: Callable[[jax.Array], PyTree], key: jax.Array) -> PyTree:
        """Creates a state on the devices: eval_shape -> shardings -> jitted init."""
        if self.mapped:
            return self.replicate(jax.device_get(jax.jit(create)(key)))
        shardings = self.state_shardings(jax.eval_shape(create, key))
        return jax.jit(create, out_shardings=shardings)(key)

    def compile_update(self, update: Callable, state: PyTree, sums: PyTree, data: PyTree) -> Callable:
        """Compiles `update(state, sums, data) -> (state, sums)`; the state is donated."""
        if self.mapped:
            return jax.pmap(update, axis_name=AXIS, donate_argnums=0)
        out_shardings = (self.state_shardings(state), self.sharding())
        return jax.jit(update, donate_argnums=0, out_shardings=out_shardings).lower(state, sums, data).compile()

    def compile_evaluation(self, evaluate: Callable) -> Callable:
        """Maps `evaluate(variables, batch) -> outputs`; the outputs are the same on every device."""
        if self.mapped:
            return jax.pmap(evaluate, axis_name=AXIS)
        return jax.jit(evaluate, out_shardings=self.sharding())


def all_devices(strategy: str, *, min_shard_elements: int = 1) -> Partition:
    """The partition over all devices of all processes."""
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    return Partition(strategy, mesh, min_shard_elements)


def wait_for_all(what: str) -> None:
    """Returns when every process has come to this point, which `what` names."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
