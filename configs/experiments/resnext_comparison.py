"""The improved ResNeXt50 and what its paper compares it with (improved ResNeXt50, Table 1), under one budget.

    vitcls experiment --config=configs/experiments/resnext_comparison.py:smoke --workdir=runs/resnext_comparison

`:smoke` is small models on digits; `:cpu` a tenth of CIFAR-10; `:full` CIFAR-10 on an accelerator, 2.6 hours on an H100
at its ceilings (docs/experiments.md), not run yet.
"""

import pathlib

from vitcls import config_file
from vitcls.core import errors
from vitcls.experiment import Row, Table

PRESETS = ("smoke", "cpu", "full")
METRICS = ("accuracy", "auc_ovr_macro_hard", "f1_macro")
PAPER = {
    "vgg16": (0.853, 0.891, 0.847),
    "resnet50": (0.912, 0.943, 0.908),
    "resnext50_32x4d": (0.925, 0.954, 0.921),
    "vit_small_patch4": (0.908, 0.937, 0.902),
    "improved_resnext50": (0.946, 0.968, 0.943),
}
SMALL = {
    "vgg16": {"widths": (16, 32, 64, 64, 64), "head_width": 64},
    "resnet50": {"width": 16, "depths": (1, 1, 1, 1)},
    "resnext50_32x4d": {"groups": 8, "group_width": 4, "width": 32, "depths": (1, 1, 1, 1)},
    "vit_small_patch4": {"hidden_dim": 64, "depth": 4, "num_heads": 4, "mlp_dim": 128},
    "improved_resnext50": {"groups": 8, "group_width": 4, "width": 32, "depths": (1, 1, 1, 1)},
}


def get_table(preset="full"):
    if preset not in PRESETS:
        raise errors.unknown("preset of resnext_comparison.py", preset, PRESETS)
    return Table(
        title="The improved ResNeXt50 against other networks",
        about="Table 1 of the paper of the improved ResNeXt50: five models with one recipe and one number of epochs, "
        "then with one time. The paper's figures are of CIFAR-10; of its VGG it does not say which, here it is VGG-16.",
        rows=[
            Row(name, _config(name, preset), dict(zip(METRICS, paper, strict=True))) for name, paper in PAPER.items()
        ],
        seeds=(0, 1) if preset == "smoke" else (0, 1, 2),
        metrics=METRICS,
        facts=("parameters", "train_seconds"),
        equal_time=True,
    )


def _config(name, preset):
    dataset = "digits" if preset == "smoke" else "cifar10"
    config = config_file.load(pathlib.Path(__file__).parents[1] / f"baseline.py:{name},{dataset},{preset}")
    config.report.timing = preset != "smoke"
    if preset != "full":
        config.model.update(SMALL[name])
    if preset == "smoke" and name == "vit_small_patch4":
        config.model.patch_size = 2
    if preset == "smoke" and name == "vgg16":
        config.dataset.image_size = 32  # the smallest that it takes
    return config
