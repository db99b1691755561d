"""The improved ResNeXt50 on CIFAR-10, from scratch.

    vitcls train --config=configs/resnext_cifar10.py --workdir=runs/resnext_cifar10

The full recipe is written for one accelerator; it has not been run yet. `:small` has three short stages, for a CPU:
74.05 % after 8 epochs and half an hour on 2 busy cores (seed 0; docs/results.md).
"""

from vitcls.config import default_config
from vitcls.core import errors

PRESETS = ("full", "small")


def get_config(preset="full"):
    if preset not in PRESETS:
        raise errors.unknown("preset of configs/resnext_cifar10.py", preset, PRESETS)
    config = default_config("improved_resnext50")
    config.batch_size = 128
    config.total = "100 epochs"
    config.log_every = "100 steps"
    config.eval_every = "10 epochs"
    config.checkpoint_every = "10 epochs"
    config.steps_per_call = 20

    config.dataset.name = "cifar10"
    config.dataset.validation = 0.02
    config.augment.crop.update(probability=1.0, padding=4)
    config.augment.flip.update(probability=0.5)
    config.augment.trivialaugment.probability = 1.0
    config.augment.cutmix.update(probability=0.5, alpha=1.0)

    config.model.stem = "small"
    config.model.dtype = "bfloat16"
    config.loss.label_smoothing = 0.1
    config.loss.l2 = 5e-4
    config.optimizer.name = "sgd"
    config.optimizer.nesterov = True
    config.optimizer.learning_rate = 0.1
    config.optimizer.ema_decay = 0.999
    config.schedule.warmup = "5%"

    if preset == "small":
        config.total = "8 epochs"
        config.eval_every = "1 epochs"
        config.checkpoint_every = "1 epochs"
        config.steps_per_call = 1  # XLA's CPU backend is slow with convolutions inside the loop over steps
        config.model.stem = "standard"  # maps of 8x8 at once: those of 32x32 take ten times as long
        config.model.stem_kernel = 3
        config.model.depths = (1, 1, 1)
        config.model.width = 32
        config.model.groups = 8
        config.model.group_width = 4
        config.model.dropout = 0.0
        config.model.dtype = "float32"
        config.augment.trivialaugment.probability = 0.0
        config.augment.cutmix.probability = 0.0
        config.loss.label_smoothing = 0.0
        config.loss.l2 = 1e-4
        config.optimizer.name = "adam"  # the paper's "adaptive learning rate"
        config.optimizer.learning_rate = 2e-3
        config.optimizer.ema_decay = 0.99
    return config
