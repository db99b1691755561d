"""Runs that start from published weights or from another run."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.conftest import make_tiny_config
from tests.core.test_sharding import question, start_two_processes
from tests.models.test_weight_files import safetensors
from vitcls import evaluate, train
from vitcls.core.errors import UserError
from vitcls.models import create
from vitcls.models.variables import init_variables
from vitcls.models.weights.to_torch import to_torch
from vitcls.training import checkpoint, run_dir

pytestmark = pytest.mark.usefixtures("no_pictures")
FIELDS = {"depths": (1, 1), "width": 8, "stem": "small"}


def tiny(weights="", **init):
    """A small ResNet, whose norms have batch statistics, on 96 synthetic images."""
    from vitcls.config import default_config

    config, base = default_config("resnet18"), make_tiny_config()
    for key in ("batch_size", "total", "log_every", "eval_every", "checkpoint_every", "steps_per_call"):
        config[key] = base[key]
    config.dataset.update(name="synthetic", num_examples=120, num_classes=3, image_size=8)
    config.report.timing = False
    config.augment.flip.probability = 0.5
    config.model.update(**FIELDS)
    config.optimizer.update(name="adamw", ema_decay=0.99, weight_decay=0.1)
    config.loss.l2 = 1e-3
    config.init.weights = str(weights)
    config.init.update(**init)
    return config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as torchvision would write that ResNet, of 7 classes, and its variables."""
    model = create("resnet18", 7, **FIELDS)
    draw = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: np.asarray(leaf) + np.float32(0.1) * draw.random(leaf.shape, np.float32),
        init_variables(model, jax.random.key(3), (8, 8, 3)),
    )
    arrays = to_torch("resnet18", variables, **FIELDS)
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    return safetensors(path, arrays), variables


def state_of(path, step=None):
    """The arrays of a checkpoint by their paths."""
    opened = run_dir.open_workdir(path)
    training = train.prepare(opened.config, path, "", range(0)).training
    shapes = jax.eval_shape(training.create_state, jax.random.key(0))
    step = opened.find_step("last") if step is None else step
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), shapes)
    tree, _ = checkpoint.restore(path / "checkpoints", step, {"state": template})
    return {jax.tree_util.keystr(place): np.asarray(leaf) for place, leaf in jax.tree.leaves_with_path(tree["state"])}


@pytest.mark.by_turns
def test_a_frozen_backbone_keeps_its_bits_and_has_no_optimizer_state(weights, tmp_path):
    file, given = weights
    train.train_and_evaluate(tiny(file, train="head"), tmp_path / "run")
    found = state_of(tmp_path / "run")
    assert not any("opt_state" in place and "stem" in place for place in found)
    for collection, average in (("params", "ema_params"), ("batch_stats", "ema_batch_stats")):
        for path, leaf in traverse_util.flatten_dict(given[collection]).items():
            if path[0] == "head":
                continue
            place = "".join(f"['{name}']" for name in path)
            np.testing.assert_array_equal(found[f".{collection}{place}"], leaf, strict=True)
            np.testing.assert_array_equal(found[f".{average}{place}"], leaf, strict=True)


@pytest.mark.by_turns
def test_a_run_that_is_killed_goes_on_to_the_same_bits_without_the_file(weights, tmp_path, monkeypatch):
    file = shutil.copy(weights[0], tmp_path / "w.safetensors")
    config = tiny(file, layer_decay=0.7)
    train.train_and_evaluate(config, tmp_path / "whole")

    class Killed(Exception):
        pass

    original = train.Update.__call__

    def dies(self, state, sums, step):
        if step >= 6:
            raise Killed
        return original(self, state, sums, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.Update, "__call__", dies)
        with pytest.raises(Killed):
            train.train_and_evaluate(config, tmp_path / "killed")
    file_moved = tmp_path / "elsewhere.safetensors"
    shutil.move(file, file_moved)
    train.train_and_evaluate(config, tmp_path / "killed")
    whole, killed = state_of(tmp_path / "whole"), state_of(tmp_path / "killed")
    for place, leaf in whole.items():
        np.testing.assert_array_equal(killed[place], leaf, err_msg=place)
    assert evaluate.evaluate(tmp_path / "killed")["accuracy"] >= 0


@pytest.mark.by_turns
def test_a_run_killed_before_its_first_step_does_not_need_the_file(weights, tmp_path, monkeypatch):
    file = shutil.copy(weights[0], tmp_path / "w.safetensors")

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Update, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(tiny(file), tmp_path / "run")
    shutil.move(file, tmp_path / "elsewhere.safetensors")
    assert train.train_and_evaluate(tiny(file), tmp_path / "run")["accuracy"] >= 0


# How a run is laid out or computed, which changes nothing of what it computes.
LAYOUTS = {
    "fsdp": {"partition.strategy": "fsdp", "partition.min_shard_elements": 16},
    "pmap": {"partition.strategy": "pmap"},
    "accumulate": {"optimizer.accumulate": 2},
    "remat": {"model.remat": "block"},
    "all": {"partition.strategy": "fsdp", "optimizer.accumulate": 2, "model.remat": "block"},
}


def few_steps(file, changes=None, **init):
    """Two steps of plain gradient descent, which makes no more of a difference than there is."""
    config = tiny(file, layer_decay=0.7, **init)
    config.optimizer.update(name="sgd", learning_rate=0.05)
    config.update(total="2 steps", checkpoint_every="1 steps", steps_per_call=1)
    config.checkpoint.keep = 5
    config.update_from_flattened_dict(changes or {})
    return config


@pytest.fixture(scope="module")
def plain(weights, tmp_path_factory):
    """freeze_norm -> the workdir of those steps by default, on the eight devices."""
    places = {freeze: tmp_path_factory.mktemp("plain") / "run" for freeze in (False, True)}
    for freeze, place in places.items():
        train.train_and_evaluate(few_steps(weights[0], freeze_norm=freeze), place)
    return places


def check_same_steps(path, plain, given):
    """The first state of a run is that of `plain`, which begins with the weights, to the bit; the next are near it."""
    first, expected = state_of(path, 0), state_of(plain, 0)
    assert first.keys() == expected.keys()
    for place, leaf in expected.items():
        np.testing.assert_array_equal(first[place], leaf, err_msg=place)
    for keys, leaf in traverse_util.flatten_dict(given["params"]).items():
        if keys[0] != "head":
            np.testing.assert_array_equal(first[".params" + "".join(f"['{key}']" for key in keys)], leaf)
    for step in (1, 2):
        found, expected = state_of(path, step), state_of(plain, step)
        assert not np.array_equal(found[".params['head']['kernel']"], first[".params['head']['kernel']"])
        for place, leaf in expected.items():
            np.testing.assert_allclose(found[place], leaf, rtol=0, atol=1e-5 * max(np.abs(leaf).max(), 1e-2))


# A part of a batch has statistics of its own, so that these must stay where batches are accumulated.
@pytest.mark.by_turns
@pytest.mark.parametrize(
    ("layout", "freeze_norm"),
    [("fsdp", False), ("pmap", False), ("remat", False), ("pmap", True), ("accumulate", True), ("all", True)],
)
@pytest.mark.eight_devices
def test_published_weights_are_trained_alike_in_every_layout(layout, freeze_norm, weights, plain, tmp_path):
    train.train_and_evaluate(few_steps(weights[0], LAYOUTS[layout], freeze_norm=freeze_norm), tmp_path / "run")
    check_same_steps(tmp_path / "run", plain[freeze_norm], weights[1])


def test_published_weights_are_trained_alike_by_two_processes(weights, plain, tmp_path):
    questions = []
    for name in ("fsdp", "pmap"):
        config = few_steps(weights[0], LAYOUTS[name], freeze_norm=False)
        questions.append(question(config, tmp_path / name))
    processes = start_two_processes(questions, tmp_path / "questions.json")
    for i, process in enumerate(processes):
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert (tmp_path / f"questions.json.{i}").read_text().split() == ["done", "done"]
    for name in ("fsdp", "pmap"):
        check_same_steps(tmp_path / name, plain[False], weights[1])


@pytest.mark.parametrize("strategy", ["fsdp", "pmap"])
@pytest.mark.eight_devices
def test_a_frozen_backbone_keeps_its_bits_in_every_layout(strategy, weights, tmp_path):
    train.train_and_evaluate(few_steps(weights[0], LAYOUTS[strategy], train="last 1 blocks"), tmp_path / "run")
    first, last = state_of(tmp_path / "run", 0), state_of(tmp_path / "run", 2)
    moved = {place for place in first if not np.array_equal(first[place], last[place])}
    assert {place.partition("]")[0] for place in moved if place.startswith(".params")} == {
        ".params['stage_2_block_1'",
        ".params['head'",
    }
    assert not any("opt_state" in place and "stem" in place for place in first)


def test_other_weights_are_not_those_of_the_run(weights, tmp_path):
    train.train_and_evaluate(tiny(weights[0]), tmp_path / "run")
    changed = shutil.copy(weights[0], tmp_path / "w.safetensors")
    with open(changed, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    with pytest.raises(UserError, match=r"is not what the run in .* began with"):
        train.train_and_evaluate(tiny(changed), tmp_path / "run")


def test_colours_are_those_of_the_weights_unless_the_config_has_its_own(weights, tmp_path):
    prepared = train.prepare(tiny(weights[0]), None, "", range(0))
    assert prepared.info.mean == (0.485, 0.456, 0.406) and prepared.config.dataset.std == (0.229, 0.224, 0.225)
    config = tiny(weights[0])
    config.dataset.mean = (0.1, 0.2, 0.3)
    prepared = train.prepare(config, None, "", range(0))
    assert prepared.info.mean == (0.1, 0.2, 0.3) and prepared.info.std == (0.229, 0.224, 0.225)
    assert train.prepare(tiny(), None, "", range(0)).start is None


def test_a_workdir_gives_its_weights_and_with_the_same_classes_its_head(weights, tmp_path):
    first = tiny(weights[0])
    train.train_and_evaluate(first, tmp_path / "first")
    second = train.prepare(tiny(tmp_path / "first", head="keep"), None, "", range(0))
    assert any(path.startswith("params/head/") for path in second.start.variables)
    assert json.loads((tmp_path / "first" / "init.json").read_text())["sha256"] != second.start.record["sha256"]
    expected = run_dir.open_workdir(tmp_path / "first").restore(second.training.model, "last")[1]
    for path, leaf in traverse_util.flatten_dict(expected, sep="/").items():
        np.testing.assert_array_equal(second.start.variables[path], leaf)
    other = tiny(tmp_path / "first", head="keep")
    other.dataset.num_classes = 4
    with pytest.raises(UserError, match=r"head='keep' is impossible: the classes of .* are not those of the data"):
        train.prepare(other, None, "", range(0))


def test_the_head_of_a_file_is_kept_for_as_many_classes(weights):
    with pytest.raises(UserError, match=r"tells 7 classes apart, and the data have 3; use 'new'"):
        train.prepare(tiny(weights[0], head="keep"), None, "", range(0))
    config = tiny(weights[0], head="keep")
    config.dataset.update(num_classes=7, num_examples=140)
    start = train.prepare(config, None, "", range(0)).start
    assert "taken for the classes of the data in their order, 'class 0' to 'class 6'" in start.words
    np.testing.assert_array_equal(start.variables["params/head/bias"], weights[1]["params"]["head"]["bias"])


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"weights": "nowhere.safetensors"}, "is not there, or is no file"),
        ({"weights": "weights.pth"}, "is pickled"),
        ({"freeze_norm": True}, "keeps statistics that nothing has learned; give config.init.weights"),
        ({"head": "old"}, "config.init.head 'old' is not known"),
        ({"train": "last 9 blocks"}, "config.init.train='last 9 blocks' is impossible"),
        ({"train": "("}, "config.init.train='\\('"),
        ({"layer_decay": 0.0}, "config.init.layer_decay=0.0 is impossible"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(init, message, tmp_path):
    config = tiny()
    config.init.update(**init)
    with pytest.raises(UserError, match=message) as caught:
        train.train_and_evaluate(config, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
