"""Runs that differ in the seed only are one group, whatever their directories are called."""

import pathlib

import pytest

from vitcls.core.errors import UserError
from vitcls.training.seed_groups import config_differences, group_seeds


def groups(**runs):
    paths = [pathlib.Path("/runs") / name.replace("__", "/") for name in runs]
    return group_seeds(paths, [{"lr": lr, "seed": seed} for lr, seed in runs.values()])


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ({"a-seed0": (1, 0), "b-seed0": (2, 0), "a-seed1": (1, 1)}, {"a": [0, 2], "b-seed0": [1]}),
        ({"a_seed=1": (1, 1), "a_seed=0": (1, 0)}, {"a": [1, 0]}),
        ({"a-s10": (1, 10), "a-s2": (1, 2), "resnets5": (2, 0)}, {"a": [1, 0], "resnets5": [2]}),
        ({"a__seed0": (1, 0), "a__seed1": (1, 1), "b__seed0": (2, 0)}, {"a": [0, 1], "seed0": [2]}),
        ({"a__run": (1, 0), "b__run": (2, 0)}, {"a/run": [0], "b/run": [1]}),
        ({"first": (1, 0), "second": (1, 1), "third": (2, 0)}, {"first": [0, 1], "third": [2]}),
        ({"a-seed0": (1, 0), "a-seed1": (1, 1), "a": (2, 0)}, {"a-seed0": [0, 1], "a": [2]}),
    ],
)
def test_groups_and_their_names(runs, expected):
    assert groups(**runs) == expected


def test_the_same_training_twice_is_refused():
    with pytest.raises(UserError, match=r"/runs/a and /runs/b are the same training, with seed 3; give one of them"):
        groups(a=(1, 3), b=(1, 3))


def test_what_distinguishes_configs():
    values = [{"lr": 1, "seed": 0, "x": (1, 2)}, {"lr": 2, "seed": 1, "x": (1, 2), "new": None}]
    assert config_differences(values) == {"lr": [1, 2]}
    assert config_differences([{"a": 1}, {"b": 2}]) == {"a": [1, None], "b": [None, 2]}
