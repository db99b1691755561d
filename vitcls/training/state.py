"""TrainState: everything that training changes, and how it is created."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from vitcls import optim
from vitcls.models.variables import init_variables
from vitcls.optim import parts

PyTree = Any


class NonFinite(flax.struct.PyTreeNode):
    """Counts of updates that were skipped because the loss or a gradient was not finite; int32 scalars.

    Once `streak` reaches the limit of the run no update is applied any more, and `streak` no longer moves.
    """

    streak: jax.Array
    total: jax.Array
    last_step: jax.Array  # the step of the newest skipped update, -1 before the first


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds. The averages and `plateau` are None where the config does not ask for them.

    Averaged parameters need the averaged statistics of the norms: those of the newest parameters belong to another
    network.
    """

    step: jax.Array  # int32 scalar: updates tried so far, and so the number of the next batch
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema_params: PyTree
    ema_batch_stats: PyTree
    plateau: PyTree  # optax.contrib.ReduceLROnPlateauState
    nonfinite: NonFinite
    task: PyTree = None  # extra state of the task

    @property
    def variables(self) -> dict[str, PyTree]:
        """The variables that are evaluated and reported: the averages where there are any."""
        if self.ema_params is None:
            return {"params": self.params, "batch_stats": self.batch_stats}
        return {"params": self.ema_params, "batch_stats": self.ema_batch_stats}


def create_state(
    key: jax.Array,
    *,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    optimizer: optax.GradientTransformation,
    ema: bool,
    schedule_config,
    init_task: Callable[[jax.Array, PyTree], PyTree] = lambda key, variables: None,
    trained: parts.Trained | None = None,
    initial: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """A state at step 0; pure, so that it can be traced for its shapes or jitted on its shardings.

    `initial` has the variables, by path, that do not start at random. What is not `trained` has no optimizer state.
    """
    variables = init_variables(model, key, image_shape)
    if initial:
        flat = traverse_util.flatten_dict(variables, sep="/") | dict(initial)
        variables = traverse_util.unflatten_dict(flat, sep="/")
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    ours, _ = parts.split(params, None if trained is None else trained.params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(ours),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        ema_batch_stats=jax.tree.map(jnp.copy, batch_stats) if ema else None,
        plateau=optim.plateau_init(schedule_config),
        nonfinite=NonFinite(
            streak=jnp.zeros((), jnp.int32), total=jnp.zeros((), jnp.int32), last_step=jnp.full((), -1, jnp.int32)
        ),
        task=init_task(key, variables),
    )
