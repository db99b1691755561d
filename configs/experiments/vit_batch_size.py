"""Accuracy of the improved ViT against the batch size (improved ViT, Figure 2).

    vitcls experiment --config=configs/experiments/vit_batch_size.py:smoke --workdir=runs/vit_batch_size

With the learning rate fixed, as the paper seems to have it, and scaled linearly (Goyal et al. 2017) and by the square
root (Krizhevsky 2014) from a batch of 128. The number of epochs is the same for all, so larger batches update less.
`:smoke` is digits; `:cpu` a tenth of MNIST; `:full` CIFAR-100 on an accelerator, 3.8 hours on an H100 at its ceilings
(docs/experiments.md), not run yet.
"""

import pathlib

from vitcls import config_file
from vitcls.core import errors
from vitcls.experiment import Row, Table

PRESETS = ("smoke", "cpu", "full")
BATCHES = {"smoke": (32, 128, 512), "cpu": (16, 32, 64, 128, 256, 512), "full": (32, 64, 128, 256, 512, 1024)}
RULES = {"fixed": lambda factor: 1.0, "linear": lambda factor: factor, "square_root": lambda factor: factor**0.5}
REFERENCE = 128


def get_table(preset="full"):
    if preset not in PRESETS:
        raise errors.unknown("preset of vit_batch_size.py", preset, PRESETS)
    names = {rule: f"learning rate {rule.replace('_', ' ')}" for rule in RULES}
    rows = [
        Row(
            f"{rule}-{batch}",
            _config(preset, batch, scale(batch / REFERENCE)),
            x=batch,
            series=tuple(names.values()) if batch == REFERENCE else (names[rule],),
        )
        for rule, scale in RULES.items()
        for batch in BATCHES[preset]
        if batch != REFERENCE or rule == "fixed"  # the rules meet there
    ]
    return Table(
        title="Batch size of the improved ViT",
        about="Figure 2 of the paper of the improved ViT says that accuracy peaks at small to medium batches. The same "
        "number of epochs for all; the learning rate fixed, or scaled from that of a batch of 128.",
        rows=rows,
        seeds=(0, 1) if preset == "smoke" else (0, 1, 2),
        metrics=("accuracy", "loss"),
        x_label="batch size",
    )


def _config(preset, batch, factor):
    dataset = {"smoke": "digits", "cpu": "mnist", "full": "cifar100"}[preset]
    model = "improved_vit_small" if preset == "full" else "improved_vit_tiny"
    config = config_file.load(pathlib.Path(__file__).parents[1] / f"baseline.py:{model},{dataset},{preset}")
    config.batch_size = batch
    config.optimizer.learning_rate *= factor
    config.report.timing = False
    if preset == "full":
        return config
    config.model.update(stem="patch", hidden_dim=64, depth=3, num_heads=4, mlp_dim=128)
    config.model.patch_size = 2 if preset == "smoke" else 7
    config.steps_per_call = 10
    if preset == "smoke":
        config.total = "6 epochs"
    return config
