"""Which part of a network is trained, and how fast each layer learns: by the names of parameters."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from vitcls.optim.masks import map_with_path

PyTree = Any
_BLOCK = re.compile(r"(?:^|/)(?:stage_(\d+)_)?(?:block|layer)_(\d+)(?:/|$)")
_BETWEEN = re.compile(r"(?:^|/)(?:downsample|transition)_(\d+)")  # before the first block of that stage
_FIRST = re.compile(r"(?:^|/)(?:stem|class_token|(?:class_)?position_embedding)")
_HEAD = re.compile(r"(?:^|/)head/")
_LAST_BLOCKS = re.compile(r"last ([1-9]\d*) blocks?")


class Trained(NamedTuple):
    """Trees of bools: which parameters are trained, and which batch statistics change."""

    params: PyTree
    batch_stats: PyTree


def split(tree: PyTree, chosen: PyTree | None) -> tuple[PyTree, PyTree]:
    """The chosen leaves of a tree and the others, each with None in the place of the other's; all without a choice."""
    if chosen is None:
        return tree, jax.tree.map(lambda leaf: None, tree)
    ours = jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, chosen)
    return ours, jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, chosen)


def merge(ours: PyTree, others: PyTree) -> PyTree:
    """The tree that was split."""
    return jax.tree.map(lambda a, b: b if a is None else a, ours, others, is_leaf=lambda leaf: leaf is None)


def check_choice(which: str) -> None:
    """Raises ValueError for what chooses no part of any network."""
    if which in ("all", "head") or _LAST_BLOCKS.fullmatch(which):
        return
    try:
        if not which:
            raise re.error("it is empty")
        re.compile(which)
    except re.error as error:
        raise ValueError(
            f"train='{which}' is not 'all', 'head', 'last N blocks' or a regular expression of paths: {error}"
        ) from None


def choose(
    which: str, variables: PyTree, *, freeze_norm: bool, new_head: bool, behind: Mapping[str, str] | None = None
) -> Trained | None:
    """What `which`, 'all', 'head', 'last N blocks' or a regex of paths, trains of the variables; None for everything.

    Blocks are counted from the end, with all that follows them; `behind` as in `layer_of_each`. A new head is always
    trained. The statistics of a norm change with its parameters, and with `freeze_norm` never.

    Raises ValueError for a regex that finds nothing, and for blocks of a network without any.
    """
    if which == "all" and not freeze_norm:
        return None
    params, statistics = variables["params"], variables.get("batch_stats", {})
    test = _test(which, params, behind)
    mask = map_with_path(lambda path, _: test(path) or (new_head and _HEAD.search(path) is not None), params)
    trained = {path[:-1] for path, keep in traverse_util.flatten_dict(mask).items() if keep}
    known = {path[:-1] for path in traverse_util.flatten_dict(mask)}

    def moves(path: tuple[str, ...]) -> bool:
        return not freeze_norm and (path[:-1] in trained if path[:-1] in known else which == "all")

    kept = {path: moves(path) for path in traverse_util.flatten_dict(statistics)}
    return Trained(mask, traverse_util.unflatten_dict(kept))


def _test(which: str, params: PyTree, behind: Mapping[str, str] | None):
    """path -> whether it is trained."""
    if which == "all":
        return lambda path: True
    if which == "head":
        return lambda path: _HEAD.search(path) is not None
    if match := _LAST_BLOCKS.fullmatch(which):
        depths, deepest = layer_of_each(params, behind)
        if int(match[1]) > deepest - 1:
            raise ValueError(f"train='{which}' is impossible: the network has {deepest - 1} blocks")
        return lambda path: depths[path] >= deepest - int(match[1])
    pattern = re.compile(which)
    if not any(map(pattern.search, _paths(params))):
        raise ValueError(f"train='{which}' is found in no parameter's path; paths look like '{_paths(params)[0]}'")
    return lambda path: pattern.search(path) is not None


def layer_rates(decay: float, params: PyTree, behind: Mapping[str, str] | None = None) -> PyTree:
    """The factor of each parameter's learning rate: decay^(L - l) of layer l of 0 .. L, 1 behind the last block.

    Layer-wise decay as BEiT has it (Bao et al. 2021, appendix): the stem is layer 0, each block one more. Raises
    ValueError for a network without blocks.
    """
    depths, deepest = layer_of_each(params, behind)
    return map_with_path(lambda path, _: decay ** (deepest - depths[path]), params)


def layer_of_each(params: PyTree, behind: Mapping[str, str] | None = None) -> tuple[dict[str, int], int]:
    """path -> its layer: 0 for the stem, then one for each block, and the last for all behind them; and the last.

    `behind`: module -> the block that it follows, and counts with, where its name does not say so.

    Raises ValueError for a network without blocks.
    """
    paths = _paths(params)
    blocks = sorted({(int(match[1] or 0), int(match[2])) for match in map(_BLOCK.search, paths) if match})
    if not blocks:
        raise ValueError("the network has no blocks to be counted, as a ViT, ResNet, ConvNeXt or EfficientNet has")
    numbers = {block: number for number, block in enumerate(blocks, start=1)}
    last = len(blocks) + 1

    def layer(path: str) -> int:
        path = next((block for module, block in (behind or {}).items() if f"/{module}/" in f"/{path}"), path)
        if match := _BLOCK.search(path):
            return numbers[int(match[1] or 0), int(match[2])]
        if match := _BETWEEN.search(path):
            return min((number for (stage, _), number in numbers.items() if stage == int(match[1])), default=last)
        return 0 if _FIRST.search(path) else last

    return {path: layer(path) for path in paths}, last


def _paths(params: PyTree) -> list[str]:
    return jax.tree.leaves(map_with_path(lambda path, _: path, params))
