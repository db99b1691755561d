"""The database of feedback, SQLite and PostgreSQL as they are: once each, limits, forgetting, many writers, kills."""

import hashlib
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from vitcls.core.errors import RunError, UserError
from vitcls.feedback import store as stores
from vitcls.feedback.store import Correction, Quota, open_store

ROOT = pathlib.Path(__file__).parents[2]
CAT = Correction(b"a cat", "answer-1", "weights", "dog", 0.75, "cat", "ann@home")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/feedback.db"
        return
    import psycopg

    server = request.getfixturevalue("postgres")
    yield server.url
    with psycopg.connect(server.url) as connection:
        connection.execute("DROP TABLE IF EXISTS feedback, feedback_images, feedback_version")


@pytest.fixture
def store(url):
    opened = open_store(url)
    yield opened
    opened.close()


def test_each_is_kept_once_and_a_client_may_change_their_mind(store):
    assert store.add(CAT)
    assert not store.add(CAT)
    assert store.add(CAT._replace(client="bob"))
    assert store.add(CAT._replace(label="dog"))  # ann again: the answer was right
    ann, bob = sorted(store.rows(), key=lambda row: row.client)
    assert (ann.label, bob.label, ann.image) == ("dog", "cat", bob.image)
    assert (bob.answer, bob.model, bob.predicted, bob.probability) == ("answer-1", "weights", "dog", 0.75)
    assert [row.client for row in store.rows()] == [bob.client, ann.client]  # the newest last
    assert store.image(ann.image) == b"a cat"
    found = store.summary()
    assert found.pop("newest") == max(ann.time, bob.time)
    assert found == {"images": 1, "bytes": 5, "corrections": 1, "confirmations": 1, "by_class": {"cat": 1, "dog": 1}}


def test_limits(url):
    store = open_store(url, client_per_day=2, total_bytes=10)
    assert store.add(CAT) and store.add(CAT._replace(image=b"dogs!"))
    with pytest.raises(Quota, match="2 things"):
        store.add(CAT._replace(image=b"x"))
    with pytest.raises(Quota, match="full"):
        store.add(CAT._replace(image=b"x", client="bob"))
    assert store.add(CAT._replace(client="bob"))  # of an image that is there already
    assert store.add(CAT._replace(label="dog"))  # in place of what was said
    assert store.summary()["images"] == 2
    store.close()


def test_a_day_later_a_client_may_speak_again(url, monkeypatch):
    store, clock = open_store(url, client_per_day=1), [1_000_000.0]
    monkeypatch.setattr(stores.time, "time", lambda: clock[0])
    assert store.add(CAT)
    clock[0] += 86_000
    with pytest.raises(Quota):
        store.add(CAT._replace(image=b"another"))
    clock[0] += 500
    assert store.add(CAT._replace(image=b"another"))
    store.close()


def on_disk(url, request, tmp_path):
    """All bytes of the files of the database, its logs of changes but for PostgreSQL's included."""
    if url.startswith("sqlite"):
        return b"".join(path.read_bytes() for path in tmp_path.glob("feedback.db*"))
    import psycopg

    server = request.getfixturevalue("postgres")
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
        place = pathlib.Path(connection.execute("SHOW data_directory").fetchone()[0])
    return b"".join(path.read_bytes() for path in (place / "base").rglob("*") if path.is_file())


def pieces(content, of):
    """How many pieces of an image are somewhere in `of`."""
    return sum(content[start : start + 16] in of for start in range(0, len(content) - 16, 160))


@pytest.mark.by_turns
def test_what_is_forgotten_is_in_no_file(url, request, tmp_path, store):
    one, both, theirs = os.urandom(400), os.urandom(3_000), [os.urandom(size) for size in (300, 900, 4_000, 50_000) * 5]
    if url.startswith("sqlite"):  # as it is unless SQLite was built otherwise
        with store._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA secure_delete=OFF")
    for image in (one, both, *theirs):
        store.add(CAT._replace(image=image))
    store.add(CAT._replace(image=both, client="bob"))
    held = on_disk(url, request, tmp_path)
    assert all(pieces(image, held) for image in (one, both, *theirs))
    sha256 = hashlib.sha256(one).hexdigest()
    assert store.forget_image(sha256) == 1 and store.forget_image(sha256) == 0
    held = on_disk(url, request, tmp_path)
    assert not pieces(one, held) and all(pieces(image, held) for image in theirs)
    assert store.forget_client(CAT.client) == 21
    held = on_disk(url, request, tmp_path)
    assert not any(pieces(image, held) for image in (one, *theirs)) and pieces(both, held)  # of which bob speaks too
    with pytest.raises(KeyError):
        store.image(sha256)
    assert [row.client for row in store.rows()] == ["bob"]
    assert CAT.client.encode() not in held and CAT.answer.encode() in held


def test_forgetting_says_when_another_program_still_holds_the_bytes(tmp_path):
    import sqlite3

    store = open_store(f"sqlite:///{tmp_path}/feedback.db")
    store.add(CAT)
    with store._engine.connect() as connection:  # that the wait is short
        connection.exec_driver_sql("PRAGMA busy_timeout=200")
    reader = sqlite3.connect(tmp_path / "feedback.db")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM feedback").fetchall()
    with pytest.raises(RunError, match="forget again"):
        store.forget_client(CAT.client)
    reader.close()
    assert store.forget_client(CAT.client) == 0
    assert b"a cat" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    store.close()


ADDER = """
import sys
from vitcls.feedback.store import Correction, open_store
url, name = sys.argv[1:]
store = open_store(url, client_per_day=10**6)
for i in range(10**6):
    added = store.add(Correction(b"image %d" % i, str(i), "m", "dog", 0.5, "cat", name))
    print(f"{i} {added}", flush=True)
    if name != "killed" and i == 49:
        break
"""


def start(url, name):
    command = [sys.executable, "-c", ADDER, url, name]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_processes_start_and_add_at_once_and_none_is_lost(url):
    adders = [start(url, name) for name in ("ann", "bob", "ann")]
    said = [adder.communicate(timeout=120)[0].split("\n") for adder in adders]
    assert [adder.returncode for adder in adders] == [0, 0, 0]
    added = sum(line.endswith("True") for lines in said for line in lines)
    store = open_store(url)
    assert added == len(list(store.rows())) == 100  # the two of ann say the same
    assert store.summary()["images"] == 50
    store.close()


def test_a_new_file_that_another_process_opens_is_waited_for(tmp_path):
    path = tmp_path / "feedback.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    ending = threading.Timer(0.5, other.rollback)
    ending.start()
    open_store(f"sqlite:///{path}").close()
    ending.join()
    other.close()


def test_threads_add_at_once_and_keep_the_limit(url):
    store, refused = open_store(url, client_per_day=30), []

    def add(worker):
        for i in range(10):
            try:
                store.add(CAT._replace(image=b"%d %d" % (worker, i)))
            except Quota:
                refused.append(i)

    threads = [threading.Thread(target=add, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(list(store.rows())), len(refused)) == (30, 50)
    store.close()


def test_a_kill_loses_nothing_that_was_said_to_be_kept(url):
    with start(url, "killed") as adder:
        lines = [adder.stdout.readline() for _ in range(40)]
        adder.send_signal(signal.SIGKILL)
        lines += adder.stdout.readlines()
    store = open_store(url)
    kept = {row.answer for row in store.rows()}
    assert kept >= {line.split()[0] for line in lines if line.endswith("True\n")}
    assert store.add(CAT)
    store.close()


def test_a_database_that_comes_back_is_used_again(postgres):
    store = open_store(postgres.url)
    store.add(CAT)
    postgres.stop()
    try:
        with pytest.raises(RunError, match="cannot be used") as lost:
            store.add(CAT._replace(client="bob"))
        assert "s3cret" not in str(lost.value)
    finally:
        postgres.start()
    assert store.add(CAT._replace(client="bob"))
    postgres.stop()
    postgres.start()
    assert store.add(CAT._replace(client="eve"))  # though its connections are those of before
    assert store.forget_image(next(store.rows()).image) == 3
    store.close()


def test_tables_of_a_newer_version_are_left_alone(url):
    """Those without a version are of the first."""
    opened = open_store(url)
    opened.add(CAT)
    with opened.writing() as connection:
        connection.exec_driver_sql("DROP TABLE feedback_version")
    opened.close()
    again = open_store(url)
    assert [row.label for row in again.rows()] == ["cat"]
    with again.writing() as connection:
        connection.exec_driver_sql(f"UPDATE feedback_version SET version = {stores.VERSION + 1}")
    again.close()
    with pytest.raises(UserError, match=rf"tables of version 2, and this vitcls knows {stores.VERSION}: update"):
        open_store(url)


@pytest.mark.parametrize(
    "url", ["oracle://me:secret@x/y", "sqlite://", "nonsense", "sqlite:////nowhere/x.db", "sqlite:///{file}"]
)
def test_a_database_that_cannot_be_used_is_one_line(url, tmp_path):
    (tmp_path / "text").write_text("no database, " * 100)
    with pytest.raises(UserError) as said:
        open_store(url.format(file=tmp_path / "text"))
    assert "\n" not in str(said.value) and "secret" not in str(said.value)
