"""The hyperparameters that Nimma & Uddagiri try for the custom CNN on MNIST (table III).

    vitcls tune --config=configs/cnn_mnist.py --space=configs/spaces/mnist_cnn.py --workdir=runs/search --method=grid

All 243 combinations take days on 2 cores; `--method=tpe --trials=20` tries some. `:smoke` has a tenth of the epochs.
"""

from vitcls.core import errors
from vitcls.tune import Choice, Space

EPOCHS = {"table": (10, 20, 30), "smoke": (1, 2, 3)}


def get_space(preset="table"):
    if preset not in EPOCHS:
        raise errors.unknown("preset of mnist_cnn.py", preset, EPOCHS)
    return Space(
        {
            "optimizer.learning_rate": Choice((0.001, 0.01, 0.1)),
            "batch_size": Choice((32, 64, 128)),
            "total": Choice(tuple(f"{count} epochs" for count in EPOCHS[preset])),
            "model.kernel_size": Choice((3, 5, 7)),
            # 5, 10 and 15 layers: the convolutions of both stages, and two dense layers.
            "model.depths": Choice(((2, 1), (4, 4), (7, 6))),
        }
    )
