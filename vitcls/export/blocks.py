"""What each block of a network gives, to say which is the first that a runtime computes otherwise."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vitcls.data.augment import to_float
from vitcls.export import compress
from vitcls.training import steps
from vitcls.training.opened import Opened

PyTree = Any
IMAGES = 8  # that are looked at


class Blocks(NamedTuple):
    """The outermost modules of a network, in the order in which they run."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # values of each for one image
    answer: Callable[[jax.Array], jax.Array]  # images uint8 [B, H, W, C] -> float32 [B, sum of sizes]


def make_blocks(opened: Opened, stored: PyTree) -> Blocks:
    """Those of the model of a run, with weights as they are `stored`, without test-time augmentation."""
    info = opened.trained.info
    normalize = steps.make_normalize(info.mean, info.std)

    def apply(images: jax.Array, **more: Any) -> None:
        opened.model.apply(compress.restore(stored), normalize(to_float(images)), train=False, **more)

    def outputs(images: jax.Array) -> dict[str, jax.Array]:
        with _recorded(kinds) as found:
            apply(images)
        return {name: leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for name, leaf in found.items()}

    example = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.uint8)
    kinds = _outermost(apply, example)
    names, sizes = [], []

    def probe(images: jax.Array) -> jax.Array:
        found = outputs(images)
        names[:], sizes[:] = list(found), [int(leaf.shape[1]) for leaf in found.values()]
        return jnp.concatenate(list(found.values()), axis=1)

    jax.eval_shape(probe, example)
    return Blocks(tuple(names), tuple(sizes), lambda images: jnp.concatenate(list(outputs(images).values()), axis=1))


def _outermost(apply: Callable, images: jax.ShapeDtypeStruct) -> set[type[nn.Module]]:
    """The classes of the outermost modules that are called."""
    found = set()

    def seen(module: nn.Module, method: str) -> bool:
        if method == "__call__" and len(module.path) == 1:
            found.add(type(module))
        return False

    jax.eval_shape(lambda images: apply(images, capture_intermediates=seen, mutable=["intermediates"]), images)
    return found


@contextlib.contextmanager
def _recorded(kinds: set[type[nn.Module]]) -> Iterator[dict[str, jax.Array]]:
    """What the outermost modules of some classes give while this is open, by their names.

    Not by Flax's own capture: jax2onnx puts other calls into the classes of Flax, which that does not see.
    """
    found: dict[str, jax.Array] = {}

    def recording(call: Callable) -> Callable:
        def record(module: nn.Module, *arguments: Any, **more: Any) -> Any:
            result = call(module, *arguments, **more)
            if len(module.path) == 1:
                found[module.name] = jax.tree.leaves(result)[-1]
            return result

        return record

    calls = {kind: kind.__call__ for kind in kinds}
    try:
        for kind, call in calls.items():
            kind.__call__ = recording(call)
        yield found
    finally:
        for kind, call in calls.items():
            kind.__call__ = call


def relative_difference(of: Blocks, expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """How far what each block gives is from what is expected, relative to its length; both [B, sum of sizes]."""
    ends = np.cumsum(of.sizes)[:-1]
    pairs = zip(*(np.split(values, ends, axis=1) for values in (expected, found)), strict=True)
    return np.array([np.linalg.norm(theirs - ours) / max(np.linalg.norm(ours), 1e-12) for ours, theirs in pairs])


def first_difference(of: Blocks, relative: np.ndarray, allowed: np.ndarray) -> str:
    """Names the first block whose difference is more than allowed; both [blocks]."""
    for name, difference, most in zip(of.names, relative, allowed, strict=True):
        if not difference <= most:  # also where it is no number
            return f"the first block that differs is '{name}', by {difference:.2g} of its length"
    return "no block differs, so it is what follows them: the head, or the calibration"
