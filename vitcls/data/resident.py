"""The whole training split in device memory as uint8; batches are gathered inside jit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.data.order import epoch_order, first_place
from vitcls.partition import Partition
from vitcls.rng import example_positions


@dataclasses.dataclass(frozen=True)
class Resident:
    """Training batches out of arrays image uint8 [N, H, W, C] and label int32 [N] that stay on the devices."""

    partition: Partition
    arrays: dict[str, Any]
    num_classes: int
    batch_size: int
    seed: int
    balanced: bool

    def data(self, step: int, length: int) -> dict[str, Any]:
        """What the call that starts at `step` needs on the devices: always the same arrays, nothing moves."""
        return self.arrays

    def open(self, data: dict[str, jax.Array], step: jax.Array, length: int) -> Callable[[jax.Array], dict]:
        """Traced: returns i -> batch of `step` + i, for i < `length`."""
        num_examples = data["label"].shape[0]
        epoch, offset = first_place(step, batch_size=self.batch_size, num_examples=num_examples)
        epochs = -(-(num_examples - 1 + length * self.batch_size) // num_examples)  # the most that a call can touch
        order = jnp.concatenate([self._epoch_order(data["label"], epoch + i) for i in range(epochs)])
        visible = self.partition.visible(self.batch_size)

        def batch(i: jax.Array) -> dict[str, jax.Array]:
            places = offset + i * self.batch_size + example_positions(visible, self.partition.axis_name)
            indices = self.partition.constrain(order[places])
            return self.partition.constrain(
                {
                    "image": data["image"][indices],
                    "label": data["label"][indices],
                    "mask": jnp.ones((visible,), jnp.float32),
                }
            )

        return batch

    def _epoch_order(self, labels: jax.Array, epoch: jax.Array) -> jax.Array:
        return epoch_order(self.seed, epoch, labels, num_classes=self.num_classes, balanced=self.balanced)


def make_resident(
    partition: Partition,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    batch_size: int,
    seed: int,
    balanced: bool,
) -> Resident:
    """Puts images uint8 [N, H, W, C] and labels int32 [N] on every device."""
    arrays = partition.replicate({"image": images, "label": labels})
    return Resident(partition, arrays, num_classes, batch_size, seed, balanced)
