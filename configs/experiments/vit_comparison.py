"""The improved ViT and what its paper compares it with (improved ViT, Table 1), under one budget.

    vitcls experiment --config=configs/experiments/vit_comparison.py:smoke --workdir=runs/vit_comparison

`:smoke` is small models on scikit-learn's digits, minutes on 2 cores; `:cpu` a tenth of CIFAR-100, hours on 2 cores;
`:full` CIFAR-100 on an accelerator, 2.4 hours on an H100 at its ceilings (docs/experiments.md), not run yet.
"""

import pathlib

from vitcls import config_file
from vitcls.core import errors
from vitcls.experiment import Row, Table

PRESETS = ("smoke", "cpu", "full")
PAPER = {  # accuracy, AUC, precision, recall
    "resnet50": (0.884, 0.923, 0.872, 0.861),
    "vgg19": (0.871, 0.911, 0.859, 0.845),
    "resnext50_32x4d": (0.896, 0.935, 0.881, 0.873),
    "convnext_tiny": (0.905, 0.947, 0.892, 0.885),
    "improved_vit_small": (0.921, 0.962, 0.908, 0.899),
}
METRICS = ("accuracy", "auc_ovr_macro_hard", "precision_macro", "recall_macro")
SMALL = {  # of a few thousand images and two cores
    "resnet50": {"width": 16, "depths": (1, 1, 1, 1)},
    "vgg19": {"widths": (16, 32, 64, 64, 64), "head_width": 64},
    "resnext50_32x4d": {"groups": 8, "group_width": 4, "width": 32, "depths": (1, 1, 1, 1)},
    "convnext_tiny": {"widths": (24, 48, 96, 192), "depths": (1, 1, 3, 1)},
    "improved_vit_small": {"hidden_dim": 64, "depth": 4, "num_heads": 4, "mlp_dim": 128},
}


def get_table(preset="full"):
    if preset not in PRESETS:
        raise errors.unknown("preset of vit_comparison.py", preset, PRESETS)
    return Table(
        title="The improved ViT against convolutional networks",
        about="Table 1 of the paper of the improved ViT: five models with one recipe and one number of epochs, then "
        "with one time. The paper's figures are of CIFAR-100; its AUC can only be that of hard predictions.",
        rows=[
            Row(name, _config(name, preset), dict(zip(METRICS, paper, strict=True))) for name, paper in PAPER.items()
        ],
        seeds=(0, 1) if preset == "smoke" else (0, 1, 2),
        metrics=METRICS,
        facts=("parameters", "train_seconds"),
        equal_time=True,
    )


def _config(name, preset):
    dataset = "digits" if preset == "smoke" else "cifar100"
    config = config_file.load(pathlib.Path(__file__).parents[1] / f"baseline.py:{name},{dataset},{preset}")
    config.report.timing = preset != "smoke"
    if preset != "full":
        config.model.update(SMALL[name])
    if preset == "smoke" and name == "improved_vit_small":
        config.model.patch_size = 2
    if preset == "smoke" and name == "vgg19":
        config.dataset.image_size = 32  # the smallest that it takes
    return config
