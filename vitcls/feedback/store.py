"""The database of feedback: SQLite or PostgreSQL, with the images in it, so that many servers need nothing else.

An image is kept once, by the SHA-256 of its file, however many speak of it. A client has one say on an image.
"""

import contextlib
import hashlib
import os
import pathlib
import sqlite3
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from vitcls.core import extras
from vitcls.core.errors import RunError, UserError

# One writer at a time, so that quotas are exact.
_BEGIN = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(860423)"}
_PATIENCE = 30  # seconds in which SQLite waits for another writer
_DAY = 86_400.0
VERSION = 1  # of the tables of the database, with those of receipts; a newer one is not touched
ANSWERS = "answers"  # the table of receipts, where a server keeps them here (vitcls/serve/receipts.py)


class Quota(Exception):
    """A limit of the store is reached; the text is one line for the user."""


class Correction(NamedTuple):
    """What a user says of an answer; `label` is `predicted` where the answer was right."""

    image: bytes  # the encoded file, as it was uploaded
    answer: str  # id of the answer
    model: str  # SHA-256 that names the weights
    predicted: str
    probability: float
    label: str  # name of the class
    client: str  # opaque


class Row(NamedTuple):
    """A correction as it is kept."""

    image: str  # SHA-256 of the file
    answer: str
    model: str
    predicted: str
    probability: float
    label: str
    client: str
    time: float  # seconds since 1970


def open_store(url: str, *, create: bool = True, client_per_day: int = 500, total_bytes: int = 10 * 2**30) -> "Store":
    """The store at 'sqlite:///PATH' or 'postgresql://USER@HOST/DATABASE', whose tables are made where they are not.

    Without `create` a file must be there already.

    Args:
      client_per_day: corrections that are taken from one client in 24 hours.
      total_bytes: of all images.

    Raises UserError for another URL, a database that cannot be reached, and a missing package.
    """
    with extras.needed("the database of feedback", "serve"):
        import sqlalchemy
    try:
        place = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        place = None
    if place is None or place.drivername not in _ENGINES or not place.database:  # not shown: it may hold a password
        raise UserError("a database of feedback is sqlite:///PATH or postgresql://USER@HOST/DATABASE")
    public = place.set(password=None, query={}).render_as_string()
    if place.drivername == "sqlite":
        _check_file(pathlib.Path(place.database).expanduser(), create)
    engine = _ENGINES[place.drivername](place)
    store = Store(engine, public, client_per_day=client_per_day, total_bytes=total_bytes)
    try:
        store.create()
    except (RunError, UserError) as error:
        store.close()
        raise UserError(str(error)) from None
    return store


def _check_file(path: pathlib.Path, create: bool) -> None:
    if not create and not path.exists():
        raise UserError(f"there is no database {path}")
    if not path.parent.is_dir():
        raise UserError(f"the database {path} cannot be: {path.parent} is not a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"the database {path} cannot be written; give another with --database=URL")


def _sqlite(place):
    """An engine that has what is committed on the disk."""
    import sqlalchemy

    path = pathlib.Path(place.database).expanduser().absolute()
    engine = sqlalchemy.create_engine(place.set(database=str(path), query={}), connect_args={"timeout": _PATIENCE})

    @sqlalchemy.event.listens_for(engine, "connect")
    def prepare(connection, _):
        connection.isolation_level = None  # a transaction is begun by `_BEGIN`, not by the driver
        _set_wal(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    return engine


def _set_wal(connection: sqlite3.Connection) -> None:
    """Waits for others who open the file in the same moment, as SQLite does not for this pragma."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _postgresql(place):
    import sqlalchemy

    with extras.needed("postgresql://...", "postgres"):
        import psycopg  # noqa: F401
    place = place.set(drivername="postgresql+psycopg")
    options = {"connect_timeout": 10, "tcp_user_timeout": 10_000, "application_name": "vitcls"}
    return sqlalchemy.create_engine(place, pool_pre_ping=True, connect_args=options)


_ENGINES = {"sqlite": _sqlite, "postgresql": _postgresql}


def _tables():
    """The tables `feedback_images`, `feedback` and `feedback_version`, which has one row."""
    import sqlalchemy as sa

    images = sa.Table(
        "feedback_images",
        sa.MetaData(),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
    )
    text = [sa.Column(name, sa.Text, nullable=False) for name in ("answer", "model", "predicted", "label", "client")]
    corrections = sa.Table(
        "feedback",
        images.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("image", sa.ForeignKey(images.c.sha256), nullable=False),
        *text,
        sa.Column("probability", sa.Double, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.UniqueConstraint("image", "client"),
        sa.Index("feedback_by_client", "client", "time"),
    )
    version = sa.Table(
        "feedback_version", images.metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False)
    )
    return images, corrections, version


class Store:
    """Feedback in a database; see `open_store`. Of any thread and process.

    Every method raises RunError, one line, where the database is lost.
    """

    def __init__(self, engine, url: str, *, client_per_day: int, total_bytes: int):
        self.url = url  # without its password
        self._engine = engine
        self._client_per_day = client_per_day
        self._total_bytes = total_bytes
        self._images, self._corrections, self._version = _tables()

    def create(self) -> None:
        """Makes the tables where they are not; raises UserError where a newer vitcls has made them."""
        import sqlalchemy as sa

        with self.writing() as connection:
            self._images.metadata.create_all(connection)
            version = connection.scalar(sa.select(self._version.c.version))
            if version is None:
                connection.execute(sa.insert(self._version).values(version=VERSION))
            elif version > VERSION:
                raise UserError(
                    f"{self.url} has tables of version {version}, and this vitcls knows {VERSION}: update vitcls, or "
                    "give another database"
                )

    def add(self, correction: Correction) -> bool:
        """Keeps a correction, on the disk before it returns; False where this client has said the same before.

        A client that says something else of the same image replaces what it said. Raises Quota beyond the limits.
        """
        import sqlalchemy as sa

        said = self._corrections
        sha256 = hashlib.sha256(correction.image).hexdigest()
        values = correction._asdict() | {"image": sha256, "time": time.time()}
        theirs = sa.and_(said.c.image == sha256, said.c.client == correction.client)
        with self.writing() as connection:
            before = connection.scalar(sa.select(said.c.label).where(theirs))
            if before == correction.label:
                return False
            if before is not None:
                connection.execute(sa.update(said).where(theirs).values(values))
                return True
            self._check_client(connection, correction.client, values["time"])
            if not connection.scalar(sa.select(sa.exists().where(self._images.c.sha256 == sha256))):
                self._check_size(connection, len(correction.image))
                image = {"sha256": sha256, "content": correction.image, "size": len(correction.image)}
                connection.execute(sa.insert(self._images).values(image))
            connection.execute(sa.insert(said).values(values))
            return True

    def _check_client(self, connection, client: str, now: float) -> None:
        import sqlalchemy as sa

        said = self._corrections
        today = sa.select(sa.func.count()).where(said.c.client == client, said.c.time > now - _DAY)
        if connection.scalar(today) >= self._client_per_day:
            raise Quota(
                f"you have said {self._client_per_day:,} things in 24 hours, which is the limit; come back later"
            )

    def _check_size(self, connection, size: int) -> None:
        import sqlalchemy as sa

        held = connection.scalar(sa.select(sa.func.coalesce(sa.func.sum(self._images.c.size), 0)))
        if held + size > self._total_bytes:
            raise Quota("the database of feedback is full; its owner can make room with vitcls feedback forget")

    def rows(self) -> Iterator[Row]:
        """All corrections, the oldest first."""
        import sqlalchemy as sa

        columns = [self._corrections.c[name] for name in Row._fields]
        with self.reading() as connection:
            found = connection.execute(
                sa.select(*columns).order_by(self._corrections.c.time, self._corrections.c.id)
            ).all()
        return (Row(*row) for row in found)

    def image(self, sha256: str) -> bytes:
        """The file of an image; raises KeyError where there is none (any more)."""
        import sqlalchemy as sa

        with self.reading() as connection:
            content = connection.scalar(sa.select(self._images.c.content).where(self._images.c.sha256 == sha256))
        if content is None:
            raise KeyError(sha256)
        return bytes(content)

    def summary(self) -> dict[str, Any]:
        """Counts: images, bytes, corrections, confirmations, by_class (of both), and the newest time or None."""
        import sqlalchemy as sa

        said = self._corrections
        right = sa.case((said.c.label == said.c.predicted, 1), else_=0)
        by_class = sa.select(said.c.label, sa.func.count(), sa.func.sum(right), sa.func.max(said.c.time))
        with self.reading() as connection:
            rows = connection.execute(by_class.group_by(said.c.label).order_by(said.c.label)).all()
            images, held = connection.execute(
                sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(self._images.c.size), 0))
            ).one()
        confirmations = sum(row[2] for row in rows)
        return {
            "images": images,
            "bytes": int(held),
            "corrections": sum(row[1] for row in rows) - confirmations,
            "confirmations": confirmations,
            "by_class": {row[0]: row[1] for row in rows},
            "newest": max((row[3] for row in rows), default=None),
        }

    def forget_image(self, sha256: str) -> int:
        """Removes an image, all that was said of it and its receipts for good; returns how many corrections."""
        return self._forget(self._corrections.c.image == sha256, sha256)

    def forget_client(self, client: str) -> int:
        """Removes all that a client has said for good, and images of which nobody else speaks; returns how many."""
        return self._forget(self._corrections.c.client == client)

    def _forget(self, which, image: str = "") -> int:
        import sqlalchemy as sa

        images, said = self._images, self._corrections
        with self.writing() as connection:
            count = connection.execute(sa.delete(said).where(which)).rowcount
            gone = sa.select(images.c.sha256).where(images.c.sha256.not_in(sa.select(said.c.image)))
            if sa.inspect(connection).has_table(ANSWERS):
                answers = sa.table(ANSWERS, sa.column("image_sha256"))
                connection.execute(
                    sa.delete(answers).where(answers.c.image_sha256.in_(gone) | (answers.c.image_sha256 == image))
                )
            connection.execute(sa.delete(images).where(images.c.sha256.in_(gone)))
        self._erase()
        return count

    def _erase(self) -> None:
        """Writes the tables anew, as databases leave what is deleted in their files.

        Raises RunError where another program reads an SQLite database all the while.
        """
        with self.reading() as connection:
            if self._engine.dialect.name == "sqlite":
                connection.exec_driver_sql("VACUUM")
                busy, *_ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
                if busy:
                    raise RunError(f"{self.url} is read by another program, so that its log still has it; forget again")
            else:
                connection.execution_options(isolation_level="AUTOCOMMIT")  # not allowed in a transaction
                for table in (self._corrections, self._images):
                    connection.exec_driver_sql(f"VACUUM FULL {table.name}")

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Any]:
        """A connection in a transaction that no other of this kind runs beside."""
        with self._explained(), self._engine.begin() as connection:
            connection.exec_driver_sql(_BEGIN[self._engine.dialect.name])
            yield connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Any]:
        """A connection that keeps no writer waiting."""
        with self._explained(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        import sqlalchemy

        try:
            yield
        except sqlalchemy.exc.SQLAlchemyError as error:
            why = " ".join(str(getattr(error, "orig", None) or error).split())
            raise RunError(f"the database of feedback {self.url} cannot be used: {why}") from None
