"""Attacks on images: all steps in one program, or one step at a time from Python."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.attacks import ball
from vitcls.attacks.ball import Forward

PyTree = Any
_GLANCE = 25  # steps between two looks at whether all images are misclassified


def perturb(
    attack: Any,
    keys: jax.Array,
    images: jax.Array,
    truth: jax.Array,
    forward: Forward,
    *,
    eps: jax.Array | float,
) -> jax.Array:
    """The images that an attack makes of `images`, float32 [B, H, W, C] in [0, 1], at most `eps` away.

    What becomes of an image depends on its own key and not on the others, as long as `forward` looks at each alone.

    Args:
      attack: such as PGD("linf", steps=40).
      keys: one for each image, [B].
      truth: labels int32 [B], or what the loss of the attack takes.
      forward: images float32 [B, H, W, C] in [0, 1] -> logits [B, K].
      eps: in units of the images.
    """
    state = attack.start(forward, keys, images, truth, jnp.asarray(eps, jnp.float32))
    if jax.default_backend() == "cpu":  # where XLA takes five times as long for convolutions inside a loop
        for i in range(attack.steps):
            state = attack.step(forward, i, state)
        return state.images
    return jax.lax.fori_loop(0, attack.steps, lambda i, state: attack.step(forward, i, state), state).images


class Runner:
    """Attacks any number of images of one model, a batch at a time; a program is compiled once for each attack.

    One step is a program that Python calls again and again: XLA's CPU backend is slow with convolutions inside a loop,
    and a batch whose images are all misclassified needs no further steps.
    """

    def __init__(
        self,
        forward: Callable[[PyTree, jax.Array], jax.Array],
        variables: PyTree,
        *,
        batch_size: int,
        put: Callable[[PyTree], PyTree] = jax.device_put,
        seed: int = 0,
    ):
        """`forward(variables, images)` gives logits; `put` takes host rows [batch_size, ...] to the devices."""
        self._variables, self._batch_size, self._put = variables, batch_size, put
        self._root = jax.random.key(seed)

        def start(attack, variables, places, images, labels, eps):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(self._root, places)
            return attack.start(lambda x: forward(variables, x), keys, images, labels, eps)

        def step(attack, variables, i, state):
            return attack.step(lambda x: forward(variables, x), i, state)

        self._start = jax.jit(start, static_argnums=0)
        self._step = jax.jit(step, static_argnums=0, donate_argnums=3)
        self._forward = jax.jit(forward)

        def slopes(variables, images, labels):
            gradients, _, _ = ball.ascent(lambda x: forward(variables, x), ball.cross_entropy, images, labels)
            return jnp.max(jnp.abs(gradients), axis=(1, 2, 3))

        self._slopes = jax.jit(slopes)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, K] of images float32 [N, H, W, C]."""
        parts = [np.asarray(self._forward(self._variables, self._put(rows))) for rows in self._batches(images)]
        return np.concatenate(parts)[: len(images)]

    def slopes(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The largest slope of the cross-entropy by a value of the image, float32 [N]."""
        batches = zip(self._batches(images), self._batches(labels), strict=True)
        return np.concatenate([np.asarray(self._slopes(self._variables, *self._put(rows))) for rows in batches])[
            : len(images)
        ]

    def survives(
        self, attack: Any, images: np.ndarray, labels: np.ndarray, places: np.ndarray, eps: float
    ) -> np.ndarray:
        """Which images are still classified right under an attack, bool [N].

        Args:
          images: float32 [N, H, W, C] in [0, 1]; labels: int32 [N].
          places: int32 [N], of which the random draws of each image are a function.
        """
        if not len(images):
            return np.zeros(0, bool)
        right = [
            self._attacked(attack, *rows, eps)
            for rows in zip(*(self._batches(x) for x in (images, labels, places)), strict=True)
        ]
        return np.concatenate(right)[: len(images)]

    def _attacked(self, attack: Any, images: np.ndarray, labels: np.ndarray, places: np.ndarray, eps: float):
        places, images, labels = self._put((places, images, labels))
        state = self._start(attack, self._variables, places, images, labels, np.float32(eps))
        for i in range(attack.steps):
            state = self._step(attack, self._variables, np.int32(i), state)
            if self._is_over(state, i):
                break
        return np.argmax(self._forward(self._variables, state.images), axis=-1) == labels

    def _is_over(self, state: Any, i: int) -> bool:
        """Whether an attack that gives a misclassified image once it has one has one of each."""
        if i % _GLANCE != _GLANCE - 1:
            return False
        if hasattr(state, "margins"):
            return bool((state.margins < 0).all())
        return bool(state.broken.all()) if hasattr(state, "broken") else False

    def _batches(self, rows: np.ndarray):
        """Rows in batches, the last filled up with its own last row."""
        for start in range(0, len(rows), self._batch_size):
            part = rows[start : start + self._batch_size]
            fill = np.repeat(part[-1:], self._batch_size - len(part), axis=0)
            yield np.concatenate([part, fill])
