"""Runs whose bucket is away for a while, and runs that are killed in the middle of a save into it.

Servers are real ones that are stopped, killed and started again; each run is the command itself.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from tests import bucket
from tests.launch.conftest import end_of
from vitcls import cli, main, status
from vitcls.core import buckets
from vitcls.core.errors import RunError
from vitcls.training import checkpoint, places
from vitcls.training.metrics_log import read_history

for needed in ("gcsfs", "gcp_storage_emulator", "s3fs", "moto"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.usefixtures("no_pictures")
ANSWER = 3.0  # seconds; a busy machine is not to be taken for one that is away
# vitcls train, in a hurry, which stands still before two of its steps until it is told to go on.
COMMAND = f"""
import sys
from vitcls import cli, main, train
from vitcls.core import buckets
from vitcls.report import plots
from vitcls.training import places

plots.styled = lambda draw: None
places._PERIOD, places._SETTLE, buckets._ANSWER = 0.05, 0.01, {ANSWER}
update = train.Update.__call__

def update_when_told(self, state, sums, step):
    if step in (4, 10):
        print(f"before step {{step}}", file=sys.stderr, flush=True)
        sys.stdin.readline()
    return update(self, state, sums, step)

train.Update.__call__ = update_when_told
sys.exit(cli.run(main.main))
"""


class Run:
    """A run of the tiny config in a process of its own."""

    def __init__(self, tmp_path, workdir, url, *, waits=False):
        (tmp_path / "config.py").write_text("from tests.conftest import make_tiny_config as get_config\n")
        self._cache = tmp_path / "cache"
        self._cache.mkdir(exist_ok=True)
        environment = {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "VITCLS_CACHE_DIR": str(self._cache),
            "JAX_COMPILATION_CACHE_DIR": os.path.join(os.environ["VITCLS_CACHE_DIR"], "xla"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"],
            env=os.environ | environment | bucket.environment(workdir.partition(":")[0], url),
            stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = []
        self._watch = threading.Timer(120, self.process.kill)  # so that nothing waits for a run that stands still
        self._watch.start()

    def read_until(self, pattern):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return
        raise AssertionError("\n".join(self.lines))

    def go_on(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def directory(self):
        """The copy of its workdir, in which it works."""
        (path,) = (self._cache / "workdirs").glob("*.lock")
        return path.with_suffix("")

    def end(self):
        _, err = self.process.communicate()
        self._watch.cancel()
        self.lines += err.splitlines()
        return self.process.returncode

    def said(self, words):
        return [line for line in self.lines if words in line]


class Store:
    """A server with the bucket `runs`, and a proxy before it. What is in gs is kept when the server is killed."""

    def __init__(self, scheme, directory):
        self.scheme, self._directory = scheme, directory if scheme == "gs" else ""
        self.server, self.url = bucket.start_server(scheme, directory=self._directory)
        self.proxy = bucket.Proxy(self.url)

    def files(self):
        return bucket.files(self.scheme, self.url)

    @contextlib.contextmanager
    def hanging(self):
        self.server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.server.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def gone(self):
        """Nothing listens; moto forgets what it has when it ends, so that it is cut off instead."""
        if self.scheme == "s3":
            with self.proxy.away():
                yield
            return
        self.server.kill()
        self.server.communicate()
        yield
        port = int(self.url.rpartition(":")[2])
        self.server, self.url = bucket.start_server(self.scheme, port=port, directory=self._directory)

    def close(self):
        self.proxy.close()
        self.server.communicate()


@pytest.fixture(params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path, monkeypatch):
    opened = Store(request.param, tmp_path / "bucket")
    for name, value in bucket.environment(opened.scheme, opened.proxy.url).items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class(opened.scheme).clear_instance_cache()  # S3's knows its server from the start
    monkeypatch.setattr(places, "_PERIOD", 0.05)
    monkeypatch.setattr(places, "_SETTLE", 0.01)
    monkeypatch.setattr(places, "cache_dir", lambda: tmp_path)
    yield opened
    opened.close()


def look(workdir, capsys):
    assert cli.run(status.main, [workdir, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_same_end(workdir, trained):
    """The last checkpoint has the same bits, metrics.jsonl the same lines, and nothing half done is left."""
    copy = places.copied(workdir)
    step, arrays, events = end_of(copy)
    expected_step, expected_arrays, expected_events = end_of(trained)
    assert (step, events) == (expected_step, expected_events) and len(events) == 5
    assert arrays.keys() == expected_arrays.keys() and len(arrays) > 20
    assert [name for name in arrays if arrays[name] != expected_arrays[name]] == []
    scheme, _, root = workdir.partition("://")
    names = {name.removeprefix(f"{root}/") for name in bucket.files(scheme).find(root)}
    assert {"config.json", "dataset.json", "metrics.jsonl", "report/metrics.json", "report/index.html"} <= names
    assert not any(part in name for name in names for part in ("tmp", "lock", ".parts", ".new"))
    saved = {int(name.split("/")[1]) for name in names if name.startswith("checkpoints/")}
    assert saved == set(checkpoint.steps(copy / "checkpoints")) >= set(checkpoint.steps(trained / "checkpoints"))
    assert all(checkpoint.damage(copy / "checkpoints" / str(step)) is None for step in saved)


@pytest.mark.by_turns
def test_a_run_whose_bucket_is_away_trains_on_and_loses_nothing(store, trained, tmp_path, monkeypatch, capsys):
    workdir = f"{store.scheme}://runs/away/run"
    run = Run(tmp_path, workdir, store.proxy.url, waits=True)
    run.read_until("before step 4")
    wait_until(lambda: store.files().exists("runs/away/run/checkpoints/4/manifest.json"))
    array = r"P\w+ .*/away/run/checkpoints/8/tree/d/\w+$"
    with store.proxy.catch(array, "half") as wait_for_request, contextlib.ExitStack() as held:
        run.go_on()
        run.read_until("before step 10")
        wait_for_request()
        since = time.monotonic()
        held.enter_context(store.hanging())  # it takes requests and does not answer
        run.read_until(rf"{workdir} cannot be reached \(no answer\); the run goes on and tries again")
        assert [event["step"] for event in read_history(run.directory())] == [4, 6, 8]
        assert checkpoint.steps(run.directory() / "checkpoints")[-1] == 8
    away = time.monotonic() - since
    run.read_until(rf"{workdir} is reached again after \d+ s")
    assert int(run.lines[-1].split()[-2]) + 1 >= away  # all of it, not only what came after the complaint
    seen = look(workdir, capsys)
    assert (seen["step"], seen["checkpoint_step"], seen["state"]) == (8, 8, "alive")
    with store.gone():
        run.go_on()
        run.read_until("step 12/12  eval")
        run.read_until("cannot be reached")
        with monkeypatch.context() as patch:
            patch.setattr(buckets, "_ANSWER", 0.5)
            assert cli.run(status.main, [workdir]) == 1
        assert re.fullmatch(r"error: the bucket \w+://runs is out of reach: .*\n", capsys.readouterr().err)
    assert run.end() == 0, run.lines
    assert_same_end(workdir, trained)
    assert len(run.said("cannot be reached")) == len(run.said("is reached again")) == 2, run.lines
    assert not run.said("Traceback") and not run.said("Error")


# What is caught when the run is killed, at which point of it, and the last checkpoint that is whole then.
KILLS = [
    ("checkpoints/4/tree/.*", "half", None),
    ("checkpoints/8/manifest.json", "head", 6),
    ("checkpoints/8/manifest.json", "half", 6),
    ("checkpoints/12/manifest.json", "answer", 12),
]


@pytest.mark.by_turns
def test_a_run_that_is_killed_in_the_middle_of_saves_ends_with_the_same_bits(store, trained, tmp_path, capsys):
    """Four kills -9 of one run, each at another point of a save, and the same command after each."""
    workdir, before = f"{store.scheme}://runs/killed/run", None
    for pattern, at, whole in KILLS:
        with store.proxy.catch(rf"P\w+ .*/killed/run/{pattern}$", at) as wait_for_request:
            run = Run(tmp_path, workdir, store.proxy.url)
            wait_for_request()
            run.process.kill()
            assert run.end() == -signal.SIGKILL, run.lines
        assert bool(run.said(f"resumed from step {before}")) == (before is not None), run.lines
        torn = store.files().find(f"runs/killed/run/{pattern.partition('/m')[0].partition('/t')[0]}")
        assert torn and any(name.endswith("/manifest.json") for name in torn) == (at == "answer")
        seen = look(workdir, capsys)
        assert (seen["checkpoint_step"], seen["state"]) == (whole, "silent")
        folder = places.copied(workdir) / "checkpoints"
        assert max(checkpoint.steps(folder), default=None) == whole
        assert all(checkpoint.damage(folder / str(step)) is None for step in checkpoint.steps(folder))
        before = whole
    assert cli.run(main.main, [f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]) == 0
    assert "resumed from step 12" in capsys.readouterr().err
    assert look(workdir, capsys)["state"] == "finished"
    assert_same_end(workdir, trained)


def test_what_a_bucket_lacks_that_does_not_come_back_is_kept(store, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_PATIENCE", 1.0)
    with contextlib.ExitStack() as held:

        def run():
            with places.opened(f"{store.scheme}://runs/away/for_good") as place, place.hold():
                monkeypatch.setattr(buckets, "_ANSWER", 0.3)
                held.enter_context(store.hanging())
                (place.path / "config.json").write_text("{}")

        with pytest.raises(RunError, match=r"could not be reached for 1 s; what it lacks is in (\S+)") as error:
            run()
    kept = tmp_path / "workdirs" / os.path.basename(str(error.value).split()[-1])
    with places.opened(f"{store.scheme}://runs/away/another"):  # which removes what killed processes have left
        assert (kept / "config.json").exists()


def test_a_bucket_that_was_taken_over_while_it_was_away_is_left_alone(store, monkeypatch, caplog):
    """What the run has made meanwhile does not go over what the other has made."""
    workdir, root, files = f"{store.scheme}://runs/away/taken", "runs/away/taken", store.files()
    with pytest.raises(RunError, match="was taken over by process 1 on afar since yesterday; this run stops"):  # noqa: SIM117
        with places.opened(workdir) as place, place.hold():
            (place.path / "config.json").write_text("ours")
            wait_until(lambda: files.exists(f"{root}/config.json"))
            other = json.loads(files.cat_file(f"{root}/lock.json"))
            other |= {"token": "other", "process_id": 1, "host": "afar", "since": "yesterday"}
            with store.proxy.away():
                monkeypatch.setattr(buckets, "_ANSWER", ANSWER)
                (place.path / "config.json").write_text("ours, newer")
                wait_until(lambda: "cannot be reached" in caplog.text)
                files.pipe_file(f"{root}/lock.json", json.dumps(other).encode())
                files.pipe_file(f"{root}/config.json", b"theirs")
            wait_until(lambda: "is reached again" in caplog.text)
    assert files.cat_file(f"{root}/config.json") == b"theirs"
    assert json.loads(files.cat_file(f"{root}/lock.json")) == other


def test_runs_that_are_out_of_reach_are_waited_for_together(store, tmp_path, monkeypatch, capsys):
    """What is wrong with their bucket is told once, and those on a disk are shown."""
    files, near = store.files(), [str(tmp_path / name) for name in ("b", "a")]
    for name in near:
        os.mkdir(name)
        pathlib.Path(name, "config.json").write_text('{"total": "1 epochs"}')
    far = [f"{store.scheme}://runs/together/{i}" for i in (7, 3, 5, 1, 2, 0, 4, 6)]
    for url in far:
        files.pipe_file(f"{url.partition('://')[2]}/config.json", b'{"total": "1 epochs"}')
    assert cli.run(status.main, [near[0], *far, near[1]]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown == [near[0], *far, near[1]]
    monkeypatch.setattr(buckets, "_ANSWER", 2.0)
    with store.hanging():
        since = time.monotonic()
        assert cli.run(status.main, [near[0], *far, near[1], f"{far[0]}*"]) == 1
        assert time.monotonic() - since < 10  # one after the other they take 18 s at least
        watch = subprocess.Popen(
            [sys.executable, "-m", "vitcls.status", "--watch", far[0]], env=os.environ | {"PYTHONPATH": os.getcwd()}
        )
        time.sleep(3)  # it waits for an answer, 15 s
        watch.send_signal(signal.SIGINT)
        assert watch.wait(timeout=5) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[1:]] == near
    assert err == f"error: the bucket {store.scheme}://runs is out of reach: no answer\n"


def test_who_reads_a_bucket_that_is_away_waits_for_it(store, monkeypatch, caplog):
    """Another process of a run, and `vitcls status --watch`."""
    workdir, files = f"{store.scheme}://runs/away/read", store.files()
    files.pipe_file("runs/away/read/config.json", b'{"total": "1 epochs"}')
    script = "from vitcls import cli, status; from vitcls.core import buckets\n"
    script += "buckets._ANSWER, status._REFRESH = 1.0, 0.1\nraise SystemExit(cli.run(status.main))"
    watch = subprocess.Popen(
        [sys.executable, "-c", script, "--watch", "--json", workdir],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert json.loads(watch.stdout.readline())["state"] == "begun"
    with places.opened(workdir) as place:
        monkeypatch.setattr(buckets, "_ANSWER", 1.0)
        reading = threading.Thread(target=place.share)
        with store.proxy.away():
            assert f"{workdir} cannot be reached (" in watch.stderr.readline()
            reading.start()
            wait_until(lambda: "cannot be reached" in caplog.text)
            files.pipe_file("runs/away/read/dataset.json", b"{}")
        reading.join()
        assert (place.path / "dataset.json").exists()
    watch.send_signal(signal.SIGINT)
    _, err = watch.communicate(timeout=30)
    assert watch.returncode == 0 and "Traceback" not in err
