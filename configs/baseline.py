"""Any model on any data set, all with one recipe, so that they can be compared.

    vitcls train --config=configs/baseline.py:resnet50,cifar10 --workdir=runs/resnet50_cifar10

The recipe: crops and flips (no flips for digits), Adam with L2 and the cosine schedule, 50 epochs; models that have a
small stem use it where the images of the data set are small. `configs/baseline.py:MODEL,DATASET` names both.
`configs/baseline.py:MODEL,DATASET,BUDGET` is what the tables of configs/experiments/ begin with: `smoke` 3 epochs,
`cpu` 15 epochs of a tenth of the training images, `full` 100 epochs in bfloat16.
"""

from vitcls import models
from vitcls.config import default_config
from vitcls.core.errors import UserError

_DIGITS = ("digits", "mnist", "kmnist", "emnist", "svhn_cropped")  # a mirror image is another character, or none
_SMALL_IMAGES = (*_DIGITS, "fashion_mnist", "cifar10", "cifar100", "cifar10_1", "synthetic")
BUDGETS = {"smoke": ("3 epochs", 1.0), "cpu": ("15 epochs", 0.1), "full": ("100 epochs", 1.0)}  # of training images


def get_config(argument=""):
    model, dataset, budget = (*argument.split(","), "", "")[:3]
    if not model or not dataset or budget not in ("", *BUDGETS):
        raise UserError(
            f"configs/baseline.py:{argument} must name a model and a data set, as in :resnet50,cifar10; a budget after "
            f"them may be {', '.join(BUDGETS)}"
        )
    config = default_config(model)
    config.batch_size = 128
    config.total = "50 epochs"
    config.log_every = "100 steps"
    config.eval_every = "5 epochs"
    config.checkpoint_every = "5 epochs"
    config.dataset.name = dataset
    config.augment.crop.update(probability=1.0, padding=4)
    config.augment.flip.probability = 0.0 if dataset in _DIGITS else 0.5
    if dataset in _SMALL_IMAGES and models.fields(model).get("stem") == "standard":
        config.model.stem = "small"
    config.loss.l2 = 1e-4
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.clip_norm = 1.0
    config.schedule.warmup = "5%"
    if budget:
        config.total, config.dataset.fraction = BUDGETS[budget]
        config.log_every, config.eval_every, config.checkpoint_every = "5%", "20%", "20%"
    if budget == "full":
        config.model.dtype = "bfloat16"
    return config
