"""Learning rate, weight decay, warm-up and regularisation of a ViT; `:nas` its architecture.

vitcls tune --config=configs/vit_digits.py --space=configs/spaces/vit_small.py --workdir=runs/search

`:nas` ends in a Pareto front of accuracy and FLOPs; `:nas_latency` measures milliseconds in place of FLOPs, with one
worker on a machine that does nothing else.
"""

from vitcls.core import errors
from vitcls.tune import Choice, Number, Space

COSTS = {"nas": "flops_per_image", "nas_latency": "latency_ms"}


def get_space(preset="training"):
    if preset == "training":
        return Space(TRAINING)
    if preset not in COSTS:
        raise errors.unknown("preset of vit_small.py", preset, ("training", *COSTS))
    return Space(ARCHITECTURE, cost=COSTS[preset])


TRAINING = {
    "optimizer.learning_rate": Number(1e-4, 1e-2, log=True),
    "optimizer.name": Choice(("adamw", "adam")),
    "optimizer.weight_decay": Number(1e-3, 0.3, log=True, only_if={"optimizer.name": "adamw"}),
    "loss.l2": Number(1e-6, 1e-3, log=True, only_if={"optimizer.name": "adam"}),
    "schedule.warmup": Choice(("0%", "2%", "5%", "10%")),
    "model.drop_path": Number(0.0, 0.3),
    "batch_size": Choice((64, 128, 256)),
}
ARCHITECTURE = {
    "model.hidden_dim": Choice((32, 64, 96, 128)),
    "model.depth": Number(1, 6),
    "model.num_heads": Choice((2, 4, 8)),
    "model.mlp_dim": Choice((64, 128, 256)),
    "model.stem": Choice(("patch", "conv")),
    "model.patch_size": Choice((2, 4)),
    "model.local_conv": Choice((True, False)),  # 3x3 kernels in the feed-forward network
    "model.squeeze_excite": Choice((0.0, 0.25)),
    "model.aggregation": Choice(("token", "mean", "gem", "attention", "mean_attention")),
}
