"""Training as vitcls runs it, on a batch that stays on the devices: what the benchmarks time.

The step is the real one (augmentation, loss, optimizer, non-finite guard, metrics), built from a config by the same
functions as a run of `vitcls.main`.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.sources import dataset_fields
from vitcls import config as configs
from vitcls import config_file, models
from vitcls.core.rng import BATCH_AXIS
from vitcls.core.sharding import Partition
from vitcls.data import DatasetInfo
from vitcls.data.resident import Resident
from vitcls.models import summary
from vitcls.training import build, steps

_STEPS = 1_000_000  # no benchmark comes to the end of its run


def make_config(model: str, batch_size: int, *, dtype: str = "float32", overrides: tuple[str, ...] = ()) -> Any:
    """A config for `model`; `overrides` are 'key=value' with keys of vitcls.config, such as 'model.remat=block'."""
    config = configs.default_config(model)
    config.batch_size = batch_size
    config.total = f"{_STEPS} steps"
    config.model.dtype = dtype
    for override in overrides:
        key, _, text = override.partition("=")
        config_file.override(config, key, text)
    config = configs.resolve(config)
    configs.validate(config)
    return config


def make_info(model: str, *, image_size: int = 0, num_classes: int = 0) -> DatasetInfo:
    """A data set of random images, of the model's native size and number of classes unless they are given."""
    preset = models.preset(model)
    height, width, channels = preset.image_shape
    num_classes = num_classes or preset.num_classes
    return DatasetInfo(
        name="random",
        class_names=tuple(map(str, range(num_classes))),
        image_shape=(image_size or height, image_size or width, channels),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        num_examples={"train": 1024},
        class_counts=(1,) * num_classes,
        skipped=(),
    )


def dataset_overrides(name: str, data_dir: str) -> tuple[str, ...]:
    """The same for `make_config`."""
    return tuple(f"{key}={value}" for key, value in dataset_fields(name, data_dir).items())


class ConstantBatch:
    """The same random batch at every step, on the devices already: training without an input pipeline."""

    def __init__(self, partition: Partition, info: DatasetInfo, batch_size: int):
        random = np.random.default_rng(0)
        rows = partition.local_rows(batch_size)
        self.batch = partition.put_batch(
            {
                "image": random.integers(0, 256, (batch_size, *info.image_shape), np.uint8)[rows],
                "label": random.integers(0, info.num_classes, batch_size, np.int32)[rows],
                "mask": np.ones(batch_size, np.float32)[rows],
            }
        )

    def host_inputs(self, step: int, length: int):
        return self.batch

    def batch_fn(self, inputs, step, length: int):
        return lambda i: inputs


def random_resident(partition: Partition, info: DatasetInfo, batch_size: int) -> Resident:
    """The resident pipeline over the random images of `info`."""
    random = np.random.default_rng(0)
    count = info.num_examples["train"]
    return Resident(
        partition,
        random.integers(0, 256, (count, *info.image_shape), np.uint8),
        random.integers(0, info.num_classes, count, np.int32),
        num_classes=info.num_classes,
        batch_size=batch_size,
        seed=0,
        balanced=False,
    )


def step_shapes(config, info: DatasetInfo, partition: Partition) -> tuple[Callable, tuple]:
    """The call of a training run and the shapes of its arguments, placed on devices that need not be there."""
    training = build.make_training(config, info, build.make_plan(config, info), partition)
    batch = config.batch_size
    rows = {
        "image": jax.ShapeDtypeStruct((batch, *info.image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct((batch,), np.int32),
        "mask": jax.ShapeDtypeStruct((batch,), np.float32),
    }

    def placed(shapes, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    state = jax.eval_shape(training.create_state, jax.eval_shape(lambda: jax.random.key(0)))
    state = jax.tree.map(placed, state, partition.state_shardings(state))
    sums = placed(jax.eval_shape(lambda: steps.zero_sums(training.task.means.values())), partition.sharding())
    seed = placed(jax.ShapeDtypeStruct((), np.int32), partition.sharding())
    call = steps.make_train_call(
        training.train_step, batch_fn=lambda inputs, step, length: lambda i: inputs, length=config.steps_per_call
    )
    return call, (state, sums, placed(rows, partition.sharding(BATCH_AXIS)), seed)


class Trainer:
    """A training run without files: each call runs `calls` dispatches and waits for the last."""

    def __init__(self, config, info: DatasetInfo, partition: Partition, batches=None, *, calls: int = 1):
        self._config, self.info, self.partition = config, info, partition
        self._batches = batches or ConstantBatch(partition, info, config.batch_size)
        self._length, self.calls = config.steps_per_call, calls
        plan = build.make_plan(config, info)
        self.training = build.make_training(config, info, plan, partition)
        self.state = partition.init(self.training.create_state, jax.random.key(config.seed))
        self._sums = partition.replicate(jax.device_get(steps.zero_sums(self.training.task.means.values())))
        self._step = 0
        call = steps.make_train_call(self.training.train_step, batch_fn=self._batches.batch_fn, length=self._length)
        self._fixed = partition.replicate(np.int32(config.seed)), partition.place(self.training.frozen)
        first = self._batches.host_inputs(0, self._length)
        start = time.perf_counter()
        self.compiled = partition.compile_update(call, self.state, self._sums, first, *self._fixed)
        if partition.mapped:  # what `pmap` would do at its first call; it cannot for several processes
            self.compiled = self.compiled.lower(self.state, self._sums, first, *self._fixed).compile()
        self.compile_seconds = time.perf_counter() - start

    @property
    def steps_per_call(self) -> int:
        return self.calls * self._length

    @property
    def images_per_call(self) -> int:
        return self.steps_per_call * self._config.batch_size

    def __call__(self) -> jax.Array:
        for _ in range(self.calls):
            previous = self._sums
            batches = self._batches.host_inputs(self._step, self._length)
            self.state, self._sums = self.compiled(self.state, self._sums, batches, *self._fixed)
            self._step += self._length
            jax.block_until_ready(previous)  # as the loop of vitcls.train does: one call ahead, not more
        return jax.block_until_ready(self._sums)["loss"]

    def inference(self):
        """A call that classifies the constant batch `calls` times."""
        evaluate = self.partition.compile_evaluation(build.make_eval_step(self._config, self.training.model, self.info))
        batch = self._batches.host_inputs(0, self._length)
        return lambda: [evaluate(self.state.variables, batch) for _ in range(self.calls)]


def train_flops_per_image(config, info: DatasetInfo) -> float:
    """Model FLOPs of a training step for one image: three forward passes' matrix products, nothing recomputed."""
    return 3 * summary.flops_per_image(build.make_model(config, info), info.image_shape, products_only=True)


# Dense bfloat16 TFLOP/s of one device, from the vendors' data sheets; the longest name that fits counts.
_PEAK_TFLOPS = {
    "NVIDIA H200": 989, "NVIDIA H200 NVL": 835, "NVIDIA H100": 989, "NVIDIA H100 NVL": 835, "NVIDIA H100 PCIe": 756,
    "NVIDIA A100": 312, "NVIDIA A10G": 70, "NVIDIA L40": 181, "NVIDIA L40S": 362, "NVIDIA L4": 121, "TPU v2": 22.5,
    "TPU v3": 61.5, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5p": 459, "TPU v5": 459,
    "TPU v6 lite": 918,
}  # fmt: skip


def peak_tflops(device_kind: str, dtype: str) -> float | None:
    """The peak of a kind of device, None where it is not known or not for this dtype."""
    fitting = [kind for kind in _PEAK_TFLOPS if device_kind.startswith(kind)]
    return _PEAK_TFLOPS[max(fitting, key=len)] if fitting and dtype == "bfloat16" else None


def peak_memory_bytes() -> tuple[int, str]:
    """The most memory that this process has taken so far, and of what: 'device' or, on a CPU, 'process'."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"], "device"
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"
