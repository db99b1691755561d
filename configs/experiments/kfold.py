"""Cross-validation of any config: each fold of the training images is the validation split once.

    vitcls experiment --config=configs/experiments/kfold.py:configs/vit_digits.py --folds=5 --workdir=runs/kfold

The test split is never read: reports are of the folds. In place of a config a preset: `:smoke` is the improved ViT on
digits, `:cpu` LeNet-5 on MNIST, `:full` the improved ViT on CIFAR-100, for an accelerator, a third of an hour on
an H100 at its ceilings (docs/experiments.md), not run yet.
"""

import pathlib
import re

from vitcls import config_file
from vitcls.core.errors import UserError
from vitcls.experiment import Row, Table

PRESETS = {"smoke": "vit_digits.py", "cpu": "lenet_mnist.py", "full": "vit_cifar100.py"}  # of configs/


def get_table(argument=""):
    file, number = re.fullmatch(r"(.*?)(?:,(-?\d+))?", argument).groups()
    folds = int(number or 5)
    if not file or not 2 <= folds <= 100:
        raise UserError(
            f"kfold.py:{argument} must name a config, with 2 to 100 folds, as in :configs/vit_digits.py --folds=5"
        )
    if file in PRESETS:
        file = pathlib.Path(__file__).parents[1] / PRESETS[file]
    rows = []
    for fold in range(folds):
        config = config_file.load(file)
        config.dataset.update(num_folds=folds, fold=fold)
        config.report.split = "validation"
        rows.append(Row(f"fold{fold}", config))
    return Table(
        title=f"{folds}-fold cross-validation of {pathlib.Path(file).stem}",
        about="Every training image is in one fold, which is validated by a model that has not seen it.",
        rows=rows,
        seeds=(0,),
        pooled=True,
    )
