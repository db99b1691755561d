"""The CNN of Nimma & Uddagiri (table II) on MNIST, with Adam at 0.001 and batches of 64 (table III).

    vitcls train --config=configs/cnn_mnist.py --workdir=runs/cnn_mnist

99.21 % of the test images after 4 minutes on 2 cores (seed 0; docs/results.md). `:enhanced` is the ten-layer network
with residual connections, batch normalisation and dropout, for the 20 epochs of table III; on a CPU it takes hours.
"""

from vitcls.config import default_config
from vitcls.core import errors

PRESETS = ("plain", "enhanced")


def get_config(preset="plain"):
    if preset not in PRESETS:
        raise errors.unknown("preset of configs/cnn_mnist.py", preset, PRESETS)
    config = default_config("mnist_cnn")
    config.batch_size = 64
    config.total = "5 epochs"
    config.log_every = "100 steps"
    config.dataset.name = "mnist"
    config.dataset.validation = 0.05
    config.model.dropout = 0.5
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.loss.l2 = 1e-5

    if preset == "enhanced":
        config.total = "20 epochs"
        config.model.name = "mnist_cnn_enhanced"
    return config
