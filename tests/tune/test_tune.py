"""Searches: what is proposed, what is pruned, and a search that is killed and goes on to the same trials."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from vitcls import cli, config_file
from vitcls.train import train_and_evaluate
from vitcls.tune import Choice, Number, Space, results, search
from vitcls.tune import __main__ as command
from vitcls.tune.search import Trial

pytest.importorskip("optuna")
ROOT = pathlib.Path(__file__).parents[2]
SPACE = Space(
    {
        "optimizer.name": Choice(("adam", "sgd")),
        "optimizer.learning_rate": Number(1e-4, 1e-1, log=True),
        "optimizer.momentum": Number(0.5, 0.9, only_if={"optimizer.name": "sgd"}),
        "model.depth": Number(1, 2),
    }
)
FILES = {
    "config.py": "from tests.conftest import make_tiny_config as get_config\n",
    "space.py": "from tests.tune.test_tune import SPACE\n\ndef get_space():\n    return SPACE\n",
}


def trial(number, scores, state="finished", **values):
    return Trial(number, {"optimizer.name": "adam", **values}, {str(step): s for step, s in scores.items()}, state)


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_a_proposal_depends_on_the_seed_and_what_ended_before_alone(method):
    ended = []
    for number in range(14):
        values = search.propose(SPACE, method, 3, number, ended, maximize=True)
        assert values == search.propose(SPACE, method, 3, number, ended, maximize=True)
        assert ("optimizer.momentum" in values) == (values["optimizer.name"] == "sgd")
        assert 1e-4 <= values["optimizer.learning_rate"] <= 1e-1 and values["model.depth"] in (1, 2)
        ended.append(Trial(number, values, {"6": 1.0 - abs(values["optimizer.learning_rate"] - 0.01)}, "finished"))
    assert values != search.propose(SPACE, method, 4, 13, ended[:-1], maximize=True)
    another = [Trial(t.number, t.values, {"6": -t.score}, "finished") for t in ended[:-1]]
    learned = search.propose(SPACE, method, 3, 13, another, maximize=True) != values
    assert learned == (method == "tpe")  # which looks at scores


def test_a_grid_has_every_combination_once():
    points = search.grid(SPACE)
    assert len(points) == 5 * 2 + 5 * 5 * 2 == len({json.dumps(point) for point in points})
    rates = sorted({point["optimizer.learning_rate"] for point in points})
    assert rates[0] == 1e-4 and rates[-1] == 1e-1 and rates[2] == pytest.approx(10**-2.5, rel=1e-5)
    assert search.propose(SPACE, "grid", 0, len(points), [], maximize=True) is None


def test_pruning_by_the_median_and_by_halving():
    ended = [trial(i, {2: 0.1 * i, 4: 0.1 * i + 0.3, 6: 0.5}) for i in range(5)]  # 0.0 .. 0.4 at step 2
    prune = {
        (pruner, score): search.should_prune(pruner, {"2": score}, ended, maximize=True)
        for pruner in search.PRUNERS
        for score in (0.1, 0.25, 0.35)
    }
    assert [prune["none", score] for score in (0.1, 0.25, 0.35)] == [False, False, False]
    assert [prune["median", score] for score in (0.1, 0.25, 0.35)] == [True, False, False]
    assert [prune["hyperband", score] for score in (0.1, 0.25, 0.35)] == [True, True, False]
    assert search.should_prune("median", {"2": 0.3}, ended, maximize=False)  # a loss, of which less is better
    assert not search.should_prune("median", {"2": 0.0}, ended[:3], maximize=True)
    assert not search.should_prune("hyperband", {"2": 0.9, "4": 0.0}, ended, maximize=True)  # no rung
    assert search.should_prune("median", {"2": None}, ended, maximize=True)  # no number is worse than any


def start(directory):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "vitcls.tune", f"--config={directory.parent}/config.py"),
            *(f"--space={directory.parent}/space.py", f"--workdir={directory}", "--trials=2"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    """A search, and the same one killed with its second trial on the way and started again."""
    root = tmp_path_factory.mktemp("searches")
    for name, text in FILES.items():
        (root / name).write_text(text)
    whole, killed = root / "whole", root / "killed"
    undisturbed, process = start(whole), start(killed)
    lock, deadline = killed / "trials" / "0001" / "lock.json", time.monotonic() + 200
    while not lock.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    os.kill(json.loads(lock.read_text())["process_id"], signal.SIGKILL)
    again = start(killed)
    for search_process in (undisturbed, again):
        out, err = search_process.communicate(timeout=300)
        assert search_process.returncode == 0, err
    return whole, killed, out


def test_a_killed_search_has_the_trials_of_an_undisturbed_one(searches):
    whole, killed, _ = searches

    def trials(directory):
        return [{**t.__dict__, "seconds": 0} for t in search.read_ledger(directory / command.LEDGER)]

    assert len(trials(whole)) == 2
    assert trials(killed) == trials(whole)
    assert all(t["state"] == "finished" and list(t["scores"]) == ["6", "12"] for t in trials(whole))


def test_the_best_config_trains_as_it_is_and_reports_on_the_test_split(searches, no_pictures, tmp_path):
    whole, _, out = searches
    ended = search.read_ledger(whole / command.LEDGER)
    best = max(ended, key=lambda t: t.score)
    assert f"best: trial {best.number:04d}, eval/accuracy {best.score:.4f} on the validation split" in out
    config = config_file.load(whole / results.BEST_CONFIG)
    assert config.optimizer.learning_rate == best.values["optimizer.learning_rate"]
    report = train_and_evaluate(config, tmp_path / "run")
    assert report["split"] == "test"
    trial_report = json.loads((whole / "trials" / f"{best.number:04d}" / "report" / "metrics.json").read_text())
    assert trial_report["split"] == "validation"
    assert (whole / "history.png").exists() and (whole / "slices.png").exists()
    assert len((whole / "trials.md").read_text().splitlines()) == 4


def test_importance_finds_the_key_that_matters():
    space = Space({"a": Number(0.0, 1.0), "b": Choice(("x", "y"))})
    ended = [Trial(i, {"a": i / 16, "b": "xy"[i % 2]}, {"1": (i / 16) ** 2}, "finished") for i in range(16)]
    shares = results.importance(ended, space)
    assert shares["a"] > 0.9 and sum(shares.values()) == pytest.approx(1)
    assert results.importance(ended[:7], space) == {}


@pytest.mark.parametrize(
    ("keys", "flags", "words"),
    [
        ({"optimizer.learning_rat": "Number(1, 2)"}, [], "did you mean 'optimizer.learning_rate'"),
        ({"batch_size": "Choice(('a', 'b'))"}, [], "batch_size"),
        ({"batch_size": "Choice(())"}, [], "'batch_size' has no values to choose from"),
        ({"batch_size": "Number(8, 4)"}, [], "'batch_size' goes from 8 to 4"),
        ({"batch_size": "Choice((8, 16), {'seed': 1})"}, [], "'batch_size' depends on 'seed', which does not stand"),
        ({"batch_size": "Choice((8, 16))"}, ["--trials=0"], "--trials=0 must be at least 1"),
        ({"batch_size": "Choice((8, 16))"}, ["--method=grit"], "--method"),
        ({}, [], "does not return a vitcls.tune.Space with keys"),
    ],
)
def test_mistakes_are_one_line(keys, flags, words, tmp_path, capsys):
    (tmp_path / "config.py").write_text(FILES["config.py"])
    values = ", ".join(f"'{key}': {what}" for key, what in keys.items())
    (tmp_path / "space.py").write_text(
        f"from vitcls.tune import Choice, Number, Space\ndef get_space():\n    return Space({{{values}}})\n"
    )
    arguments = [f"--config={tmp_path}/config.py", f"--space={tmp_path}/space.py", f"--workdir={tmp_path}/s", *flags]
    assert cli.run(command.main, arguments) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_values_that_do_not_go_together_are_a_failed_trial_each(tmp_path, capsys):
    (tmp_path / "config.py").write_text(FILES["config.py"])
    (tmp_path / "space.py").write_text(
        "from vitcls.tune import Choice, Space\n"
        "def get_space():\n    return Space({'optimizer.accumulate': Choice((3,))})\n"
    )
    arguments = [f"--{name}={tmp_path}/{name}.py" for name in ("config", "space")]
    assert cli.run(command.main, [*arguments, f"--workdir={tmp_path}/s", "--trials=3"]) == 1
    assert "no trial has come to a score" in capsys.readouterr().err
    ended = search.read_ledger(tmp_path / "s" / command.LEDGER)
    assert [(t.number, t.state) for t in ended] == [(0, "failed"), (1, "failed"), (2, "failed")]
    assert len((tmp_path / "s" / command.LEDGER).read_text().splitlines()) == 3
    assert "cannot be divided into config.optimizer.accumulate=3 parts" in ended[0].error


@pytest.mark.parametrize("preset", ["training", "nas"])
def test_the_spaces_of_the_house_fit_their_config(preset):
    from vitcls.tune import space

    assert space.load(f"{ROOT}/configs/spaces/vit_small.py:{preset}", config_file.load(ROOT / "configs/vit_digits.py"))
