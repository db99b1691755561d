"""Learning rate and regularisation of the improved ResNeXt in its size for a CPU; `:nas` its architecture.

vitcls tune --config=configs/resnext_cifar10.py:small --space=configs/spaces/resnext_small.py:nas --workdir=runs/search

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
        raise errors.unknown("preset of resnext_small.py", preset, ("training", *COSTS))
    return Space(ARCHITECTURE, cost=COSTS[preset])


TRAINING = {
    "optimizer.learning_rate": Number(1e-4, 1e-2, log=True),
    "schedule.warmup": Choice(("0%", "2%", "5%", "10%")),
    "loss.l2": Number(1e-6, 1e-3, log=True),
    "loss.label_smoothing": Choice((0.0, 0.1)),
    "model.dropout": Number(0.0, 0.5),
    "model.drop_path": Number(0.0, 0.2),
    "batch_size": Choice((64, 128, 256)),
}
ARCHITECTURE = {
    "model.depths": Choice(((1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2))),
    "model.width": Choice((16, 32, 64)),
    "model.groups": Choice((4, 8, 16)),  # what heads are to a ViT
    "model.group_width": Choice((2, 4, 8)),
    "model.stem": Choice(("standard", "small")),
    "model.stem_kernel": Choice((3, 5, 7), only_if={"model.stem": "standard"}),
    "model.fusion": Choice(("none", "kernels", "stages")),
    "model.fusion_kernels": Choice(((1, 3), (3, 5), (1, 3, 5)), only_if={"model.fusion": "kernels"}),
    "model.fusion_stage": Choice((1, 2, 3), only_if={"model.fusion": "kernels"}),
    "model.fusion_stages": Choice(((1, 2), (2, 3), (1, 2, 3)), only_if={"model.fusion": "stages"}),
    "model.fusion_width": Choice((32, 64, 128), only_if={"model.fusion": "stages"}),
}
