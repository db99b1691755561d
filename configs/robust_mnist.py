"""A small CNN on MNIST, trained on attacked images (Madry et al. 2018), or plainly to compare.

vitcls train --config=configs/robust_mnist.py --workdir=runs/robust_mnist
vitcls attack --workdir=runs/robust_mnist --eps=0.3
"""

from vitcls.config import default_config
from vitcls.core import errors

PRESETS = ("pgd", "fgsm", "trades", "plain")


def get_config(preset="pgd"):
    if preset not in PRESETS:
        raise errors.unknown("preset of configs/robust_mnist.py", preset, PRESETS)
    config = default_config("mnist_cnn", "classify" if preset == "plain" else "adversarial")
    config.batch_size = 128
    config.total = "3 epochs"
    config.log_every = "100 steps"
    config.eval_every = "1 epochs"
    config.dataset.name = "mnist"
    config.dataset.validation = 0.05
    config.dataset.mean, config.dataset.std = (0.0,), (1.0,)  # with a larger scale the loss does not leave log(10)
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.schedule.warmup = "10%"
    if preset != "plain":
        config.task.method = preset
        config.task.eps = 0.3
        config.task.steps = 6
        # Larger steps go from corner to corner of the ball, and the network forgets the images between them.
        config.task.step_size = 0.375 if preset == "fgsm" else 0.1
    return config
