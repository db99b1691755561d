"""The same training in vitcls and in a peer, turn by turn in one process, as a ratio.

    python -m benchmarks.versus --model=resnet50 --image_size=64 --batch=16
    python -m benchmarks.versus --epoch --data_dir=DIR       # one epoch of CIFAR-10 with augmentation

Peers: Keras 3 on TensorFlow, and timm on PyTorch, eager and compiled. Model, batch, dtype and optimizer are the same. A
ratio above 1 says that vitcls is the faster. A peer that is not installed, runs on another kind of device, has other
parameters or cannot run the model is a row that says so; the exit code is 1 where nothing could be compared.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers need memory of the same device

import jax

from benchmarks import harness, workload
from benchmarks.peers import vit_fields
from benchmarks.sources import DATA_DIR_HELP
from vitcls import cli, data
from vitcls.core import errors, sharding
from vitcls.models import summary

MODELS = ("vit_tiny_patch16", "resnet50", "resnext50_32x4d", "convnext_tiny")
EPOCH_MODEL = dict(patch_size=4, hidden_dim=64, depth=3, num_heads=4, mlp_dim=128)  # a CPU's epoch takes a minute
_PEERS = {  # the module of a peer and what it needs
    "keras": ("keras_peer", ("keras", "tensorflow")),
    "timm": ("torch_peer", ("torch", "timm")),
    "timm_compiled": ("torch_peer", ("torch", "timm")),
    "torch": ("torch_peer", ("torch",)),
}
STEP_PEERS, EPOCH_PEERS = ("keras", "timm", "timm_compiled"), ("keras", "torch")
# Keras gives the convolutions of ResNet biases, which batch normalisation takes out again.
MORE_PARAMETERS = {("keras", "resnet50"): 26_560}

# Makes a call of a peer, which has run once, and its number of parameters.
Build = Callable[[str, ModuleType], tuple[Callable, int]]


def choose_peers(names: str, known: tuple[str, ...]) -> list[str]:
    chosen = names.split(",") if names else list(known)
    for name in chosen:
        if name not in known:
            raise errors.unknown("peer", name, known)
    return chosen


def load_peer(name: str) -> ModuleType:
    """The module of a peer; raises RuntimeError where it cannot be compared here."""
    module_name, needs = _PEERS[name]
    for need in needs:
        if not importlib.util.find_spec(need):
            raise RuntimeError(f"{need} is not installed")
    module = importlib.import_module(f"benchmarks.peers.{module_name}")
    if jax.default_backend() != module.PLATFORM:
        raise RuntimeError(f"it runs on the {module.PLATFORM}, vitcls on the {jax.default_backend()}")
    return module


def against_peers(
    trainer: workload.Trainer, chosen: list[str], build: Build, repeats: int, *, model: str = "", warm: bool = False
) -> list[harness.Row]:
    """Times the trainer and the chosen peers by turns; one row per peer."""
    calls: dict[str, Callable] = {"vitcls": trainer}
    parameters = {"vitcls": summary.count_parameters(trainer.state.params)}
    failures: list[harness.Row] = []
    for peer in chosen:
        try:
            call, count = build(peer, load_peer(peer))
            if count - MORE_PARAMETERS.get((peer, model), 0) != parameters["vitcls"]:
                raise RuntimeError(f"it has {count:,} parameters, vitcls {parameters['vitcls']:,}")
        except Exception as error:  # whatever a peer cannot do is a row that says so
            failures.append({"peer": peer, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"})
        else:
            calls[peer], parameters[peer] = call, count
    return (rows_of(calls, parameters, repeats, warm=warm) if len(calls) > 1 else []) + failures


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
    """Rows of one SGD step on a batch that stays where it is."""
    overrides = ("optimizer.name=sgd", "optimizer.learning_rate=0.01")
    config = workload.make_config(name, batch, dtype=dtype, overrides=overrides)
    info = workload.make_info(name, image_size=image_size)
    size = info.image_shape[0]

    def build(peer: str, module: ModuleType) -> tuple[Callable, int]:
        compiled = {"compiled": True} if peer == "timm_compiled" else {}
        call, count = module.train_step(name, size, batch, info.num_classes, dtype, **compiled, **vit_fields(name))
        call()
        return call, count

    trainer = workload.Trainer(config, info, sharding.all_devices("data"))
    rows = against_peers(trainer, chosen, build, repeats, model=name)
    return [{"model": name, "image size": size, "batch": batch, "dtype": dtype} | row for row in rows]


def compare_epochs(data_dir: str, batch: int, dtype: str, chosen: list[str], repeats: int):
    """One epoch of CIFAR-10 with random crops and flips, through each library's own input pipeline."""
    fields = tuple(f"model.{key}={value}" for key, value in EPOCH_MODEL.items())
    augment = ("augment.crop.probability=1.0", "augment.flip.probability=0.5", "dataset.validation=0.0")
    source = workload.dataset_overrides("cifar10", data_dir)
    config = workload.make_config("vit_tiny_patch4", batch, dtype=dtype, overrides=(*fields, *augment, *source))
    dataset = data.decode(data.load(config.dataset), ("train",))
    info = data.describe(dataset, config.dataset)
    partition = sharding.all_devices("data")
    batches = data.train_batches(dataset, config.dataset, partition=partition, batch_size=batch, seed=0)
    count = len(dataset.train.labels) // batch
    trainer = workload.Trainer(config, info, partition, batches, calls=3)
    trainer()  # as the peers do, before they are timed
    trainer.calls = count

    def build(peer: str, module: ModuleType) -> tuple[Callable, int]:
        images, labels = dataset.train.images, dataset.train.labels
        return module.epoch(images, labels, batch, info.mean, info.std, dtype=dtype, **EPOCH_MODEL)

    rows = against_peers(trainer, chosen, build, repeats, warm=True)
    return [{"epoch": f"CIFAR-10, {count} batches of {batch}", "dtype": dtype} | row for row in rows]


def main(argv: list[str]) -> int:
    flags = harness.parser(__doc__)
    flags.add_argument("--model", action="append", help=f"may be given several times; default: {', '.join(MODELS)}")
    flags.add_argument("--image_size", type=int, default=0, help="pixels; the model's own without")
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument(
        "--peers", default="", help=f"default: {','.join(STEP_PEERS)}; with --epoch: {','.join(EPOCH_PEERS)}"
    )
    flags.add_argument("--epoch", action="store_true", help="one epoch of CIFAR-10 with augmentation")
    flags.add_argument("--data_dir", default="", help=f"with --epoch: {DATA_DIR_HELP}")
    args = flags.parse_args(argv)
    chosen = choose_peers(args.peers, EPOCH_PEERS if args.epoch else STEP_PEERS)
    if args.epoch:
        rows = compare_epochs(args.data_dir, args.batch, args.dtype, chosen, args.repeats)
    else:
        rows = []
        for name in args.model or MODELS:
            rows += compare_steps(name, args.image_size, args.batch, args.dtype, chosen, args.repeats)
            jax.clear_caches()
    harness.publish("versus_epoch" if args.epoch else "versus", rows, args.out)
    return int(all("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(cli.run(main))
