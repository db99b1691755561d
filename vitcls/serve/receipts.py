"""Receipts: what was answered, by which weights, preprocessing and image, so that it can be computed again.

A receipt has no image, only its SHA-256; whoever wants the same bits again has the file, or gave feedback with it.
"""

import functools
import hashlib
import logging
import queue
import secrets
import threading
import time
from typing import NamedTuple

import jax
import numpy as np
import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite

from vitcls.core.errors import RunError
from vitcls.feedback.store import ANSWERS, Store
from vitcls.serve.batcher import Answer

_MOST = 100_000  # receipts that are kept; older ones go
PERIOD = 0.2  # seconds between two transactions
_logger = logging.getLogger("vitcls")
_tables = sql.MetaData()
_answers = sql.Table(
    ANSWERS,
    _tables,
    sql.Column("id", sql.String(32), primary_key=True),
    sql.Column("batch_size", sql.Integer, primary_key=True),  # which may change the last bits
    sql.Column("device", sql.String(128), primary_key=True),
    sql.Column("answered_at", sql.Float, nullable=False, index=True),  # seconds since 1970
    sql.Column("model", sql.String(64), nullable=False),
    sql.Column("preprocessing", sql.Text, nullable=False),  # JSON
    sql.Column("source", sql.Text, nullable=False),  # of the model: a workdir or a file
    sql.Column("step", sql.Integer, nullable=False),  # of its checkpoint
    sql.Column("image_sha256", sql.String(64), nullable=False, index=True),
    sql.Column("outputs", sql.LargeBinary, nullable=False),  # float32 [K]
    sql.Column("predicted", sql.String(256), nullable=False),
    sql.Column("probability", sql.Float, nullable=False),
)


_salts = sql.Table(
    "salt",
    _tables,
    sql.Column("one", sql.Integer, primary_key=True),
    sql.Column("value", sql.String(32), nullable=False),
)


class Receipt(NamedTuple):
    """A row of the table, see there."""

    id: str
    batch_size: int
    device: str
    answered_at: float
    model: str
    preprocessing: str
    source: str
    step: int
    image_sha256: str
    outputs: bytes
    predicted: str
    probability: float


@functools.cache
def device() -> str:
    """The kind of device that answers; the same bits are promised on the same kind and version alone."""
    return f"{jax.local_devices()[0].device_kind}, jax {jax.__version__}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make(answer: Answer, image_sha256: str) -> Receipt:
    return Receipt(
        answer.model.name_of_answer(image_sha256),
        answer.batch_size,
        device(),
        time.time(),
        answer.model.version,
        answer.model.preprocessing_json,
        answer.model.source,
        answer.model.about["checkpoint"]["step"],
        image_sha256,
        np.asarray(answer.outputs, np.float32).tobytes(),
        answer.model.class_names[answer.best],
        float(answer.probabilities[answer.best]),
    )


class Receipts:
    """Those of a database; written by a thread, a few times a second."""

    def __init__(self, store: Store, most: int = _MOST):
        self._store, self._most, self._since_pruned = store, most, most
        self._lost = 0  # receipts of an outage of the database
        with store.writing() as connection:
            _tables.create_all(connection)
            self._salt = connection.scalar(sql.select(_salts.c.value))
            if self._salt is None:
                self._salt = secrets.token_hex(16)
                connection.execute(sql.insert(_salts).values(one=1, value=self._salt))
        self._new: queue.SimpleQueue[Receipt | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._keep_up, daemon=True).start()

    def client(self, address: str) -> str:
        """A name for an address, the same for all servers on this database, from which nobody gets the address."""
        return hashlib.sha256(f"{self._salt} {address}".encode()).hexdigest()[:16]

    def add(self, receipt: Receipt) -> None:
        self._new.put(receipt)

    def flush(self) -> None:
        """Returns when all that was added before is in the database, or could not be written."""
        written = threading.Event()
        self._new.put(written)
        written.wait()

    def find(self, id: str) -> list[Receipt]:
        """All of an id, the newest first."""
        self.flush()
        return find(self._store, id)

    def _keep_up(self) -> None:
        while True:
            some = [self._new.get()]
            if isinstance(some[0], Receipt):
                time.sleep(PERIOD)
            while not self._new.empty():
                some.append(self._new.get())
            rows = [one._asdict() for one in some if isinstance(one, Receipt)]
            if rows:
                self._try_to_write(rows)
            for one in some:
                if isinstance(one, threading.Event):
                    one.set()

    def _try_to_write(self, rows: list[dict]) -> None:
        try:
            self._write(rows)
        except RunError as error:
            if not self._lost:
                _logger.warning("receipts cannot be kept: %s", error)
            self._lost += len(rows)
            return
        if self._lost:
            _logger.warning("receipts are kept again; %d are lost", self._lost)
            self._lost = 0

    def _write(self, rows: list[dict]) -> None:
        with self._store.writing() as connection:
            insert = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name]
            again = insert(_answers)  # of an answer that was given before, which is new once more
            newer = {name: again.excluded[name] for name in ("answered_at", "source", "step")}
            connection.execute(again.on_conflict_do_update(index_elements=_answers.primary_key, set_=newer), rows)
            self._since_pruned += len(rows)
            if self._since_pruned >= self._most // 10:
                newest = sql.select(_answers.c.answered_at).order_by(_answers.c.answered_at.desc())
                bound = connection.scalar(newest.offset(self._most).limit(1))
                if bound is not None:
                    connection.execute(sql.delete(_answers).where(_answers.c.answered_at <= bound))
                self._since_pruned = 0


def find(store: Store, id: str) -> list[Receipt]:
    """All receipts of an id, the newest first; raises RunError where the database is lost."""
    columns = [_answers.c[name] for name in Receipt._fields]
    chosen = sql.select(*columns).where(_answers.c.id == id).order_by(_answers.c.answered_at.desc())
    with store.reading() as connection:
        if not sql.inspect(connection).has_table(_answers.name):
            return []
        return [Receipt(*row) for row in connection.execute(chosen)]
