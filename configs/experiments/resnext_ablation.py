"""Fusion and the adaptive learning rate of the improved ResNeXt50 (its second Table 1), and small samples.

    vitcls experiment --config=configs/experiments/resnext_ablation.py:smoke --workdir=runs/resnext_ablation

ResNeXt with a fixed rate (SGD), with fusion, with the adaptive rate (Adam), with both; the base and the improved
network on 1 % (`:cpu` 2 %) and 10 % of the training images; all with five strengths of noise on the test images.
`:smoke` is digits; `:cpu` a tenth of CIFAR-10 with small networks, 2 to 3 hours on 2 cores; `:full` CIFAR-10 on an
accelerator, 1.4 hours on an H100 at its ceilings (docs/experiments.md), not run yet.
"""

import pathlib

from vitcls import config_file
from vitcls.core import errors
from vitcls.experiment import Row, Table

PRESETS = ("smoke", "cpu", "full")
METRICS = ("accuracy", "auc_ovr_macro_hard", "f1_macro")
DESIGNS = {  # fusion, adaptive rate: what the paper prints
    ("base", "none", "sgd"): (0.925, 0.954, 0.921),
    ("fusion", "kernels", "sgd"): (0.927, 0.956, 0.922),
    ("adaptive", "none", "adam"): (0.926, 0.958, 0.923),
    ("both", "kernels", "adam"): (0.946, 0.968, 0.943),
}


def get_table(preset="full"):
    if preset not in PRESETS:
        raise errors.unknown("preset of resnext_ablation.py", preset, PRESETS)
    rows = [
        Row(name, _config(preset, fusion, optimizer), dict(zip(METRICS, paper, strict=True)))
        for (name, fusion, optimizer), paper in DESIGNS.items()
    ]
    rows += [
        Row(f"{name}-{percent}pct", _config(preset, fusion, optimizer, percent), part=f"{percent} % of the images")
        for percent in (2 if preset == "cpu" else 1, 10)  # :cpu has too few images for 1 %
        for name, fusion, optimizer in (("base", "none", "sgd"), ("both", "kernels", "adam"))
    ]
    return Table(
        title="Ablation of the improved ResNeXt50",
        about="Fusion of scales and an adaptive learning rate (Adam against SGD with momentum and a fixed rate), each "
        "and both; the ends of that on small parts of the training images; and all on noisy test images. The paper's "
        "figures are of CIFAR-10.",
        rows=rows,
        seeds=(0, 1) if preset == "smoke" else (0, 1, 2),
        metrics=METRICS,
    )


def _config(preset, fusion, optimizer, percent=100):
    dataset = "digits" if preset == "smoke" else "cifar10"
    model = "improved_resnext50"
    config = config_file.load(pathlib.Path(__file__).parents[1] / f"baseline.py:{model},{dataset},{preset}")
    config.model.update(fusion=fusion, dropout=0.0 if fusion == "none" else 0.2)
    config.optimizer.name = optimizer
    if optimizer == "sgd":
        config.optimizer.update(learning_rate=0.05, momentum=0.9)
        config.schedule.name = "constant"
    config.report.update(timing=False, corruptions=("gaussian_noise",))
    config.dataset.fraction *= percent / 100
    if preset == "full":
        return config
    config.model.update(groups=4, group_width=3, width=12, depths=(1, 1, 1))
    config.batch_size = 32
    config.total = "100 steps" if preset == "smoke" else "1500 steps"
    return config
