"""Attacks on images: all steps in one program, or one step at a time from Python."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.attacks import ball, bounds
from vitcls.attacks.ball import Forward

PyTree = Any
_GLANCE = 25  # steps between two looks at which images are misclassified
_GROUP = 4  # batches that are attacked together, so that few images do not keep a batch busy


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
    and images that are misclassified already make room for others.
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
        self._step = jax.jit(step, static_argnums=0)
        self._forward = jax.jit(forward)

        def slopes(variables, images, labels):
            gradients, _, _ = ball.ascent(lambda x: forward(variables, x), ball.cross_entropy, images, labels)
            return jnp.max(jnp.abs(gradients), axis=(1, 2, 3))

        def safe(variables, images, labels, eps):
            ends = jnp.maximum(images - eps, 0.0), jnp.minimum(images + eps, 1.0)
            with jax.default_matmul_precision("highest"):  # a certificate is no place for TF32
                gaps = bounds.largest_gaps(bounds.logits(lambda x: forward(variables, x), *ends), labels)
            return jnp.sum(~(gaps < 0), axis=-1) == 1  # that of the label with itself; what is no number is not safe

        self._slopes, self._safe = jax.jit(slopes), jax.jit(safe)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """float32 [N, K] of images float32 [N, H, W, C]."""
        parts = [np.asarray(self._forward(self._variables, self._put(rows))) for rows in self._batches(images)]
        return np.concatenate(parts)[: len(images)]

    def slopes(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The largest slope of the cross-entropy by a value of the image, float32 [N]."""
        return self._each(self._slopes, images, labels)

    def certified(self, images: np.ndarray, labels: np.ndarray, eps: float) -> np.ndarray:
        """Which images no change of at most `eps` by the linf norm can have misclassified, bool [N]: some, or none.

        Raises bounds.Unbounded for a model without bounds.
        """
        return self._each(functools.partial(self._safe, eps=np.float32(eps)), images, labels)

    def _each(self, function: Callable, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """`function(variables, images, labels)` of all, a batch at a time."""
        batches = zip(self._batches(images), self._batches(labels), strict=True)
        parts = [np.asarray(function(self._variables, *self._put(rows))) for rows in batches]
        return np.concatenate(parts)[: len(images)]

    def survives(
        self, attack: Any, images: np.ndarray, labels: np.ndarray, places: np.ndarray, eps: float
    ) -> np.ndarray:
        """Which images are still classified right under an attack, bool [N].

        Args:
          images: float32 [N, H, W, C] in [0, 1]; labels: int32 [N].
          places: int32 [N], of which the random draws of each image are a function.
        """
        size = _GROUP * self._batch_size
        groups = [slice(start, start + size) for start in range(0, len(images), size)]
        parts = [self._survives(attack, images[rows], labels[rows], places[rows], eps) for rows in groups]
        return np.concatenate([np.zeros(0, bool), *parts])

    def _survives(self, attack: Any, images: np.ndarray, labels: np.ndarray, places: np.ndarray, eps: float):
        """The same of so few images that the states of all fit the memory."""
        rows = self._batches(np.arange(len(images)))
        inputs = zip(*(self._batches(x) for x in (places, images, labels)), strict=True)
        states = [self._start(attack, self._variables, *self._put(part), np.float32(eps)) for part in inputs]
        open_batches = list(zip(rows, states, strict=True))
        for first in range(0, attack.steps, _GLANCE):
            last = min(first + _GLANCE, attack.steps)
            open_batches = [(rows, self._advance(attack, state, first, last)) for rows, state in open_batches]
            open_batches = self._without_broken(attack, open_batches)
        right = np.zeros(len(images), bool)
        for rows, state in open_batches:
            right[rows] = np.argmax(self._forward(self._variables, state.images), axis=-1) == labels[rows]
        return right

    def _advance(self, attack: Any, state: PyTree, first: int, last: int) -> PyTree:
        for i in range(first, last):
            state = self._step(attack, self._variables, np.int32(i), state)
        return state

    def _without_broken(self, attack: Any, batches: list[tuple[np.ndarray, PyTree]]) -> list[tuple[np.ndarray, PyTree]]:
        """As few batches as hold the images that are still classified right; the same ones where that saves none."""
        broken = [attack.broken(state) for _, state in batches]
        if not batches or broken[0] is None:
            return batches
        rows = np.concatenate([rows for rows, _ in batches])
        first = np.zeros(len(rows), bool)
        first[np.unique(rows, return_index=True)[1]] = True  # what fills a batch up is there already
        left = np.flatnonzero(first & ~np.concatenate([np.asarray(each) for each in broken]))
        if -(-len(left) // self._batch_size) == len(batches):
            return batches
        states = [state for _, state in batches]
        whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves) if leaves[0].ndim else leaves[0], *states)

        def take(chosen: np.ndarray) -> PyTree:
            return jax.tree.map(lambda leaf: self._put(leaf[chosen]) if leaf.ndim else leaf, whole)

        return [(rows[chosen], take(chosen)) for chosen in self._batches(left)]

    def _batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Rows in batches, the last filled up with its own last row."""
        for start in range(0, len(rows), self._batch_size):
            part = rows[start : start + self._batch_size]
            fill = np.repeat(part[-1:], self._batch_size - len(part), axis=0)
            yield np.concatenate([part, fill])
