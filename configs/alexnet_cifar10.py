"""AlexNet (one tower, small stem) on CIFAR-10, trained as in 2012: SGD with momentum, L2, crops and flips.

    vitcls train --config=configs/alexnet_cifar10.py --workdir=runs/alexnet_cifar10

Written for one accelerator; it has not been run yet.
"""

from vitcls.config import default_config


def get_config():
    config = default_config("alexnet")
    config.batch_size = 128
    config.total = "90 epochs"
    config.eval_every = "5 epochs"
    config.checkpoint_every = "5 epochs"
    config.steps_per_call = 20
    config.dataset.name = "cifar10"
    config.augment.crop.update(probability=1.0, padding=4)
    config.augment.flip.update(probability=0.5)
    config.model.stem = "small"
    config.model.norm = "batch"
    config.model.head_width = 1024  # 9 places of 256 channels need less than 4,096
    config.loss.l2 = 5e-4
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.02
    config.optimizer.clip_norm = 5.0
    config.schedule.warmup = "2%"
    return config
