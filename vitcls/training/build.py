"""From a config to the parts of a run: durations in steps, model, optimizer, losses and the pure steps."""

import dataclasses
import functools
import textwrap
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import optax

from vitcls import models, optim
from vitcls.core import durations
from vitcls.core.errors import UserError
from vitcls.core.partition import Partition
from vitcls.data import DatasetInfo
from vitcls.data.augment import make_augment, mixes_pairs, to_float, views
from vitcls.models import convolutions
from vitcls.models.variables import variable_shapes
from vitcls.tasks import losses
from vitcls.training import steps
from vitcls.training.state import create_state


@dataclasses.dataclass(frozen=True)
class Plan:
    """The durations of a config, in steps; 0 for what is never due."""

    total: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    steps_per_call: int
    steps_per_epoch: float


def make_plan(config, info: DatasetInfo) -> Plan:
    """Resolves the durations of a config for the size of its training split."""
    num_examples = info.num_examples["train"]

    def to_steps(duration, total_steps=None):
        return durations.to_steps(
            duration, batch_size=config.batch_size, num_examples=num_examples, total_steps=total_steps
        )

    total = to_steps(config.total)
    if total < 1:
        raise UserError(f"config.total='{config.total}' is no training at all; make it at least '1 steps'")
    return Plan(
        total=total,
        log_every=to_steps(config.log_every, total),
        eval_every=to_steps(config.eval_every, total),
        checkpoint_every=to_steps(config.checkpoint_every, total),
        steps_per_call=min(config.steps_per_call, total),
        steps_per_epoch=num_examples / config.batch_size,
    )


def examples_kept_together(config) -> int:
    """How many neighbours of a batch belong together: the two of a pair that is mixed, else each is for itself."""
    return 2 if mixes_pairs(config.augment) else 1


def make_model(config, info: DatasetInfo, *, axis_name: str | None = None) -> nn.Module:
    """The model of a config; raises UserError, by shapes alone, where it cannot take the images."""
    fields = {key: value for key, value in config.model.items() if key != "name"}
    model = models.create(config.model.name, info.num_classes, **fields).clone(axis_name=axis_name)
    try:
        variable_shapes(model, info.image_shape)
    except UserError:
        raise
    except Exception as error:  # whatever a field that its checks do not know can do to a layer
        size = "x".join(map(str, info.image_shape))
        reason = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        raise UserError(
            f"{config.model.name} cannot be built for images of {size}: {reason}; see config.model"
        ) from None
    return model


@dataclasses.dataclass(frozen=True)
class Training:
    """The pure functions of a training run and what describes them."""

    model: nn.Module
    schedule: optax.Schedule
    create_state: Callable  # key -> TrainState
    train_step: Callable  # (state, batch, key) -> (state, sums)


def make_training(config, info: DatasetInfo, plan: Plan, layout: Partition) -> Training:
    """Builds the training functions of a config for the devices of `layout`; no device work."""
    model = make_model(config, info, axis_name=layout.axis_name)
    optimizer = optim.make_optimizer(config.optimizer, variable_shapes(model, info.image_shape)["params"])
    schedule = optim.make_schedule(
        config.schedule,
        config.optimizer,
        batch_size=config.batch_size,
        num_examples=info.num_examples["train"],
        total_steps=plan.total,
    )
    class_weights = losses.class_weights(tuple(config.loss.class_weights), np.asarray(info.class_counts))
    loss = losses.make_loss(**dict(config.loss) | {"class_weights": class_weights})
    train_step = steps.make_train_step(
        model=convolutions.for_training(model),
        augment=make_augment(config.augment),
        normalize=steps.make_normalize(info.mean, info.std),
        loss=loss,
        l2=config.loss.l2,
        optimizer=optimizer,
        schedule=schedule,
        ema_decay=config.optimizer.ema_decay,
        accumulate=config.optimizer.accumulate,
        nonfinite_limit=config.nonfinite_limit,
        total_steps=plan.total,
        num_classes=info.num_classes,
        whole=layout.whole,
        axis_name=layout.axis_name,
        unit=examples_kept_together(config),
    )

    def create(key: jax.Array):
        return create_state(
            key,
            model=model.clone(axis_name=None),  # initialised outside of any mapped axis
            image_shape=info.image_shape,
            optimizer=optimizer,
            ema=config.optimizer.ema_decay > 0,
            schedule_config=config.schedule,
        )

    return Training(model, schedule, create, _with_precision(train_step, config))


def make_eval_step(config, model: nn.Module, info: DatasetInfo) -> Callable:
    """eval_step(variables, batch) of a model on its data's own normalisation."""
    eval_step = steps.make_eval_step(
        model=model,
        views=lambda images: views(config.test_time_augmentation, to_float(images)),
        normalize=steps.make_normalize(info.mean, info.std),
        axis_name=model.axis_name,
    )
    return _with_precision(eval_step, config)


def _with_precision(step: Callable, config) -> Callable:
    """`step`, whose products of float32 are as precise as the config says where they do not say it themselves."""

    @functools.wraps(step)
    def with_precision(*args):
        with jax.default_matmul_precision(config.matmul_precision):
            return step(*args)

    return with_precision
