"""APGD: gradient ascent that finds its own step size (Croce & Hein 2020, arXiv 2003.01690, algorithm 1)."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.attacks import ball
from vitcls.attacks.ball import Forward

_MOMENTUM = 0.75  # alpha, of the new direction
_RISES = 0.75  # rho, the share of steps that must raise the loss


class State(NamedTuple):
    """Where the ascent of each image stands; `at` and `gradients` are of the newest point, `best` of the highest."""

    keys: jax.Array  # [B]
    clean: jax.Array  # [B, H, W, C]
    truth: jax.Array  # int32 [B], the labels
    eps: jax.Array  # scalar
    images: jax.Array  # [B, H, W, C], what the attack gives: a point that is misclassified, else the best
    broken: jax.Array  # bool [B], whether one was found
    at: jax.Array
    before: jax.Array
    gradients: jax.Array
    losses: jax.Array  # [B], of `at`
    best: jax.Array
    best_gradients: jax.Array
    best_losses: jax.Array
    step_size: jax.Array  # [B]
    rises: jax.Array  # int32 [B], steps since the last checkpoint that raised the loss
    halved: jax.Array  # bool [B], whether the last checkpoint halved the step
    best_then: jax.Array  # [B], the best loss at the last checkpoint


@dataclasses.dataclass(frozen=True)
class APGD:
    """APGD on the cross-entropy: steps with momentum, halved at checkpoints where the loss does not grow.

    A halving goes on from the best point so far. It gives a misclassified point where it met one, else the best.
    """

    norm: str = "linf"
    steps: int = 100

    def start(self, forward: Forward, keys: jax.Array, images: jax.Array, truth: jax.Array, eps: jax.Array) -> State:
        first = ball.random_point(keys, images, eps, self.norm)
        gradients, losses, logits = ball.ascent(forward, ball.cross_entropy, first, truth)
        nothing = jnp.zeros(len(images), jnp.int32)
        return State(
            keys,
            images,
            truth,
            eps,
            images=first,
            broken=jnp.argmax(logits, axis=-1) != truth,
            at=first,
            before=first,
            gradients=gradients,
            losses=losses,
            best=first,
            best_gradients=gradients,
            best_losses=losses,
            step_size=2 * eps * jnp.ones(len(images)),
            rises=nothing,
            halved=nothing > 0,
            best_then=losses,
        )

    def step(self, forward: Forward, i: jax.Array, state: State) -> State:
        moved = self._move(i, state)
        gradients, losses, logits = ball.ascent(forward, ball.cross_entropy, moved, state.truth)
        wrong, higher = jnp.argmax(logits, axis=-1) != state.truth, losses > state.best_losses
        best = _where(higher, moved, state.best)
        state = state._replace(
            images=_where(wrong, moved, _where(state.broken, state.images, best)),
            broken=state.broken | wrong,
            at=moved,
            before=state.at,
            gradients=gradients,
            losses=losses,
            best=best,
            best_gradients=_where(higher, gradients, state.best_gradients),
            best_losses=jnp.maximum(losses, state.best_losses),
            rises=state.rises + (losses > state.losses),
        )
        window = jnp.asarray(checkpoints(self.steps))[i]
        return jax.tree.map(lambda new, old: jnp.where(window > 0, new, old), _check(state, window), state)

    def broken(self, state: State) -> jax.Array:
        """Which images have a misclassified point, bool [B]."""
        return state.broken

    def _move(self, i: jax.Array, state: State) -> jax.Array:
        size = state.step_size[:, None, None, None]
        ahead = state.at + size * ball.steepest(state.gradients, self.norm)
        ahead = ball.project(ahead, state.clean, state.eps, self.norm)
        momentum = jnp.where(i == 0, 1.0, _MOMENTUM)  # the first step has none
        moved = state.at + momentum * (ahead - state.at) + (1 - momentum) * (state.at - state.before)
        return ball.project(moved, state.clean, state.eps, self.norm)


def checkpoints(steps: int) -> np.ndarray:
    """After each step, int32 [steps]: how many steps since the last checkpoint if this is one, else 0 (section 3.2)."""
    window = np.zeros(steps, np.int32)
    last, before, p = 0, 0.0, 0.22
    while (now := math.ceil(p * steps)) <= steps:
        if now > last:
            window[now - 1] = now - last
        last, before, p = now, p, p + max(p - before - 0.03, 0.06)
    return window


def _check(state: State, window: jax.Array) -> State:
    """What a checkpoint does: conditions 1 and 2 of section 3.2 halve the step and go back to the best point."""
    too_few = state.rises < _RISES * window
    stuck = ~state.halved & (state.best_losses <= state.best_then)
    halve = too_few | stuck
    return state._replace(
        at=_where(halve, state.best, state.at),
        before=_where(halve, state.best, state.before),  # no momentum from elsewhere
        gradients=_where(halve, state.best_gradients, state.gradients),
        losses=jnp.where(halve, state.best_losses, state.losses),
        step_size=jnp.where(halve, state.step_size / 2, state.step_size),
        rises=jnp.zeros_like(state.rises),
        halved=halve,
        best_then=state.best_losses,
    )


def _where(which: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(which[:, None, None, None], new, old)
