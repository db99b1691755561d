"""What each part of the improved ViT is worth: the plain one with each part, all parts, and all but each.

    vitcls experiment --config=configs/experiments/vit_ablation.py:smoke --workdir=runs/vit_ablation

`:smoke` is digits; `:cpu` a tenth of CIFAR-100 with a small model; `:full` CIFAR-100 on an accelerator, 3.1 hours on an
H100 at its ceilings (docs/experiments.md), not run yet.
"""

import pathlib

from vitcls import config_file
from vitcls.core import errors
from vitcls.experiment import Row, Table

PRESETS = ("smoke", "cpu", "full")
PARTS = {
    "stem": {"stem": "conv"},
    "local_conv": {"local_conv": True},
    "squeeze_excite": {"squeeze_excite": 0.25},
    "mean": {"aggregation": "mean"},
    "gem": {"aggregation": "gem"},
    "attention": {"aggregation": "attention"},
    "mean_attention": {"aggregation": "mean_attention", "head_norm": True},
}
PLAIN = {"stem": "patch", "local_conv": False, "squeeze_excite": 0.0, "aggregation": "token", "head_norm": False}
WHOLE = ("stem", "local_conv", "squeeze_excite", "mean_attention")  # the paper's g is one of the four


def get_table(preset="full"):
    if preset not in PRESETS:
        raise errors.unknown("preset of vit_ablation.py", preset, PRESETS)
    whole = PLAIN | {key: value for part in WHOLE for key, value in PARTS[part].items()}
    designs = {"plain": PLAIN} | {f"+{part}": PLAIN | fields for part, fields in PARTS.items()} | {"all": whole}
    designs |= {f"all-{part}": whole | {key: PLAIN[key] for key in PARTS[part]} for part in WHOLE}
    return Table(
        title="Ablation of the improved ViT",
        about="The plain ViT with a class token, with each part of the improved one alone, with all, and with all but "
        "each. One recipe and one number of epochs; what a part adds in parameters is a column.",
        rows=[Row(name, _config(preset, fields)) for name, fields in designs.items()],
        seeds=(0, 1) if preset == "smoke" else (0, 1, 2),
        metrics=("accuracy", "f1_macro", "loss"),
        facts=("parameters",),
    )


def _config(preset, fields):
    dataset = "digits" if preset == "smoke" else "cifar100"
    model = "improved_vit_small" if preset == "full" else "improved_vit_tiny"
    config = config_file.load(pathlib.Path(__file__).parents[1] / f"baseline.py:{model},{dataset},{preset}")
    config.report.timing = False
    if preset != "full":
        config.model.update(hidden_dim=64, depth=3, num_heads=4, mlp_dim=128)
        config.model.patch_size = 2 if preset == "smoke" else 4
    if preset == "cpu":
        config.total = "20 epochs"
    config.model.update(fields)
    return config
