"""What each block of a network gives, to say which is the first that a runtime computes otherwise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vitcls.data.augment import to_float
from vitcls.export import compress
from vitcls.training import build, steps
from vitcls.training.opened import Opened

PyTree = Any
IMAGES = 8  # that are looked at
# By what the weights are: how far the output of a block may be from what it should be, relative to its length.
_RELATIVE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2, "int8": 0.5}


class Blocks(NamedTuple):
    """The outermost modules of a network, in the order in which they run."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]  # values of each for one image
    answer: Callable[[jax.Array], jax.Array]  # images uint8 [B, H, W, C] -> float32 [B, sum of sizes]


def make_blocks(opened: Opened, stored: PyTree) -> Blocks:
    """Those of the model of a run, with weights as they are `stored`, without test-time augmentation."""
    info = opened.trained.info
    model = build.make_model(opened.trained.config, info, device=jax.devices("cpu")[0])
    normalize = steps.make_normalize(info.mean, info.std)

    def outputs(images: jax.Array) -> dict[str, jax.Array]:
        _, found = model.apply(
            compress.restore(stored),
            normalize(to_float(images)),
            train=False,
            mutable=["intermediates"],
            capture_intermediates=lambda module, method: method == "__call__" and len(module.path) == 1,
        )
        calls = {name: each["__call__"] for name, each in found["intermediates"].items() if "__call__" in each}
        leaves = {name: jax.tree.leaves(call)[-1] for name, call in calls.items()}
        return {name: leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for name, leaf in leaves.items()}

    names, sizes = [], []

    def probe(images: jax.Array) -> jax.Array:
        found = outputs(images)
        names[:], sizes[:] = list(found), [int(leaf.shape[1]) for leaf in found.values()]
        return jnp.concatenate(list(found.values()), axis=1)

    jax.eval_shape(probe, jax.ShapeDtypeStruct((1, *info.image_shape), jnp.uint8))
    return Blocks(tuple(names), tuple(sizes), lambda images: jnp.concatenate(list(outputs(images).values()), axis=1))


def first_difference(of: Blocks, expected: np.ndarray, found: np.ndarray, precision: str) -> str:
    """Names the first block whose values float32 [B, sum of sizes] are not as expected."""
    ends = np.cumsum(of.sizes)[:-1]
    for name, ours, theirs in zip(
        of.names, *(np.split(values, ends, axis=1) for values in (expected, found)), strict=True
    ):
        relative = np.linalg.norm(theirs - ours) / max(np.linalg.norm(ours), 1e-12)
        if not relative <= _RELATIVE[precision]:
            return f"the first block that differs is '{name}', by {relative:.2g} of its length"
    return "no block differs, so it is what follows them: the head, or the calibration"
