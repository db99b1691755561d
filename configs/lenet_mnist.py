"""LeNet-5 on MNIST.

    vitcls train --config=configs/lenet_mnist.py --workdir=runs/lenet_mnist

99.16 % of the test images after two and a half minutes on 2 cores (seed 0; docs/results.md).
"""

from vitcls.config import default_config


def get_config():
    config = default_config("lenet5")
    config.batch_size = 128
    config.total = "10 epochs"
    config.log_every = "100 steps"
    config.dataset.name = "mnist"
    config.dataset.validation = 0.05
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.loss.l2 = 1e-4
    config.schedule.warmup = "2%"
    return config
