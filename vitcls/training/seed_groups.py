"""Which runs are seeds of one recipe, and what distinguishes recipes."""

import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from vitcls import config as configs
from vitcls.core import buckets
from vitcls.core.errors import UserError

_SEED = re.compile(r"(^|[-_.])s(eed)?[-_=]?\d+$", re.IGNORECASE)  # at the end of a directory's name


def group_seeds(paths: Sequence[os.PathLike | str], values: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Groups runs whose configs differ in `seed` only: name of the group -> indices of its runs, by seed.

    A group is called as its directories are, without '-seedN', and by as many directories above as tell the groups
    apart. Raises UserError for two runs of the same config and seed, which are no two samples.

    Args:
      paths: of the workdirs, or their URLs; values: their configs, flat.
    """
    groups: dict[tuple, list[int]] = {}
    for i, flat in enumerate(values):
        key = tuple(sorted((name, repr(value)) for name, value in flat.items() if name != "seed"))
        groups.setdefault(key, []).append(i)
    members = [sorted(group, key=lambda i: values[i]["seed"]) for group in groups.values()]
    for group in members:
        for i, j in itertools.pairwise(group):
            if values[i]["seed"] == values[j]["seed"]:
                raise UserError(
                    f"{paths[i]} and {paths[j]} are the same training, with seed {values[i]['seed']}; give one of them"
                )
    return dict(zip(_names([[paths[i] for i in group] for group in members]), members, strict=True))


def _names(groups: Sequence[Sequence[os.PathLike | str]]) -> list[str]:
    """A short name for each group of paths; all are different."""
    plain = [_parts(group[0]) for group in groups]
    for parts in ([_common(group) for group in groups], plain):
        for depth in range(1, max(map(len, parts)) + 1):
            names = ["/".join(part[-depth:]) for part in parts]
            if len(set(names)) == len(names) and all(names):
                return names
    raise AssertionError("paths are different")


def _parts(path: os.PathLike | str) -> tuple[str, ...]:
    if buckets.is_url(path):
        return tuple(os.fspath(path).partition("://")[2].split("/"))
    return pathlib.Path(path).resolve().parts


def _common(group: Sequence[os.PathLike | str]) -> tuple[str, ...]:
    """The parts of the path that runs of a group share, without what says the seed."""
    parts = [_parts(path) for path in group]
    if len(group) == 1:
        return parts[0]
    *above, last = parts[0]
    stripped = {_SEED.sub("", part[-1]) for part in parts}
    if len(stripped) > 1:
        return parts[0]
    return (*above, *filter(None, stripped)) if above[1:] else (*above, last)


def config_differences(values: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys in which flat configs differ, but for the seed, with the value of each; None where it has none."""
    keys = dict.fromkeys(key for flat in values for key in flat if key != "seed")
    rows = {key: [flat.get(key) for flat in values] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def flat_config(config) -> dict[str, Any]:
    """A config's keys and values, without blocks."""
    return configs.flatten(config.to_dict())
