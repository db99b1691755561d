"""Hyperparameters of the custom CNN on MNIST (Nimma & Uddagiri, Table III), and it against LeNet-5 and AlexNet.

    vitcls experiment --config=configs/experiments/mnist_search.py:smoke --workdir=runs/mnist_search

Each value that the paper tried, one at a time around its best: learning rate, batch size, epochs, layers, filter size.
`:smoke` is digits; `:cpu` MNIST with a tenth of the epochs, a few hours on 2 cores; `:full` as the paper, not run yet.
"""

import pathlib

from vitcls import config_file
from vitcls.core import errors
from vitcls.experiment import Row, Table

PRESETS = ("smoke", "cpu", "full")
SEARCH = {  # key: the values of table III; the first is what the paper found best
    "learning_rate": (0.001, 0.01, 0.1),
    "batch_size": (64, 32, 128),
    "epochs": (20, 10, 30),
    "kernel_size": (3, 5, 7),
}
MODELS = ("lenet5", "alexnet")


def get_table(preset="full"):
    if preset not in PRESETS:
        raise errors.unknown("preset of mnist_search.py", preset, PRESETS)
    best = {key: values[0] for key, values in SEARCH.items()}
    rows = [Row("best_of_the_paper", _config(preset, "mnist_cnn", best))]
    rows += [
        Row(f"{key}={value}", _config(preset, "mnist_cnn", best | {key: value}))
        for key, values in SEARCH.items()
        for value in values[1:]
    ]
    rows += [Row(name, _config(preset, name, best)) for name in MODELS]
    return Table(
        title="The custom CNN on MNIST: its hyperparameters, and other networks",
        about="Table III of Nimma & Uddagiri names a best learning rate (0.001), batch size (64), number of epochs "
        "(20) and filter size (3x3). Every other value that they tried, one at a time; then LeNet-5 and AlexNet.",
        rows=rows,
        seeds=(0, 1) if preset == "smoke" else (0, 1, 2),
        metrics=("accuracy", "f1_macro", "loss"),
    )


def _config(preset, model, values):
    dataset = "digits" if preset == "smoke" else "mnist"
    config = config_file.load(pathlib.Path(__file__).parents[1] / f"baseline.py:{model},{dataset}")
    config.augment.crop.probability = 0.0
    config.batch_size = values["batch_size"]
    config.optimizer.learning_rate = values["learning_rate"]
    config.schedule.name = "constant"
    if preset == "smoke" and model in MODELS:
        config.dataset.image_size = 28  # the smallest that they take
    if model == "mnist_cnn":
        config.model.kernel_size = values["kernel_size"]
        config.model.dropout = 0.5
    epochs = values["epochs"] if preset == "full" else values["epochs"] / 10
    config.total = f"{epochs:g} epochs"
    config.eval_every = config.checkpoint_every = "50%"
    config.log_every = "25%"
    config.report.timing = preset != "smoke"
    return config
