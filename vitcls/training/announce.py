"""What a run says of itself: devices, parameters and FLOPs, data, memory; at its start and in its report."""

import logging
from typing import Any

import jax
import numpy as np

from vitcls.core.rng import BATCH_AXIS
from vitcls.core.sharding import Partition
from vitcls.data import DatasetInfo, resident_bytes
from vitcls.models import summary
from vitcls.optim import parts
from vitcls.training.build import Plan, Training
from vitcls.training.initial import Start

PyTree = Any
_logger = logging.getLogger("vitcls")


def log_start(
    config,
    info: DatasetInfo,
    plan: Plan,
    training: Training,
    partition: Partition,
    pipeline: str,
    start: Start | None = None,
) -> None:
    """Says what is about to run: devices, data, model, what it starts from, and memory."""
    state = jax.eval_shape(training.create_state, jax.random.key(0))
    resident = resident_bytes(info.num_examples, info.image_shape) if pipeline == "resident" else 0
    epochs = plan.total / plan.steps_per_epoch
    lines = [
        f"devices   {devices_line()}, partition '{config.partition.strategy}'",
        f"products  {products_line(config)}",
        f"data      {dataset_line(info)}; {pipeline}",
        f"          mean {_numbers(info.mean)}, std {_numbers(info.std)} " + _whose_colors(config, start),
        f"training  {plan.total:,} steps of {config.batch_size} images, {epochs:.1f} epochs; "
        f"{plan.steps_per_call} steps in one call",
        f"memory    {mebibytes(partition.bytes_per_device(state))} of state and {mebibytes(resident)} of images "
        "a device, and the activations",
        f"model     {config.model.name}, task {config.task.name}"
        + (", whose loss is its own: of config.loss only l2 counts" if training.task.own_loss else ""),
        *_weights_lines(start, training),
        summary.parameter_table(training.model, info.image_shape),
    ]
    for line in lines:
        _logger.info("%s", line)


def _whose_colors(config, start: Start | None) -> str:
    if start and start.colors_taken:
        return "of the weights"
    return "of the config" if config.dataset.mean and config.dataset.std else "of the training split"


def _weights_lines(start: Start | None, training: Training) -> list[str]:
    """What the network starts from, and how much of it is trained."""
    lines = [f"weights   {start.words}"] if start else []
    if training.trained is not None:
        state = jax.eval_shape(training.create_state, jax.random.key(0))
        ours, _ = parts.split(state.params, training.trained.params)
        lines.append(
            f"trained   {summary.count_parameters(ours):,} of {summary.count_parameters(state.params):,} parameters, "
            f"batch statistics {'change' if any(jax.tree.leaves(training.trained.batch_stats)) else 'stay'}"
        )
    return lines


def log_first_step(config, info: DatasetInfo, training: Training, partition: Partition) -> None:
    """Traces the first training step by shapes alone; the end of a dry run."""
    state = jax.eval_shape(training.create_state, jax.random.key(0))
    step, shape = training.train_step, (config.batch_size,)
    if partition.mapped:
        step = jax.vmap(step, in_axes=(None, 0, None, None), axis_name=BATCH_AXIS)
        shape = (partition.mesh.size, partition.visible(config.batch_size))
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, *info.image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct(shape, np.int32),
        "mask": jax.ShapeDtypeStruct(shape, np.float32),
    }
    jax.eval_shape(step, state, batch, jax.random.key(0), training.frozen)
    _logger.info("dry run: the first step has been traced; nothing was run and nothing was written")


def compiled_memory(compiled) -> str:
    """What a compiled program needs of a device while it runs, in words; '' where the backend does not say."""
    analysis = compiled.memory_analysis() if hasattr(compiled, "memory_analysis") else None
    return "" if analysis is None else f", {mebibytes(analysis.temp_size_in_bytes)} of activations a device"


def devices_line() -> str:
    """Such as '8 x TPU v4 (tpu), 2 processes'."""
    device = jax.devices()[0]
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {device.device_kind} ({device.platform}){processes}"


def products_line(config) -> str:
    """How precise products of float32 are, and whether a run can be repeated to the bit."""
    device = jax.devices()[0]
    least = {"gpu": "TF32 on NVIDIA GPUs that have it", "tpu": "bfloat16"}.get(device.platform, "float32")
    precision = {"default": least, "high": f"three products of {least}", "highest": "float32"}
    used = "float32" if device.platform == "cpu" else precision[config.matmul_precision]
    dtype = config.model.get("dtype", "float32")
    operands = "" if dtype == "float32" else f" (the model computes in {dtype})"
    repeated = ", deterministic kernels" if config.deterministic else ""
    return f"of float32 in {used}{operands}{repeated}"


def dataset_line(info: DatasetInfo) -> str:
    height, width, channels = info.image_shape
    counts = ", ".join(f"{count:,} {split}" for split, count in info.num_examples.items())
    skipped = f", {len(info.skipped)} files skipped" if info.skipped else ""
    return f"{info.name}: {counts}; {info.num_classes} classes of {height}x{width}x{channels}{skipped}"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _numbers(values) -> str:
    return "(" + ", ".join(f"{value:.4f}" for value in values) + ")"
