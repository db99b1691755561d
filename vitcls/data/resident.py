"""The whole training split in device memory as uint8; batches are gathered inside jit."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.core.rng import example_keys, example_positions, step_key
from vitcls.core.sharding import Partition
from vitcls.data.augment.resized_crop import random_resized_crop
from vitcls.data.images import Crop
from vitcls.data.order import epoch_order, first_place, offset_on_device

_CROP_STREAM = 0x0C40  # apart from what the training step draws with the same key


class Cropping(NamedTuple):
    """Random resized crops of images that were squeezed into one shape."""

    crop: Crop
    size: tuple[int, int]  # height, width of what the model sees
    aspects: np.ndarray  # float32 [N]: width / height that the images had
    interpolation: str


class Resident:
    """Training batches out of images uint8 [N, H, W, C] and labels int32 [N] that stay on the devices.

    The order of an epoch is made on the devices too, once: sorting 50,000 random numbers takes a CPU longer than many
    a training step. An image is one row there, [N, H * W * C]: of [N, H, W, C] a TPU makes a copy in another layout in
    every step, to gather from it (docs/performance.md).
    """

    def __init__(
        self,
        partition: Partition,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        num_classes: int,
        batch_size: int,
        seed: int,
        balanced: bool,
        cropping: Cropping | None = None,
    ):
        self._partition = partition
        self._batch_size = batch_size
        self._num_examples = len(labels)
        self._image_shape = images.shape[1:]
        arrays = {"image": images.reshape(len(images), -1), "label": labels}
        self._cropping = cropping
        if cropping:
            arrays |= {"aspect": cropping.aspects, "seed": np.int32(seed)}
        self._arrays = partition.replicate(arrays)
        self._seed = partition.replicate(np.int32(seed))  # data, so that all seeds share a program
        order = functools.partial(epoch_order, num_classes=num_classes, balanced=balanced)
        self._compute_order = partition.compile_evaluation(order)
        self._orders: dict[int, jax.Array] = {}  # of the epochs that the newest call touched

    def close(self) -> None:
        """Nothing is read ahead."""

    def host_inputs(self, step: int, length: int) -> dict[str, Any]:
        """What the call that starts at `step` needs on the devices; nothing moves but the number of a new epoch."""
        first, _ = first_place(step, batch_size=self._batch_size, num_examples=self._num_examples)
        most = -(-(self._num_examples - 1 + length * self._batch_size) // self._num_examples)  # that a call can touch
        self._orders = {
            epoch: self._orders[epoch] if epoch in self._orders else self._epoch_order(epoch)
            for epoch in range(first, first + most)
        }
        return self._arrays | {"orders": tuple(self._orders.values())}

    def batch_fn(self, inputs: dict[str, Any], step: jax.Array, length: int) -> Callable[[jax.Array], dict]:
        """Traced: returns i -> batch of `step` + i, for i < `length`."""
        offset = offset_on_device(step, batch_size=self._batch_size, num_examples=self._num_examples)
        order = jnp.concatenate(inputs["orders"])
        visible = self._partition.visible(self._batch_size)

        def batch(i: jax.Array) -> dict[str, jax.Array]:
            places = offset + i * self._batch_size + example_positions(visible)
            indices = self._partition.constrain(order[places])
            images = self._partition.constrain(inputs["image"][indices]).reshape(visible, *self._image_shape)
            if self._cropping:
                images = self._crop(inputs, images, indices, step + i)
            return self._partition.constrain(
                {
                    "image": images,
                    "label": inputs["label"][indices],
                    "mask": jnp.ones((visible,), jnp.float32),
                }
            )

        return batch

    def _crop(self, inputs: dict[str, Any], images: jax.Array, indices: jax.Array, step: jax.Array) -> jax.Array:
        """Random resized crops of a batch, by seed, step and place in the batch alone."""
        key = jax.random.fold_in(step_key(inputs["seed"], step), _CROP_STREAM)
        crop, size, _, interpolation = self._cropping
        one = functools.partial(
            random_resized_crop, size=size, area=crop.area, ratio=crop.ratio, interpolation=interpolation
        )
        return jax.vmap(one)(example_keys(key, len(indices)), images, inputs["aspect"][indices])

    def _epoch_order(self, epoch: int) -> jax.Array:
        return self._compute_order(self._seed, self._partition.replicate(np.int32(epoch)), self._arrays["label"])
