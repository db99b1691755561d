"""Projected gradient ascent, of which the fast gradient sign method is one step."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax

from vitcls.attacks import ball
from vitcls.attacks.ball import Forward


class State(NamedTuple):
    """Where the ascent of each image stands."""

    keys: jax.Array  # [B]
    clean: jax.Array  # [B, H, W, C]
    truth: jax.Array  # what the loss takes besides the logits: labels int32 [B], or anything with a row for each image
    eps: jax.Array  # scalar
    images: jax.Array  # [B, H, W, C], what the attack gives


@dataclasses.dataclass(frozen=True)
class PGD:
    """Steps of `step_size` eps in the steepest direction, back into the ball after each (Madry et al. 2018, 2.1).

    The last point is what it gives, as in the paper. `begin` is where it starts: at a 'uniform' point of the ball, at
    the image with 'normal' noise of 0.001 (TRADES: Zhang et al. 2019, section 5), or at the image itself, 'clean'.
    """

    norm: str = "linf"
    steps: int = 40
    step_size: float = 0.0  # in units of eps; 0 for 2.5 / steps (section 5 of Madry et al.'s code for l2)
    begin: str = "uniform"
    loss: Callable[[jax.Array, jax.Array], jax.Array] = ball.cross_entropy  # (logits, truth) -> [B]

    def start(self, forward: Forward, keys: jax.Array, images: jax.Array, truth: jax.Array, eps: jax.Array) -> State:
        first = images
        if self.begin == "uniform":
            first = ball.random_point(keys, images, eps, self.norm)
        elif self.begin == "normal":
            noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
            first = ball.project(images + 1e-3 * noise, images, eps, self.norm)
        return State(keys, images, truth, eps, first)

    def step(self, forward: Forward, i: jax.Array, state: State) -> State:
        gradients, _, _ = ball.ascent(forward, self.loss, state.images, state.truth)
        moved = state.images + self._size * state.eps * ball.steepest(gradients, self.norm)
        return state._replace(images=ball.project(moved, state.clean, state.eps, self.norm))

    def broken(self, state: State) -> None:
        """Not known before the end: the last point counts, which need not be the worst."""

    @property
    def _size(self) -> float:
        return self.step_size or 2.5 / self.steps


def fgsm(norm: str = "linf") -> PGD:
    """One step to the rim of the ball (Goodfellow et al. 2015, section 4; for l2 the gradient itself)."""
    return PGD(norm, steps=1, step_size=1.0, begin="clean")
