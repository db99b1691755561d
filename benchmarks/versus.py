"""The same training in vitcls and in a peer, turn by turn in one process, as a ratio.

    python -m benchmarks.versus --model=resnet50 --image_size=64 --batch=16
    python -m benchmarks.versus --epoch --data_dir=DIR       # one epoch of CIFAR-10 with augmentation

Peers: Keras 3 on TensorFlow, and timm on PyTorch, eager and compiled, where they are installed. Model, batch, dtype
and optimizer are the same, and so must be the number of parameters. A ratio above 1 says that vitcls is the faster.
"""

import importlib.util
import os
import sys
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers need memory of the same device

import jax

from benchmarks import harness, workload
from benchmarks.peers import vit_fields
from vitcls import cli, data, errors, overview, partition
from vitcls.config import ConfigDict

MODELS = ("vit_tiny_patch16", "resnet50", "resnext50_32x4d", "convnext_tiny")
_EPOCH_MODEL = dict(patch_size=4, hidden_dim=64, depth=3, num_heads=4, mlp_dim=128)  # a CPU's epoch takes a minute

_NEEDS = {
    "keras": ("keras", "tensorflow"),
    "timm": ("torch", "timm"),
    "timm_compiled": ("torch", "timm"),
    "torch": ("torch",),
}


def peers(names: str) -> list[str]:
    """Those of the named peers that are installed."""
    chosen = names.split(",")
    for name in chosen:
        if name not in _NEEDS:
            raise errors.unknown("peer", name, _NEEDS)
    return [name for name in chosen if all(importlib.util.find_spec(part) for part in _NEEDS[name])]


def rows_of(
    calls: dict[str, Callable], parameters: dict[str, int], repeats: int, *, warm: bool = False
) -> list[harness.Row]:
    """Times the calls, 'vitcls' among them, by turns; one row per peer."""
    timings = harness.alternate(calls, repeats=repeats, warm=warm)
    return [
        {
            "peer": peer,
            "vitcls ms": 1e3 * timings["vitcls"].median,
            "vitcls fastest..slowest": timings["vitcls"].spread(),
            "peer ms": 1e3 * timing.median,
            "peer fastest..slowest": timing.spread(),
            "peer / vitcls": harness.ratio(timing, timings["vitcls"]),
            "parameters": parameters["vitcls"],
            "parameters of the peer": parameters[peer],
        }
        for peer, timing in timings.items()
        if peer != "vitcls"
    ]


def compare_steps(name: str, image_size: int, batch: int, dtype: str, chosen: list[str], repeats: int):
    overrides = ("optimizer.name=sgd", "optimizer.learning_rate=0.01")
    config = workload.make_config(name, batch, dtype=dtype, overrides=overrides)
    info = workload.make_info(name, image_size=image_size)
    trainer = workload.Trainer(config, info, partition.all_devices("data"))
    calls = {"vitcls": trainer}
    parameters = {"vitcls": overview.count_parameters(trainer.state.params)}
    fields = vit_fields(name)
    size = info.image_shape[0]
    failures = []
    for peer in chosen:
        arguments = (name, size, batch, info.num_classes, dtype)
        try:
            if peer == "keras":
                from benchmarks.peers import keras_peer

                call, count = keras_peer.train_step(*arguments, **fields)
            else:
                from benchmarks.peers import torch_peer

                call, count = torch_peer.train_step(*arguments, compiled=peer == "timm_compiled", **fields)
            call()
        except Exception as error:  # whatever a peer cannot do is a row that says so
            failures.append({"peer": peer, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"})
            continue
        calls[peer], parameters[peer] = call, count
    rows = rows_of(calls, parameters, repeats) + failures
    return [{"model": name, "image size": size, "batch": batch, "dtype": dtype} | row for row in rows]


def compare_epochs(data_dir: str, batch: int, dtype: str, chosen: list[str], repeats: int):
    """One epoch of CIFAR-10 with random crops and flips, through each library's own input pipeline."""
    fields = tuple(f"model.{key}={value}" for key, value in _EPOCH_MODEL.items())
    augment = ("augment.crop.probability=1.0", "augment.flip.probability=0.5")
    config = workload.make_config("vit_tiny_patch4", batch, dtype=dtype, overrides=(*fields, *augment))
    dataset_config = ConfigDict(config.dataset.to_dict() | dict(name="cifar10", data_dir=data_dir, validation=0.0))
    dataset = data.decode(data.load(dataset_config), ("train",))
    info = data.describe(dataset, dataset_config)
    layout = partition.all_devices("data")
    batches = data.train_batches(dataset, dataset_config, partition=layout, batch_size=batch, seed=0)
    count = len(dataset.train.labels) // batch
    trainer = workload.Trainer(config, info, layout, batches, calls=3)
    trainer()  # as the peers do, before they are timed
    trainer.calls = count
    calls, parameters = {"vitcls": trainer}, {"vitcls": overview.count_parameters(trainer.state.params)}
    arguments = (dataset.train.images, dataset.train.labels, batch, info.mean, info.std)
    for peer in chosen:
        if peer == "keras":
            from benchmarks.peers import keras_peer

            calls[peer], parameters[peer] = keras_peer.epoch(*arguments, **_EPOCH_MODEL)
        else:
            from benchmarks.peers import torch_peer

            calls[peer], parameters[peer] = torch_peer.epoch(*arguments, dtype=dtype, **_EPOCH_MODEL)
    rows = rows_of(calls, parameters, repeats, warm=True)
    return [{"epoch": f"CIFAR-10, {count} batches of {batch}", "dtype": dtype} | row for row in rows]


def main(argv: list[str]) -> None:
    flags = harness.parser(__doc__)
    flags.add_argument("--model", action="append", help=f"may be given several times; default: {', '.join(MODELS)}")
    flags.add_argument("--image_size", type=int, default=0, help="pixels; the model's own without")
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--peers", default="", help="default: keras,timm,timm_compiled; with --epoch: keras,torch")
    flags.add_argument("--epoch", action="store_true", help="one epoch of CIFAR-10 with augmentation")
    flags.add_argument("--data_dir", default="", help="where TFDS keeps cifar10")
    args = flags.parse_args(argv)
    chosen = peers(args.peers or ("keras,torch" if args.epoch else "keras,timm,timm_compiled"))
    if args.epoch:
        rows = compare_epochs(args.data_dir, args.batch, args.dtype, chosen, args.repeats)
    else:
        rows = []
        for name in args.model or MODELS:
            rows += compare_steps(name, args.image_size, args.batch, args.dtype, chosen, args.repeats)
            jax.clear_caches()
    harness.publish("versus_epoch" if args.epoch else "versus", rows, args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
