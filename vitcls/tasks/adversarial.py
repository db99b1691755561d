"""Adversarial training: the loss on images that are attacked anew in every step."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from vitcls import attacks
from vitcls.core.registry import require, require_range
from vitcls.tasks.base import Aux, Context, Task, augmented, same_guess

_METHODS = ("fgsm", "pgd", "trades")


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """Training on attacked images, in [0, 1] before normalisation and after augmentation.

    'fgsm' takes one step from a random start (Wong et al. 2020, "Fast is better than free", algorithm 3), 'pgd' `steps`
    of them (Madry et al. 2018, section 2); both train on the attacked image alone. 'trades' adds to the loss of the
    image itself `beta` KL(p(image) || p(attacked image)), which is also what its attack climbs (Zhang et al. 2019,
    equation 5 and algorithm 1).

    The attack sees the network in evaluation, without dropout and with the averages of batch normalisation, as TRADES
    does (Madry et al.'s network has neither): what becomes of an image does not depend on the others, and the attack
    leaves the averages alone. The loss is of the network in training.
    """

    method: str = "pgd"
    norm: str = "linf"
    eps: float = 8 / 255  # of images in [0, 1]
    steps: int = 10  # of pgd and trades
    step_size: float = 0.0  # of images in [0, 1]; 0 for 1.25 eps of fgsm, else 2.5 eps / steps
    beta: float = 6.0  # of trades

    def __post_init__(self):
        require(self, "method", self.method in _METHODS, f"one of {', '.join(_METHODS)}")
        require(self, "norm", self.norm in attacks.NORMS, f"one of {', '.join(attacks.NORMS)}")
        require(self, "eps", 0 < self.eps < math.inf, "above 0")
        require_range(self, steps=(1, 1000), step_size=(0, math.inf), beta=(0, math.inf))

    def build(self, context: Context) -> Task:
        if self.method != "trades":
            return Task(self._attacked(context), inputs=_inputs, means={"robust_accuracy": "robust"})
        means = {"accuracy": "correct", "robust_accuracy": "robust"}
        return Task(self._trades(context), inputs=_inputs, means=means)

    def _attacked(self, context: Context):
        attack = self._attack("uniform", context.loss)

        def loss(tools, params, batch_stats, inputs, extra, frozen, key):
            images = self._perturb(attack, tools, params, batch_stats, inputs, inputs["target"])
            output = tools.forward(params, batch_stats, tools.normalize(images), key)
            robust = same_guess(output.logits, inputs["target"])
            return context.loss(output.logits, inputs["target"]), Aux(output.batch_stats, {"robust": robust})

        return loss

    def _trades(self, context: Context):
        attack = self._attack("normal", _divergence)

        def loss(tools, params, batch_stats, inputs, extra, frozen, key):
            clean = tools.normalize(inputs["image"])
            truth = jax.lax.stop_gradient(tools.evaluate(params, batch_stats, clean))
            images = self._perturb(attack, tools, params, batch_stats, inputs, truth)
            plain_key, attacked_key = jax.random.split(key)
            plain = tools.forward(params, batch_stats, clean, plain_key)
            attacked = tools.forward(params, plain.batch_stats, tools.normalize(images), attacked_key)
            own = context.loss(plain.logits, inputs["target"])
            sums = {
                "correct": same_guess(plain.logits, inputs["target"]),
                "robust": same_guess(attacked.logits, inputs["target"]),
            }
            return own + self.beta * _divergence(attacked.logits, plain.logits), Aux(attacked.batch_stats, sums)

        return loss

    def _attack(self, begin: str, loss) -> attacks.PGD:
        steps = 1 if self.method == "fgsm" else self.steps
        size = self.step_size / self.eps or (1.25 if self.method == "fgsm" else 2.5 / steps)
        return attacks.PGD(self.norm, steps=steps, step_size=size, begin=begin, loss=loss)

    def _perturb(self, attack, tools, params, batch_stats, inputs, truth) -> jax.Array:
        # Gathered once, not in each step of the attack.
        fixed = jax.lax.stop_gradient((tools.gather_params(params), batch_stats))

        def forward(images):
            return tools.evaluate(*fixed, tools.normalize(images))

        images = attacks.perturb(attack, inputs["key"], inputs["image"], truth, forward, eps=self.eps)
        return jax.lax.stop_gradient(images)


def _inputs(tools, batch):
    """Images in [0, 1], which the attack moves, and the keys of its random starts."""
    images, targets = augmented(tools, batch)
    keys = jax.vmap(jax.random.fold_in, (0, None))(batch["key"], 1)
    return {"image": images, "target": targets, "key": keys}


def _divergence(logits: jax.Array, truth: jax.Array) -> jax.Array:
    """KL(softmax(truth) || softmax(logits)), [B, K], [B, K] -> [B]."""
    log_p, log_q = jax.nn.log_softmax(truth), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
