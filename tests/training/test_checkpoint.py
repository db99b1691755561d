import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vitcls.core.errors import RunError
from vitcls.training import checkpoint

METRIC = "eval/accuracy"
PARAMS = {"dense": {"kernel": np.arange(64_000, dtype=np.float32).reshape(160, 400), "bias": np.ones(3, np.float32)}}


def tree(step):
    params = jax.tree.map(lambda x: jnp.asarray(x) + step, PARAMS)
    return {"params": params, "opt_state": optax.adam(1e-3).init(params), "ema": None, "step": jnp.int32(step)}


def save(directory, scores, keep=2, metric=METRIC):
    with checkpoint.Checkpoints(directory, keep=keep, metric=metric) as checkpoints:
        for step, score in scores.items():
            metrics = None if score is None else {metric: score, "other": 1.0}
            checkpoints.save(step, tree(step), record={"note": f"at {step}"}, metrics=metrics)


def array_file(directory, step):
    return max((directory / str(step)).rglob("d/*"), key=lambda path: path.stat().st_size)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    save(tmp_path, {7: 0.5})
    restored, record = checkpoint.restore(tmp_path, 7, tree(0))
    assert jax.tree.structure(restored) == jax.tree.structure(tree(7))
    jax.tree.map(np.testing.assert_array_equal, restored, tree(7))
    assert record["note"] == "at 7"
    part, _ = checkpoint.restore(tmp_path, 7, {"params": PARAMS})
    jax.tree.map(np.testing.assert_array_equal, part, {"params": tree(7)["params"]})


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.9, 3: None, 4: 0.5, 5: 0.3, 6: None})
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    assert checkpoint.best(tmp_path, METRIC) == 2
    assert checkpoint.latest_whole(tmp_path, quarantine=False) == 6


@pytest.mark.parametrize("values", [(math.nan, 0.2, 0.7), (0.7, math.nan, 0.2), (0.2, 0.7, math.nan)])
def test_what_is_not_a_number_is_never_the_best(tmp_path, values):
    for metric, best in (("eval/accuracy", 0.7), ("eval/loss", 0.2)):
        save(tmp_path / metric, dict(enumerate(values, 1)), keep=1, metric=metric)
        assert checkpoint.best(tmp_path / metric, metric) == values.index(best) + 1


def test_less_of_a_loss_is_better(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.4}, keep=1, metric="eval/loss")
    assert checkpoint.steps(tmp_path) == [1, 4]
    assert checkpoint.best(tmp_path, "eval/loss") == 1


@pytest.mark.parametrize("metric", ["eval/accuracy", "eval/loss"])
@pytest.mark.parametrize("keep", [1, 4])
def test_of_equals_the_first_is_the_best_however_many_are_kept(tmp_path, metric, keep):
    for scores in ({1: 0.2, 2: 0.5, 3: 0.5}, {4: 0.5, 5: math.nan}):  # the second time after a resume
        save(
            tmp_path,
            {step: 0.7 - score if metric == "eval/loss" else score for step, score in scores.items()},
            keep=keep,
            metric=metric,
        )
        assert checkpoint.best(tmp_path, metric) == 2


def test_a_resume_keeps_the_best_of_before_unless_it_is_damaged(tmp_path):
    save(tmp_path, {1: 0.8, 2: 0.9, 3: 0.5}, keep=3)
    save(tmp_path, {4: 0.5, 5: None}, keep=1)
    assert checkpoint.steps(tmp_path) == [2, 5]
    with open(array_file(tmp_path, 2), "r+b") as file:
        file.write(b"damaged")
    save(tmp_path, {6: 0.4, 7: 0.3}, keep=1)
    assert checkpoint.best(tmp_path, METRIC) == 6
    assert {6, 7} <= set(checkpoint.steps(tmp_path))


def test_a_donated_state_does_not_reach_into_a_checkpoint_that_is_still_being_written(tmp_path):
    state = {"x": jnp.zeros((1000, 1000))}
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path, keep=5, metric=METRIC) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, state, record={}, metrics=None)
            for _ in range(5):
                state = overwrite(state)
    for step in range(1, 4):
        restored, _ = checkpoint.restore(tmp_path, step, {"x": jnp.ones((1000, 1000))})
        np.testing.assert_array_equal(restored["x"], np.full((1000, 1000), 5.0 * (step - 1)))


@pytest.mark.parametrize("harm", ["flip a bit", "cut", "delete a file", "delete the manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_set_aside(tmp_path, harm, caplog):
    save(tmp_path, {1: None, 2: None})
    path = array_file(tmp_path, 2)
    content = bytearray(path.read_bytes())
    if harm == "flip a bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-1])
    elif harm == "delete a file":
        path.unlink()
    else:
        (tmp_path / "2" / checkpoint.MANIFEST).unlink()
    assert checkpoint.latest_whole(tmp_path, quarantine=False) == 1
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert checkpoint.latest_whole(tmp_path, quarantine=True) == 1
    assert checkpoint.steps(tmp_path) == [1]
    assert (tmp_path / "2.damaged").is_dir()
    save(tmp_path, {2: None})  # the run can write it again
    assert checkpoint.latest_whole(tmp_path, quarantine=True) == 2


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    save(tmp_path, {1: None})
    unfinished = tmp_path / "2.orbax-checkpoint-tmp-7" / "tree"
    unfinished.mkdir(parents=True)
    (unfinished / "part").write_text("half")
    assert checkpoint.latest_whole(tmp_path, quarantine=False) == 1
    assert unfinished.exists()  # a run may be alive
    assert checkpoint.latest_whole(tmp_path, quarantine=True) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_no_whole_checkpoint_is_an_error_and_no_checkpoint_is_a_new_run(tmp_path):
    assert checkpoint.latest_whole(tmp_path / "new", quarantine=True) is None
    save(tmp_path, {3: None})
    os.truncate(array_file(tmp_path, 3), 10)
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole"):
        checkpoint.latest_whole(tmp_path, quarantine=False)


def test_the_manifest_names_every_file(tmp_path):
    save(tmp_path, {1: None})
    folder = tmp_path / "1"
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - manifest.keys() <= {checkpoint.MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}
    assert {pathlib.Path(name).parts[0] for name in manifest} >= {"tree", "record"}
