"""Tables of runs, with real processes: shared by workers, killed, failed, resumed, and reported."""

import contextlib
import csv
import io
import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from sklearn.metrics import f1_score

from vitcls import cli, evaluate, ledger, models
from vitcls.core.errors import UserError
from vitcls.experiment import __main__ as command
from vitcls.experiment import results, table, work
from vitcls.models.variables import variable_shapes

ROOT = pathlib.Path(__file__).parents[2]
TABLE = """
from tests.conftest import make_tiny_config
from vitcls.experiment import Row, Table

def get_table(preset="good"):
    rows = []
    for name, width in (("narrow", 16), ("wide", 32), ("thin", 8)):
        config = make_tiny_config()
        config.model.mlp_dim = width
        config.report.corruptions = ("gaussian_noise",)
        if name == "narrow":  # long enough to be killed on the way
            config.total, config.checkpoint_every, config.eval_every = "300 steps", "20 steps", "300 steps"
        rows.append(Row(name, config, {"accuracy": 0.9}))
    if preset == "bad":
        config = make_tiny_config()
        config.dataset.name, config.dataset.data_dir = "npz", "nowhere.npz"
        rows.insert(1, Row("broken", config))
    facts, equal_time = ("parameters", "train_seconds"), preset == "equal"
    return Table(
        "Tiny", "Three widths.", rows, seeds=(0, 1), metrics=("accuracy", "loss"), facts=facts, equal_time=equal_time
    )
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "tiny.py"
    path.write_text(TABLE)
    return path


def start(*arguments, path=ROOT):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "vitcls.experiment", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


GOOD = [f"{name}-seed{seed}" for name in ("narrow", "wide", "thin") for seed in (0, 1)]


def starts(directory):
    """How often a process has begun or gone on with each run."""
    logs = {path.parent.name: path.read_text() for path in directory.glob("runs/*/log.txt")}
    return {name: len(re.findall("^devices ", log, re.M)) for name, log in logs.items()}


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def ends_of(workers):
    said = [worker.communicate(timeout=400) for worker in workers]
    return [(worker.returncode, out, err) for worker, (out, err) in zip(workers, said, strict=True)]


@pytest.fixture(scope="module")
def done(file, tmp_path_factory):
    """A table with a row that fails, which two workers share; before, one was killed with its run on the way."""
    directory = tmp_path_factory.mktemp("done") / "table"
    arguments = (f"--config={file}:bad", f"--workdir={directory}")
    killed = start(*arguments)
    run = directory / "runs" / "narrow-seed0"
    wait_for(run / "checkpoints" / "40" / "manifest.json", killed)
    killed.kill()
    os.kill(json.loads((run / "lock.json").read_text())["process_id"], signal.SIGKILL)
    killed.communicate()
    return directory, ends_of([start(*arguments), start(*arguments)])


@pytest.mark.by_turns("done")
def test_two_workers_share_a_table_and_what_fails_does_not_stop_it(done):
    directory, ends = done
    for code, out, err in ends:
        assert code == 1, err
        assert "failed: 2 of 8 runs failed; the same command tries them again" in err
        assert "- broken-seed0 failed: error: config.dataset.data_dir=" in out and "is not a file" in out
    assert {name for name, entry in ledger.read("", directory).items() if entry.code == 0} == set(GOOD)
    said = "".join(err for *_, err in ends)
    assert all(f"{name} finished, accuracy" in said for name in GOOD)
    assert said.count("broken-seed0 failed: ") == 1
    assert {name: count for name, count in starts(directory).items() if "broken" not in name} == dict.fromkeys(
        GOOD, 1
    ) | {"narrow-seed0": 2}


@pytest.mark.by_turns("done")
def test_a_killed_run_loses_nothing_but_the_steps_since_its_last_checkpoint(done):
    directory, _ = done
    log = (directory / "runs" / "narrow-seed0" / "log.txt").read_text()
    (step,) = re.findall(r"^resumed from step (\d+)", log, re.M)
    assert 40 <= int(step) < 300


@pytest.fixture(scope="module")
def shared(file, postgres, tmp_path_factory):
    """A table that two workers share by PostgreSQL, which crashes on the way and comes back."""
    directory = tmp_path_factory.mktemp("shared") / "table"
    arguments = (f"--config={file}", f"--workdir={directory}", f"--storage={postgres.url}")
    workers = [start(*arguments), start(*arguments)]
    wait_for(directory / "runs" / "wide-seed0" / "lock.json", workers[0])
    postgres.stop()
    time.sleep(8)
    postgres.start()
    return directory, ends_of(workers)


@pytest.mark.by_turns("shared")
def test_two_workers_share_a_table_by_postgresql_though_it_is_away_for_a_while(shared, postgres):
    directory, ends = shared
    for code, out, err in ends:
        assert code == 0, err
        assert "6 of 6 runs have finished" in out
        assert err.count(f"{postgres.public} is away (") <= 2
    assert starts(directory) == dict.fromkeys(GOOD, 1)
    entries = ledger.read(postgres.url, directory)
    assert sorted(entries) == sorted(GOOD) and all(entry.code == 0 for entry in entries.values())
    texts = [text for _, *said in ends for text in said]
    texts += [path.read_text(errors="replace") for path in directory.rglob("*") if path.is_file()]
    assert not any("s3cret" in text for text in texts)


@pytest.mark.by_turns("shared")
def test_a_report_needs_the_storage_of_its_table(shared, file, capsys, postgres):
    directory, _ = shared
    arguments = [f"--config={file}", f"--workdir={directory}", "--report_only"]
    assert cli.run(command.main, arguments) == 2
    assert "does not know the job of" in capsys.readouterr().err
    assert cli.run(command.main, [*arguments, f"--storage={postgres.url}"]) == 0


@pytest.mark.by_turns("done")
def test_the_results_hold_every_run_and_the_papers_figures_as_the_papers(done):
    directory, _ = done
    rows = list(csv.DictReader(io.StringIO((directory / "results.csv").read_text())))
    assert list(rows[0]) == list(results.COLUMNS)
    assert len(rows) == 8 and {row["status"] for row in rows} == {"finished", "failed"}
    accuracies = [float(row["accuracy"]) for row in rows if row["run"] == "wide"]
    report = json.loads((directory / "runs" / "wide-seed1" / "report" / "metrics.json").read_text())
    assert accuracies[1] == report["accuracy"]
    text = " ".join((directory / "results.md").read_text().split())  # columns are padded
    assert "Accuracy, the paper's" in text and "| 90.00% |" in text
    mean, deviation = np.mean(accuracies), np.std(accuracies, ddof=1)
    assert f"| wide | 2 | a | {mean:.2%} ± {deviation:.2%} |" in text
    assert "6 of 8 runs have finished" in text and "Welch's t test over seeds" in text
    assert "- Trained on synthetic: 86 images, for 300 steps or 12 steps in batches of 16; judged by 24 others." in text
    parameters = report["parameters"]
    assert f"| {parameters:,} |" in text  # of every seed alike: no deviation
    page = (directory / "index.html").read_text()
    assert page.count("data:image/png;base64") == 3 and "<script" not in page


@pytest.mark.by_turns("done")
def test_accuracy_under_a_corruption_is_a_table_of_its_own(done):
    directory, _ = done
    runs = [directory / "runs" / f"wide-seed{seed}" / "report" / "metrics.json" for seed in (0, 1)]
    reports = [json.loads(path.read_text()) for path in runs]
    measured = [[report["accuracy"], *report["corrupted_accuracy"]["gaussian_noise"]] for report in reports]
    spread = np.std(measured, axis=0, ddof=1)
    cells = [f"{mean:.2%} ± {std:.2%}" for mean, std in zip(np.mean(measured, axis=0), spread, strict=True)]
    text = " ".join((directory / "results.md").read_text().partition("## Accuracy under gaussian noise")[2].split())
    assert f"| wide | {' | '.join(cells)} |" in text and "| broken | - |" in text
    assert (directory / "gaussian_noise.png").exists()


@pytest.mark.by_turns("done")
def test_rows_run_again_with_equal_time(done, file):
    """By the seconds that the first ones took; rows that go on keep what was planned."""
    directory, _ = done
    worker = start(f"--config={file}:equal", f"--workdir={directory}", "--seeds=0", "--workers=2")
    out, err = worker.communicate(timeout=300)
    assert worker.returncode == 0, err
    plan = json.loads((directory / "equal_time.json").read_text())
    seconds = {
        name: json.loads((directory / "runs" / f"{name}-seed0" / "report" / "metrics.json").read_text())
        for name in plan["steps"]
    }
    seconds = {name: report["train_seconds"] for name, report in seconds.items()}
    assert plan["seconds"] == pytest.approx(np.median(list(seconds.values())))
    for name, steps in plan["steps"].items():
        config = json.loads((directory / "runs" / f"{name}-equal_time-seed0" / "config.json").read_text())
        first = json.loads((directory / "runs" / f"{name}-seed0" / "report" / "metrics.json").read_text())
        assert config["total"] == f"{steps} steps"
        assert steps == round(first["checkpoint_step"] * plan["seconds"] / seconds[name])
    assert "## As much training time for each" in out


@pytest.fixture
def copy(done, tmp_path):
    """Of a table whose runs have finished, before any plan."""
    directory = shutil.copytree(done[0], tmp_path / "copy")
    (directory / "equal_time.json").unlink(missing_ok=True)
    for path in directory.glob("runs/*-equal_time-*"):
        shutil.rmtree(path)
    return directory


def test_a_plan_of_equal_time_is_of_the_whole_table(copy, file, monkeypatch, capsys):
    """Though a part of it was chosen; and a row that came later gets the time of the others."""
    started = []
    monkeypatch.setattr(work.jobs.Jobs, "start", lambda self, name, *rest: started.append(name) or sys.exit(3))
    flags = [f"--config={file}:equal", f"--workdir={copy}", "--only=wide-seed0|wide-equal_time-seed0"]
    assert cli.run(command.main, flags) == 3
    plan = json.loads((copy / "equal_time.json").read_text())
    assert set(plan["steps"]) == {"narrow", "wide", "thin"} and started == ["wide-equal_time-seed0"]
    del plan["steps"]["thin"]
    (copy / "equal_time.json").write_text(json.dumps(plan | {"seconds": 7.0}))
    assert cli.run(command.main, [*flags[:2], "--only=wide-seed0"]) == 0
    again = json.loads((copy / "equal_time.json").read_text())
    report = json.loads((copy / "runs" / "thin-seed0" / "report" / "metrics.json").read_text())
    rates = [
        12 / json.loads((copy / "runs" / f"thin-seed{seed}" / "report" / "metrics.json").read_text())["train_seconds"]
        for seed in (0, 1)
    ]
    assert report["checkpoint_step"] == 12
    assert again == {"seconds": 7.0, "steps": plan["steps"] | {"thin": round(7 * np.median(rates))}}
    shutil.rmtree(copy / "runs" / "thin-seed0")
    shutil.rmtree(copy / "runs" / "thin-seed1")
    (copy / "equal_time.json").unlink()
    assert cli.run(command.main, [*flags[:2], "--only=wide-seed0"]) == 0
    assert not (copy / "equal_time.json").exists()  # not every row has finished
    capsys.readouterr()


def test_what_was_not_chosen_now_stays_in_the_results(copy, file, capsys):
    for flags in (["--only=wide", "--report_only"], ["--seeds=1"]):
        (copy / "results.csv").unlink()
        assert cli.run(command.main, [f"--config={file}", f"--workdir={copy}", *flags]) == 0
        rows = csv.DictReader(io.StringIO((copy / "results.csv").read_text()))
        found = [f"{row['run']}-seed{row['seed']}" for row in rows if row["status"] == "finished"]
        assert found == [f"{name}-seed{seed}" for seed in (0, 1) for name in ("narrow", "wide", "thin")]
    capsys.readouterr()


def test_files_that_were_damaged_are_one_line_each(copy, file, capsys):
    def error_of(*flags):
        assert cli.run(command.main, [*flags, f"--workdir={copy}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    for text in ('{"seconds": 7.0, "st', "[]", '{"seconds": "x", "steps": {}}'):
        (copy / "equal_time.json").write_text(text)
        assert "equal_time.json cannot be used; remove it and the runs of equal time" in error_of(
            f"--config={file}:equal", "--list"
        )
    (copy / "equal_time.json").unlink()
    (copy / "results.md").unlink()
    (copy / "results.md").mkdir()
    assert error_of(f"--config={file}", "--report_only") == (
        f"error: {copy}/results.md cannot be written: Is a directory"
    )
    with contextlib.closing(sqlite3.connect(copy / "ledger.db")) as connection, connection:
        connection.execute(
            "CREATE TRIGGER no BEFORE UPDATE ON vitcls_ledger BEGIN SELECT RAISE(FAIL, 'the disk is read-only'); END"
        )
    assert "ledger.db cannot be used: the disk is read-only" in error_of(f"--config={file}")


OWN_PARTS = {  # the first is imported by the flag, the second by the config
    "own_optimizer.py": """
from vitcls.optim import optimizers

class Own(optimizers.SGD):
    pass

optimizers.OPTIMIZERS.add("own", Own)
""",
    "own_loss.py": """
from vitcls.tasks import losses

class Own(losses.CrossEntropy):
    pass

losses.LOSSES.add("own", Own)
""",
    "tiny.py": """
import own_loss
from tests.conftest import make_tiny_config

def get_config():
    config = make_tiny_config()
    config.loss.name = "own"
    return config
""",
}


@pytest.mark.by_turns
def test_folds_are_pooled(tmp_path):
    """Against scikit-learn on the predictions of all folds; each training image is in one of them.

    Their processes know the parts that come from outside of the package.
    """
    for name, text in OWN_PARTS.items():
        (tmp_path / name).write_text(text)
    arguments = [f"--config={ROOT}/configs/experiments/kfold.py:{tmp_path}/tiny.py", f"--workdir={tmp_path}/folds"]
    own = ["--import=own_optimizer", "--override=optimizer.name=own"]
    worker = start(*arguments, *own, "--folds=2", "--workers=2", path=tmp_path)
    out, err = worker.communicate(timeout=300)
    assert worker.returncode == 0, err
    kept = [np.load(tmp_path / "folds" / "runs" / f"fold{k}-seed0" / "report" / "predictions.npz") for k in (0, 1)]
    labels = np.concatenate([each["labels"] for each in kept])
    predicted = np.concatenate([each["probabilities"].argmax(1) for each in kept])
    info = json.loads((tmp_path / "folds" / "runs" / "fold0-seed0" / "dataset.json").read_text())["num_examples"]
    assert len(labels) == info["train"] + info["validation"]
    (row,) = [line for line in out.splitlines() if line.startswith("| all 2 folds, seed 0")]
    assert f"{len(labels):,}" in row and f"{np.mean(predicted == labels):.2%} [" in row
    assert f"{f1_score(labels, predicted, average='macro'):.4f} [" in row
    _, err = (worker := start(*arguments, "--folds=1", "--list", path=tmp_path)).communicate(timeout=60)
    assert worker.returncode == 2 and "must name a config, with 2 to 100 folds" in err


@pytest.mark.by_turns("done")
def test_what_is_finished_is_skipped_and_the_list_says_what_is_left(done, file, capsys):
    directory, _ = done
    before = ledger.read("", directory)
    arguments = [f"--config={file}", f"--workdir={directory}"]
    assert cli.run(command.main, [*arguments, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["narrow-seed0", "finished"]
    assert lines[-1] == "6 runs; time left: 0:00:00"
    assert cli.run(command.main, [*arguments, "--list", "--seeds=0,7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("narrow-seed7") and "pending, about 0:00:" in lines[4]
    assert cli.run(command.main, arguments) == 0
    assert ledger.read("", directory) == before


def test_a_stopped_run_that_was_evaluated_is_not_finished(trained, tmp_path, tiny_config, no_pictures):
    workdir = shutil.copytree(trained, tmp_path / "run")
    run = table.Run(table.Row("run", tiny_config), tiny_config.seed, workdir)
    assert work.state_of(run).status == "finished"
    shutil.rmtree(workdir / "checkpoints" / "12")
    evaluate.evaluate(workdir)
    assert work.state_of(run).status == "interrupted"


def test_a_table_goes_on_with_the_runs_that_a_training_goes_on_with(trained, tmp_path, tiny_config):
    """Those of an older version, whose defaults compute the same."""
    config = json.loads((trained / "config.json").read_text())
    config["model"]["attention"], config["total"], config["partition"]["cpu_devices"] = "xla", "12step", 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    work.check_config(table.Run(table.Row("run", tiny_config), tiny_config.seed, tmp_path))
    with pytest.raises(UserError, match="holds a run of another config: seed was 0, is 1; use another --workdir"):
        work.check_config(table.Run(table.Row("run", tiny_config), 1, tmp_path))


@pytest.mark.by_turns("done")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only=nothing"], "--only 'nothing' is not known"),
        (["--only=("], "is no regular expression"),
        (["--seeds=a"], "--seeds=a is no list of numbers"),
        (["--workers=²"], "--workers=² must be a number of processes"),
        (["--workers=0"], "--workers=0 must be a number of processes"),
        (["--folds=5"], "--folds=5 is of cross-validation: --config=configs/experiments/kfold.py:CONFIG"),
        (["--override=total"], "--override=total must be KEY=VALUE"),
        (["--override=totl=3"], "key 'totl' is not known"),
        (["--config=nowhere.py"], "the config file 'nowhere.py' is not there"),
        (["--config=configs/experiments/vit_ablation.py:smoke", "--list"], "holds the runs of another table, such as "),
        (["--config=configs/vit_digits.py"], "has no function get_table(), which returns a table of runs"),
        (
            ["--override=batch_size=32"],
            "holds a run of another config: batch_size was 16, is 32; use another --workdir",
        ),
    ],
)
def test_mistakes_are_one_line(done, file, flags, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    directory, _ = done
    config = [] if flags[0].startswith("--config") else [f"--config={file}"]
    assert cli.run(command.main, [*config, f"--workdir={directory}", *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


def test_a_run_whose_process_was_killed_has_failed(tmp_path):
    queue = ledger.start("", tmp_path)
    for name, code, said in (("a", 0, ""), ("b", -9, "step 3"), ("c", 143, ""), ("d", 2, "error: no"), ("e", None, "")):
        queue.claim(name, {})
        if code is not None:
            queue.end(name, code, 1.0, said, {})
    end = "its process ended with exit code"
    assert work.failed(queue.entries()) == {"b": f"{end} -9", "c": f"{end} 143", "d": "error: no"}


def test_rows_have_names_of_their_own(tmp_path):
    for rows, words in (
        ("[]", "has no rows"),
        ("2 * [row]", "two rows of"),
        ("[bad]", "cannot be the name of a dir"),
        ("[number]", "cannot be the name of a dir"),
        ("[long]", "cannot be the name of a dir"),
        ("[row], seeds=()", "has no seeds"),
        ("[row], seeds=('x',)", "must be whole numbers, and one is 'x'"),
    ):
        (tmp_path / "t.py").write_text(
            "from vitcls.config import default_config\nfrom vitcls.experiment import Row, Table\n"
            "def get_table():\n"
            "    names = 'a', 'a/b', 3, 300 * 'a'\n"
            "    row, bad, number, long = (Row(name, default_config('lenet5')) for name in names)\n"
            f"    return Table('t', 'a', {rows})\n"
        )
        with pytest.raises(ValueError, match=words):
            table.load(tmp_path / "t.py")


PRESETS = [
    f"{path.name}:{preset}"
    for path in sorted((ROOT / "configs" / "experiments").glob("*.py"))
    for preset in ("smoke", "cpu", "full")
]


@pytest.mark.parametrize("name", PRESETS)
def test_every_table_of_the_house_can_run(name, tmp_path):
    loaded = table.load(ROOT / "configs" / "experiments" / name)
    assert table.runs_of(loaded, tmp_path)


@pytest.mark.by_turns
def test_every_row_of_a_smoke_table_has_a_model_that_takes_its_images(tmp_path):
    """By shapes alone; `:smoke` is of digits, which are always there."""
    seen = set()
    for name in (name for name in PRESETS if name.endswith(":smoke")):
        for run in table.runs_of(table.load(ROOT / "configs" / "experiments" / name), tmp_path, only="seed0"):
            size = run.config.dataset.image_size or 8
            shape = size, size, 1
            if (key := json.dumps([run.config.model.to_dict(), size])) not in seen:
                seen.add(key)
                fields = {key: value for key, value in run.config.model.items() if key != "name"}
                variable_shapes(models.create(run.config.model.name, 10, **fields), shape)
    assert len(seen) > 20


def test_a_row_may_be_a_point_of_several_lines():
    """Where the rules of the learning rate meet."""
    rows = table.load(ROOT / "configs" / "experiments" / "vit_batch_size.py:smoke").rows
    lines = {row.x: set(row.series) for row in rows}
    assert len(lines[128]) == 3 and all(lines[128] > set(row.series) for row in rows if row.x != 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith(":smoke")])
def test_every_smoke_table_runs_to_its_end(name, tmp_path):
    process = start(f"--config={ROOT}/configs/experiments/{name}", f"--workdir={tmp_path}/t", "--workers=2")
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    assert (tmp_path / "t" / "index.html").exists() and "runs have finished" in out
