"""Whatever a config says, it is refused in one line before anything is written, or it can be trained with."""

import os
import re
import sys

import hypothesis
import jax
import ml_collections
import pytest
from hypothesis import strategies as st

from vitcls import cli
from vitcls import config as configs
from vitcls.core.errors import UserError
from vitcls.models.variables import variable_shapes
from vitcls.train import prepare, train_and_evaluate
from vitcls.training import announce, build

TEXTS = ("", "adm", "cosine", "none", "3 epochs", "0 steps", "-1 steps", "9e99 examples", "nan%", "eval/los", "\n", "é")
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 2**31, 10**30, 0.0, 0.5, -0.5, 1.5, 1e-30, 1e30, float("nan"), float("inf"))
PARTS = (*NUMBERS[:-2], "x", None, True)
VALUES = st.one_of(
    st.sampled_from((*TEXTS, *NUMBERS, True, False, None, {}, {"x": 1}, b"x", object())),
    st.lists(st.sampled_from(PARTS), max_size=3).map(tuple),
    st.lists(st.sampled_from(PARTS), max_size=2),
)


def base():
    """A tiny valid config; `vgg` and the rest of the zoo take too long to be traced so often."""
    config = configs.default_config("improved_vit_tiny")
    config.batch_size = 16
    config.total = "4 steps"
    config.dataset.update(name="synthetic", num_examples=60, num_classes=3, image_size=8, random_resized_crop=False)
    config.model.update(stem="patch", patch_size=4, hidden_dim=8, depth=1, num_heads=2, mlp_dim=8)
    return config.copy_and_resolve_references()


def keys(config, prefix=""):
    for key, value in config.items():
        yield from keys(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else [prefix + key]


KEYS = sorted(set(keys(base())) - {"dataset.name", "dataset.data_dir"})


@st.composite
def mistakes(draw):
    """(key, value): a key of the config or one with a typo, and any value at all."""
    key = draw(st.sampled_from(KEYS))
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(key) - 1))
        key = key[:place] + key[place + 1 :]
    return key, draw(VALUES)


def with_value(key, value):
    """The base config where a config file has put `value`, past all checks of ml_collections."""
    config = base()
    *blocks, name = key.split(".")
    node = config
    for block in blocks:
        node = node.get(block, node)
    with config.unlocked(), config.ignore_type():
        node[name or "x"] = value
    return config


@pytest.mark.by_turns
@hypothesis.settings(max_examples=500, deadline=None, derandomize=True, database=None)
@hypothesis.given(mistakes())
def test_a_config_is_refused_in_one_line_or_can_be_trained_with(mistake):
    key, value = mistake
    try:
        prepared = prepare(with_value(key, value), None, "", range(0))
    except UserError as error:
        assert len(cli.one_line(error)) > 20
        return
    announce.log_first_step(prepared.config, prepared.info, prepared.training, prepared.partition)
    step = build.make_eval_step(prepared.config, prepared.training.model, prepared.info)
    shapes = variable_shapes(prepared.training.model, prepared.info.image_shape)
    batch = {"image": (16, *prepared.info.image_shape), "label": (16,), "mask": (16,)}
    dtypes = {"image": "uint8", "label": "int32", "mask": "float32"}
    jax.eval_shape(step, shapes, {name: jax.ShapeDtypeStruct(batch[name], dtypes[name]) for name in batch})
    configs.from_json(configs.to_json(prepared.config))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset.crop_area", (0.5, 0.1)),
        ("dataset.crop_area", (0.0, 1.0)),
        ("dataset.crop_ratio", (-1.0, 1.0)),
        ("dataset.crop_ratio", (1.0,)),
        ("dataset.std", (0.0, 0.5, 0.5)),
        ("dataset.mean", (float("nan"), 0.5, 0.5)),
        ("dataset.mean", ("a",)),
        ("dataset.image_size", (8, 8, 8)),
        ("batch_size", True),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.learning_rate", 1e39),  # more than float32 holds
        ("optimizer.eps", 1e-300),
        ("optimizer.weight_decay", 1e308),
        ("optimizer.multipliers", (("head", 1e300),)),
        ("dataset.image_size", 8_192),
        ("model.hidden_dim", "wide"),
        ("model.hidden_dim", 10**30),
        ("model.depth", 10**30),
        ("augment.randaugment.num_ops", 10**6),
    ],
)
def test_values_that_once_failed_late_are_refused_by_their_key(key, value, tmp_path):
    with pytest.raises(UserError, match=rf"config.{re.escape(key)}.* is impossible"):
        train_and_evaluate(with_value(key, value), tmp_path / "run")
    assert not os.listdir(tmp_path)


def test_how_long_some_examples_are_depends_on_the_batch(tiny_config):
    """Their size is checked with that of the steps, and before anything is written."""
    tiny_config.update(total="3e9 examples", batch_size=4096)
    assert prepare(tiny_config, None, "", range(0)).plan.total == 732_422
    tiny_config.batch_size = 1
    with pytest.raises(UserError, match=r"duration '3e9 examples' is 3e.09 steps; make it at most 2147483647 steps"):
        prepare(tiny_config, None, "", range(0))
    config = configs.default_config("lenet5", "certified")
    config.update(total="4 steps", batch_size=8)
    config.dataset.update(name="synthetic", num_examples=60, num_classes=3, image_size=8)
    config.task.ramp = "1e12 examples"
    with pytest.raises(UserError, match=r"duration '1e12 examples' is 1.25e.11 steps"):
        prepare(config, None, "", range(0))


@pytest.mark.parametrize("config", [{"model": {"name": "lenet5"}}, ml_collections.ConfigDict({"model": None})])
def test_what_is_no_config_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="a config is what `default_config"):
        train_and_evaluate(config, tmp_path / "run")


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be made \(File exists\); use another"):
        train_and_evaluate(base(), tmp_path / "file")


def test_a_reader_that_goes_away_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # the command sets it

    def command(arguments):
        raise BrokenPipeError

    assert cli.run(command, []) == 0
    sys.stdout.close()


def test_a_bad_config_ends_the_command_with_code_2(tmp_path, capsys):
    code = cli.run(lambda _: train_and_evaluate(with_value("dataset.std", (0.0,)), tmp_path / "run"), [])
    assert (code, capsys.readouterr().err.count("\n")) == (2, 1)
