"""Learning rate, weight decay, warm-up and regularisation of a ViT; `:nas` its architecture.

vitcls tune --config=configs/vit_digits.py --space=configs/spaces/vit_small.py --workdir=runs/search
"""

from vitcls.tune import Choice, Number, Space


def get_space(preset="training"):
    if preset == "nas":
        return Space(
            {
                "model.hidden_dim": Choice((32, 64, 96, 128)),
                "model.depth": Number(1, 6),
                "model.num_heads": Choice((2, 4, 8)),
                "model.mlp_dim": Choice((64, 128, 256)),
                "model.stem": Choice(("patch", "conv")),
                "model.aggregation": Choice(("token", "mean", "gem", "attention", "mean_attention")),
                "model.local_conv": Choice((True, False)),
            }
        )
    return Space(
        {
            "optimizer.learning_rate": Number(1e-4, 1e-2, log=True),
            "optimizer.name": Choice(("adamw", "adam")),
            "optimizer.weight_decay": Number(1e-3, 0.3, log=True, only_if={"optimizer.name": "adamw"}),
            "loss.l2": Number(1e-6, 1e-3, log=True, only_if={"optimizer.name": "adam"}),
            "model.drop_path": Number(0.0, 0.3),
            "batch_size": Choice((64, 128, 256)),
        }
    )
