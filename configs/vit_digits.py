"""Improved ViT on the 1,797 handwritten digits that come inside scikit-learn (8x8 pixels); the quick demonstration.

    vitcls train --config=configs/vit_digits.py --workdir=runs/digits

Half a minute of training on 2 CPU cores; 98.05 % of the 359 held-out digits (seed 0; docs/results.md).
"""

from vitcls.config import default_config


def get_config():
    config = default_config("improved_vit_tiny")
    config.batch_size = 128
    config.total = "600 steps"  # 59 epochs
    config.log_every = "50 steps"
    config.eval_every = "100 steps"
    config.checkpoint_every = "200 steps"
    config.steps_per_call = 10

    config.dataset.name = "digits"
    config.dataset.validation = 0.1
    config.augment.crop.update(probability=1.0, padding=1)
    config.augment.rotate.update(probability=0.5, degrees=10.0)

    config.model.stem = "patch"
    config.model.patch_size = 2
    config.model.hidden_dim = 64
    config.model.depth = 4
    config.model.num_heads = 4
    config.model.mlp_dim = 128

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 4e-3
    config.loss.l2 = 1e-4
    config.loss.label_smoothing = 0.1
    config.schedule.warmup = "5%"
    return config
