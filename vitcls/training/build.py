"""From a config to the parts of a run: durations in steps, model, optimizer, losses and the pure steps."""

import dataclasses
import functools
import logging
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vitcls import models, optim
from vitcls.attribution.network import Network, make_network
from vitcls.core import durations
from vitcls.core.errors import UserError
from vitcls.core.registry import about
from vitcls.core.sharding import Partition
from vitcls.data import DatasetInfo
from vitcls.data.augment import make_augment, mixes_pairs, to_float, views
from vitcls.metrics.unknown import Outputs
from vitcls.models import forms
from vitcls.models.variables import variable_shapes
from vitcls.optim import parts
from vitcls.optim.parts import Trained
from vitcls.tasks import TASKS, Context, Task, TrainedRun, losses
from vitcls.tasks.losses import LOSSES
from vitcls.training import run_dir, steps
from vitcls.training.state import create_state

PyTree = Any
_logger = logging.getLogger("vitcls")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The durations of a config, in steps; 0 for what is never due."""

    total: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    pruned: int  # updates after which nothing more is pruned
    steps_per_call: int
    steps_per_epoch: float


def make_plan(config, info: DatasetInfo) -> Plan:
    """Resolves the durations of a config for the size of its training split."""
    to_steps = _to_steps(config, info)
    total = to_steps(config.total)
    if total < 1:
        raise UserError(f"config.total='{config.total}' is no training at all; make it at least '1 steps'")
    return Plan(
        total=total,
        log_every=to_steps(config.log_every, total_steps=total),
        eval_every=to_steps(config.eval_every, total_steps=total),
        checkpoint_every=to_steps(config.checkpoint_every, total_steps=total),
        pruned=to_steps(config.optimizer.prune_end, total_steps=total) + 1 if config.optimizer.prune else 0,
        steps_per_call=min(config.steps_per_call, total),
        steps_per_epoch=info.num_examples["train"] / config.batch_size,
    )


def _to_steps(config, info: DatasetInfo) -> Callable[..., int]:
    return functools.partial(durations.to_steps, batch_size=config.batch_size, num_examples=info.num_examples["train"])


def examples_kept_together(config) -> int:
    """How many neighbours of a batch belong together: the two of a pair that is mixed, else each is for itself."""
    return 2 if mixes_pairs(config.augment) else 1


def make_task(config, info: DatasetInfo) -> Task:
    """The training objective of a config; raises UserError where it cannot be that of these data."""
    with LOSSES.about(config.loss.name):
        class_weights = losses.class_weights(tuple(config.loss.class_weights), np.asarray(info.class_counts))
    context = Context(
        class_names=info.class_names,
        image_shape=info.image_shape,
        loss=losses.make_loss(**dict(config.loss) | {"class_weights": class_weights}),
        open_run=_open_run,
        to_steps=lambda duration: _to_steps(config, info)(duration, total_steps=make_plan(config, info).total),
    )
    return TASKS.create(config.task.name, config.task).build(context)


def _open_run(path: str) -> TrainedRun:
    """The weights that the report of a workdir is about."""
    trained = run_dir.open_workdir(path)
    if make_task(trained.config, trained.info).remember is not None:
        raise UserError(
            f"the run in {path} was trained by config.task.name='{trained.config.task.name}' and has no classifier"
        )
    model = make_model(trained.config, trained.info)
    step, variables = trained.restore(model, trained.config.report.checkpoint)
    total = make_plan(trained.config, trained.info).total
    _logger.info("teacher   %s of %s, step %s of %s", trained.config.model.name, path, f"{step:,}", f"{total:,}")
    normalize = steps.make_normalize(trained.info.mean, trained.info.std)
    return TrainedRun(model, variables, trained.info.class_names, trained.info.image_shape, normalize)


def make_model(
    config,
    info: DatasetInfo,
    task: Task | None = None,
    *,
    device: jax.Device | None = None,
    training: bool = False,
) -> nn.Module:
    """The model of a config, with what its task adds; `task` is that of the config, made if left out.

    It is in forms that `device` has, by default the first of this process; in `training` in those that train the
    fastest there. Raises UserError, by shapes alone, where it cannot take the images.
    """
    fields = {key: value for key, value in config.model.items() if key != "name"}
    model = models.create(config.model.name, info.num_classes, **fields)
    try:
        with about("config.model", fields):
            model = forms.for_device(model, device or jax.local_devices()[0], training=training)
            model = (task or make_task(config, info)).wrap(model)
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

    task: Task
    model: nn.Module
    step_model: nn.Module  # the same in the forms that train the fastest on these devices
    schedule: optax.Schedule
    create_state: Callable  # (key, initial=None) -> TrainState
    train_step: Callable  # (state, batch, key, frozen) -> (state, sums)
    frozen: PyTree  # of the task, on the host
    trained: Trained | None  # which parameters and statistics change; None for all


def make_training(config, info: DatasetInfo, plan: Plan, partition: Partition) -> Training:
    """Builds the training functions of a config for the devices of `partition`; no device work."""
    task = make_task(config, info)
    model = make_model(config, info, task, device=partition.device)
    step_model = make_model(config, info, task, device=partition.device, training=True)
    if config.optimizer.accumulate > 1 and not task.separable:
        raise UserError(
            f"config.optimizer.accumulate={config.optimizer.accumulate} is not for config.task.name="
            f"'{config.task.name}', whose loss is of a whole batch; set it to 1"
        )
    if not task.separable and mixes_pairs(config.augment):
        raise UserError(
            f"mixup and CutMix are not for config.task.name='{config.task.name}', which compares images; set "
            "config.augment.mixup.probability and config.augment.cutmix.probability to 0"
        )
    with TASKS.about(config.task.name):
        frozen = task.frozen()
    shapes = variable_shapes(model, info.image_shape)
    trained, rates = _parts(config, shapes, getattr(model, "behind", {}))
    ours, _ = parts.split(shapes["params"], trained and trained.params)
    sizes = {"batch_size": config.batch_size, "num_examples": info.num_examples["train"], "total_steps": plan.total}
    to_steps = functools.partial(durations.to_steps, **sizes)
    optimizer = optim.make_optimizer(config.optimizer, ours, rates, to_steps=to_steps)
    schedule = optim.make_schedule(config.schedule, config.optimizer, **sizes)
    tools = steps.make_tools(
        step_model,
        augment=make_augment(config.augment),
        normalize=steps.make_normalize(info.mean, info.std),
        num_classes=info.num_classes,
        gather_params=partition.gather_params,
        trained=trained,
    )
    update = steps.Update(
        optimizer,
        schedule,
        l2=config.loss.l2,
        ema_decay=config.optimizer.ema_decay,
        accumulate=config.optimizer.accumulate,
        unit=examples_kept_together(config),
        nonfinite_limit=config.nonfinite_limit,
        total_steps=plan.total,
        trained=trained,
    )

    def create(key: jax.Array, initial: dict[str, jax.Array] | None = None):
        return create_state(
            key,
            model=model,
            image_shape=info.image_shape,
            optimizer=optimizer,
            ema=config.optimizer.ema_decay > 0,
            schedule_config=config.schedule,
            init_task=task.init,
            trained=trained,
            initial=initial,
        )

    train_step = _with_precision(steps.make_train_step(task, tools, update), config)
    return Training(task, model, step_model, schedule, create, train_step, frozen, trained)


def _parts(config, shapes: PyTree, behind: Mapping[str, str]) -> tuple[Trained | None, PyTree | None]:
    """What `config.init` trains of variables of these shapes, and the factors of its learning rates."""
    init = config.init
    if init.freeze_norm and not init.weights and shapes.get("batch_stats"):
        raise UserError(
            "config.init.freeze_norm=True keeps statistics that nothing has learned; give config.init.weights, or set "
            "it to False"
        )
    with about("config.init", {"train": "", "layer_decay": 1.0}):
        trained = parts.choose(
            init.train, shapes, freeze_norm=init.freeze_norm, new_head=init.head == "new", behind=behind
        )
    if init.layer_decay == 1:
        return trained, None
    try:
        rates = parts.layer_rates(init.layer_decay, shapes["params"], behind)
    except ValueError as error:
        raise UserError(f"config.init.layer_decay={init.layer_decay} is not for {config.model.name}: {error}") from None
    return trained, parts.split(rates, trained and trained.params)[0]


def make_predict(config, model: nn.Module, info: DatasetInfo) -> Callable:
    """predict(variables, images uint8 [B, H, W, C], bank=None) -> logits [B, K], as evaluation has them."""
    return _with_precision(steps.make_predict(make_task(config, info), model=model, **_seen(config, info)), config)


def _seen(config, info: DatasetInfo) -> dict[str, Callable]:
    """What evaluation makes of images before the model sees them."""
    return {
        "views": lambda images: views(config.test_time_augmentation, to_float(images)),
        "normalize": steps.make_normalize(info.mean, info.std),
    }


def make_eval_step(config, model: nn.Module, info: DatasetInfo) -> Callable:
    """eval_step(variables, batch, bank=None) of a model on its data's own normalisation."""
    return _with_precision(steps.make_eval_step(make_task(config, info), model=model, **_seen(config, info)), config)


def make_bank_step(config, model: nn.Module, info: DatasetInfo) -> tuple[Callable | None, int]:
    """(bank_step(variables, batch), size of the bank) of a task that predicts by what it remembers; else (None, 0)."""
    task = make_task(config, info)
    if task.remember is None:
        return None, 0
    normalize = steps.make_normalize(info.mean, info.std)
    bank_step = steps.make_bank_step(task, model=model, to_float=to_float, normalize=normalize)
    return _with_precision(bank_step, config), task.bank_size


def make_outputs_step(config, model: nn.Module, info: DatasetInfo) -> Callable:
    """outputs_step(variables, batch) -> Outputs, float32: the logits and what the model gives its classifier.

    Of the images as they are, without test-time augmentation.
    """
    apply = steps.make_apply(model, steps.make_normalize(info.mean, info.std))

    def outputs_step(variables: PyTree, batch: dict) -> Outputs:
        output = apply(variables, to_float(batch["image"]), sow=True)
        return Outputs(output.logits.astype(jnp.float32), output.sown["features"][0].astype(jnp.float32))

    return _with_precision(outputs_step, config)


def make_explained(config, model: nn.Module, info: DatasetInfo) -> Network:
    """The classifier of a run, differentiable by images in [0, 1] as they are: no test-time augmentation.

    In the forms that train the fastest on the first device, as attacks and most maps want gradients.
    """
    model = forms.for_device(model, jax.local_devices()[0], training=True)
    network = make_network(model, steps.make_normalize(info.mean, info.std), tuple(info.mean))
    return Network(_with_precision(network.forward, config), _with_precision(network.read, config), network.baseline)


def _with_precision(step: Callable, config) -> Callable:
    """`step`, whose products of float32 are as precise as the config says where they do not say it themselves."""

    @functools.wraps(step)
    def with_precision(*args):
        with jax.default_matmul_precision(config.matmul_precision):
            return step(*args)

    return with_precision
