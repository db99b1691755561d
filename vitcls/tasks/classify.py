"""Supervised classification: the loss of `config.loss` on the model's logits."""

import dataclasses

from vitcls.tasks.base import Aux, Context, Task, same_guess


@dataclasses.dataclass(frozen=True)
class Classify:
    """The default; it has no keys."""

    def build(self, context: Context) -> Task:
        def loss(tools, params, batch_stats, inputs, extra, frozen, key):
            output = tools.forward(params, batch_stats, inputs["image"], key)
            correct = same_guess(output.logits, inputs["target"])
            return context.loss(output.logits, inputs["target"]), Aux(output.batch_stats, {"correct": correct})

        return Task(loss)
