"""Distillation: a network is taught by one that was trained before (Hinton et al. 2015, arXiv 1503.02531)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from vitcls.core.registry import local_path, require
from vitcls.tasks.base import Aux, Context, Task, TrainedRun, augmented, same_guess


@dataclasses.dataclass(frozen=True)
class Distill:
    """(1 - weight) * the loss of `config.loss` + weight * what the teacher says of the same augmented image.

    With T the temperature, the latter is T^2 KL(softmax(teacher / T) || softmax(student / T)) (Hinton et al. 2015,
    section 2), or, if `hard`, the cross-entropy with the teacher's first guess (DeiT: Touvron et al. 2021, equation 3).
    """

    teacher: str = local_path()  # the workdir of a run on the same classes and image size
    temperature: float = 4.0
    weight: float = 0.9
    hard: bool = False

    def __post_init__(self):
        require(self, "temperature", 0 < self.temperature < math.inf, "above 0")
        require(self, "weight", 0 <= self.weight <= 1, "in [0, 1]")

    def build(self, context: Context) -> Task:
        @functools.cache  # only training needs it
        def teacher() -> TrainedRun:
            return self._open_teacher(context)

        def inputs(tools, batch):
            images, targets = augmented(tools, batch)
            return {"image": tools.normalize(images), "target": targets, "lesson": teacher().normalize(images)}

        def loss(tools, params, batch_stats, inputs, extra, frozen, key):
            variables = tools.gather_params(jax.lax.stop_gradient(frozen))
            lesson = jax.lax.stop_gradient(teacher().model.apply(variables, inputs["lesson"], train=False))
            output = tools.forward(params, batch_stats, inputs["image"], key)
            own = context.loss(output.logits, inputs["target"])
            losses = (1 - self.weight) * own + self.weight * self._taught(output.logits, lesson)
            sums = {
                "correct": same_guess(output.logits, inputs["target"]),
                "agrees": same_guess(output.logits, lesson),
            }
            return losses, Aux(output.batch_stats, sums)

        means = {"accuracy": "correct", "teacher_agreement": "agrees"}
        return Task(loss, inputs=inputs, frozen=lambda: teacher().variables, means=means)

    def _open_teacher(self, context: Context) -> TrainedRun:
        """Raises UserError where there is no such run, ValueError where it was trained on other classes or images."""
        if not self.teacher:
            raise ValueError("teacher='' names no workdir; give that of the run that teaches")
        teacher = context.open_run(self.teacher)
        if teacher.class_names != context.class_names:
            raise ValueError(
                f"teacher='{self.teacher}' was trained on other classes than those of this run: "
                f"{len(teacher.class_names)}, the first '{teacher.class_names[0]}', for {len(context.class_names)}, "
                f"the first '{context.class_names[0]}'"
            )
        if teacher.image_shape != context.image_shape:
            theirs, ours = ("x".join(map(str, run.image_shape)) for run in (teacher, context))
            raise ValueError(
                f"teacher='{self.teacher}' was trained on images of {theirs}, this run on {ours}; set "
                "config.dataset.image_size"
            )
        return teacher

    def _taught(self, logits: jax.Array, lesson: jax.Array) -> jax.Array:
        """[B, K], [B, K] -> [B]."""
        if self.hard:
            guess = jnp.argmax(lesson, axis=-1, keepdims=True)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), guess, axis=-1)[:, 0]
        ours, theirs = (jax.nn.log_softmax(x / self.temperature) for x in (logits, lesson))
        return self.temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
