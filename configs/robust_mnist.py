"""A small CNN on MNIST, trained on images that are attacked in every step (Madry et al. 2018), or plainly to compare.

    vitcls train --config=configs/robust_mnist.py:warm --workdir=runs/warm
    vitcls train --config=configs/robust_mnist.py --workdir=runs/robust --config.init.weights=runs/warm
    vitcls attack --workdir=runs/robust --eps=0.1,0.2,0.3

The two stages are needed: with small steps from random weights the loss stays at log(10), and with `:warm`'s large ones
the network learns the corners of the ball alone (after 4 epochs 83 % of the images as they are, and none under PGD-40).
"""

from vitcls.config import default_config
from vitcls.core import errors

PRESETS = ("pgd", "warm", "fgsm", "trades", "plain")


def get_config(preset="pgd"):
    if preset not in PRESETS:
        raise errors.unknown("preset of configs/robust_mnist.py", preset, PRESETS)
    config = default_config("mnist_cnn", "classify" if preset == "plain" else "adversarial")
    config.batch_size = 128
    config.total = "1 epochs" if preset == "warm" else "8 epochs"
    config.log_every = "100 steps"
    config.eval_every = "1 epochs"
    config.dataset.name = "mnist"
    config.dataset.validation = 0.05
    config.dataset.mean, config.dataset.std = (0.0,), (1.0,)  # with a larger scale the loss does not leave log(10)
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.schedule.warmup = "5%"
    if preset != "plain":
        config.task.method = "pgd" if preset == "warm" else preset
        config.task.eps = 0.3
        config.task.steps = 4 if preset == "warm" else 6
        if preset in ("pgd", "trades"):
            config.task.step_size = 0.1
    return config
