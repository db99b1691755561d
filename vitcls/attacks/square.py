"""Square Attack: random search without gradients (Andriushchenko et al. 2020, arXiv 1912.00049)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.attacks import ball
from vitcls.attacks.ball import Forward

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of the share, in steps of 10,000 (section 3.2)


class State(NamedTuple):
    """The best image found of each, and how far it is from being misclassified."""

    keys: jax.Array  # [B]
    clean: jax.Array  # [B, H, W, C]
    truth: jax.Array  # int32 [B], the labels
    eps: jax.Array  # scalar
    images: jax.Array  # [B, H, W, C], what the attack gives
    margins: jax.Array  # [B], logit of the truth less the largest other; below 0 is misclassified


@dataclasses.dataclass(frozen=True)
class Square:
    """Tries a changed square at a time, in smaller and smaller ones, and keeps what lowers the margin (algorithm 1).

    For linf a square gets eps or -eps in each channel (algorithm 2), for l2 the budget of another one (algorithm 3).
    """

    norm: str = "linf"
    steps: int = 1_000  # queries of each image
    share: float = 0.8  # of the image that the first square has (p_init; 0.1 for l2 in the paper, 0.8 in AutoAttack)

    def start(self, forward: Forward, keys: jax.Array, images: jax.Array, truth: jax.Array, eps: jax.Array) -> State:
        first = _stripes if self.norm == "linf" else _bumps
        delta = jax.vmap(lambda key: first(jax.random.fold_in(key, 0), images.shape[1:]))(keys)
        tried = _reach(delta, images, eps, self.norm)
        return State(keys, images, truth, eps, tried, margins(forward(tried), truth))

    def step(self, forward: Forward, i: jax.Array, state: State) -> State:
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, i + 1)
        sizes = window_sizes(self.steps, self.share, state.clean.shape[1:3], least=1 if self.norm == "linf" else 3)
        if self.norm == "linf":
            tried = _try_linf(keys, jnp.asarray(sizes)[i], state)
        else:
            different, which = np.unique(sizes, return_inverse=True)
            table = np.stack([bump(size, state.clean.shape[1:3]) for size in different])
            tried = _try_l2(keys, jnp.asarray(sizes)[i], jnp.asarray(table)[jnp.asarray(which)[i]], state)
        found = margins(forward(tried), state.truth)
        better = found < state.margins
        images = jnp.where(better[:, None, None, None], tried, state.images)
        return state._replace(images=images, margins=jnp.where(better, found, state.margins))

    def broken(self, state: State) -> jax.Array:
        """Which images are misclassified, bool [B]."""
        return state.margins < 0


def margins(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The logit of the truth less the largest of the others, [B]."""
    truth = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    own = jnp.max(jnp.where(truth, logits, -jnp.inf), axis=-1)
    return own - jnp.max(jnp.where(truth, -jnp.inf, logits), axis=-1)


def window_sizes(steps: int, share: float, shape: tuple[int, int], *, least: int) -> np.ndarray:
    """The side of the square of each step, int32 [steps], odd where `least` is 3."""
    height, width = shape
    at = np.arange(steps) / steps * 10_000
    shares = share / 2.0 ** np.searchsorted(_HALVINGS, at, side="left")
    sizes = np.clip(np.rint(np.sqrt(shares * height * width)), least, min(height, width)).astype(np.int32)
    return sizes if least == 1 else np.minimum(sizes | 1, (min(height, width) - 1) | 1)


def _signs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.rademacher(key, shape, jnp.float32)


def _stripes(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Vertical stripes of one pixel, of -1 or 1 in each channel: [H, W, C]."""
    _, width, channels = shape
    return jnp.broadcast_to(_signs(key, (1, width, channels)), shape)


def _reach(delta: jax.Array, clean: jax.Array, eps: jax.Array, norm: str) -> jax.Array:
    """The images at distance eps in these directions, cut to [0, 1]."""
    return jnp.clip(clean + eps * delta / jnp.maximum(ball.lengths(delta, norm), 1e-12), 0.0, 1.0)


def _inside(corner: jax.Array, size: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Which pixels are in the square at `corner` int32 [2], bool [H, W, 1]."""
    rows, columns = (jnp.arange(side) - at for side, at in zip(shape, corner, strict=True))
    inside = [(place >= 0) & (place < size) for place in (rows, columns)]
    return (inside[0][:, None] & inside[1][None, :])[..., None]


def _corner(key: jax.Array, size: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jax.random.randint(key, (2,), 0, jnp.asarray(shape) - size + 1)


def _try_linf(keys: jax.Array, size: jax.Array, state: State) -> jax.Array:
    shape, channels = state.clean.shape[1:3], state.clean.shape[3]

    def change(key: jax.Array, clean: jax.Array, image: jax.Array) -> jax.Array:
        place, color = jax.random.split(key)
        inside = _inside(_corner(place, size, shape), size, shape)
        signs = _signs(color, (1, 1, channels))

        def put(signs: jax.Array) -> jax.Array:
            return jnp.where(inside, jnp.clip(clean + state.eps * signs, 0.0, 1.0), image)

        tried = put(signs)
        return jnp.where(jnp.all(tried == image), put(-signs), tried)  # a query of what is known would be wasted

    return jax.vmap(change)(keys, state.clean, state.images)


def bump(size: int, shape: tuple[int, int]) -> np.ndarray:
    """Two opposite hills, one above the other, of l2 norm 1, in the corner of [H, W] (section 3.4, eta)."""

    def hill(height: int, width: int) -> np.ndarray:
        rows, columns = np.indices((height, width))
        middle = (height // 2, width // 2)
        rings = np.maximum(abs(rows - middle[0]), abs(columns - middle[1]))
        # A pixel is in all rectangles from its own ring outwards.
        outwards = np.cumsum([1 / (ring + 1) ** 2 for ring in range(max(middle) + 1)][::-1])[::-1]
        values = outwards[rings]
        return values / np.linalg.norm(values)

    pair = np.concatenate([hill(size // 2, size), -hill(size - size // 2, size)])
    whole = np.zeros(shape, np.float32)
    whole[:size, :size] = pair / np.linalg.norm(pair)
    return whole


def _bumps(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Bumps over the whole image, five by five of them where it is square, each channel with its sign: [H, W, C]."""
    height, width, channels = shape
    size = max(min(height, width) // 5, 3)
    size = min(size, height, width)
    tile = bump(size, (size, size))
    down, across = height // size, width // size
    signs = _signs(key, (down, across, channels))
    tiled = jnp.kron(signs, jnp.asarray(tile)[..., None])
    frame = [
        ((side - count * size) // 2, side - count * size - (side - count * size) // 2)
        for side, count in ((height, down), (width, across))
    ]
    return jnp.pad(tiled, [*frame, (0, 0)])


def _try_l2(keys: jax.Array, size: jax.Array, hills: jax.Array, state: State) -> jax.Array:
    """Moves what two squares have of the budget into one of them, as a bump added to what is there."""
    shape, channels = state.clean.shape[1:3], state.clean.shape[3]

    def change(key: jax.Array, delta: jax.Array) -> jax.Array:
        to, of, color, turn = jax.random.split(key, 4)
        corner = _corner(to, size, shape)
        into, out = _inside(corner, size, shape), _inside(_corner(of, size, shape), size, shape)
        turned = jnp.where(jax.random.bernoulli(turn), hills.T, hills) if shape[0] == shape[1] else hills
        new = jnp.roll(turned, corner, axis=(0, 1))[..., None] * _signs(color, (1, 1, channels))

        def each(values: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.sum(values**2, axis=(0, 1), keepdims=True))  # of each channel, [1, 1, C]

        old = jnp.where(into, delta, 0.0)
        unused = jnp.maximum(state.eps**2 - jnp.sum(delta**2), 0.0) / channels
        budget = jnp.sqrt(unused + jnp.sum(jnp.where(into | out, delta, 0.0) ** 2, axis=(0, 1), keepdims=True))
        new = new + old / jnp.maximum(each(old), 1e-12)
        new = new / jnp.maximum(each(new), 1e-12) * budget
        return jnp.where(into, new, jnp.where(out, 0.0, delta))

    deltas = jax.vmap(change)(keys, state.images - state.clean)
    return _reach(deltas, state.clean, state.eps, "l2")
