"""Every key of a config with its default, and the checks that a config must pass before any device work.

A config file (configs/*.py) calls `default_config(model_name)` and changes values; it never adds or removes keys.
"""

import functools
import json
import math
import os
import re
from typing import Any

from ml_collections import ConfigDict, FieldReference

from vitcls import models, optim
from vitcls.core import durations, errors
from vitcls.core.errors import UserError
from vitcls.core.partition import STRATEGIES
from vitcls.data.augment import TEST_TIME, make_augment
from vitcls.data.order import MAX_BATCH_SIZE
from vitcls.tasks import losses


def default_config(model_name: str) -> ConfigDict:
    """Returns a locked config for `model_name`, with every key that vitcls reads.

    The block `model` has one key per field of the model; a field left at None takes the value of the named preset.
    """
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128  # examples per update, over all devices and processes
    config.total = "10 epochs"  # durations: 'N steps', 'N epochs', 'N examples' or 'N%' of total
    config.log_every = "50 steps"
    config.eval_every = "1 epochs"
    config.checkpoint_every = "1 epochs"
    config.steps_per_call = 1  # training steps in one device dispatch
    # Of products of float32: 'default' is TF32 on NVIDIA GPUs and bfloat16 on TPUs, 'high' three of those, 'highest'
    # float32. The head and attention scores are float32 in any case.
    config.matmul_precision = "default"
    config.deterministic = False  # the same bits on every run on GPUs too, at the price of slower kernels
    config.test_time_augmentation = "none"  # or 'mirror', 'mirror_shift': means over views in every evaluation
    config.nonfinite_limit = 10  # stop after so many skipped (non-finite) updates in a row

    config.dataset = ConfigDict()
    # 'digits', 'synthetic', 'synthetic_jpeg', 'folder', 'npz' or any TFDS classification set.
    config.dataset.name = "digits"
    config.dataset.data_dir = ""  # folder: its root; npz: the file; TFDS: data directory ('' = TFDS's own default)
    config.dataset.pipeline = "auto"  # 'resident', 'streaming' or 'auto' (by size)
    # Pixels: one number, or (height, width); 0 keeps the native size, which all images must then share.
    config.dataset.image_size = FieldReference(0, field_type=object)
    config.dataset.max_value = 0.0  # what becomes white where there are more than 8 bits; 0 finds it in training images
    config.dataset.validation = 0.1  # of train, carved off where the source has no validation split; 0 for none
    config.dataset.test = 0.2  # fraction carved off for test where the source has no test split
    config.dataset.split_seed = 0
    # k-fold cross-validation: with k > 1, fold `fold` of train is the validation split; one that comes with the data
    # set is not used, and a line of the log says so.
    config.dataset.num_folds = 0
    config.dataset.fold = 0
    config.dataset.sampling = "uniform"  # 'uniform' or 'balanced' (every class equally often)
    config.dataset.mean = ()  # per channel, in [0, 1]; () computes it from the training split
    config.dataset.std = ()
    # The central crop, as a share of the image resized to image_size / eval_crop: of evaluation, prediction, and of
    # training images too unless they are cropped at random.
    config.dataset.eval_crop = 1.0
    config.dataset.random_resized_crop = False  # on the host; streaming only
    config.dataset.crop_area = (0.08, 1.0)  # of the image
    config.dataset.crop_ratio = (3 / 4, 4 / 3)  # width / height
    config.dataset.num_examples = 1000  # 'synthetic' and 'synthetic_jpeg' only
    config.dataset.num_classes = 10  # as num_examples

    config.augment = ConfigDict()
    config.augment.crop = dict(probability=0.0, padding=4, fill="zero")  # pixels on each side; or 'reflect'
    config.augment.flip = dict(probability=0.0)  # horizontal
    config.augment.rotate = dict(probability=0.0, degrees=15.0)  # uniform in +-degrees
    config.augment.scale = dict(probability=0.0, low=0.8, high=1.25)  # zoom factor
    config.augment.color = dict(probability=0.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    config.augment.noise = dict(probability=0.0, std=0.05)  # of images in [0, 1]
    config.augment.erase = dict(probability=0.0, min_area=0.02, max_area=1 / 3, fill="noise")  # or 'zero' (cutout)
    config.augment.randaugment = dict(probability=0.0, num_ops=2, magnitude=9.0)  # magnitude in [0, 10]
    config.augment.trivialaugment = dict(probability=0.0)
    config.augment.mixup = dict(probability=0.0, alpha=0.8)
    config.augment.cutmix = dict(probability=0.0, alpha=1.0)

    config.model = ConfigDict({"name": model_name, **models.field_placeholders(model_name)})

    config.loss = ConfigDict()
    config.loss.name = "cross_entropy"  # or 'focal'
    config.loss.label_smoothing = 0.0
    config.loss.focal_gamma = 2.0
    config.loss.class_weights = ()  # () for none, ('balanced',), or one weight per class
    config.loss.l2 = 0.0  # l2 / 2 * sum of squares of the decayed parameters, added to the loss

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # 'adam', 'adamw', 'sgd', 'lamb', 'lion', 'muon'
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.0  # decoupled; masked off biases, norms and embeddings ('adam' takes loss.l2)
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.momentum = 0.9  # 'sgd' and 'muon'
    config.optimizer.nesterov = False  # 'sgd' and 'muon'
    config.optimizer.clip_norm = 0.0  # global norm; 0 for no clipping
    config.optimizer.accumulate = 1  # the batch is processed in so many parts, one after the other
    config.optimizer.ema_decay = 0.0  # EMA of parameters and batch statistics, used for evaluation; 0 for none
    config.optimizer.multipliers = ()  # (('regex of parameter path', learning-rate multiplier), ...); 0 freezes
    config.optimizer.base_batch_size = 0  # scale the learning rate by batch_size / base_batch_size; 0 for off

    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # 'constant', 'step', 'exponential', 'linear', 'cosine', 'onecycle', 'plateau'
    config.schedule.warmup = "0 steps"  # linear, from 0 to the learning rate
    config.schedule.final = 0.0  # last value, as a fraction of the learning rate ('linear', 'cosine', 'onecycle')
    config.schedule.boundaries = ("50%", "75%")  # 'step': durations at which the rate is multiplied by `factor`
    config.schedule.factor = 0.1  # 'step', 'plateau': multiplier; 'exponential': multiplier per `every`
    config.schedule.every = "1 epochs"  # 'exponential'
    config.schedule.peak = 0.3  # 'onecycle': fraction of the run at which the rate peaks
    config.schedule.metric = "eval/loss"  # 'plateau': the metric watched, and
    config.schedule.patience = 5  # so many evaluations without improvement before a reduction

    config.early_stopping = ConfigDict()
    config.early_stopping.metric = "eval/loss"
    config.early_stopping.patience = 0  # evaluations without improvement; 0 for off
    config.early_stopping.min_delta = 0.0

    config.partition = ConfigDict()
    config.partition.strategy = "data"  # 'data', 'fsdp', 'pmap'
    config.partition.min_shard_elements = 2**14  # 'fsdp': smaller parameters stay replicated

    config.checkpoint = ConfigDict()
    config.checkpoint.keep = 3  # the last K; the best by `metric` is kept besides
    config.checkpoint.metric = "eval/accuracy"

    config.report = ConfigDict()
    config.report.checkpoint = "last"  # 'last' or 'best': the weights that are reported
    config.report.timing = True  # latency and throughput of inference, which take 4 seconds
    config.lock()
    return config


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
    resolved = ConfigDict(_complete(blocks, default_config(config.model.name).to_dict()))
    name, fields = config.model.name, models.fields(config.model.name)
    given = {key: value for key, value in config.model.items() if key != "name" and value is not None}
    for key, value in given.items():
        if key not in fields:
            raise errors.unknown(f"field of {name}", key, fields)
        given[key] = _checked(value, fields[key], f"config.model.{key}")
    resolved.model = ConfigDict({"name": name, **fields, **given})
    check_local(config.dataset.data_dir, "config.dataset.data_dir")
    if config.dataset.data_dir:
        resolved.dataset.data_dir = os.path.abspath(os.path.expanduser(config.dataset.data_dir))
    return resolved.lock()


def check_local(data_dir: str, key: str) -> None:
    """Raises UserError for a URL, which would be taken for a directory called `gs:`."""
    if re.match(r"[A-Za-z][\w+.-]+:/", data_dir):
        raise UserError(f"{key}='{data_dir}' is a URL; the data must be in a local directory")


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
        else _checked(given.get(key, default), default, f"{block}.{key}")
        for key, default in defaults.items()
    }


_TYPES = {
    bool: ("True or False", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number that float32 can hold", (int, float)),
    str: ("text", (str,)),
    tuple: ("a tuple", (tuple, list)),
}


def _fits_float32(value: float) -> bool:
    """Whether a number keeps its meaning on the devices: finite there, and not 0 unless it is."""
    return value == 0 or 1e-37 <= abs(value) <= 1e37


def _checked(value: Any, default: Any, key: str) -> Any:
    """`value` if it is of the type of `default`, which a config file can get around; lists become tuples."""
    if key == "config.dataset.image_size":  # of two types
        return value
    if default is None:  # a model's field without a default is free
        return value
    expected, types = _TYPES[type(default)]
    wrong = not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
    if wrong or (isinstance(default, float) and not _fits_float32(value)):
        raise UserError(f"{key}={value!r} is impossible; it must be {expected}, such as {default!r}")
    return tuple(value) if isinstance(value, list) else value


def validate(config: ConfigDict) -> None:
    """Raises UserError, one line that names the key, for a value that cannot work whatever the data and the devices."""
    for key, valid in _CHOICES.items():
        if _get(config, key) not in valid:
            raise errors.unknown(f"config.{key}", str(_get(config, key)), valid)
    for key, (low, high) in _RANGES.items():
        value = _get(config, key)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            raise UserError(f"config.{key}={value} is impossible; it must be {bounds}")
    for key, (low, high, count) in _NUMBERS.items():
        value = _get(config, key)
        numbers = [part for part in value if isinstance(part, int | float) and low <= part <= high]
        if len(numbers) < len(value) or (count and (len(value) != count or list(value) != sorted(value))):
            form = f"{count} numbers in order, each" if count else "empty or numbers, each"
            raise UserError(f"config.{key}={value} is impossible; it must be {form} in [{low:g}, {high:g}]")
    for key in _DURATIONS:
        value = _get(config, key)
        for duration in value if isinstance(value, tuple) else (value,):
            try:
                durations.to_steps(duration, batch_size=config.batch_size, num_examples=1, total_steps=1)
            except UserError as error:
                raise UserError(f"config.{key}: {error}") from None
    size = config.dataset.image_size
    sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
    if size != 0 and not all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in sides):
        raise UserError(
            f"config.dataset.image_size={size!r} is impossible; it must be 0, a number of pixels, or (height, width), "
            f"of up to {_LARGEST_SIDE}"
        )
    if not 0 < config.dataset.eval_crop <= 1:
        raise UserError(f"config.dataset.eval_crop={config.dataset.eval_crop} is impossible; it must be in (0, 1]")
    if config.batch_size % config.optimizer.accumulate:
        raise UserError(
            f"config.batch_size={config.batch_size} cannot be divided into "
            f"config.optimizer.accumulate={config.optimizer.accumulate} parts"
        )
    pixels = math.prod(sides) if len(sides) == 2 else sides[0] ** 2
    if config.dataset.name in ("digits", "synthetic") and pixels > _LARGEST_MADE_UP**2:
        raise UserError(
            f"config.dataset.image_size={size} is impossible for '{config.dataset.name}', whose images are in memory; "
            f"it must be at most {_LARGEST_MADE_UP} pixels"
        )
    if config.deterministic and config.partition.strategy == "pmap":
        raise UserError("config.deterministic=True is not for config.partition.strategy='pmap'; use 'data' or 'fsdp'")
    if config.dataset.num_folds == 1 or not 0 <= config.dataset.fold < max(config.dataset.num_folds, 1):
        raise UserError(
            f"config.dataset.fold={config.dataset.fold} of config.dataset.num_folds={config.dataset.num_folds}: "
            "num_folds must be 0 or at least 2, and fold one of 0 .. num_folds - 1"
        )
    make_augment(config.augment)


def validate_metrics(config: ConfigDict, *, evaluates: bool) -> None:
    """Raises UserError for a named metric that the run will not have; `evaluates`: it has a validation split."""
    watched = {"checkpoint.metric": False}
    if config.early_stopping.patience:
        watched["early_stopping.metric"] = True
    if config.schedule.name == "plateau":
        watched["schedule.metric"] = True
    for key, needed in watched.items():
        if _get(config, key) not in EVAL_METRICS:
            raise errors.unknown(f"config.{key}", _get(config, key), EVAL_METRICS)
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
        config = default_config(values["model"]["name"])
        config.update(_tuples(values))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"config.json cannot be read: {error}") from None
    return resolve(config)


_RENAMED: dict[str, str] = {}  # what a key of an older version is called now, as 'block.key'


def _renamed(values: dict) -> dict:
    """A config of any version under the names of this one."""
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


EVAL_METRICS = ("eval/loss", "eval/accuracy", "eval/top5_accuracy")
_CHOICES = {
    "matmul_precision": ("default", "high", "highest"),
    "test_time_augmentation": TEST_TIME,
    "dataset.pipeline": ("auto", "resident", "streaming"),
    "dataset.sampling": ("uniform", "balanced"),
    "loss.name": losses.NAMES,
    "optimizer.name": optim.OPTIMIZERS,
    "schedule.name": optim.SCHEDULES,
    "partition.strategy": STRATEGIES,
    "report.checkpoint": ("last", "best"),
}
_RANGES = {
    "seed": (0, 2**31 - 1),
    "batch_size": (1, MAX_BATCH_SIZE),
    "steps_per_call": (1, 10_000),
    "nonfinite_limit": (1, 2**31 - 1),
    "dataset.max_value": (0, math.inf),
    "dataset.validation": (0, 0.9),
    "dataset.test": (0.01, 0.9),
    "dataset.split_seed": (0, 2**31 - 1),
    "dataset.num_folds": (0, math.inf),
    "dataset.num_examples": (1, 10_000_000),
    "dataset.num_classes": (2, 10_000),
    "loss.label_smoothing": (0, 0.99),
    "loss.focal_gamma": (0, math.inf),
    "loss.l2": (0, math.inf),
    "optimizer.accumulate": (1, math.inf),
    "optimizer.clip_norm": (0, math.inf),
    "optimizer.ema_decay": (0, 0.999999),
    "optimizer.base_batch_size": (0, math.inf),
    "early_stopping.patience": (0, math.inf),
    "early_stopping.min_delta": (0, math.inf),
    "partition.min_shard_elements": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
}
_LARGEST_SIDE = 8_192  # pixels
_LARGEST_MADE_UP = 1_024
_NUMBERS = {  # of tuples: lowest, highest, and how many, which are then in order
    "dataset.mean": (-1e3, 1e3, 0),
    "dataset.std": (1e-6, 1e3, 0),
    "dataset.crop_area": (1e-6, 1, 2),
    "dataset.crop_ratio": (1e-3, 1e3, 2),
}
_DURATIONS = (
    "total",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "schedule.warmup",
    "schedule.every",
    "schedule.boundaries",
)
