"""Which worker has which run of a table or a search, and what came of it: a queue in a database.

SQLite, in a file, is for the workers of one machine; PostgreSQL is for those of several. Times are the database's own,
so that clocks need not agree. Each statement has a connection of its own: an outage leaves nothing to mend, and many
workers need few connections.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vitcls import cli
from vitcls.core import extras
from vitcls.core.errors import RunError, UserError
from vitcls.training import lock

JOB_FILE = "job"  # in the directory: its name in the database
HELP = "sqlite:///PATH or postgresql://USER@HOST/DATABASE; default: a file in DIR"  # of --storage
_DEFAULT = "ledger.db"  # in the directory
_BEAT = 5.0  # seconds between two signs of life
_SILENCE = 30.0  # seconds without one after which a worker is dead
_PATIENCE = 300.0  # seconds for which a database that was there may be away
_LOOKS = 50  # at a file that is being written, 0.1 s apart
_logger = logging.getLogger("vitcls")

_CREATE = """CREATE TABLE IF NOT EXISTS vitcls_ledger (
    job TEXT NOT NULL,  -- a table or a search
    name TEXT NOT NULL,  -- of one of its runs
    data TEXT NOT NULL,  -- JSON
    owner TEXT NOT NULL,  -- JSON of the worker; '' for none
    beat DOUBLE PRECISION NOT NULL,  -- the last sign of life, or the end; seconds since 1970
    code INTEGER,  -- exit code; NULL until the end
    seconds DOUBLE PRECISION NOT NULL,  -- of all its processes that have ended
    last_line TEXT NOT NULL,  -- of its log
    PRIMARY KEY (job, name))"""
_CLAIM = """INSERT INTO vitcls_ledger AS old (job, name, data, owner, beat, seconds, last_line)
    VALUES (?, ?, ?, ?, CLOCK, 0, '')
    ON CONFLICT (job, name) DO UPDATE SET owner = excluded.owner, beat = excluded.beat, code = NULL
    WHERE old.code IS NULL AND (old.owner IN ('', excluded.owner) OR old.beat < CLOCK - ?)
        OR old.code IS NOT NULL AND old.beat < ?"""
_OWN = "job = ? AND owner = ? AND code IS NULL"


class Database(NamedTuple):
    """How a database is spoken to, and in which words it differs from others."""

    name: str  # the URL, without its password
    connect: Callable[[], Any]
    failures: tuple[type[Exception], ...]  # which may pass
    errors: type[Exception]
    create: str  # makes the table
    clock: str  # seconds since 1970
    mark: str  # of a value
    secret: str = ""

    def run(self, statement: str, *values) -> list[tuple]:
        """Runs a statement, with values for its `?`, and commits; returns its rows."""
        statement = statement.replace("CLOCK", self.clock).replace("?", self.mark)
        with contextlib.closing(self.connect()) as connection, connection:
            cursor = connection.execute(statement, *([values] if values else []))
            return cursor.fetchall() if cursor.description else []

    def first(self, statement: str, *values) -> list[tuple]:
        """As `run`, before any work is done; raises UserError where the database cannot be used."""
        try:
            return self.run(statement, *values)
        except self.errors as error:
            raise UserError(f"--storage={self.name} cannot be used: {self.said(error)}") from None

    def said(self, error: Exception) -> str:
        """An error in one line, without any word of the password, which libpq may quote."""
        words = re.findall(r"\w{3,}", self.secret)
        return re.sub("|".join(words), "***", cli.one_line(error)) if words else cli.one_line(error)


class Entry(NamedTuple):
    """What is known of a run."""

    data: dict
    held: bool  # by a living worker
    code: int | None  # exit code; None until it has ended
    beat: float  # the last sign of life, or the end; seconds since 1970
    seconds: float
    last_line: str


@dataclasses.dataclass
class Ledger(contextlib.AbstractContextManager):
    """The runs of one job. While it is entered, a thread says that the runs which it has claimed are alive.

    A database that is away for a while is waited for, with `pause`, which may raise; RunError after five minutes.
    """

    database: Database
    job: str
    pause: Callable[[float], None] = time.sleep

    def __post_init__(self):
        self.owner = json.dumps(lock.this_process())
        self.began = self._run("SELECT CLOCK")[0][0]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self):
        self._sign()
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        """Gives up what has not ended, so that others may take it up at once."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(*self.database.failures):
            self.database.run(f"UPDATE vitcls_ledger SET owner = '' WHERE {_OWN}", self.job, self.owner)

    def entries(self) -> dict[str, Entry]:
        """All runs that were ever claimed, by name."""
        columns = f"name, data, owner <> '' AND beat > CLOCK - {_SILENCE}, code, beat, seconds, last_line"
        rows = self._run(f"SELECT {columns} FROM vitcls_ledger WHERE job = ? AND name <> '' ORDER BY name", self.job)
        return {name: Entry(json.loads(data), bool(held), *rest) for name, data, held, *rest in rows}

    def claim(self, name: str, data: dict, *, again: bool = False) -> dict | None:
        """Takes a run that is nobody's, or a dead worker's; with `again` one that ended before this worker began.

        Returns what `data` was at its first claim, so that who takes it up goes on with the same; None where another
        worker has it.
        """
        values = (name, json.dumps(data), self.owner, _SILENCE, self.began if again else 0.0)
        self._run(_CLAIM, self.job, *values)
        rows = self._run(f"SELECT data FROM vitcls_ledger WHERE {_OWN} AND name = ?", self.job, self.owner, name)
        return json.loads(rows[0][0]) if rows else None

    def release(self, name: str) -> None:
        """Gives up a run."""
        self._run(f"UPDATE vitcls_ledger SET owner = '' WHERE {_OWN} AND name = ?", self.job, self.owner, name)

    def end(self, name: str, code: int, seconds: float, last_line: str, data: dict) -> None:
        """Notes the end of a run, unless another worker, which took this one for dead, has it now."""
        self._run(
            "UPDATE vitcls_ledger SET data = ?, code = ?, seconds = seconds + ?, last_line = ?, owner = '', "
            "beat = CLOCK WHERE job = ? AND name = ? AND owner IN ('', ?) AND code IS NULL",
            *(json.dumps(data), code, seconds, last_line, self.job, name, self.owner),
        )

    def _live(self) -> None:
        while not self._stop.wait(_BEAT):
            self._sign()

    def _sign(self) -> None:
        """Says that this worker lives, and which of this machine do not; nothing while the database is away."""
        with contextlib.suppress(*self.database.failures):
            self.database.run(f"UPDATE vitcls_ledger SET beat = CLOCK WHERE {_OWN}", self.job, self.owner)
            for (owner,) in self.database.run("SELECT DISTINCT owner FROM vitcls_ledger WHERE job = ?", self.job):
                if owner and lock.died_here(json.loads(owner)):
                    self.database.run(f"UPDATE vitcls_ledger SET owner = '' WHERE {_OWN}", self.job, owner)

    def _run(self, statement: str, *values) -> list[tuple]:
        """Waits for a database that is away; so a statement may be run twice, and must bear it."""
        deadline = None
        while True:
            try:
                return self.database.run(statement, *values)
            except self.database.failures as error:
                reason = self.database.said(error)
                if deadline is None:
                    deadline = time.monotonic() + _PATIENCE
                    _logger.warning("%s is away (%s); waiting up to %.0f s ...", self.database.name, reason, _PATIENCE)
                if time.monotonic() > deadline:
                    raise RunError(f"{self.database.name} is away: {reason}; the same command goes on") from None
            self.pause(1.0)


def start(storage: str, directory: pathlib.Path, pause: Callable[[float], None] = time.sleep) -> Ledger:
    """The ledger of the job in a directory, which is made; `storage` is a URL, or '' for a file in the directory.

    Raises UserError, and leaves nothing behind, where the directory or the database cannot be used.
    """
    with _made(directory):
        database = _reached(storage, directory)
        path = directory / JOB_FILE
        if not path.exists():
            _begin(database, path)
        job = _job(database, path)
        database.first("UPDATE vitcls_ledger SET beat = beat WHERE job = ? AND name = ''", job)  # it can be written
        return Ledger(database, job, pause)


def read(storage: str, directory: pathlib.Path) -> dict[str, Entry]:
    """The entries of the job in a directory; {} where none has begun. Raises UserError as `start` does."""
    path = directory / JOB_FILE
    if not path.exists():
        return {}
    database = _reached(storage, directory)
    return Ledger(database, _job(database, path)).entries()


def _begin(database: Database, path: pathlib.Path) -> None:
    """Gives the job a name, as its path may be another on another machine. The first of several workers wins."""
    job = uuid.uuid4().hex
    database.first("INSERT INTO vitcls_ledger VALUES (?, '', '{}', '', 0, 0, 0, '')", job)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(job)
    except FileExistsError:
        database.first("DELETE FROM vitcls_ledger WHERE job = ?", job)


def _job(database: Database, path: pathlib.Path) -> str:
    """The name of the job; raises UserError where it is in another database."""
    for _ in range(_LOOKS):
        job = path.read_text(encoding="utf-8")
        if job:  # else another worker is writing it
            break
        time.sleep(0.1)
    if not database.first("SELECT job FROM vitcls_ledger WHERE job = ? AND name = ''", job):
        raise UserError(
            f"{database.name} does not know the job of {path.parent}; give the --storage that it began with, or remove "
            f"{path} to begin a ledger"
        )
    return job


def _reached(storage: str, directory: pathlib.Path) -> Database:
    """The database of a URL, with its table."""
    scheme, _, place = (storage or f"sqlite:///{directory / _DEFAULT}").partition("://")
    if scheme not in _DATABASES:  # it is not shown, as it may hold a password
        raise UserError("--storage must be sqlite:///PATH or postgresql://USER@HOST/DATABASE")
    database = _DATABASES[scheme](place)
    database.first(database.create)
    return database


def _sqlite(place: str) -> Database:
    """SQLite, in the file after 'sqlite:///'."""
    path = pathlib.Path(place.removeprefix("/")).absolute()
    return Database(
        f"sqlite:///{path}",
        connect=lambda: sqlite3.connect(path, timeout=_SILENCE),
        failures=(sqlite3.OperationalError,),
        errors=sqlite3.Error,
        create=_CREATE,
        clock="((julianday('now') - 2440587.5) * 86400.0)",
        mark="?",
    )


def _postgresql(place: str) -> Database:
    """PostgreSQL, as libpq reads the URL, the environment (PGPASSWORD) and ~/.pgpass."""
    with extras.needed("--storage=postgresql://...", "postgres"):
        import psycopg
    options = {"connect_timeout": 10, "tcp_user_timeout": 10_000, "application_name": "vitcls"}
    return Database(
        _public(place),
        connect=lambda: psycopg.connect(f"postgresql://{place}", **options),
        failures=(psycopg.OperationalError, psycopg.InterfaceError),
        errors=psycopg.Error,
        create=f"SELECT pg_advisory_xact_lock(860422); {_CREATE}",  # two at a time would collide
        clock="extract(epoch FROM clock_timestamp())::float8",
        mark="%s",
        secret=_secret(place),
    )


_DATABASES = {"sqlite": _sqlite, "postgresql": _postgresql}


def _public(place: str) -> str:
    """The URL of a place without its password and its options, of which one may be the password.

    >>> _public("me:secret@host:5432/runs?sslmode=require")
    'postgresql://me@host:5432/runs'
    """
    person, at, place = place.rpartition("@")
    return f"postgresql://{person.partition(':')[0]}{at}{place.partition('?')[0]}"


def _secret(place: str) -> str:
    """The passwords of a place, as they stand there.

    >>> _secret("me:se@cret@host/runs?password=other&sslmode=require")
    'se@cret other'
    """
    return " ".join([place.rpartition("@")[0].partition(":")[2], *re.findall(r"password=([^&]*)", place)])


@contextlib.contextmanager
def _made(directory: pathlib.Path) -> Iterator[None]:
    """Makes a directory; takes it away again where what follows fails."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={directory} cannot be made ({error.strerror}); use another") from None
    try:
        yield
    except UserError:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
