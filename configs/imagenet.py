"""Any model on ImageNet (ILSVRC 2012), with the recipe of its family.

    vitcls prepare imagenet2012
    vitcls train --config=configs/imagenet.py:resnet50 --workdir=runs/imagenet_resnet50

TFDS needs the archives of ImageNet, which are downloaded by hand; the same images in directories are taken with
`--config.dataset.name=folder --config.dataset.data_dir=DIR`. `configs/imagenet.py:MODEL,smoke` runs a few steps of the
same path on made-up JPEGs of real sizes, at 64 pixels, on a CPU in a minute or so; `:smoke` does with resnet18. Only
`:smoke` has been run. The recipes, none of whose published accuracies is ours:

- ResNet, ResNeXt and all others not named below: SGD with Nesterov momentum, 0.1 per 256 images, L2 of 1e-4, 90 epochs,
  5 of them warm-up, no label smoothing (Goyal et al. 2017, arXiv 1706.02677; their ResNet-50: 76.4 %, with steps where
  this has the cosine). Networks without normalisation, such as VGG, take a tenth of the rate, BiT 0.03 (Kolesnikov et
  al. 2020, arXiv 1912.11370, section 3.2). EfficientNet and
  MobileNet were published with RMSProp, which is not here; they take this recipe too, with an L2 of 4e-5.
- ViT: AdamW as DeiT (Touvron et al. 2021, arXiv 2012.12877; their DeiT-S: 79.8 %), without repeated augmentation.
- ConvNeXt: the same with the values of its paper (Liu et al. 2022, arXiv 2201.03545; their ConvNeXt-T: 82.1 %), but
  batches of 1,024, and the rate by them, for their 4,096.

Images have 224 pixels, or the native size of the model where that is larger.
"""

from vitcls import models
from vitcls.config import default_config
from vitcls.core.errors import UserError, unknown


def get_config(argument=""):
    model, _, preset = argument.partition(",")
    if argument == "smoke":
        model, preset = "resnet18", "smoke"
    if not model or preset not in ("", "smoke"):
        raise UserError(
            f"configs/imagenet.py:{argument} must name a model, as :resnet50 or :resnet50,smoke, or be :smoke"
        )
    if model not in models.names():
        raise unknown("model of configs/imagenet.py", model, [*models.names(), "smoke"])
    config = default_config(model)
    config.log_every = "100 steps"
    config.eval_every = "5 epochs"
    config.checkpoint_every = "1 epochs"

    config.dataset.name = "imagenet2012"
    config.dataset.pipeline = "streaming"
    config.dataset.image_size = max(224, models.preset(model).image_shape[0])
    config.dataset.validation = 0.01  # the official validation images are the test split
    config.dataset.random_resized_crop = True
    config.dataset.eval_crop = 0.875  # the central 224 of 256 pixels
    config.dataset.mean = (0.485, 0.456, 0.406)  # what the field uses; no pass over the images for them
    config.dataset.std = (0.229, 0.224, 0.225)
    config.augment.flip.probability = 0.5
    config.model.dtype = "bfloat16"

    family = models.preset(model).module.__name__
    if family == "VisionTransformer":
        _like_deit(config)
    elif family == "ConvNeXt":
        _like_convnext(config)
    else:
        _like_resnet(config, family)
    if preset == "smoke":
        _smoke(config)
    return config


def _like_resnet(config, family):
    config.batch_size = 1024
    config.total = "90 epochs"
    config.schedule.warmup = "5 epochs"
    config.optimizer.name = "sgd"
    config.optimizer.nesterov = True
    config.optimizer.base_batch_size = 256
    config.optimizer.learning_rate = 0.1 if models.fields(config.model.name).get("norm", "batch") != "none" else 0.01
    if family == "ResNetV2":
        config.optimizer.learning_rate = 0.03
    config.loss.l2 = 4e-5 if family.startswith(("EfficientNet", "MobileNet")) else 1e-4


def _like_deit(config):
    config.batch_size = 1024
    config.total = "300 epochs"
    config.schedule.warmup = "5 epochs"
    config.optimizer.name = "adamw"
    config.optimizer.base_batch_size = 512
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.05
    config.model.drop_path = 0.1
    config.loss.label_smoothing = 0.1
    config.augment.randaugment.update(probability=1.0, num_ops=2, magnitude=9.0)
    config.augment.mixup.update(probability=0.5, alpha=0.8)
    config.augment.cutmix.update(probability=0.5, alpha=1.0)
    config.augment.erase.probability = 0.25


def _like_convnext(config):
    _like_deit(config)
    config.schedule.warmup = "20 epochs"
    config.optimizer.base_batch_size = 4096
    config.optimizer.learning_rate = 4e-3
    config.optimizer.ema_decay = 0.9999
    drop_path = {"convnext_tiny": 0.1, "convnext_small": 0.4, "convnext_base": 0.5}  # table 5 of the paper
    config.model.drop_path = drop_path[config.model.name]


def _smoke(config):
    """A minute on a CPU, most of it compilation."""
    config.dataset.update(name="synthetic_jpeg", num_examples=200, num_classes=4, validation=0.1, image_size=64)
    config.batch_size = 16
    config.total = "10 steps"
    config.log_every = "5 steps"
    config.eval_every = "10 steps"
    config.checkpoint_every = "10 steps"
    config.schedule.warmup = "20%"
    config.model.dtype = "float32"
