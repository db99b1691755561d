"""Hyperparameters of the custom CNN on MNIST (Nimma & Uddagiri, Table III), and it against LeNet-5 and AlexNet.

    vitcls experiment --config=configs/experiments/mnist_search.py:smoke --workdir=runs/mnist_search

Each value that the paper tried, one at a time around its best: learning rate, batch size, epochs, layers, filter size.
`configs/spaces/mnist_cnn.py` has the same space for a search. `:smoke` is digits; `:cpu` a twentieth of MNIST's
training images, 3 hours on 2 idle cores; `:full` all of them, on an accelerator, about an hour, most of it compiling
(docs/experiments.md), not run yet.
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
    "layers": (10, 5, 15),
    "kernel_size": (3, 5, 7),
}
DEPTHS = {5: (2, 1), 10: (4, 4), 15: (7, 6)}  # convolutions of the two stages; two dense layers are counted beside them
MODELS = ("lenet5", "alexnet")


def get_table(preset="full"):
    if preset not in PRESETS:
        raise errors.unknown("preset of mnist_search.py", preset, PRESETS)
    best = {key: values[0] for key, values in SEARCH.items()}
    rows = [Row("best_of_the_paper", _config(preset, "mnist_cnn_enhanced", best))]
    rows += [
        Row(f"{key}={value}", _config(preset, "mnist_cnn_enhanced", best | {key: value}))
        for key, values in SEARCH.items()
        for value in values[1:]
    ]
    rows += [Row(name, _config(preset, name, best)) for name in MODELS]
    return Table(
        title="The custom CNN on MNIST: its hyperparameters, and other networks",
        about="Table III of Nimma & Uddagiri names a best learning rate (0.001), batch size (64), number of epochs "
        "(20), number of layers (10) and filter size (3x3), for a CNN with shortcuts, batch normalisation and dropout. "
        "Every other value that they tried, one at a time; then LeNet-5 and AlexNet with the best of that.",
        rows=rows,
        seeds=(0, 1) if preset == "smoke" else (0, 1, 2),
        metrics=("accuracy", "f1_macro", "loss"),
        facts=() if preset == "smoke" else ("train_seconds", "latency_ms"),
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
    if model not in MODELS:
        config.model.update(kernel_size=values["kernel_size"], depths=DEPTHS[values["layers"]])
    epochs = values["epochs"] / 10 if preset == "smoke" else values["epochs"]
    config.total = f"{epochs:g} epochs"
    config.dataset.fraction = 0.05 if preset == "cpu" else 1.0
    config.eval_every = config.checkpoint_every = "50%"
    config.log_every = "25%"
    config.report.timing = preset != "smoke"
    return config
