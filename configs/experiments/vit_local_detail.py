"""Where in the improved ViT local convolution and squeeze-excite pay, with equal epochs and with equal time.

    vitcls experiment --config=configs/experiments/vit_local_detail.py:smoke --workdir=runs/vit_local_detail

Between its two products each block has a depthwise convolution and squeeze-excite, which move many bytes and multiply
little (docs/performance.md): so in some blocks only, with the gate on the narrow input, or both.
`:smoke` is digits; `:cpu` a tenth of CIFAR-100 with a small model; `:full` CIFAR-100 on an accelerator, 3.3 hours on an
H100 at its ceilings (docs/experiments.md), not run yet.
"""

import pathlib

from vitcls import config_file
from vitcls.core import errors
from vitcls.experiment import Row, Table

PRESETS = ("smoke", "cpu", "full")
DESIGNS = {
    "every_block": {},
    "first_half": {"local_conv_blocks": "first_half"},
    "second_half": {"local_conv_blocks": "second_half"},
    "alternate": {"local_conv_blocks": "alternate"},
    "gate_on_input": {"squeeze_excite_position": "input"},
    "alternate_gate_on_input": {"local_conv_blocks": "alternate", "squeeze_excite_position": "input"},
    "neither": {"local_conv": False, "squeeze_excite": 0.0},
}


def get_table(preset="full"):
    if preset not in PRESETS:
        raise errors.unknown("preset of vit_local_detail.py", preset, PRESETS)
    return Table(
        title="Local convolution and squeeze-excite in the improved ViT",
        about="In every block, as the preset has them, in half of the blocks, with the gate before the expansion, and "
        "without either. One recipe and one number of epochs, then one time.",
        rows=[Row(name, _config(preset, fields)) for name, fields in DESIGNS.items()],
        seeds=(0, 1) if preset == "smoke" else (0, 1, 2),
        metrics=("accuracy", "loss"),
        facts=("parameters", "train_seconds"),
        equal_time=True,
    )


def _config(preset, fields):
    dataset = "digits" if preset == "smoke" else "cifar100"
    model = "improved_vit_small" if preset == "full" else "improved_vit_tiny"
    config = config_file.load(pathlib.Path(__file__).parents[1] / f"baseline.py:{model},{dataset},{preset}")
    config.report.timing = False
    if preset != "full":
        config.model.update(hidden_dim=64, depth=4, num_heads=4, mlp_dim=128)
        config.model.patch_size = 2 if preset == "smoke" else 4
    config.model.update(fields)
    return config
