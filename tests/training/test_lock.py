"""Two runs in one workdir: the second is refused, and the lock of a dead one is taken over."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from vitcls.core.errors import RunError, Stopped, UserError
from vitcls.training import lock
from vitcls.training.lock import LockFile, WorkdirLock

HOLD = """
import sys, time
from vitcls.training.lock import LockFile, WorkdirLock

WorkdirLock(LockFile(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the workdir."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    monkeypatch.setattr(lock, "_SILENCE", 1.0)


def of_another_machine(path):
    """The lock of `path` as if it had been made on another machine."""
    text = json.loads((path / lock.LOCK_FILE).read_text()) | {"machine": "elsewhere", "token": "theirs"}
    (path / lock.LOCK_FILE).write_text(json.dumps(text))


def test_a_second_run_is_refused_and_a_killed_holder_is_followed_at_once(tmp_path, holder):
    message = rf"is in use by process {holder.pid} on \S+ since 20\d\d-.*; wait for it, or use another --workdir"
    with pytest.raises(UserError, match=message):
        WorkdirLock(LockFile(tmp_path))
    assert json.loads((tmp_path / lock.LOCK_FILE).read_text())["process_id"] == holder.pid
    holder.kill()
    holder.wait()
    with WorkdirLock(LockFile(tmp_path)) as held:
        held.check()
    assert not list(tmp_path.iterdir())


def test_a_lock_is_released_and_leaves_no_directory_that_it_made(tmp_path):
    with WorkdirLock(LockFile(tmp_path / "new" / "run")):
        assert (tmp_path / "new" / "run" / lock.LOCK_FILE).exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (RunError("the loss is not finite;\n lower the rate"), "the loss is not finite; lower the rate"),
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOSPC, "No space"), "OSError: [Errno 28] No space"),
        (UserError("another config"), None),
        (Stopped(143, "stopped"), None),
        (KeyboardInterrupt(), None),  # a second one
    ],
)
def test_a_run_that_ends_by_an_error_leaves_why(error, failure, tmp_path):
    with pytest.raises(type(error)), WorkdirLock(LockFile(tmp_path)):
        raise error
    left = {path.name: json.loads(path.read_text())["failure"] for path in tmp_path.iterdir()}
    assert left == ({} if failure is None else {"failed.json": failure})


def test_a_run_that_ends_as_the_disk_is_full_leaves_that_it_failed(tmp_path, monkeypatch):
    def full(self, text, token):
        raise OSError(errno.ENOSPC, "No space")

    with pytest.raises(RunError), WorkdirLock(LockFile(tmp_path)):
        monkeypatch.setattr(LockFile, "replace", full)
        raise RunError("no room")
    assert [path.name for path in tmp_path.iterdir()] == ["failed.json"]


def test_a_run_that_ends_as_another_process_is_gone_leaves_why(tmp_path):
    end = "from vitcls.core import peers; held = WorkdirLock(LockFile(sys.argv[1])); peers.end('process 1 is gone')"
    script = f"import sys; from vitcls.training.lock import LockFile, WorkdirLock; {end}"
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 1
    left = {path.name: json.loads(path.read_text())["failure"] for path in tmp_path.iterdir()}
    assert left == {"failed.json": "process 1 is gone"}


def test_a_reused_process_id_does_not_keep_a_lock(tmp_path, holder):
    text = json.loads((tmp_path / lock.LOCK_FILE).read_text()) | {"process_start": "1"}
    (tmp_path / lock.LOCK_FILE).write_text(json.dumps(text))
    with WorkdirLock(LockFile(tmp_path)):
        assert json.loads((tmp_path / lock.LOCK_FILE).read_text())["process_id"] == os.getpid()


def test_a_holder_on_another_machine_lives_while_its_lock_is_written_anew(tmp_path, quick):
    with WorkdirLock(LockFile(tmp_path)):
        of_another_machine(tmp_path)
        beating = threading.Event()

        def beat():
            while not beating.wait(0.1):
                text = json.loads((tmp_path / lock.LOCK_FILE).read_text())
                (tmp_path / lock.LOCK_FILE).write_text(json.dumps(text | {"beats": text["beats"] + 1}))

        thread = threading.Thread(target=beat)
        thread.start()
        with pytest.raises(UserError, match="is in use by"):
            WorkdirLock(LockFile(tmp_path))
        beating.set()
        thread.join()


def test_a_silent_holder_on_another_machine_is_followed_and_learns_of_it(tmp_path, quick):
    first = WorkdirLock(LockFile(tmp_path))
    first.check()
    of_another_machine(tmp_path)
    second = WorkdirLock(LockFile(tmp_path))
    deadline = time.monotonic() + 10
    while not first.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(RunError, match="was taken over by process"):
        first.check()
    first.__exit__()
    second.check()
    assert (tmp_path / lock.LOCK_FILE).exists(), "the lock of the second is not the first one's to remove"
    second.__exit__()


def test_a_torn_lock_file_is_taken_over(tmp_path, quick, caplog):
    (tmp_path / lock.LOCK_FILE).write_text('{"host": "a')
    with caplog.at_level("INFO", "vitcls"), WorkdirLock(LockFile(tmp_path)) as held:
        held.check()
    assert "the lock of a run that lock.json does not name, which is dead, is taken over" in caplog.text


def test_a_lock_that_another_run_took_over_first_is_left_to_it(tmp_path, holder, monkeypatch):
    """It follows a dead holder between our look at the lock and our taking it."""
    living = (tmp_path / lock.LOCK_FILE).read_text()
    dead = json.dumps(json.loads(living) | {"process_start": "long ago", "token": "dead"})
    (tmp_path / lock.LOCK_FILE).write_text(dead)
    is_alive = WorkdirLock._is_alive

    def while_we_look(self, found):
        alive = is_alive(self, found)
        (tmp_path / lock.LOCK_FILE).write_text(living)
        return alive

    monkeypatch.setattr(WorkdirLock, "_is_alive", while_we_look)
    with pytest.raises(UserError, match=f"is in use by process {holder.pid} on "):
        WorkdirLock(LockFile(tmp_path))
    assert json.loads((tmp_path / lock.LOCK_FILE).read_text())["token"] == json.loads(living)["token"]
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK_FILE]


def test_a_lock_that_is_out_of_reach_for_a_while_is_held_on_to(tmp_path, quick, monkeypatch):
    with WorkdirLock(LockFile(tmp_path)) as held:
        monkeypatch.setattr(LockFile, "read", lambda self: 1 / 0)  # as a service's own kind of error
        time.sleep(0.3)
        monkeypatch.undo()
        before = (tmp_path / lock.LOCK_FILE).read_text()
        deadline = time.monotonic() + 10
        while (tmp_path / lock.LOCK_FILE).read_text() == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / lock.LOCK_FILE).read_text() != before
        held.check()


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="no directory here in which nobody may make a file")
def test_a_place_that_cannot_be_written_to_is_said():
    with pytest.raises(UserError, match=r"--workdir=/proc cannot be written to \(.*\); use another"):
        LockFile("/proc").create("{}")
