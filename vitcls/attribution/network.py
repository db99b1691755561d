"""What a classifier shows of itself, for any Linen model that sows its maps as those of vitcls do.

No model is changed for it. Its program is traced once with what it sows, and cut in two at its last map of features:
the second half is the function of which Grad-CAM wants the gradient.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

PyTree = Any


class Network(NamedTuple):
    """A classifier and what fills the place of removed pixels."""

    forward: Callable  # (variables, images float32 [B, H, W, C] in [0, 1]) -> logits float32 [B, K]
    read: Callable  # the same, and all that is sown or captured: -> (logits, intermediates)
    baseline: tuple[float, ...]  # the colour of 'nothing', [C]; the mean of the training images


def make_network(model: nn.Module, normalize: Callable, baseline: tuple[float, ...]) -> Network:
    """That of a model in evaluation; `normalize` takes images in [0, 1] to what the model was trained on.

    Without recomputing: what is sown inside a block that is computed again cannot be cut out of it.
    """
    if hasattr(model, "remat"):
        model = model.clone(remat="none")

    def forward(variables: PyTree, images: jax.Array) -> jax.Array:
        return model.apply(variables, normalize(images), train=False).astype(jnp.float32)

    def read(variables: PyTree, images: jax.Array) -> tuple[jax.Array, PyTree]:
        logits, shown = model.apply(
            variables, normalize(images), train=False, mutable=["intermediates"], capture_intermediates=_captured
        )
        return logits.astype(jnp.float32), shown["intermediates"]

    return Network(forward, read, baseline)


def _captured(module: nn.Module, method: str) -> bool:
    """What the attention of a block sees, besides what models sow.

    Behind the last attention the patches no longer reach a class token, so its gradient has to be taken before it.
    """
    return module.name == "attention_norm" and method == "__call__"


class Features(NamedTuple):
    """A network cut at its last map of features."""

    maps: jax.Array  # [B, h, w, D]
    head: Callable[[jax.Array], jax.Array]  # maps -> logits [B, K]


def features(network: Network, variables: PyTree, images: jax.Array) -> Features:
    """Cuts the network behind the last map of at least 2 x 2 places, or the tokens of its patches.

    Raises ValueError where it shows none.
    """
    traced, (_, shapes) = jax.make_jaxpr(network.read, return_shape=True)(variables, images)
    program, inputs = traced.jaxpr, jax.tree.leaves((variables, images))
    outputs = dict(zip(_names(shapes), program.outvars[1:], strict=True))  # after the logits
    made = {variable: i for i, equation in enumerate(program.eqns) for variable in equation.outvars}
    candidates = [outputs[name] for name in _maps(shapes, images.shape) if outputs[name] in made]
    if not candidates:
        raise ValueError("the model sows no map of features")
    target = max(candidates, key=made.get)
    place = made[target]
    before, after = program.eqns[: place + 1], program.eqns[place + 1 :]
    used = {one for equation in after for one in equation.invars if not isinstance(one, core.Literal)}
    known = [one for one in (*program.constvars, *program.invars, *made) if one in used and made.get(one, -1) <= place]
    carried = [one for one in known if one is not target]
    value, *rest = _run(program, traced.consts, program.invars, before, [target, *carried])(*inputs)

    def head(value: jax.Array) -> jax.Array:
        return _run(program, (), [target, *carried], after, program.outvars[:1])(value, *rest)[0]

    if value.ndim == 4:
        return Features(value, head)
    rows, columns, extra = grid(value.shape[1], images.shape[1:3])
    first, shape = value[:, :extra], (value.shape[0], value.shape[1] - extra, value.shape[2])

    def token_head(maps: jax.Array) -> jax.Array:  # [B, h, w, D] -> [B, N, D]
        return head(jnp.concatenate([first, maps.reshape(shape)], axis=1))

    return Features(value[:, extra:].reshape(shape[0], rows, columns, -1), token_head)


def _run(program: core.Jaxpr, constants, invars: list, equations: list, outvars: list) -> Callable:
    """A part of a program as a function of the values of `invars`."""
    part = program.replace(
        constvars=program.constvars if constants else [],
        invars=list(invars),
        eqns=equations,
        outvars=list(outvars),
        debug_info=program.debug_info.with_unknown_names(),
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, constants))


def attention_weights(intermediates: PyTree) -> list[jax.Array]:
    """Those of each block in order, [B, heads, N, N] each; [] where the model has no attention."""
    found = {
        name: leaf
        for name, leaf in zip(_names(intermediates), jax.tree.leaves(intermediates), strict=True)
        if "'attention_weights'" in name
    }
    return [
        found[name] for name in sorted(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    ]


def grid(tokens: int, size: tuple[int, int]) -> tuple[int, int, int]:
    """(rows, columns, tokens before those of the patches) of square patches that tile H x W pixels.

    Raises ValueError where no such patches make so many tokens.
    """
    height, width = size
    for extra in (0, 1):
        patch = math.isqrt(height * width // max(tokens - extra, 1))
        if (
            patch
            and not height % patch
            and not width % patch
            and (height // patch) * (width // patch) + extra == tokens
        ):
            return height // patch, width // patch, extra
    raise ValueError(f"{tokens} tokens are no grid of square patches of {height}x{width} pixels")


def abilities(network: Network, variables: PyTree, image_shape: tuple[int, int, int]) -> set[str]:
    """What the network shows, by shapes alone: of 'map' and 'attention'. `variables` may be shapes."""
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    _, shown = jax.eval_shape(network.read, variables, images)
    found = {"map"} if _maps(shown, images.shape) else set()
    weights = attention_weights(shown)
    return found | ({"attention"} if weights and _tiles(weights[-1].shape[-1], images.shape[1:3]) else set())


def _maps(shown: PyTree, shape: tuple[int, ...]) -> list[str]:
    """The names of all at which the network can be cut."""
    usable = []
    for name, leaf in zip(_names(shown), jax.tree.leaves(shown), strict=True):
        is_map = re.search(r"_map'\]\[0\]$", name) and leaf.ndim == 4 and min(leaf.shape[1:3]) >= 2
        if is_map or (leaf.ndim == 3 and _is_last(name, leaf.shape[1], shape[1:3])):
            usable.append(name)
    return usable


def _is_last(name: str, tokens: int, size: tuple[int, int]) -> bool:
    """Whether tokens are those of patches that still reach the classifier."""
    if not _tiles(tokens, size):
        return False
    has_class_token = grid(tokens, size)[2] == 1
    return ("'attention_norm'" if has_class_token else "'tokens'") in name


def _tiles(tokens: int, size: tuple[int, int]) -> bool:
    try:
        rows, columns, _ = grid(tokens, size)
    except ValueError:
        return False
    return min(rows, columns) >= 2


def _names(tree: PyTree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
