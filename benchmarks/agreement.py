"""One training step of a model of each family on the accelerator and on the CPU of the same machine: the same numbers?

    python -m benchmarks.agreement

From the same weights and images, in float32 with products in full precision, and in bfloat16 with the forms of
attention and convolutions that each device trains with. Exit code 1 where a loss or a gradient norm differs by more.
"""

import sys

import jax
import numpy as np

from benchmarks import harness, workload
from vitcls import cli
from vitcls.core import sharding
from vitcls.training import build, steps

FAMILIES = (
    "improved_vit_tiny", "vit_tiny_patch16", "improved_resnext50_lite", "resnext29_8x64d", "resnet18", "convnext_tiny",
    "vgg11", "densenet121", "googlenet", "inception_v3", "efficientnet_b0", "mobilenet_v1", "mobilenet_v2",
    "mobilenet_v3_small", "alexnet", "lenet5", "mnist_cnn", "airbench94",
)  # fmt: skip
_SIZES = {"inception_v3": 80, "vgg11": 32, "alexnet": 64}
_ALLOWED = {"float32": 1e-3, "bfloat16": 5e-2}  # relative


def one_step(device: jax.Device, name: str, dtype: str, batch: int, size: int) -> dict[str, float]:
    """The loss and the gradient norm of the first step."""
    overrides = ("matmul_precision=highest", "optimizer.name=sgd", "steps_per_call=1")
    config = workload.make_config(name, batch, dtype=dtype, overrides=overrides)
    info = workload.make_info(name, image_size=size)
    partition = sharding.over([device], "data")
    training = build.make_training(config, info, build.make_plan(config, info), partition)
    # Weights are drawn by the CPU for both: a device's own arithmetic may round a normal variate otherwise.
    with jax.default_device(jax.devices("cpu")[0]):
        state = jax.device_get(jax.jit(training.create_state)(jax.random.key(0)))
    batches = workload.ConstantBatch(partition, info, batch)
    call = steps.make_train_call(training.train_step, batch_fn=batches.batch_fn, length=1)
    arguments = (state, jax.device_get(steps.zero_sums(training.task.means.values())))
    arguments = (*map(partition.replicate, arguments), batches.batch, partition.replicate(np.int32(0)))
    _, sums = partition.compile_update(call, *arguments)(*arguments)
    sums = partition.to_host(sums)
    return {"loss": float(sums["loss"] / sums["count"]), "gradient norm": float(sums["gradient_norm"])}


def compare(name: str, dtype: str, batch: int, size: int) -> harness.Row:
    here, there = jax.devices("cpu")[0], jax.devices()[0]
    row = {"model": name, "dtype": dtype, "on": there.device_kind}
    try:
        ours, theirs = (one_step(device, name, dtype, batch, size) for device in (here, there))
    except Exception as error:  # what a device cannot do is a row that says so
        return row | {"good": False, "error": " ".join(str(error).split())[:200]}
    differences = {key: abs(theirs[key] - ours[key]) / max(abs(ours[key]), 1e-12) for key in ours}
    good = all(np.isfinite(value) and value <= _ALLOWED[dtype] for value in differences.values())
    return row | ours | {f"{key} differs by": value for key, value in differences.items()} | {"good": good}


def main(argv: list[str]) -> int:
    flags = harness.parser(__doc__.splitlines()[0])
    flags.add_argument("--model", action="append", help="may be given several times; default: one of each family")
    flags.add_argument("--batch", type=int, default=8)
    flags.add_argument("--dtypes", default="float32,bfloat16")
    args = flags.parse_args(argv)
    rows = []
    for name in args.model or FAMILIES:
        for dtype in args.dtypes.split(","):
            rows.append(compare(name, dtype, args.batch, _SIZES.get(name, 0 if name in _SMALL else 64)))
            print(rows[-1], flush=True)
        jax.clear_caches()
    harness.publish("agreement", rows, args.out)
    return int(not all(row["good"] for row in rows))


_SMALL = ("improved_vit_tiny", "resnext29_8x64d", "lenet5", "mnist_cnn", "airbench94")  # of their own size


if __name__ == "__main__":
    sys.exit(cli.run(main))
