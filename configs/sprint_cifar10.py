"""94 % of CIFAR-10 in as few seconds of training as possible: ResNet-9 and the recipe of Page's DAWNBench entry.

    python -m vitcls.main --config=configs/sprint_cifar10.py --workdir=runs/sprint

Written for one accelerator; it has not been run yet. All 50,000 training images are trained on, and nothing but the
end of the run is evaluated. Quote the mean over at least 20 seeds (`python -m benchmarks.accelerator
--only=sprint_cifar10`).
"""

from vitcls.config import default_config


def get_config():
    config = default_config("resnet9")
    config.batch_size = 512
    config.total = "24 epochs"
    config.log_every = "4 epochs"
    config.checkpoint_every = "100%"
    config.steps_per_call = 98  # an epoch
    config.dataset.name = "cifar10"
    config.dataset.validation = 0.0
    config.augment.crop = dict(probability=1.0, padding=4)
    config.augment.flip = dict(probability=0.5)
    config.augment.erase = dict(probability=1.0, min_area=0.0624, max_area=0.0626, fill="zero")  # cutout of 8x8
    config.model.dtype = "bfloat16"
    config.loss.label_smoothing = 0.2
    config.loss.l2 = 5e-4
    config.optimizer.name = "sgd"
    config.optimizer.nesterov = True
    config.optimizer.learning_rate = 0.4
    config.schedule.name = "linear"
    config.schedule.warmup = "20%"
    return config
