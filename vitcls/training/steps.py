"""train_step and eval_step: pure functions of their arguments; no files, no devices, no globals."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from vitcls import metrics, optim
from vitcls.core import rng
from vitcls.models.layers import keeping_statistics
from vitcls.optim import parts
from vitcls.optim.parts import Trained
from vitcls.tasks.base import Aux, Batch, Output, Task, Tools, Updated
from vitcls.tasks.losses import l2_penalty
from vitcls.training.state import NonFinite, TrainState

Sums = dict[str, jax.Array]
PyTree = Any
_OWN_SUMS = ("loss", "l2", "count", "gradient_norm", "updates", "skipped")
_OWN_MEANS = (*_OWN_SUMS, "images_per_second", "seconds", "learning_rate", "epoch")


def zero_sums(means: Iterable[str] = ("correct",)) -> Sums:
    """Where the sums of a logging interval start, float32 scalars: those of every step, and those that a task means."""
    return {name: jnp.zeros((), jnp.float32) for name in (*_OWN_SUMS, *means)}


def make_normalize(mean, std) -> Callable[[jax.Array], jax.Array]:
    """Returns images float32 [B, H, W, C] in [0, 1] -> (images - mean) / std, per channel."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return lambda images: (images - mean[None, None, None, :]) / std[None, None, None, :]


def make_tools(
    model: nn.Module,
    *,
    augment: Callable,
    normalize: Callable,
    num_classes: int,
    gather_params: Callable[[PyTree], PyTree] = lambda params: params,
    trained: Trained | None = None,
) -> Tools:
    """What the step lends to a task, for `model` as it is trained; None trains all of it."""
    kept = set()
    if trained is not None:
        kept = {path[:-1] for path, moves in traverse_util.flatten_dict(trained.batch_stats).items() if not moves}

    def forward(params, batch_stats, images, key, *, sow=False) -> Output:
        with keeping_statistics(kept):
            logits, updated = model.apply(
                {"params": gather_params(params), "batch_stats": batch_stats},
                images,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats", *(["intermediates"] if sow else [])],
            )
        return Output(logits, updated.get("batch_stats", batch_stats), updated.get("intermediates", {}))

    def evaluate(params, batch_stats, images) -> jax.Array:
        return model.apply({"params": gather_params(params), "batch_stats": batch_stats}, images, train=False)

    return Tools(
        forward, augment, normalize, gather_params, _gather_batch, rng.example_positions, num_classes, evaluate
    )


def _global_sum(tree: PyTree) -> PyTree:
    """The sum over the devices of a mapped axis; under `jit` a sum over the batch is that already."""
    axis = rng.mapped_axis()
    return tree if axis is None else jax.lax.psum(tree, axis)


def _gather_batch(tree: PyTree) -> PyTree:
    axis = rng.mapped_axis()
    return tree if axis is None else jax.lax.all_gather(tree, axis, tiled=True)


class Update(NamedTuple):
    """How gradients become new parameters."""

    optimizer: optax.GradientTransformation  # at learning rate 1
    schedule: Callable[[jax.Array], jax.Array]  # step -> learning rate
    l2: float = 0.0
    ema_decay: float = 0.0
    accumulate: int = 1  # parts of a batch, one after the other
    unit: int = 1  # neighbours in a batch that stay in one part
    nonfinite_limit: int = 10
    total_steps: int = 2**31 - 1
    trained: Trained | None = None  # what is; None for everything

    def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """The parameters that are trained, and the others."""
        return parts.split(params, None if self.trained is None else self.trained.params)


def make_train_step(task: Task, tools: Tools, update: Update) -> Callable[..., tuple[TrainState, Sums]]:
    """Builds train_step(state, batch, key, frozen=None) -> (state, sums over the batch).

    The objective is the mean of the task's loss over the unmasked examples plus l2 / 2 times the sum of squares of the
    decayed parameters (the papers' "Adam + L2"). The batch is the global one or, under `pmap`, this device's part of
    it. With `accumulate` > 1 it is augmented and processed in so many parts, for the memory of one. From step
    `total_steps` on it changes nothing and counts nothing, so that a last call of fewer steps is the same program.
    `frozen` holds the arrays of `task.frozen`.

    Raises ValueError, when it is built or traced, for a task whose names or shapes cannot be right.
    """
    if taken := [name for name in task.means if name in _OWN_MEANS]:
        raise ValueError(f"the task's mean '{taken[0]}' is logged by every step already; rename it")

    def train_step(state: TrainState, batch: Batch, key: jax.Array, frozen: PyTree = None) -> tuple[TrainState, Sums]:
        augment_key, dropout_key = jax.random.split(key)
        batch = batch | {"key": rng.example_keys(augment_key, batch["label"].shape[0])}
        count = _global_sum(jnp.sum(batch["mask"]))

        grads, aux = _gradients(task, tools, update, state, batch, frozen, dropout_key, count)
        sums = aux.sums
        penalty = jnp.zeros((), jnp.float32)
        if update.l2:
            ours, _ = update.split(state.params)
            mask = optim.decay_mask(ours)
            penalty, decay = jax.value_and_grad(lambda params: update.l2 * l2_penalty(params, mask))(ours)
            grads = jax.tree.map(jnp.add, grads, decay)

        gradient_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums["loss"] + penalty) & jnp.isfinite(gradient_norm)
        due = state.step < update.total_steps
        applied = due & finite & (state.nonfinite.streak < update.nonfinite_limit)

        new = _updated(task, update, state, grads, aux)
        old = {name: getattr(state, name) for name in new}
        state = state.replace(
            **jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old),
            step=state.step + due.astype(jnp.int32),
            nonfinite=_count_skips(state.nonfinite, state.step, due, finite, update.nonfinite_limit),
        )
        sums = {name: sums[name] for name in ("loss", *task.means.values())}
        sums |= {"l2": penalty * count, "count": count, "gradient_norm": gradient_norm, "updates": 1.0}
        sums = {name: jnp.where(applied, value, 0.0).astype(jnp.float32) for name, value in sums.items()}
        return state, sums | {"skipped": jnp.where(due & ~applied, 1.0, 0.0)}

    return train_step


def _gradients(
    task: Task,
    tools: Tools,
    update: Update,
    state: TrainState,
    batch: Batch,
    frozen: PyTree,
    key: jax.Array,
    count: jax.Array,
) -> tuple[PyTree, Aux]:
    """The gradients of a batch, of what is trained alone, and its Aux.

    That is the statistics after the last part, sums over all parts, and their rows.
    """
    ours, others = update.split(state.params)

    def objective(ours, batch_stats, inputs, mask, key):
        params = parts.merge(ours, others)
        losses, aux = task.loss(tools, params, batch_stats, inputs, state.task, frozen, key)
        _check(losses, aux, mask.shape, task)
        total = jnp.sum(mask * losses)
        sums = {name: jnp.tensordot(mask, values.astype(jnp.float32), 1) for name, values in aux.sums.items()}
        return total / count, aux._replace(sums={"loss": total} | sums)

    def one_part(batch_stats, part, index):
        """(batch statistics, (gradients, sums), rows) of a part, whose images are still uint8."""
        inputs, part_key = task.inputs(tools, part), jax.random.fold_in(key, index)
        gradient = jax.value_and_grad(objective, has_aux=True)
        (_, aux), grads = gradient(ours, batch_stats, inputs, part["mask"], part_key)
        return aux.batch_stats, (grads, aux.sums), aux.rows

    def whole(batch_stats, summed, rows):
        grads, sums = _global_sum(summed)
        return grads, Aux(batch_stats, sums, _gather_batch(rows))

    if update.accumulate == 1:
        return whole(*one_part(state.batch_stats, batch, jnp.zeros((), jnp.int32)))

    def add_part(carry, indexed):
        batch_stats, summed, rows = one_part(carry[0], *indexed)
        return (batch_stats, jax.tree.map(jnp.add, carry[1], summed)), rows

    pieces = split_into_parts(batch, update.accumulate, update.unit), jnp.arange(update.accumulate)
    _, shapes, _ = jax.eval_shape(one_part, state.batch_stats, *jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    carry, rows = jax.lax.scan(add_part, (state.batch_stats, zeros), pieces)
    return whole(*carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows))


def _check(losses: jax.Array, aux: Aux, shape: tuple[int, ...], task: Task) -> None:
    """Raises ValueError for a loss or sums of other shapes, or without what the task's means need."""
    if losses.shape != shape:
        raise ValueError(f"the task's loss has shape {losses.shape}; it must be {shape}, one value for each example")
    for name, values in aux.sums.items():
        if name in _OWN_SUMS or values.shape[:1] != shape:
            why = "is the step's own name" if name in _OWN_SUMS else f"has shape {values.shape}, not {shape} and more"
            raise ValueError(f"the task's sum '{name}' {why}")
    for name, of in task.means.items():
        if aux.sums[of].shape != shape if of in aux.sums else True:
            raise ValueError(f"the task's mean '{name}' is of the sum '{of}', which its loss must give as {shape}")


def _updated(task: Task, update: Update, state: TrainState, grads: PyTree, aux: Aux) -> dict[str, PyTree]:
    """The fields of the state that an update changes."""
    ours, others = update.split(state.params)
    updates, opt_state = update.optimizer.update(grads, state.opt_state, ours)
    learning_rate = update.schedule(state.step) * (1.0 if state.plateau is None else state.plateau.scale)
    ours = jax.tree.map(lambda p, u: p + (learning_rate * u).astype(p.dtype), ours, updates)
    ours = optim.keep_pruned(ours, opt_state)
    params = parts.merge(ours, others)
    new = {"params": params, "batch_stats": aux.batch_stats, "opt_state": opt_state}
    new["task"] = task.update(state.task, Updated(state.step, params, *aux))
    if state.ema_params is not None:
        average = Trained(state.ema_params, state.ema_batch_stats)
        average, fixed = parts.split(average, update.trained)  # whose average would differ in its last bits
        newest, _ = parts.split(Trained(params, aux.batch_stats), update.trained)
        average = Trained(*optim.ema_update(average, newest, update.ema_decay, state.step))
        average = average._replace(params=optim.keep_pruned(average.params, opt_state))
        average = parts.merge(average, fixed)
        new |= dict(zip(("ema_params", "ema_batch_stats"), average, strict=True))
    return new


def split_into_parts(batch: PyTree, parts: int, unit: int) -> PyTree:
    """Deals the `unit`s of a batch out to `parts`, in turn: [B, ...] -> [parts, B / parts, ...].

    In turn, not in blocks, so that every device keeps the examples that it has.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, parts, unit, *x.shape[1:])  # [B, ...] -> [B / (P u), P, u, ...] -> [P, B / (P u), u, ...]
        return jnp.moveaxis(x, 1, 0).reshape(parts, -1, *x.shape[3:])

    return jax.tree.map(split, batch)


def _count_skips(counts: NonFinite, step: jax.Array, due: jax.Array, finite: jax.Array, limit: int) -> NonFinite:
    """Counts the update of `step`, if due; after `limit` skips in a row the counts stand still: the run is over."""
    running = due & (counts.streak < limit)
    skipped = running & ~finite
    return NonFinite(
        streak=jnp.where(running, jnp.where(finite, 0, counts.streak + 1), counts.streak),
        total=counts.total + skipped,
        last_step=jnp.where(skipped, step, counts.last_step),
    )


def make_train_call(
    train_step: Callable, *, batch_fn: Callable[[Any, jax.Array, int], Callable], length: int
) -> Callable[..., tuple[TrainState, Sums]]:
    """Builds train_call(state, sums, inputs, seed, frozen=None): `length` steps in one dispatch (fewer at the end).

    Metrics are added to `sums`. `batch_fn(inputs, step, length)` gives the function i -> batch of step + i (see
    vitcls.data). `seed` is an int32 scalar on the devices, so that one program serves all seeds.
    """

    def train_call(
        state: TrainState, sums: Sums, inputs: Any, seed: jax.Array, frozen: PyTree = None
    ) -> tuple[TrainState, Sums]:
        batch = batch_fn(inputs, state.step, length)

        def one_step(carry, i):
            state, sums = carry
            state, new_sums = train_step(state, batch(i), rng.step_key(seed, state.step), frozen)
            return (state, jax.tree.map(jnp.add, sums, new_sums)), None

        if length == 1:  # XLA's CPU backend is slow with convolutions inside a loop, even one of a single turn
            return one_step((state, sums), 0)[0]
        return jax.lax.scan(one_step, (state, sums), jnp.arange(length))[0]

    return train_call


def make_apply(model: nn.Module, normalize: Callable) -> Callable[..., Output]:
    """apply(variables, images in [0, 1], *, sow=False) -> Output, of a forward pass in evaluation."""

    def apply(variables: PyTree, images: jax.Array, *, sow: bool = False) -> Output:
        mutable = ["intermediates"] if sow else False
        result = model.apply(variables, normalize(images), train=False, mutable=mutable)
        logits, changed = result if sow else (result, {})
        return Output(logits, variables.get("batch_stats", {}), changed.get("intermediates", {}))

    return apply


def make_predict(
    task: Task, *, model: nn.Module, views: Callable, normalize: Callable
) -> Callable[[PyTree, jax.Array, PyTree], jax.Array]:
    """predict(variables, images uint8 [B, H, W, C], bank=None) -> logits [B, K], the sum of those of all views."""
    apply = make_apply(model, normalize)

    def predict(variables: PyTree, images: jax.Array, bank: PyTree = None) -> jax.Array:
        return sum(weight * task.predict(apply, variables, seen, bank) for weight, seen in views(images))

    return predict


def make_eval_step(
    task: Task, *, model: nn.Module, views: Callable, normalize: Callable
) -> Callable[..., tuple[Sums, jax.Array]]:
    """Builds eval_step(variables, batch, bank=None) -> (sums over the batch, probabilities [B, K]).

    The sums are metrics.evaluation_sums and those of the task. Both are of the global batch, on every device.
    `views(images uint8)` are pairs of a weight and images float32 in [0, 1]; the logits are the sum of theirs.
    """
    apply = make_apply(model, normalize)
    predict = make_predict(task, model=model, views=views, normalize=normalize)

    def eval_step(variables: dict, batch: Batch, bank: PyTree = None) -> tuple[Sums, jax.Array]:
        images, labels, mask = batch["image"], batch["label"], batch["mask"]
        logits = predict(variables, images, bank)
        sums = metrics.evaluation_sums(logits, labels, mask)
        for name, function in task.eval_sums.items():
            values = sum(weight * function(apply, variables, seen, labels, bank) for weight, seen in views(images))
            sums[name] = jnp.sum(jnp.where(mask > 0, values, 0.0))
        return _global_sum(sums), _gather_batch(jax.nn.softmax(logits, axis=-1))

    return eval_step


def make_bank_step(task: Task, *, model: nn.Module, to_float: Callable, normalize: Callable) -> Callable[..., PyTree]:
    """Builds bank_step(variables, batch) -> what the task remembers of the batch, rows of the global batch."""
    apply = make_apply(model, normalize)

    def bank_step(variables: dict, batch: Batch) -> PyTree:
        rows = task.remember(apply, variables, to_float(batch["image"]))
        return _gather_batch({"rows": rows, "label": batch["label"], "mask": batch["mask"]})

    return bank_step
