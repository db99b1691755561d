"""Every key of a config with its default, and the checks that a config must pass before any device work.

A block is made of dataclasses, whose fields are its keys and which check themselves: those of this file, and those of
the optimizers, schedules, losses, augmentations and data sources. A config file (configs/*.py) calls
`default_config(model_name)` and changes values; it never adds or removes keys.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Container
from typing import Any

from ml_collections import ConfigDict, FieldReference

from vitcls import models
from vitcls.core import buckets, errors
from vitcls.core.errors import UserError
from vitcls.core.registry import (
    checked,
    defaults,
    fill,
    local_path,
    of_two_types,
    paths,
    require,
    require_choice,
    require_durations,
    require_range,
)
from vitcls.core.sharding import STRATEGIES
from vitcls.data.augment import AUGMENTATIONS, TEST_TIME, make_augment
from vitcls.data.corruptions import CORRUPTIONS
from vitcls.data.order import MAX_BATCH_SIZE
from vitcls.data.sources import SOURCES, TFDS, source_of
from vitcls.metrics.table import ALWAYS_LOGGED, metric_of, metrics_of
from vitcls.models.weights import hub
from vitcls.optim import OPTIMIZERS, SCHEDULES
from vitcls.optim.parts import check_choice
from vitcls.tasks import TASKS
from vitcls.tasks.losses import LOSSES


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The keys outside of any block. Durations are 'N steps', 'N epochs', 'N examples' or 'N%' of total."""

    seed: int = 0
    batch_size: int = 128  # examples per update, over all devices and processes
    total: str = "10 epochs"
    log_every: str = "50 steps"
    eval_every: str = "1 epochs"
    checkpoint_every: str = "1 epochs"
    steps_per_call: int = 1  # training steps in one device dispatch
    # Of products of float32: 'default' is TF32 on NVIDIA GPUs and bfloat16 on TPUs, 'high' three of those, 'highest'
    # float32. The head and attention scores are float32 in any case.
    matmul_precision: str = "default"
    deterministic: bool = False  # the same bits on every run on GPUs too, at the price of slower kernels
    test_time_augmentation: str = "none"  # or 'mirror', 'mirror_shift': means over views in every evaluation
    nonfinite_limit: int = 10  # stop after so many skipped (non-finite) updates in a row

    def __post_init__(self):
        require_choice(self, "matmul_precision", ("default", "high", "highest"))
        require_choice(self, "test_time_augmentation", TEST_TIME)
        require_range(
            self,
            seed=(0, 2**31 - 1),
            batch_size=(1, MAX_BATCH_SIZE),
            steps_per_call=(1, 10_000),
            nonfinite_limit=(1, 2**31 - 1),
        )
        require_durations(self, "total", "log_every", "eval_every", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """When a run ends before its total."""

    metric: str = "eval/loss"
    patience: int = 0  # evaluations without improvement; 0 for off
    min_delta: float = 0.0

    def __post_init__(self):
        require_range(self, patience=(0, math.inf), min_delta=(0, math.inf))


@dataclasses.dataclass(frozen=True)
class PartitionSettings:
    """How arrays are laid out over devices."""

    strategy: str = "data"  # 'data', 'fsdp', 'pmap'
    min_shard_elements: int = 2**14  # 'fsdp': smaller parameters stay replicated
    # Virtual devices that a CPU is; 0 for what is faster (training/cpu_devices.py), 1 in several runs at once. Both
    # are for commands that start JAX; JAX_NUM_CPU_DEVICES and XLA_FLAGS go first.
    cpu_devices: int = 0

    def __post_init__(self):
        require_choice(self, "strategy", STRATEGIES)
        require_range(self, min_shard_elements=(1, math.inf), cpu_devices=(0, 64))


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """What is kept."""

    keep: int = 3  # the last K; the best by `metric` is kept besides
    metric: str = "eval/accuracy"

    def __post_init__(self):
        require_range(self, keep=(1, math.inf))


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """What the report at the end is of."""

    checkpoint: str = "last"  # 'last' or 'best': the weights that are reported
    split: str = "test"  # 'validation': a search or cross-validation, which may not look at the test split
    timing: bool = True  # latency and throughput of inference, which take 4 seconds
    corruptions: tuple[str, ...] = ()  # of data/corruptions.py, in which accuracy is measured in five severities

    def __post_init__(self):
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise ValueError(errors.not_known("corruptions", str(name), tuple(CORRUPTIONS)))
        require_choice(self, "checkpoint", ("last", "best"))
        require_choice(self, "split", ("test", "validation"))


@dataclasses.dataclass(frozen=True)
class InitSettings:
    """What a network starts from, and which part of it is trained."""

    # A file of published weights (.safetensors, .npz, .weights.h5, .keras), timm/MODEL.TAG of the Hub, or a workdir.
    weights: str = local_path()
    head: str = "new"  # 'keep': the classifier too, for the same classes
    train: str = "all"  # 'head', 'last N blocks', or a regex of parameter paths; a new head always
    layer_decay: float = 1.0  # the learning rate falls by this factor per block, towards the input; 1 for none
    freeze_norm: bool = False  # batch statistics stay, and norms use them

    def __post_init__(self):
        require_choice(self, "head", ("new", "keep"))
        require(self, "layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")
        check_choice(self.train)


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """What `vitcls probe` has made of the data; training leaves it as it is."""

    features: str = ""  # 'pixels', 'hog', 'color', or 'network', which is that of config.init.weights
    classifier: str = ""  # 'linear', 'knn', 'svm' or 'centroid'
    shots: tuple = ()  # images of each class of few-shot classification


_SETTINGS = {
    "init": InitSettings,
    "probe": ProbeSettings,
    "early_stopping": EarlyStopping,
    "partition": PartitionSettings,
    "checkpoint": CheckpointSettings,
    "report": ReportSettings,
}
_REGISTRIES = {"task": TASKS, "loss": LOSSES, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
_ANY_TYPE = of_two_types(SOURCES.shared)  # image_size


def default_config(model_name: str, task_name: str = "classify") -> ConfigDict:
    """Returns a locked config for `model_name`, with every key that vitcls reads.

    The block `model` has one key per field of the model; a field left at None takes the value of the named preset. The
    block `task` has the fields of the training objective.
    """
    config = ConfigDict(defaults(RunSettings))
    config.dataset = SOURCES.block("digits")
    for key in _ANY_TYPE:
        default = config.dataset[key]
        del config.dataset[key]
        config.dataset[key] = FieldReference(default, field_type=object)
    config.augment = {name: defaults(entry) for name, entry in AUGMENTATIONS.items()}
    config.model = ConfigDict({"name": model_name, **models.field_placeholders(model_name)})
    config.task = {"name": task_name} | defaults(TASKS[task_name])
    config.loss = LOSSES.block("cross_entropy")
    config.optimizer = OPTIMIZERS.block("adamw")
    config.schedule = SCHEDULES.block("cosine")
    for name, settings in _SETTINGS.items():
        config[name] = defaults(settings)
    return config.lock()


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns the config as it will run and as config.json keeps it.

    What a block leaves out, because the config has assigned it a dict, takes its default; the model's fields are filled
    in from its preset, and the data directory no longer depends on where one stands. Raises UserError for an unknown
    model or key.
    """
    if not isinstance(config, ConfigDict) or not isinstance(config.get("model"), ConfigDict):
        raise UserError(
            "a config is what `default_config(model_name)` of vitcls.config returns, with its block `model`"
        )
    blocks = {key: value for key, value in config.to_dict().items() if key != "model"}
    task_name = config.task.get("name", "classify") if isinstance(config.get("task"), ConfigDict) else "classify"
    resolved = ConfigDict(_complete(blocks, default_config(config.model.name, task_name).to_dict()))
    name, fields = config.model.name, models.fields(config.model.name)
    given = {key: value for key, value in config.model.items() if key != "name" and value is not None}
    for key, value in given.items():
        if key not in fields:
            raise errors.unknown(f"field of {name}", key, fields)
        given[key] = checked(value, fields[key], f"config.model.{key}")
    resolved.model = ConfigDict({"name": name, **fields, **given})
    resolved.dataset.data_dir = place_of_data(config.dataset.data_dir, config.dataset.name, "config.dataset.data_dir")
    for block, entry in (("task", TASKS[task_name]), ("init", InitSettings), ("dataset", SOURCES.shared)):
        for key in paths(entry):
            path = resolved[block][key]
            buckets.check_local(path, f"config.{block}.{key}")
            if path and not (block == "init" and hub.is_name(path)):
                resolved[block][key] = os.path.abspath(os.path.expanduser(path))
    return resolved.lock()


def place_of_data(path: str, name: str, key: str) -> str:
    """Where the data set `name` is: an absolute path, '' for the default, or for sets of TFDS a URL of a bucket."""
    if source_of(name) == TFDS and buckets.is_url(path):
        if not buckets.is_in_bucket(path):
            known = " or ".join(f"{scheme}://BUCKET/DIR" for scheme in buckets.EXTRAS)
            raise UserError(f"{key}='{path}' cannot be used; give a directory, {known}")
        return path.rstrip("/")
    buckets.check_local(path, key)
    return path and os.path.abspath(os.path.expanduser(path))


def _complete(given: dict, defaults: dict, block: str = "config") -> dict:
    """`given` with the keys that it lacks, in the order of `defaults`.

    Raises UserError for a key that is not there and for a value of another type than its default.
    """
    if not isinstance(given, dict):
        raise UserError(f"{block}={given!r} is impossible: it is a block of {', '.join(defaults)}")
    for key in given:
        if key not in defaults:
            raise errors.unknown(f"key of {block}", str(key), defaults)
    return {
        key: _complete(given.get(key, {}), default, f"{block}.{key}")
        if isinstance(default, dict)
        else checked(given.get(key, default), None if key in _ANY_TYPE else default, f"{block}.{key}")
        for key, default in defaults.items()
    }


def validate(config: ConfigDict) -> None:
    """Raises UserError, one line that names the key, for a value that cannot work whatever the data and the devices."""
    fill(RunSettings, config, "config")
    for name, settings in _SETTINGS.items():
        fill(settings, config[name], f"config.{name}")
    for name, registry in _REGISTRIES.items():
        registry.check(config[name])
    SOURCES.check(config.dataset, source_of(config.dataset.name))
    make_augment(config.augment)
    if config.batch_size % config.optimizer.accumulate:
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be divided into "
            f"config.optimizer.accumulate={config.optimizer.accumulate} parts"
        )
    size = config.dataset.image_size
    pixels = math.prod(size) if isinstance(size, tuple) else size**2
    if config.dataset.name in ("digits", "synthetic") and pixels > _LARGEST_MADE_UP**2:
        raise UserError(
            f"config.dataset.image_size={size} is impossible for '{config.dataset.name}', whose images are in memory; "
            f"it must be at most {_LARGEST_MADE_UP} pixels"
        )
    if config.deterministic and config.partition.strategy == "pmap":
        raise UserError("config.deterministic=True is not for config.partition.strategy='pmap'; use 'data' or 'fsdp'")


def watched_metrics(config: ConfigDict) -> list[str]:
    """The metrics that an evaluation during training computes: those always logged, and those that the config names."""
    named = [config.checkpoint.metric]
    if config.early_stopping.patience:
        named.append(config.early_stopping.metric)
    if config.schedule.name == "plateau":
        named.append(config.schedule.metric)
    return list(dict.fromkeys([*ALWAYS_LOGGED, *(metric_of(key).name for key in named)]))


def validate_metrics(config: ConfigDict, *, evaluates: bool, sums: Container[str] = ()) -> None:
    """Raises UserError for a named metric that the run will not have.

    `evaluates`: it has a validation split; `sums`: those that its task adds to an evaluation.
    """
    watched = {"checkpoint.metric": False}
    if config.early_stopping.patience:
        watched["early_stopping.metric"] = True
    if config.schedule.name == "plateau":
        watched["schedule.metric"] = True
    for key, needed in watched.items():
        known = [f"eval/{name}" for name in metrics_of(sums)]
        if _get(config, key) not in known:
            raise errors.unknown(f"config.{key}", _get(config, key), known)
        if needed and not evaluates:
            raise UserError(
                f"config.{key}='{_get(config, key)}' needs evaluations; set config.dataset.validation above 0 and "
                "config.eval_every, or turn off what watches it"
            )
    if config.report.checkpoint == "best" and not evaluates:
        raise UserError(
            "config.report.checkpoint='best' needs a validation split; set config.dataset.validation above 0"
        )


def to_json(config: ConfigDict) -> str:
    """The text of config.json."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Reads config.json back; keys that a newer version has added take their defaults.

    Raises UserError for text that is not a config.
    """
    try:
        values = _renamed(json.loads(text))
        config = default_config(values["model"]["name"], values.get("task", {}).get("name", "classify"))
        config.update(_tuples(values))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split(" Other fields")[0].split())
        raise UserError(
            f"{reason}; it is damaged, or needs --import=MODULE with the parts of its own that it uses"
        ) from None
    return resolve(config)


_RENAMED: dict[str, str] = {}  # what a key of an older version is called now, as 'block.key'
_REPLACED = {"model.remat": {False: "none", True: "block"}}  # what its values are called now


def _renamed(values: dict) -> dict:
    """Renames the keys of older versions, and their values."""
    for place, now in _REPLACED.items():
        *blocks, key = place.split(".")
        node = functools.reduce(lambda node, block: node.get(block, {}), blocks, values)
        if isinstance(node.get(key), bool):
            node[key] = now[node[key]]
    for old, new in _RENAMED.items():
        *blocks, key = old.split(".")
        node = functools.reduce(lambda node, block: node.get(block, {}), blocks, values)
        if key in node:
            *blocks, new_key = new.split(".")
            value = node.pop(key)
            functools.reduce(lambda node, block: node.setdefault(block, {}), blocks, values)[new_key] = value
    return values


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their keys: {"model": {"name": "lenet5"}} -> {"model.name": "lenet5"}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in flatten(value, f"{prefix}.{key}".lstrip(".")).items()
    }


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _get(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


_LARGEST_MADE_UP = 1_024  # pixels of a side
