"""What a training objective is: a record of pure functions, as `optax.GradientTransformation` is one.

The training step (vitcls.training.steps) keeps what all objectives share: accumulation, L2, the guard against what is
not finite, the average of parameters, counting, and the partition over devices. A task says what is computed from a
batch.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

PyTree = Any
Batch = dict[str, jax.Array]  # image uint8 [B, H, W, C], label int32 [B], mask float32 [B], key [B]


class Output(NamedTuple):
    """What a forward pass gives."""

    logits: jax.Array  # float32 [B, K]
    batch_stats: PyTree  # after the pass
    sown: dict[str, Any]  # 'features' [B, D] and the rest, if they were asked for


class Tools(NamedTuple):
    """What the training step lends to a task, so that it need not know how arrays lie on the devices."""

    forward: Callable[..., Output]  # (params, batch_stats, images, key, *, sow=False), in training
    augment: Callable  # (keys [B], images uint8, targets [B, K]) -> (images float32 in [0, 1], targets)
    normalize: Callable[[jax.Array], jax.Array]  # images in [0, 1] -> what the model takes
    gather_params: Callable[[PyTree], PyTree]  # gathers sharded parameters onto every device
    gather_batch: Callable[[PyTree], PyTree]  # rows of this device [b, ...] -> of the global batch [B, ...]
    positions: Callable[[int], jax.Array]  # b -> int32 [b], the places of this device's examples in the global batch
    num_classes: int
    # (params, batch_stats, images) -> logits of a pass in evaluation: no dropout, statistics as they are
    evaluate: Callable[..., jax.Array]


class Aux(NamedTuple):
    """What a loss gives besides its values."""

    batch_stats: PyTree
    sums: dict[str, jax.Array]  # [B, ...]: the step sums them over the unmasked examples
    rows: PyTree = None  # leaves [B, ...], such as features for a queue; `Task.update` gets those of the global batch


class Updated(NamedTuple):
    """What a task's extra state is updated from."""

    step: jax.Array  # int32 scalar, of this update
    params: PyTree  # after the update
    batch_stats: PyTree
    sums: dict[str, jax.Array]  # Aux.sums over the global batch
    rows: PyTree  # Aux.rows of the global batch, in its order unless the batch was processed in parts


class Context(NamedTuple):
    """What a task is built from."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # H, W, C
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # config.loss: (logits [B, K], targets [B, K]) -> [B]
    open_run: Callable[[str], "TrainedRun"]  # the checkpoint of its report; raises UserError
    to_steps: Callable[[str], int]  # a duration -> updates of this training


class TrainedRun(NamedTuple):
    """A network that was trained before."""

    model: nn.Module
    variables: dict[str, PyTree]  # numpy
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    normalize: Callable[[jax.Array], jax.Array]


def augmented(tools: Tools, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(images float32 [B, H, W, C] in [0, 1], targets [B, K]), augmented."""
    return tools.augment(batch["key"], batch["image"], jax.nn.one_hot(batch["label"], tools.num_classes))


def one_view(tools: Tools, batch: Batch) -> dict[str, jax.Array]:
    """'image' float32 [B, H, W, C], augmented and normalised, and its 'target' [B, K]."""
    images, targets = augmented(tools, batch)
    return {"image": tools.normalize(images), "target": targets}


def same_guess(a: jax.Array, b: jax.Array) -> jax.Array:
    """Whether two scores of classes [B, K] have their highest at the same class, bool [B]."""
    return jnp.argmax(a, axis=-1) == jnp.argmax(b, axis=-1)


def own_logits(apply: Callable, variables: PyTree, images: jax.Array, bank: PyTree) -> jax.Array:
    """The logits of the model itself."""
    return apply(variables, images).logits


class Task(NamedTuple):
    """A training objective; the defaults are those of plain classification."""

    # (tools, params, batch_stats, inputs, extra, frozen, key) -> (loss [B], Aux)
    loss: Callable[..., tuple[jax.Array, Aux]]
    # (tools, batch) -> inputs, leaves [B, ...]: one view of each image, or several
    inputs: Callable[[Tools, Batch], PyTree] = one_view
    # model -> model, such as one with a projection head; its parameters are trained, evaluated and saved
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    # (key, variables) -> extra state that is trained along: a queue, a centre, a teacher's average; saved and resumed
    init: Callable[[jax.Array, PyTree], PyTree] = lambda key, variables: None
    # (extra, updated: Updated) -> extra after an update
    update: Callable[[PyTree, Updated], PyTree] = lambda extra, updated: extra
    # Returns constant arrays, such as a teacher's: an argument of the compiled step, and never saved.
    frozen: Callable[[], PyTree] = lambda: None
    # Logged as train/NAME: which of Aux.sums, [B], to divide by the number of examples.
    means: Mapping[str, str] = {"accuracy": "correct"}
    # (apply, variables, images, bank) -> logits [B, K]; `apply(variables, images, *, sow=False)` gives an Output
    predict: Callable[..., jax.Array] = own_logits
    # Extra sums of an evaluation: name -> (apply, variables, images, labels, bank) -> [B], for a metric of the table
    # that names it as its `task_sum`.
    eval_sums: Mapping[str, Callable[..., jax.Array]] = {}
    # (apply, variables, images) -> rows [B, ...], collected over the training split into the `bank` of `predict`
    remember: Callable[..., PyTree] | None = None
    bank_size: int = 0  # training images in the bank, at most
    own_loss: bool = False  # True where `Context.loss` is not used, so that no key of config.loss but l2 counts
    separable: bool = True  # False where the loss couples the examples of a batch, so that it cannot be split
