"""Logits and features of images, by a run that is open."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.core.errors import UserError
from vitcls.data.augment import to_float
from vitcls.metrics.unknown import Outputs
from vitcls.training import build, steps
from vitcls.training.opened import Opened
from vitcls.training.run_dir import Workdir


def make_outputs_step(trained: Workdir, model):
    """outputs_step(variables, images uint8 [B, H, W, C]) -> logits float32 [B, K] and features float32 [B, D].

    Raises UserError for a run whose task has no classifier.
    """
    config, info = trained.config, trained.info
    if build.make_task(config, info).remember is not None:
        raise UserError(f"a run of config.task.name='{config.task.name}' has no classifier of its own")
    apply = steps.make_apply(model, steps.make_normalize(info.mean, info.std))

    def outputs_step(variables, images: jax.Array) -> Outputs:
        output = apply(variables, to_float(images), sow=True)
        return Outputs(output.logits.astype(jnp.float32), output.sown["features"][0].astype(jnp.float32))

    return outputs_step


def outputs_of(opened: Opened, batches: Iterable[dict], count: int) -> Outputs:
    """Of the first `count` images of batches on the devices."""
    step = opened.partition.compile_evaluation(make_outputs_step(opened.trained, opened.model))
    parts = [opened.partition.to_host(step(opened.variables, batch["image"])) for batch in batches]
    return Outputs(*(np.concatenate(part)[:count] for part in zip(*parts, strict=True)))
