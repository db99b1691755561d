"""The queue in a database: who gets a run, when it is taken for another's, and a database that is away."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from vitcls import jobs, ledger
from vitcls.core.errors import RunError, Stopped, UserError

ROOT = pathlib.Path(__file__).parents[1]
CLAIM = """
import pathlib, sys, time
from vitcls import ledger

with ledger.start(sys.argv[1], pathlib.Path(sys.argv[2])) as queue:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(sys.argv[3])):
        if queue.claim(str(number), {"by": queue.owner}) is not None:
            print(number, flush=True)
    print("done", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request):
    """A URL; '' is SQLite in the directory of the job."""
    return "" if request.param == "sqlite" else request.getfixturevalue("postgres").url


def claimer(storage, directory, count):
    """A process that claims `count` runs once a line comes, and holds them until another comes."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, storage, str(directory), str(count)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def won(process):
    return [int(line) for line in iter(process.stdout.readline, "done\n")]


def elsewhere(queue):
    """Makes a worker one of another machine, of which nothing but its signs of life is known."""
    queue.owner = json.dumps(json.loads(queue.owner) | {"machine": "elsewhere"})
    return queue


def silent_for(queue, seconds):
    queue.database.run("UPDATE vitcls_ledger SET beat = CLOCK - ? WHERE job = ? AND name <> ''", seconds, queue.job)


@pytest.mark.by_turns
def test_every_run_has_one_worker_and_those_of_a_killed_one_are_free_at_once(storage, tmp_path):
    processes = [claimer(storage, tmp_path, 40) for _ in range(3)]
    for process in processes:
        go(process)
    shares = {process: won(process) for process in processes}
    assert sorted(number for share in shares.values() for number in share) == list(range(40))
    killed = max(processes, key=lambda process: len(shares[process]))
    killed.kill()
    killed.communicate()
    with ledger.start(storage, tmp_path) as queue:
        taken = {number: queue.claim(str(number), {"by": "me"}) for number in range(40)}
    assert sorted(number for number, data in taken.items() if data is not None) == shares[killed]
    assert all(json.loads(taken[number]["by"])["process_id"] == killed.pid for number in shares[killed])
    for process in processes:
        if process is not killed:
            process.communicate("\n")
    assert not any(entry.held for entry in ledger.read(storage, tmp_path).values())


def test_a_worker_of_another_machine_is_dead_after_half_a_minute_of_silence(storage, tmp_path):
    there, here = elsewhere(ledger.start(storage, tmp_path)), ledger.start(storage, tmp_path)
    assert there.claim("a", {"x": [1, 2.5]}) == {"x": [1, 2.5]}
    silent_for(there, 25)
    here._sign()
    assert here.claim("a", {"x": 0}) is None and here.entries()["a"].held
    silent_for(there, 31)
    assert not here.entries()["a"].held
    there._sign()
    assert here.claim("a", {"x": 0}) is None  # it had slept, and is back in time
    silent_for(there, 31)
    assert here.claim("a", {"x": 0}) == {"x": [1, 2.5]}
    there.end("a", 1, 5.0, "too late", {})
    there.release("a")
    assert here.entries()["a"][:3] == ({"x": [1, 2.5]}, True, None)
    here.end("a", 0, 7.0, "done", {"y": 1})
    assert here.entries()["a"]._replace(beat=0) == ledger.Entry({"y": 1}, False, 0, 0, 7.0, "done")


def test_a_worker_gives_signs_of_life(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_BEAT", 0.05)
    with elsewhere(ledger.start(storage, tmp_path)) as queue:
        queue.claim("a", {})
        silent_for(queue, 31)
        deadline = time.monotonic() + 20
        while not queue.entries()["a"].held:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_failed_before_is_tried_again_and_what_failed_meanwhile_is_not(storage, tmp_path):
    first = ledger.start(storage, tmp_path)
    first.claim("a", {})
    first.end("a", 2, 3.0, "error", {})
    assert first.claim("a", {}, again=True) is None
    second = ledger.start(storage, tmp_path)
    assert second.claim("a", {}) is None
    assert second.claim("a", {}, again=True) == {}
    second.end("a", 0, 4.0, "", {})
    assert second.entries()["a"].seconds == 7.0


def test_jobs_do_not_meet_in_a_database(storage, tmp_path):
    one, other = (ledger.start(storage, tmp_path / name) for name in ("one", "other"))
    assert one.claim("a", {}) == {} == other.claim("a", {})
    other.end("a", 0, 1.0, "", {})
    assert one.entries()["a"].code is None
    (tmp_path / "one").rename(tmp_path / "moved")
    assert ledger.read(storage, tmp_path / "moved")["a"].held  # as another machine may call it


def test_workers_that_start_at_once_are_of_one_job(storage, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(ledger.start(storage, tmp_path).job)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


@pytest.fixture
def queue(postgres, tmp_path, caplog, monkeypatch):
    """With a run, and its database stopped."""
    monkeypatch.setattr(ledger._logger, "propagate", True)
    queue = ledger.start(postgres.url, tmp_path)
    queue.claim("a", {})
    postgres.stop()
    timer = threading.Timer(2.0, postgres.start)
    timer.start()
    yield queue
    timer.join()


def test_a_database_that_is_away_for_a_while_is_waited_for(queue, postgres, caplog):
    queue._sign()  # is nothing meanwhile
    queue.end("a", 0, 1.0, "", {"x": 1})
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{postgres.public} is away (") and "\n" not in message and "s3cret" not in message
    assert queue.entries()["a"].data == {"x": 1}


def test_a_signal_ends_the_waiting(queue):
    processes = jobs.Jobs(1)
    queue.pause = processes.pause
    with processes, pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        queue.entries()
    assert stopped.value.code == 143


def test_waiting_has_an_end(queue, monkeypatch):
    monkeypatch.setattr(ledger, "_PATIENCE", 0.0)
    with pytest.raises(RunError, match=r"is away: .*; the same command goes on"):
        queue.entries()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://me:s3cret@host/runs", "--storage must be sqlite:///PATH or postgresql://USER@HOST/DATABASE"),
        ("s3cret", "--storage must be sqlite:///PATH"),
        ("sqlite:////nowhere/at/all.db", "--storage=sqlite:////nowhere/at/all.db cannot be used: unable to open"),
        ("postgresql://me:s3cret@127.0.0.1:1/runs", "--storage=postgresql://me@127.0.0.1:1/runs cannot be used: "),
        ("postgresql://127.0.0.1:1/runs?user=me&password=s3cret", "--storage=postgresql://127.0.0.1:1/runs cannot"),
        ("postgresql://me:s3cret%zz@127.0.0.1:1/runs", 'invalid percent-encoded token: "***'),
        ("postgresql://me:s3cret@s3cret/runs@127.0.0.1:1/runs", "--storage=postgresql://me@127.0.0.1:1/runs cannot"),
        ("postgresql://me:s3cret@127.0.0.1:port/runs", "cannot be used: "),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line_without_the_password(url, words, tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(UserError) as raised:
        ledger.start(url, tmp_path / "a" / "b")
    assert words in str(raised.value) and "\n" not in str(raised.value) and "s3cret" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_wrong_password_is_not_said(postgres, tmp_path):
    with pytest.raises(UserError, match="password authentication failed for user") as raised:
        ledger.start(postgres.url.replace("s3cret", "wr0ng"), tmp_path / "a")
    assert "wr0ng" not in str(raised.value) and not (tmp_path / "a").exists()


def test_a_job_is_not_begun_again_in_another_database(postgres, tmp_path):
    ledger.start(postgres.url, tmp_path).claim("a", {})
    for storage in ("", f"sqlite:///{tmp_path}/other.db"):
        with pytest.raises(UserError, match=f"does not know the job of {tmp_path}; give the --storage that it began"):
            ledger.start(storage, tmp_path)
    assert "s3cret" not in (tmp_path / ledger.JOB_FILE).read_text()


def test_a_package_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"needs another package: pip install 'vitcls\[postgres\]'"):
        ledger.start("postgresql://host/runs", tmp_path / "a")
    assert not (tmp_path / "a").exists()
