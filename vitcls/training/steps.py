"""train_step and eval_step: pure functions of their arguments; no files, no devices, no globals."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vitcls import metrics, optim
from vitcls.core import rng
from vitcls.tasks import losses
from vitcls.training.state import NonFinite, TrainState

Batch = dict[str, jax.Array]  # image uint8 [B, H, W, C], label int32 [B], mask float32 [B]
Sums = dict[str, jax.Array]
PyTree = Any
TRAIN_SUMS = ("loss", "l2", "correct", "count", "gradient_norm", "updates", "skipped")


def zero_sums() -> Sums:
    """Where the sums of a logging interval start, float32 scalars."""
    return {name: jnp.zeros((), jnp.float32) for name in TRAIN_SUMS}


def make_normalize(mean, std) -> Callable[[jax.Array], jax.Array]:
    """Returns images float32 [B, H, W, C] in [0, 1] -> (images - mean) / std, per channel."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return lambda images: (images - mean[None, None, None, :]) / std[None, None, None, :]


def make_train_step(
    *,
    model: nn.Module,
    augment: Callable,
    normalize: Callable,
    loss: Callable,
    l2: float,
    optimizer: optax.GradientTransformation,
    schedule: Callable,
    ema_decay: float,
    accumulate: int,
    nonfinite_limit: int,
    total_steps: int,
    num_classes: int,
    whole: Callable[[Any], Any] = lambda params: params,
    axis_name: str | None,
    unit: int = 1,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Sums]]:
    """Builds train_step(state, batch, key) -> (state, sums over the batch).

    The objective is the mean of `loss` over the unmasked examples plus l2 / 2 times the sum of squares of the
    decayed parameters (the papers' "Adam + L2"). The batch is the global one (`axis_name` None) or, under `pmap`,
    this device's part of it. With `accumulate` > 1 it is augmented and processed in so many parts, for the memory of
    one; `unit` neighbours stay together. From step `total_steps` on it changes nothing and counts nothing, so that a
    last call of fewer steps is the same program.
    `whole` makes parameters that are spread over the devices whole on each, for the model.
    """

    def global_sum(tree):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def objective(params, batch_stats, part, key, count):
        logits, updated = model.apply(
            {"params": whole(params), "batch_stats": batch_stats},
            part["image"],
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        total = jnp.sum(part["mask"] * loss(logits, part["target"]))
        hits = jnp.argmax(logits, axis=-1) == jnp.argmax(part["target"], axis=-1)
        sums = {"loss": total, "correct": jnp.sum(part["mask"] * hits)}
        return total / count, (updated.get("batch_stats", batch_stats), sums)

    def one_part(state, key, count, carry, part):
        """Adds the gradients and sums of a part, images still uint8, to those of the parts before it."""
        batch_stats, summed = carry
        images, targets = augment(part["key"], part["image"], jax.nn.one_hot(part["label"], num_classes))
        examples = {"image": normalize(images), "target": targets, "mask": part["mask"]}
        part_key = jax.random.fold_in(key, part["index"])
        (_, (batch_stats, sums)), grads = jax.value_and_grad(objective, has_aux=True)(
            state.params, batch_stats, examples, part_key, count
        )
        return batch_stats, jax.tree.map(jnp.add, summed, (grads, sums))

    def gradients(state, batch, key, count):
        """Sums over the parts of gradients and metrics, and the batch statistics after the last part."""
        carry = (state.batch_stats, jax.tree.map(jnp.zeros_like, (state.params, {"loss": count, "correct": count})))
        if accumulate == 1:
            carry = one_part(state, key, count, carry, batch | {"index": jnp.zeros((), jnp.int32)})
        else:
            parts = split_into_parts(batch, accumulate, unit) | {"index": jnp.arange(accumulate)}
            carry, _ = jax.lax.scan(lambda carry, part: (one_part(state, key, count, carry, part), None), carry, parts)
        batch_stats, summed = carry
        return batch_stats, *global_sum(summed)

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Sums]:
        augment_key, dropout_key = jax.random.split(key)
        batch = batch | {"key": rng.example_keys(augment_key, batch["label"].shape[0], axis_name)}
        count = global_sum(jnp.sum(batch["mask"]))

        batch_stats, grads, sums = gradients(state, batch, dropout_key, count)
        penalty = jnp.zeros((), jnp.float32)
        if l2:
            mask = optim.decay_mask(state.params)
            penalty, decay = jax.value_and_grad(lambda params: l2 * losses.l2_penalty(params, mask))(state.params)
            grads = jax.tree.map(jnp.add, grads, decay)

        gradient_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums["loss"] + penalty) & jnp.isfinite(gradient_norm)
        due = state.step < total_steps
        applied = due & finite & (state.nonfinite.streak < nonfinite_limit)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        learning_rate = schedule(state.step) * (1.0 if state.plateau is None else state.plateau.scale)
        params = jax.tree.map(lambda p, u: p + (learning_rate * u).astype(p.dtype), state.params, updates)
        new = {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}
        if state.ema_params is not None:
            average = (state.ema_params, state.ema_batch_stats)
            average = optim.ema_update(average, (params, batch_stats), ema_decay, state.step)
            new |= dict(zip(("ema_params", "ema_batch_stats"), average, strict=True))
        old = {name: getattr(state, name) for name in new}
        state = state.replace(
            **jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old),
            step=state.step + due.astype(jnp.int32),
            nonfinite=_count_skips(state.nonfinite, state.step, due, finite, nonfinite_limit),
        )
        sums |= {"l2": penalty * count, "count": count, "gradient_norm": gradient_norm, "updates": 1.0}
        sums = {name: jnp.where(applied, value, 0.0).astype(jnp.float32) for name, value in sums.items()}
        return state, sums | {"skipped": jnp.where(due & ~applied, 1.0, 0.0)}

    return train_step


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
    train_step: Callable, *, open_batches: Callable[[Any, jax.Array, int], Callable], seed: int, length: int
) -> Callable[[TrainState, Sums, Any], tuple[TrainState, Sums]]:
    """Builds train_call(state, sums, data): `length` steps in one dispatch (fewer at the end), metrics added to `sums`.

    `open_batches(data, step, length)` gives the function i -> batch of step + i (see vitcls.data).
    """

    def train_call(state: TrainState, sums: Sums, data: Any) -> tuple[TrainState, Sums]:
        batch = open_batches(data, state.step, length)

        def one_step(carry, i):
            state, sums = carry
            state, new_sums = train_step(state, batch(i), rng.step_key(seed, state.step))
            return (state, jax.tree.map(jnp.add, sums, new_sums)), None

        if length == 1:  # XLA's CPU backend is slow with convolutions inside a loop, even one of a single turn
            return one_step((state, sums), 0)[0]
        return jax.lax.scan(one_step, (state, sums), jnp.arange(length))[0]

    return train_call


def make_eval_step(
    *, model: nn.Module, views: Callable, normalize: Callable, axis_name: str | None
) -> Callable[[dict, Batch], tuple[Sums, jax.Array]]:
    """Builds eval_step(variables, batch) -> (metrics.evaluation_sums over the batch, probabilities [B, K]).

    Both are of the global batch, on every device. `views(images uint8)` are pairs of a weight and images float32 in
    [0, 1]; the logits are the sum of theirs.
    """

    def eval_step(variables: dict, batch: Batch) -> tuple[Sums, jax.Array]:
        logits = sum(
            weight * model.apply(variables, normalize(images), train=False) for weight, images in views(batch["image"])
        )
        sums = metrics.evaluation_sums(logits, batch["label"], batch["mask"])
        probabilities = jax.nn.softmax(logits, axis=-1)
        if axis_name is not None:
            sums = jax.lax.psum(sums, axis_name)
            probabilities = jax.lax.all_gather(probabilities, axis_name, tiled=True)
        return sums, probabilities

    return eval_step
