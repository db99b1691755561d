"""A small CNN on MNIST that withstands changes of up to 0.3 of every pixel (Madry et al. 2018), and one to compare.

    vitcls train --config=configs/robust_mnist.py:fgsm --workdir=runs/fgsm
    vitcls train --config=configs/robust_mnist.py --workdir=runs/pgd --config.init.weights=runs/fgsm \\
        --config.init.head=keep
    vitcls train --config=configs/robust_mnist.py --workdir=runs/robust --config.init.weights=runs/pgd \\
        --config.init.head=keep
    vitcls attack --workdir=runs/robust --eps=0.1,0.2,0.3

Against PGD from random weights the loss stays at log(10), and against one large step it falls within an epoch (Wong et
al. 2020, whose step is 1.25 eps); PGD goes on from there, and once more from its end. `:plain` is the same network
without attacks: four convolutions of 3x3 and a hidden layer, since a LeNet-5 of a third of the multiplications
withstands less (docs/results.md).

    vitcls train --config=configs/robust_mnist.py:certified --workdir=runs/certified

trains a LeNet-5 in one stage, of which `vitcls attack` proves what it withstands (Gowal et al. 2018, who train with 0.4
for 0.3, too).
"""

from vitcls.config import default_config
from vitcls.core import errors

PRESETS = ("pgd", "fgsm", "trades", "certified", "plain")
_TASKS = {"plain": "classify", "certified": "certified"}


def get_config(preset="pgd"):
    if preset not in PRESETS:
        raise errors.unknown("preset of configs/robust_mnist.py", preset, PRESETS)
    config = default_config("lenet5" if preset == "certified" else "paper_cnn", _TASKS.get(preset, "adversarial"))
    config.batch_size = 128
    config.total = "8 epochs"
    config.log_every = "100 steps"
    config.eval_every = "1 epochs"
    config.dataset.name = "mnist"
    config.dataset.validation = 0.05
    config.dataset.mean, config.dataset.std = (0.0,), (1.0,)
    config.optimizer.name = "adam"
    config.optimizer.learning_rate, config.schedule.warmup = 2e-3, "5%"
    if preset == "certified":
        config.model.update(widths=(16, 32, 100), hidden_width=100, pooling="max", activation="relu")
        config.total, config.eval_every = "30 epochs", "5 epochs"
        config.schedule.warmup = "2%"
        config.task.eps = 0.4
        return config
    config.model.update(depths=(2, 2), widths=(16, 32), hidden_width=128)
    if preset != "plain":
        config.task.method = preset
        config.task.eps = 0.3
        config.task.steps = 7
        if preset == "fgsm":
            config.total = "5 epochs"
            config.optimizer.learning_rate, config.schedule.warmup = 3e-3, "20%"
        else:
            config.task.step_size = 0.1
    return config
