"""Certified training: the loss of the worst that any small change of an image could do to its logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from vitcls.attacks import bounds
from vitcls.core.registry import require, require_durations
from vitcls.models.variables import variable_shapes
from vitcls.tasks.base import Aux, Context, Task, augmented, same_guess


@dataclasses.dataclass(frozen=True)
class Certified:
    """Interval bound propagation (Gowal et al. 2018, arXiv 1810.12715, section 3): `weight` of the loss of the image
    itself, and 1 - `weight` of that of the worst logits that any image within eps has, by bounds that hold for all.

    Both begin where a network can learn: eps at 0 and the weight at 1, for `warmup`; they come to their values along a
    line over `ramp`. The bounds are of the network in evaluation, of images in [0, 1] before normalisation. A network
    of products, ReLU and other monotonous activations, pooling and additions has bounds; attention and normalisation by
    an image's own statistics have none. `vitcls attack` shows for how many test images they hold.
    """

    eps: float = 8 / 255  # of images in [0, 1], by the largest change of a value; train with more than is asked for
    weight: float = 0.5  # of the loss of the image itself, at the end
    warmup: str = "5%"  # of training
    ramp: str = "40%"

    def __post_init__(self):
        require(self, "eps", 0 < self.eps < math.inf, "above 0")
        require(self, "weight", 0 <= self.weight <= 1, "in [0, 1]")
        require_durations(self, "warmup", "ramp")

    def build(self, context: Context) -> Task:
        warmup, ramp = context.to_steps(self.warmup), context.to_steps(self.ramp)

        def wrap(model):
            shapes = variable_shapes(model, context.image_shape)
            image = jax.ShapeDtypeStruct((1, *context.image_shape), jnp.float32)
            try:
                bounds.check(lambda variables, images: model.apply(variables, images, train=False), shapes, image)
            except bounds.Unbounded as error:
                raise ValueError(f"this network cannot be trained as 'certified': {error}") from None
            return model

        def loss(tools, params, batch_stats, inputs, extra, frozen, key):
            progress = jnp.clip((extra - warmup) / max(ramp, 1), 0.0, 1.0)
            eps, weight = self.eps * progress, 1 - (1 - self.weight) * progress
            images, targets = inputs["image"], inputs["target"]
            output = tools.forward(params, batch_stats, tools.normalize(images), key)
            ends = jnp.maximum(images - eps, 0.0), jnp.minimum(images + eps, 1.0)
            found = bounds.logits(lambda x: tools.evaluate(params, batch_stats, tools.normalize(x)), *ends)
            worst = bounds.largest_gaps(found, jnp.argmax(targets, axis=-1))
            losses = weight * context.loss(output.logits, targets) + (1 - weight) * context.loss(worst, targets)
            sums = {
                "correct": same_guess(output.logits, targets),
                "certified": same_guess(worst, targets),
            }
            return losses, Aux(output.batch_stats, sums)

        return Task(
            loss,
            inputs=_inputs,
            wrap=wrap,
            init=lambda key, variables: jnp.zeros((), jnp.int32),  # updates so far
            update=lambda extra, updated: updated.step + 1,
            means={"accuracy": "correct", "certified_accuracy": "certified"},
        )


def _inputs(tools, batch):
    """Images in [0, 1], which the changes are of."""
    images, targets = augmented(tools, batch)
    return {"image": images, "target": targets}
