"""What a run says of itself: devices, parameters and FLOPs, data, memory; at its start and in its report."""

import datetime
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import sys
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vitcls.core.partition import Partition
from vitcls.data import DatasetInfo, resident_bytes
from vitcls.models import flops
from vitcls.training import build
from vitcls.training.build import Plan, Training

PyTree = Any
_logger = logging.getLogger("vitcls")


def count_parameters(params: PyTree) -> int:
    """The number of parameters in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def count_bytes(tree: PyTree) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def flops_per_image(model: nn.Module, info: DatasetInfo, *, products_only: bool = False) -> float:
    """FLOPs of one forward pass of one image, 2 per multiply-add; see `flops.count`."""
    return sum(_flops_by_part(model, info, products_only=products_only).values())


def _flops_by_part(model: nn.Module, info: DatasetInfo, *, products_only: bool = False) -> dict[str, float]:
    shapes = build.variable_shapes(model, info)
    image = jax.ShapeDtypeStruct((1, *info.image_shape), np.float32)
    plain = {"grouped_conv": "xla", "attention": "xla"}  # so that no platform or kernel counts otherwise
    model = model.clone(axis_name=None, **{field: form for field, form in plain.items() if hasattr(model, field)})
    trace = jax.make_jaxpr(lambda variables, images: model.apply(variables, images, train=False))
    return flops.count(trace(shapes, image).jaxpr, products_only=products_only)


def log_start(config, info: DatasetInfo, plan: Plan, training: Training, layout: Partition, pipeline: str) -> None:
    """Says what is about to run: devices, data, model and memory."""
    state = jax.eval_shape(training.create_state, jax.random.key(0))
    resident = resident_bytes(info.num_examples, info.image_shape) if pipeline == "resident" else 0
    epochs = plan.total / plan.steps_per_epoch
    lines = [
        f"devices   {devices_line()}, partition '{config.partition.strategy}'",
        f"products  {products_line(config)}",
        f"data      {dataset_line(info)}; {pipeline}",
        f"          mean {_numbers(info.mean)}, std {_numbers(info.std)} "
        + ("of the config" if config.dataset.mean and config.dataset.std else "of the training split"),
        f"training  {plan.total:,} steps of {config.batch_size} images, {epochs:.1f} epochs; "
        f"{plan.steps_per_call} steps in one call",
        f"memory    {mebibytes(layout.bytes_per_device(state))} of state and {mebibytes(resident)} of images a device, "
        "and the activations",
        f"model     {config.model.name}",
        parameter_table(training.model, info),
    ]
    for line in lines:
        _logger.info("%s", line)


def parameter_table(model: nn.Module, info: DatasetInfo) -> str:
    """Parameters and forward FLOPs per image of the model's parts, as text; numbered parts are summed."""
    parameters = {part: count_parameters(tree) for part, tree in build.variable_shapes(model, info)["params"].items()}
    part_flops = _flops_by_part(model, info)
    groups: dict[str, list[str]] = {}
    for part in [*parameters, *(part for part in part_flops if part not in parameters)]:
        groups.setdefault(re.sub(r"_\d+$", "", part), []).append(part)
    rows = [
        (
            f"{group} x {len(parts)}" if len(parts) > 1 else parts[0],
            sum(parameters.get(part, 0) for part in parts),
            sum(part_flops.get(part, 0) for part in parts) / 1e6,
        )
        for group, parts in groups.items()
    ]
    rows = [row for row in rows if row[1] or row[2] >= 0.005]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return "\n".join(
        [f"          {'part':<28}{'parameters':>14}{'MFLOPs/image':>16}"]
        + [f"          {name:<28}{count:>14,}{megaflops:>16,.2f}" for name, count, megaflops in rows]
    )


def log_first_step(config, info: DatasetInfo, training: Training, layout: Partition) -> None:
    """Traces the first training step by shapes alone; the end of a dry run."""
    state = jax.eval_shape(training.create_state, jax.random.key(0))
    step, shape = training.train_step, (config.batch_size,)
    if layout.mapped:
        step = jax.vmap(step, in_axes=(None, 0, None), axis_name=layout.axis_name)
        shape = (layout.mesh.size, layout.visible(config.batch_size))
    batch = {
        "image": jax.ShapeDtypeStruct((*shape, *info.image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct(shape, np.int32),
        "mask": jax.ShapeDtypeStruct(shape, np.float32),
    }
    jax.eval_shape(step, state, batch, jax.random.key(0))
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
    operands = "" if config.model.dtype == "float32" else f" (the model computes in {config.model.dtype})"
    repeated = ", deterministic kernels" if config.deterministic else ""
    return f"of float32 in {used}{operands}{repeated}"


def dataset_line(info: DatasetInfo) -> str:
    height, width, channels = info.image_shape
    counts = ", ".join(f"{count:,} {split}" for split, count in info.num_examples.items())
    skipped = f", {len(info.skipped)} files skipped" if info.skipped else ""
    return f"{info.name}: {counts}; {info.num_classes} classes of {height}x{width}x{channels}{skipped}"


def facts(config, info: DatasetInfo, *, step: int) -> dict[str, Any]:
    """Rows for the head of the report."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))
    return {
        "Model": config.model.name,
        "Data": dataset_line(info),
        "Checkpoint": f"step {step:,}",
        "Test-time augmentation": config.test_time_augmentation,
        "Seed": str(config.seed),
        "Devices": devices_line(),
        "Machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {versions}",
        "Command": command_line(),
        "Date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "Skipped files": [f"{file.path}: {file.reason}" for file in info.skipped],
    }


def command_line() -> str:
    """This process's command as it can be given to a shell again: `vitcls VERB ...` or `python -m vitcls.VERB ...`."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    name = os.path.basename(sys.argv[0])
    program = ["python", "-m", module.name.removesuffix(".__main__")] if module else [name]
    return shlex.join([*program, *sys.argv[1:]])


def headline(results: dict, workdir) -> str:
    """The last lines of a command: the main numbers and where the report is."""
    return (
        f"{results['split']}: accuracy {results['accuracy']:.2%}, top-5 {results['top5_accuracy']:.2%}, "
        f"macro F1 {results['f1_macro']:.4f}, AUC {results['auc_ovr_macro']:.4f}, ECE {results['ece']:.4f}, "
        f"loss {results['loss']:.4f} on {results['num_examples']:,} images\n"
        f"report: {workdir}/report/index.html"
    )


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _numbers(values) -> str:
    return "(" + ", ".join(f"{value:.4f}" for value in values) + ")"
