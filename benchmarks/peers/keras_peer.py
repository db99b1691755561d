"""Training with Keras 3 on TensorFlow: its own models where it has them, else the plain architecture in its layers."""

import os
from collections.abc import Callable

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # as TensorFlow has it; vitcls turns it off, since it computes nothing there
import keras
import tensorflow as tf

_CONVNEXT = {"include_preprocessing": False}
PLATFORM = "gpu" if tf.config.get_visible_devices("GPU") else "cpu"
for gpu in tf.config.get_visible_devices("GPU"):
    tf.config.experimental.set_memory_growth(gpu, True)  # the device is shared with the others


def build(name: str, image_size: int, num_classes: int, **fields) -> keras.Model:
    """The model that vitcls calls `name`, at its preset; `fields` are for a ViT."""
    shape = (image_size, image_size, 3)
    arguments = dict(weights=None, input_shape=shape, classes=num_classes, classifier_activation=None)
    match name:
        case "resnet50":
            return keras.applications.ResNet50(**arguments)
        case "convnext_tiny":
            return keras.applications.ConvNeXtTiny(**arguments, **_CONVNEXT)
        case "resnext50_32x4d":
            return _resnext50(shape, num_classes)
        case _:
            return _vit(shape, num_classes, **fields)


def train_step(
    name: str, image_size: int, batch: int, num_classes: int, dtype: str, **fields
) -> tuple[Callable[[], None], int]:
    """A call that makes one SGD step and waits for it, and the number of trained parameters."""
    _prepare(dtype)
    model = build(name, image_size, num_classes, **fields)
    _compile(model, keras.optimizers.SGD(0.01, momentum=0.9))
    random = np.random.default_rng(0)
    images = tf.constant(random.standard_normal((batch, image_size, image_size, 3)), tf.float32)
    labels = tf.constant(random.integers(0, num_classes, batch), tf.int32)
    return lambda: model.train_on_batch(images, labels), count_parameters(model)


def epoch(
    images: np.ndarray, labels: np.ndarray, batch: int, mean, std, *, dtype: str, **fields
) -> tuple[Callable[[], None], int]:
    """A call that trains for one epoch with random crops and flips out of tf.data, and the number of parameters."""
    _prepare(dtype)
    size = images.shape[1]
    model = _vit(images.shape[1:], int(labels.max()) + 1, **fields)
    _compile(model, keras.optimizers.AdamW(1e-3))

    def augment(image, label):
        image = tf.pad(image, [[4, 4], [4, 4], [0, 0]])
        image = tf.image.random_flip_left_right(tf.image.random_crop(image, (size, size, 3)))
        return (tf.cast(image, tf.float32) / 255 - mean) / std, label

    examples = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(labels))
    batches = examples.map(augment, tf.data.AUTOTUNE).batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    model.fit(batches.take(3), shuffle=False, verbose=0)  # the examples are shuffled
    return lambda: model.fit(batches, shuffle=False, verbose=0), count_parameters(model)


def _prepare(dtype: str) -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16" if dtype == "bfloat16" else "float32")
    keras.utils.set_random_seed(0)


def _compile(model: keras.Model, optimizer) -> None:
    """'auto' compiles with XLA on accelerators; on a CPU Keras's own choice of kernels is the faster."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])


def count_parameters(model: keras.Model) -> int:
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


def _vit(shape, num_classes: int, *, patch_size: int, hidden_dim: int, depth: int, num_heads: int, mlp_dim: int):
    """The plain ViT with a class token and learned positions (Dosovitskiy et al. 2021)."""
    layers = keras.layers
    inputs = keras.Input(shape)
    tokens = layers.Conv2D(hidden_dim, patch_size, patch_size)(inputs)
    tokens = layers.Reshape((-1, hidden_dim))(tokens)
    tokens = _ClassToken()(tokens)
    for _ in range(depth):
        y = layers.LayerNormalization(epsilon=1e-6)(tokens)
        tokens += layers.MultiHeadAttention(num_heads, hidden_dim // num_heads)(y, y)
        y = layers.LayerNormalization(epsilon=1e-6)(tokens)
        tokens += layers.Dense(hidden_dim)(layers.Dense(mlp_dim, activation="gelu")(y))
    features = layers.LayerNormalization(epsilon=1e-6)(tokens)[:, 0]
    return keras.Model(inputs, layers.Dense(num_classes, dtype="float32")(features))


class _ClassToken(keras.layers.Layer):
    """Prepends a token and adds positions."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="token")
        self.positions = self.add_weight(shape=(1, shape[1] + 1, shape[-1]), name="positions")

    def call(self, tokens):
        token = keras.ops.repeat(self.token, keras.ops.shape(tokens)[0], axis=0)
        return keras.ops.concatenate([token, tokens], axis=1) + self.positions


def _resnext50(shape, num_classes: int) -> keras.Model:
    """ResNeXt-50 32x4d (Xie et al. 2017)."""
    layers = keras.layers

    def unit(x, width, kernel, stride=1, groups=1, activation=True):
        pad = "same" if stride == 1 else "valid"
        x = layers.ZeroPadding2D(kernel // 2)(x) if stride > 1 else x
        x = layers.Conv2D(width, kernel, stride, padding=pad, groups=groups, use_bias=False)(x)
        x = layers.BatchNormalization(epsilon=1e-5)(x)
        return layers.ReLU()(x) if activation else x

    inputs = keras.Input(shape)
    x = unit(inputs, 64, 7, 2)
    x = layers.MaxPooling2D(3, 2, padding="same")(x)
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 128 << stage
        for i in range(depth):
            stride = 2 if i == 0 and stage > 0 else 1
            y = unit(unit(unit(x, width, 1), width, 3, stride, groups=32), 2 * width, 1, activation=False)
            x = unit(x, 2 * width, 1, stride, activation=False) if i == 0 else x
            x = layers.ReLU()(x + y)
    return keras.Model(inputs, layers.Dense(num_classes, dtype="float32")(layers.GlobalAveragePooling2D()(x)))
