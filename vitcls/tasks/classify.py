"""Supervised classification: the loss of `config.loss` on the model's logits."""

import dataclasses

import jax.numpy as jnp

from vitcls.tasks.base import Aux, Context, Task


@dataclasses.dataclass(frozen=True)
class Classify:
    """The default; it has no keys."""

    def build(self, context: Context) -> Task:
        def loss(tools, params, batch_stats, inputs, extra, frozen, key):
            output = tools.forward(params, batch_stats, inputs["image"], key)
            correct = jnp.argmax(output.logits, axis=-1) == jnp.argmax(inputs["target"], axis=-1)
            return context.loss(output.logits, inputs["target"]), Aux(output.batch_stats, {"correct": correct})

        return Task(loss)
