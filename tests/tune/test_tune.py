"""Searches: what is proposed, what is pruned, and a search that is killed and goes on to the same trials."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vitcls import cli, config_file, ledger, models
from vitcls.core.errors import UserError
from vitcls.models.variables import variable_shapes
from vitcls.train import train_and_evaluate
from vitcls.tune import Choice, Number, Space, results, search, space
from vitcls.tune import __main__ as command
from vitcls.tune.search import Trial
from vitcls.tune.space import apply

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
    "space.py": "from tests.tune.test_tune import COSTLY\n\ndef get_space():\n    return COSTLY\n",
}


COSTLY = Space(SPACE.keys, cost="flops_per_image")


def trial(number, scores, state="finished", **values):
    return Trial(number, {"optimizer.name": "adam", **values}, {str(step): s for step, s in scores.items()}, state)


@pytest.mark.parametrize("of_cost", [True, False])
def test_proposals_come_near_the_best_in_either_objective(of_cost):
    def distance(values):
        return abs(math.log10(values["optimizer.learning_rate"]) + 2)

    ended = []
    for number in range(40):
        values = search.propose(COSTLY, "tpe", 3, number, ended, maximize=True)
        assert values == search.propose(COSTLY, "tpe", 3, number, ended, maximize=True)
        score, cost = (0.5, distance(values)) if of_cost else (-distance(values), 7.0)
        ended.append(Trial(number, json.loads(json.dumps(values)), {"6": score}, "finished", cost))
    distances = [distance(each.values) for each in ended]
    assert np.mean(distances[20:]) < 0.75 * np.mean(distances[:10])  # the first ten are at random


@pytest.mark.parametrize("maximize", [True, False])
def test_the_front_is_optunas(maximize):
    import optuna

    numbers = np.random.default_rng(0).integers(0, 6, (40, 2))  # small whole numbers: many are equal
    trials = [Trial(i, {}, {"1": float(score)}, "finished", float(cost)) for i, (score, cost) in enumerate(numbers)]
    study = optuna.create_study(directions=["maximize" if maximize else "minimize", "minimize"])
    for each in trials:
        study.add_trial(optuna.trial.create_trial(values=[each.score, each.cost], params={}, distributions={}))
    front = search.front(trials, maximize=maximize)
    assert {each.number for each in front} == {best.number for best in study.best_trials}
    assert [each.cost for each in front] == sorted(each.cost for each in front)


def test_the_front_by_hand():
    points = {0: (0.9, 10.0), 1: (0.8, 5.0), 2: (0.8, 6.0), 3: (0.7, 5.0), 4: (0.9, 10.0), 5: (0.95, 20.0)}
    trials = [Trial(i, {}, {"1": score}, "finished", cost) for i, (score, cost) in points.items()]
    assert [each.number for each in search.front(trials, maximize=True)] == [1, 0, 4, 5]
    assert search.front([], maximize=True) == []


@pytest.mark.parametrize("method", search.METHODS)
def test_choices_may_be_tuples(method):
    space = Space({"model.depths": Choice(((2, 1), (4, 4), (7, 6))), "batch_size": Choice((8, 16, 32))})
    ended, seen = [], set()
    for number in range(9):
        values = search.propose(space, method, 0, number, ended, maximize=True)
        config = config_file.load(ROOT / "configs" / "cnn_mnist.py")
        assert apply(config, json.loads(json.dumps(values))).model.depths == values["model.depths"]
        score = float(values["model.depths"] == (4, 4))
        ended.append(Trial(number, json.loads(json.dumps(values)), {"6": score}, "finished"))
        seen.add(values["model.depths"])
    assert seen == {(2, 1), (4, 4), (7, 6)}
    assert set(results.importance(ended, space)) == set(space.keys)
    assert not results.importance(ended[:6], space)  # of six trials it would be chance


@pytest.mark.parametrize("method", search.METHODS)
def test_no_combination_is_tried_twice(method):
    space = Space({"model.depths": Choice(((2, 1), (4, 4), (7, 6))), "batch_size": Choice((8, 16, 32, 64))})
    ended, tried = [], []
    for number in range(12):
        values = json.loads(json.dumps(search.propose(space, method, 5, number, ended, maximize=True)))
        tried.append(json.dumps(values))
        ended.append(Trial(number, values, {"6": float(values["batch_size"])}, "finished"))
    assert len(set(tried)) == search.combinations(space) == len(search.grid(space)) == 12
    assert search.combinations(SPACE) == math.inf


@pytest.mark.parametrize("method", search.METHODS[:2])
@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({"model.depth": Number(1, 7)}, 7),
        ({"a": Choice((0, 1)), "b": Choice((1, 2, 3), {"a": 1}), "c": Number(0.0, 1.0, only_if={"b": 4})}, 4),
    ],
)
def test_whole_ranges_and_keys_that_depend_on_others_have_an_end(method, keys, count):
    space, ended = Space(keys), []
    assert search.combinations(space) == count
    for number in range(count):
        values = search.propose(space, method, 0, number, ended, maximize=True)
        ended.append(Trial(number, values, {"6": 0.5}, "finished"))
    assert len({json.dumps(trial.values) for trial in ended}) == count


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


def start(directory, *flags):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "vitcls.tune", f"--config={directory.parent}/config.py"),
            *(f"--space={directory.parent}/space.py", f"--workdir={directory}", "--config.loss.l2=1e-3", *flags),
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
    undisturbed, process = start(whole, "--trials=3"), start(killed, "--trials=3")
    lock, deadline = killed / "trials" / "0001" / "lock.json", time.monotonic() + 200
    while not lock.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    os.kill(json.loads(lock.read_text())["process_id"], signal.SIGKILL)
    again = start(killed, "--trials=3")
    for search_process in (undisturbed, again):
        out, err = search_process.communicate(timeout=300)
        assert search_process.returncode == 0, err
    return whole, killed, out


def trials_of(directory):
    return search.ended_of(ledger.read("", directory))


def test_a_killed_search_has_the_trials_and_the_front_of_an_undisturbed_one(searches):
    whole, killed, _ = searches

    def trials(directory):
        return [{**t.__dict__, "seconds": 0} for t in trials_of(directory)]

    assert len(trials(whole)) == 3
    assert trials(killed) == trials(whole)
    assert all(t["state"] == "finished" and list(t["scores"]) == ["6", "12"] for t in trials(whole))
    fronts = [{path.name: path.read_text() for path in (directory / "front").iterdir()} for directory in searches[:2]]
    assert fronts[0] == fronts[1]


def test_the_front_of_a_search(searches):
    whole, _, out = searches
    ended = trials_of(whole)
    for each in ended:
        report = json.loads((whole / "trials" / f"{each.number:04d}" / "report" / "metrics.json").read_text())
        assert each.cost == report["flops_per_image"] > 0
    best = [
        f"{one.number:04d}"
        for one in ended
        if not any(
            (other.score >= one.score and other.cost < one.cost) or (other.score > one.score and other.cost <= one.cost)
            for other in ended
        )
    ]
    assert sorted(path.stem for path in (whole / "front").iterdir()) == best
    for name in best:
        config = config_file.load(whole / "front" / f"{name}.py")
        assert config.model.depth == ended[int(name)].values["model.depth"] and config.report.split == "test"
    text = (whole / "trials.md").read_text()
    first, every = text.split("# All trials")
    assert first.count("\n| 000") == len(best) and every.count("\n| 000") == 3 and "flops_per_image" in first
    assert (whole / "pareto.png").exists()
    assert "Pareto front of eval/accuracy and flops_per_image: " in out


def test_a_front_leaves_no_config_of_an_earlier_one(tmp_path, no_pictures):
    config = config_file.load(ROOT / "configs" / "vit_digits.py")
    space = Space({"model.depth": Number(1, 4)}, cost="flops_per_image")
    trials = [Trial(i, {"model.depth": i + 1}, {"1": 0.5}, "finished", 2.0 - i) for i in range(2)]
    for count in (1, 2):
        results.write(tmp_path, trials[:count], space, "eval/accuracy", config)
        assert [path.name for path in (tmp_path / "front").iterdir()] == [f"000{count - 1}.py"]


def test_a_latency_is_the_median_of_the_report(tmp_path):
    (tmp_path / "report").mkdir()
    assert results.cost(tmp_path, "latency_ms") is None
    (tmp_path / "report" / "metrics.json").write_text('{"latency_ms": {"median": 1.5, "p95": 2.0}}')
    assert results.cost(tmp_path, "latency_ms") == 1.5
    config = config_file.load(ROOT / "configs" / "vit_digits.py")
    assert apply(config, {}, timing=True).report.timing and not apply(config, {}).report.timing


def test_the_best_config_trains_as_it_is_and_reports_on_the_test_split(searches, no_pictures, tmp_path):
    whole, _, out = searches
    ended = trials_of(whole)
    best = max(ended, key=lambda t: t.score)
    assert f"best: trial {best.number:04d}, eval/accuracy {best.score:.4f} on the validation split" in out
    config = config_file.load(whole / results.BEST_CONFIG)
    assert config.optimizer.learning_rate == best.values["optimizer.learning_rate"]
    assert config.loss.l2 == 1e-3  # of the command line
    report = train_and_evaluate(config, tmp_path / "run")
    assert report["split"] == "test"
    trial_report = json.loads((whole / "trials" / f"{best.number:04d}" / "report" / "metrics.json").read_text())
    assert trial_report["split"] == "validation"
    assert (whole / "history.png").exists() and (whole / "slices.png").exists()


def test_two_workers_share_a_search_by_postgresql(searches, postgres):
    """And a third finds that all is done. They have the values of one worker: the first trials are at random."""
    directory = searches[0].parent / "shared"
    flags = (f"--storage={postgres.url}", "--trials=4", "--method=random")
    workers = [start(directory, *flags), start(directory, *flags)]
    for worker in workers:
        _, err = worker.communicate(timeout=400)
        assert worker.returncode == 0, err
    ended = search.ended_of(ledger.read(postgres.url, directory))
    assert [each.number for each in ended] == [0, 1, 2, 3] and all(each.state == "finished" for each in ended)
    for each in ended:
        assert each.values == search.propose(COSTLY, "random", 0, each.number, [], maximize=True)
        log = (directory / "trials" / f"{each.number:04d}" / "log.txt").read_text()
        assert log.count("\ndevices ") + log.startswith("devices ") == 1


def test_importance_finds_the_key_that_matters():
    space = Space({"a": Number(0.0, 1.0), "b": Choice(("x", "y"))})
    ended = [Trial(i, {"a": i / 16, "b": "xy"[i % 2]}, {"1": (i / 16) ** 2}, "finished") for i in range(16)]
    shares = results.importance(ended, space)
    assert shares["a"] > 0.9 and sum(shares.values()) == pytest.approx(1)
    assert results.importance(ended[:7], space) == {}


@pytest.mark.parametrize(
    ("keys", "flags", "words"),
    [
        ({"optimizer.learning_rat": "Number(1, 2)"}, [], "did you mean 'learning_rate'"),
        ({"batch_size": "Choice(('a', 'b'))"}, [], "batch_size"),
        ({"batch_size": "Choice(())"}, [], "'batch_size' has no values to choose from"),
        ({"batch_size": "Number(8, 4)"}, [], "'batch_size' goes from 8 to 4"),
        ({"batch_size": "Choice((8, 16), {'seed': 1})"}, [], "'batch_size' depends on 'seed', which does not stand"),
        ({"batch_size": "Choice((8, 16))"}, ["--trials=0"], "--trials=0 must be at least 1"),
        ({"batch_size": "Choice((8, 16))"}, ["--method=grit"], "--method"),
        ({"batch_size": "Choice((8, 16))"}, ["--storage=oracle://x"], "--storage must be sqlite:///PATH or postgresql"),
        (
            {"batch_size": "Choice((8, 16))", "cost": "flops"},
            [],
            "'flops' is not known; did you mean 'flops_per_image'",
        ),
        ({"batch_size": "Choice((8, 16))", "cost": "latency_ms"}, ["--pruner=median"], "goes by one objective"),
        ({}, [], "does not return a vitcls.tune.Space with keys"),
        ({"seed": "(1, 2)"}, [], "'seed' is (1, 2); keys are text, and what they may be a Choice or a Number"),
        ({"seed": "Number('a', 'b')"}, [], "'seed' goes from 'a' to 'b', which must be two numbers"),
        ({"seed": "Number(0.1, float('inf'))"}, [], "'seed' goes from 0.1 to inf, which must be two numbers"),
        (
            {"batch_size": "Choice((8, 16))", "seed": "Choice((1, 2), {'batch_size': 4})"},
            [],
            "'seed' is for 'batch_size' of 4, which is none of its values",
        ),
        (
            {"batch_size": "Choice((8, 16))"},
            ["--config.checkpoint.metric=eval/acuracy"],
            "config.checkpoint.metric 'eval/acuracy' is not known; did you mean 'eval/accuracy'",
        ),
    ],
)
def test_mistakes_are_one_line(keys, flags, words, tmp_path, capsys):
    (tmp_path / "config.py").write_text(FILES["config.py"])
    values = ", ".join(f"'{key}': {what}" for key, what in keys.items() if key != "cost")
    (tmp_path / "space.py").write_text(
        "from vitcls.tune import Choice, Number, Space\n"
        f"def get_space():\n    return Space({{{values}}}, cost={keys.get('cost', '')!r})\n"
    )
    arguments = [f"--config={tmp_path}/config.py", f"--space={tmp_path}/space.py", f"--workdir={tmp_path}/s", *flags]
    assert cli.run(command.main, arguments) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_the_workdir_of_a_training_is_left_alone(trained, tmp_path, capsys):
    files = set(trained.rglob("*"))
    (tmp_path / "config.py").write_text(FILES["config.py"])
    (tmp_path / "space.py").write_text(
        "from vitcls.tune import Choice, Space\ndef get_space(): return Space({'seed': Choice((1, 2))})\n"
    )
    arguments = [f"--config={tmp_path}/config.py", f"--space={tmp_path}/space.py", f"--workdir={trained}"]
    assert cli.run(command.main, arguments) == 2
    assert "holds a run; give a directory for many" in capsys.readouterr().err
    assert set(trained.rglob("*")) == files


def test_a_damaged_note_of_a_search_is_one_line(searches, tmp_path, capsys):
    directory = shutil.copytree(searches[0], tmp_path / "copy")
    (directory / "search.json").write_text((directory / "search.json").read_text()[:99])
    folder = searches[0].parent
    flags = [f"--config={folder}/config.py", f"--space={folder}/space.py", f"--workdir={directory}", "--method=random"]
    assert cli.run(command.main, flags) == 2
    err = capsys.readouterr().err
    assert f"{directory}/search.json cannot be read" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("trials, tried", [(None, 3), (2, 2), (9, 3)])
def test_a_grid_is_tried_whole_unless_fewer_trials_are_asked_for(trials, tried, tmp_path, capsys):
    (tmp_path / "config.py").write_text(FILES["config.py"])
    (tmp_path / "space.py").write_text(
        "from vitcls.tune import Choice, Space\n"
        "def get_space():\n    return Space({'optimizer.accumulate': Choice((3, 5, 7))})\n"  # of batches of 16
    )
    arguments = [f"--{name}={tmp_path}/{name}.py" for name in ("config", "space")]
    arguments += ["--method=grid", f"--workdir={tmp_path}/s", *([f"--trials={trials}"] if trials else [])]
    assert cli.run(command.main, arguments) == 1
    assert [t.values for t in trials_of(tmp_path / "s")] == [{"optimizer.accumulate": n} for n in (3, 5, 7)][:tried]
    assert ("of which the first 2 are tried" in capsys.readouterr().err) == (tried == 2)


def test_values_that_do_not_go_together_are_a_failed_trial_each(tmp_path, capsys):
    (tmp_path / "config.py").write_text(FILES["config.py"])
    (tmp_path / "space.py").write_text(
        "from vitcls.tune import Choice, Space\n"
        "def get_space():\n    return Space({'optimizer.accumulate': Choice((3, 5))})\n"
    )
    arguments = [f"--{name}={tmp_path}/{name}.py" for name in ("config", "space")]
    assert cli.run(command.main, [*arguments, f"--workdir={tmp_path}/s"]) == 1
    assert "no trial has come to a score" in capsys.readouterr().err
    ended = trials_of(tmp_path / "s")
    assert [(t.number, t.state) for t in ended] == [(0, "failed"), (1, "failed")]
    assert len((tmp_path / "s" / "trials.md").read_text().splitlines()) == 4
    assert all("cannot be divided into config.optimizer.accumulate=" in trial.error for trial in ended)


HOUSE = [
    ("vit_small.py", "vit_digits.py", "training"),
    ("vit_small.py", "vit_digits.py", "nas"),
    ("resnext_small.py", "resnext_cifar10.py:small", "training"),
    ("resnext_small.py", "resnext_cifar10.py:small", "nas"),
    ("mnist_cnn.py", "cnn_mnist.py", "table"),
    ("mnist_cnn.py", "cnn_mnist.py", "smoke"),
]


@pytest.mark.parametrize(("file", "config", "preset"), HOUSE)
def test_every_proposal_of_a_space_of_the_house_is_a_model_that_takes_its_images(file, config, preset):
    """By shapes alone; every value of a choice is among the proposals."""
    config = config_file.load(f"{ROOT}/configs/{config}")
    found = space.load(f"{ROOT}/configs/spaces/{file}:{preset}", config)
    assert found.cost == ("flops_per_image" if preset == "nas" else "")
    shape = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[config.dataset.name]
    missing = {(key, value) for key, what in found.keys.items() if isinstance(what, Choice) for value in what.values}
    for number in range(60):
        values = search.propose(found, "random", 0, number, [], maximize=True)
        missing -= set(values.items())
        fields = apply(config, values).model.to_dict()
        if number < 8:
            variable_shapes(models.create(fields.pop("name"), 10, **fields), shape)
    assert not missing
    assert config_file.call(f"{ROOT}/configs/spaces/{file}", "get_space").keys
    with pytest.raises(UserError, match=r"preset of .* is not known"):
        space.load(f"{ROOT}/configs/spaces/{file}:nass", config)


@pytest.mark.parametrize("file", ["vit_small.py", "resnext_small.py"])
def test_an_architecture_may_be_searched_by_its_latency(file):
    nas, latency = (
        config_file.call(f"{ROOT}/configs/spaces/{file}:{name}", "get_space") for name in ("nas", "nas_latency")
    )
    assert latency == Space(nas.keys, cost="latency_ms")


def test_the_space_of_the_papers_table_has_its_combinations():
    found = space.load(f"{ROOT}/configs/spaces/mnist_cnn.py", config_file.load(ROOT / "configs" / "cnn_mnist.py"))
    points = search.grid(found)
    assert len(points) == 3**5
    layers = {sum(point["model.depths"]) + 2 for point in points}  # convolutions and two dense layers
    assert layers == {5, 10, 15}
