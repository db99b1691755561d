"""How the images were prepared on which published weights were trained."""

import dataclasses

from vitcls import models

Colors = tuple[float, float, float]
_IMAGENET: tuple[Colors, Colors] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF: tuple[Colors, Colors] = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# 'caffe' of Keras, in [0, 1] and in the order of RGB: only the means are subtracted.
_CAFFE: tuple[Colors, Colors] = (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Images in [0, 1], resized so that `eval_crop` of them has `size`, cropped, less `mean`, divided by `std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int  # pixels of a side
    eval_crop: float = 0.875
    interpolation: str = "bilinear"

    def for_channels(self, channels: int) -> "Preprocessing":
        """For images with other channels than the weights know: of each the mean over the colours."""
        if channels == len(self.mean):
            return self
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return dataclasses.replace(self, mean=(mean,) * channels, std=(std,) * channels)


# By who published the weights: family -> mean and std, share of the central crop, interpolation. timm and torchvision
# are one, as their names agree for most families; where nothing tells them apart these are timm's.
_PYTORCH = {
    "AlexNet": (_IMAGENET, 0.875, "bilinear"),
    "ConvNeXt": (_IMAGENET, 0.875, "bicubic"),
    "DenseNet": (_IMAGENET, 0.875, "bicubic"),
    "EfficientNet": (_IMAGENET, 0.875, "bicubic"),
    "GoogLeNet": (_HALF, 0.875, "bilinear"),
    "InceptionV3": (_HALF, 0.875, "bicubic"),
    "MobileNetV2": (_IMAGENET, 0.875, "bicubic"),
    "MobileNetV3": (_IMAGENET, 0.875, "bicubic"),
    "ResNeXt": (_IMAGENET, 0.875, "bilinear"),
    "ResNet": (_IMAGENET, 0.875, "bilinear"),
    "ResNetV2": (_HALF, 0.875, "bilinear"),
    "VGG": (_IMAGENET, 0.875, "bilinear"),
    "VisionTransformer": (_HALF, 0.9, "bicubic"),
}
_KERAS = {
    "ConvNeXt": (_IMAGENET, 0.875, "bicubic"),
    "DenseNet": (_IMAGENET, 0.875, "bicubic"),
    "EfficientNet": (_IMAGENET, 0.875, "bicubic"),
    "InceptionV3": (_HALF, 0.875, "bilinear"),
    "MobileNetV1": (_HALF, 0.875, "bilinear"),
    "MobileNetV2": (_HALF, 0.875, "bilinear"),
    "MobileNetV3": (_HALF, 0.875, "bilinear"),
    "ResNet": (_CAFFE, 0.875, "bilinear"),
    "VGG": (_CAFFE, 0.875, "bilinear"),
}
_NPZ = {"ResNetV2": (_HALF, 0.875, "bilinear"), "VisionTransformer": (_HALF, 0.9, "bicubic")}
_TORCHVISION = {"VisionTransformer": (_IMAGENET, 0.875, "bilinear")}
_TENSORFLOW = {"MobileNetV3": (_HALF, 0.875, "bilinear")}  # timm's tf_..., which pad as TensorFlow does
_SOURCES = {
    "safetensors": _PYTORCH,
    "torchvision": _TORCHVISION,
    "tensorflow": _TENSORFLOW,
    "keras": _KERAS,
    "npz": _NPZ,
}
_OF_MODELS = {"efficientnet_lite0": (_HALF, 0.875, "bicubic")}  # that differ from their family
_UNKNOWN = (_IMAGENET, 0.875, "bilinear")
BGR = {("keras", "ResNet"), ("keras", "VGG")}  # whose first layer takes the colours in the other order
KNOWN = {"imagenet": _IMAGENET, "half": _HALF, "zero_to_one": ((0.0,) * 3, (1.0,) * 3), "caffe": _CAFFE}


def preprocessing_of(name: str, source: str = "safetensors") -> Preprocessing:
    """That of the published weights of the model `name` by their source; ImageNet's where nothing is known of them."""
    preset = models.preset(name)
    family = _SOURCES[source].get(preset.module.__name__, _UNKNOWN)
    (mean, std), eval_crop, interpolation = _OF_MODELS.get(name, family)
    return Preprocessing(mean, std, preset.image_shape[0], eval_crop, interpolation)
