"""Which part of a network is trained, and how fast."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from vitcls import models
from vitcls.models.variables import variable_shapes
from vitcls.optim import parts

SMALL = {
    "vit_tiny_patch16": {"hidden_dim": 16, "depth": 3, "num_heads": 2, "mlp_dim": 16},
    "resnet18": {"depths": (2, 1), "width": 8},
    "resnetv2_50x1_bit": {"depths": (2, 1), "width": 8},
    "convnext_tiny": {"depths": (1, 2), "widths": (8, 16)},
    "efficientnet_lite0": {"width_multiplier": 0.25},
    "improved_resnext50": {"depths": (1, 1, 2), "width": 8, "groups": 2, "group_width": 2},
}


def shapes(name):
    return variable_shapes(models.create(name, 3, **SMALL.get(name, {})), (64, 64, 3))


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.parametrize(
    ("name", "first", "middle", "last"),
    [
        ("vit_tiny_patch16", ("class_token", "position_embedding", "stem/kernel"), "block_1/attention/qkv/kernel", 4),
        ("resnet18", ("stem/conv/kernel",), "stage_1_block_2/conv_1/conv/kernel", 4),
        ("resnetv2_50x1_bit", ("stem/conv/kernel",), "stage_1_block_2/norm_1/scale", 4),
        ("convnext_tiny", ("stem/kernel", "stem_norm/scale"), "downsample_2/kernel", 4),
        ("efficientnet_lite0", ("stem/norm/bias",), "stage_2_block_1/expand/conv/kernel", 17),
        ("improved_resnext50", ("stem/conv/kernel",), "fusion/logits", 5),
    ],
)
def test_learning_rates_fall_by_the_factor_for_each_block(name, first, middle, last):
    behind = getattr(models.create(name, 3, **SMALL[name]), "behind", {})
    rates = flat(parts.layer_rates(0.5, shapes(name)["params"], behind))
    assert rates["head/kernel"] == 1 and min(rates.values()) == 0.5**last
    assert all(rates[path] == 0.5**last for path in first)
    assert rates[middle] == 0.5 ** (last - 2)


def trained(name, which, **options):
    options = {"freeze_norm": False, "new_head": True} | options
    variables = shapes(name)
    chosen = parts.choose(which, variables, **options)
    return {path for path, keep in flat(chosen.params).items() if keep}, flat(chosen.batch_stats)


def test_everything_is_trained_unless_something_is_not():
    assert parts.choose("all", shapes("resnet18"), freeze_norm=False, new_head=True) is None
    paths, statistics = trained("resnet18", "all", freeze_norm=True)
    assert paths == set(flat(shapes("resnet18")["params"])) and not any(statistics.values())


def test_the_head_alone():
    paths, statistics = trained("resnet18", "head")
    assert paths == {"head/kernel", "head/bias"} and not any(statistics.values())


def test_the_last_blocks_are_counted_from_the_end_with_what_follows_them():
    paths, statistics = trained("efficientnet_lite0", "last 2 blocks")
    places = {path.split("/")[0] for path in paths}
    assert places == {"stage_6_block_4", "stage_7_block_1", "last", "head"}
    assert {path.split("/")[0] for path, moves in statistics.items() if moves} == places - {"head"}
    behind = models.create("improved_resnext50", 3, **SMALL["improved_resnext50"]).behind
    paths, _ = trained("improved_resnext50", "last 2 blocks", behind=behind)
    assert {path.split("/")[0] for path in paths} == {"stage_3_block_1", "stage_3_block_2", "head"}
    assert trained("vit_tiny_patch16", "last 1 block")[0] >= {"norm/scale", "head/bias", "block_2/attention_norm/bias"}


def test_a_regex_of_paths_and_always_a_new_head():
    paths, _ = trained("resnet18", r"norm/(scale|bias)$")
    assert {"head/kernel", "stem/norm/scale"} < paths and "stem/conv/kernel" not in paths
    paths, statistics = trained("resnet18", "^stem/", new_head=False)
    assert paths == {"stem/conv/kernel", "stem/norm/scale", "stem/norm/bias"}
    assert {path for path, moves in statistics.items() if moves} == {"stem/norm/mean", "stem/norm/var"}


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("heed", "train='heed' is found in no parameter's path"),
        ("last 9 blocks", "train='last 9 blocks' is impossible: the network has 3 blocks"),
        ("last 0 blocks", "train='last 0 blocks' is found in no parameter's path"),
    ],
)
def test_what_chooses_nothing_is_refused(which, message):
    with pytest.raises(ValueError, match=message):
        trained("resnet18", which)
    with pytest.raises(ValueError, match="is not 'all', 'head', 'last N blocks' or a regular expression"):
        parts.check_choice("(")


def test_networks_without_blocks_have_no_layer_rates():
    with pytest.raises(ValueError, match="has no blocks to be counted"):
        parts.layer_rates(0.5, variable_shapes(models.create("lenet5", 3), (32, 32, 1))["params"])


def test_what_is_split_is_merged_again():
    tree = {"a": np.ones(2), "b": {"c": np.zeros(3), "d": np.ones(1)}}
    ours, others = parts.split(tree, {"a": True, "b": {"c": False, "d": True}})
    assert len(jax.tree.leaves(ours)) == 2 and len(jax.tree.leaves(others)) == 1
    jax.tree.map(np.testing.assert_array_equal, parts.merge(ours, others), tree)
    jax.tree.map(np.testing.assert_array_equal, parts.merge(*parts.split(tree, None)), tree)
