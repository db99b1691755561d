"""Any model with published weights on a folder of your own photos.

    vitcls train --config=configs/transfer.py:efficientnet_lite0 --config.init.weights=FILE \\
        --config.dataset.data_dir=photos --workdir=runs/photos

`photos` has one directory per class; photos may differ in size and shape. FILE is a .safetensors as timm or torchvision
name them, Google's .npz of a ViT or BiT, a .weights.h5 or .keras of keras.applications, or the workdir of another run
(docs/transfer.md). `configs/transfer.py:MODEL,METHOD`:

- `full`, the default: all of it, at a small learning rate.
- `head`: a new classifier on features that stay as they are; the fastest, and hard to overfit.
- `layer_decay`: all of it, each block slower than the one behind it; for ViT and ConvNeXt, and for few images.

200 CIFAR-10 images of each class at 128 pixels, 3 epochs on 2 busy CPU cores: `head` 80.2 % of 1,000 test images in a
minute, `full`, with norms that learn, 80.5 % in 15 (seed 0; docs/results.md).
"""

from vitcls import models
from vitcls.config import default_config
from vitcls.core.errors import UserError, unknown
from vitcls.models.weights.preprocessing import preprocessing_of

METHODS = ("full", "head", "layer_decay")


def get_config(argument=""):
    model, _, method = argument.partition(",")
    method = method or "full"
    if not model:
        raise UserError("configs/transfer.py must name a model, as configs/transfer.py:efficientnet_lite0")
    if model not in models.names():
        raise unknown("model of configs/transfer.py", model, models.names())
    if method not in METHODS:
        raise unknown("method of configs/transfer.py", method, METHODS)
    config = default_config(model)
    config.batch_size = 32
    config.total = "20 epochs"
    config.log_every = "10 steps"
    config.eval_every = "1 epochs"
    config.checkpoint_every = "1 epochs"
    config.early_stopping.update(metric="eval/loss", patience=5)
    config.report.checkpoint = "best"

    weights = preprocessing_of(model)
    config.dataset.name = "folder"
    config.dataset.image_size = max(weights.size, 224)
    config.dataset.eval_crop = weights.eval_crop
    config.dataset.interpolation = weights.interpolation
    config.dataset.random_resized_crop = True
    config.dataset.crop_area = (0.35, 1.0)  # of a few photos, more than the 8 % of ImageNet
    config.dataset.validation = 0.15
    config.augment.flip.probability = 0.5

    # Few images in small batches have no statistics to speak of.
    config.init.freeze_norm = models.fields(model).get("norm") == "batch"
    config.loss.label_smoothing = 0.1
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.02
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.99
    config.schedule.warmup = "10%"

    family = models.preset(model).module.__name__
    if family in ("ConvNeXt", "VisionTransformer"):
        config.optimizer.learning_rate = 1e-4
    if family == "ResNetV2":  # BiT-HyperRule (Kolesnikov et al. 2020, section 3.3), whose batches are of 512 images
        config.optimizer.update(name="sgd", learning_rate=0.003, weight_decay=0.0)
    if method == "head":
        config.init.train = "head"
        config.optimizer.learning_rate = 2e-3
        if "drop_path" in models.fields(model):
            config.model.drop_path = 0.0  # of features that stay as they are
    if method == "layer_decay":
        config.init.layer_decay = 0.75
        config.optimizer.learning_rate *= 2
    return config
