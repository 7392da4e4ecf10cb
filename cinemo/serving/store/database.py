"""One database behind every process of a server: an SQLite file on one machine, or PostgreSQL among several.

What is committed survives the death of any process. SQLite runs in WAL mode: readers never wait for the writer.
A durable transaction survives a power cut and a crash of PostgreSQL as well; of the others (heartbeats) they may lose
the last second. Claims are durable: one that was forgotten would give its attempt's number to two workers.
Faults that pass by themselves (a restart of PostgreSQL, a locked file) are met with patience, then `RunError`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import URL, Connection, Engine, Executable, Row, create_engine, event, insert, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionLeft

from cinemo.serving.store.tables import VERSION, about, metadata
from cinemo.types import InputError, NoRoom, RunError, local_faults

log = logging.getLogger(__name__)
T = TypeVar("T")

Lock = Literal["schema", "submit", "claim"]
_LOCK_NUMBERS: dict[Lock, int] = {"schema": 0x63696E00, "submit": 0x63696E01, "claim": 0x63696E02}

_SQLITE_BUSY_SECONDS = 5.0
_SQLITE_PASSES = frozenset({5, 6})  # BUSY, LOCKED
_SQLITE_BROKEN = frozenset({11, 26})  # CORRUPT, NOTADB
_SQLITE_FULL = frozenset({13, 4874})  # FULL, IOERR_SHMSIZE
# A process that is frozen inside a transaction loses it, so that the others go on.
_POSTGRES_OPTIONS = "-c lock_timeout=10s -c idle_in_transaction_session_timeout=30s -c client_encoding=utf8"
# Serialization failure, deadlock, lock timeout, too many connections, and the server going down or coming up.
_POSTGRES_PASSES = frozenset({"40001", "40P01", "55P03", "53300", "57P01", "57P02", "57P03", "25P03"})
# A refusal at the door has no code of its own.
_POSTGRES_HOPELESS = ("authentication failed", "does not exist", "no password supplied", "no pg_hba.conf entry")


@dataclass(frozen=True)
class Transaction:
    """An open transaction. ``repeated``: an earlier try may have been committed, only its answer was lost."""

    connection: Connection
    repeated: bool

    def now(self) -> float:
        """Unix seconds of the one clock that all users of this database share."""
        if self.connection.dialect.name == "sqlite":
            return time.time()
        return float(self.connection.execute(_NOW).scalar_one())

    def execute(self, statement: Executable, parameters: Any = None) -> Any:
        return self.connection.execute(statement, parameters)


_NOW = text("SELECT CAST(extract(epoch FROM clock_timestamp()) AS double precision)")


class Database:
    """Made where it is missing, by whichever process comes first. Safe for threads and processes; not across a fork.

    Args:
        url: ``sqlite:////absolute/path`` or ``postgresql://user:password@host:port/name``.
        patience: seconds for which a passing fault is tried again.

    Raises:
        InputError: not such a URL, nobody may write there, or another version's tables.
        RunError: the server did not answer for ``patience`` seconds.
    """

    def __init__(self, url: str, patience: float = 30.0) -> None:
        parsed = _parse(url)
        self.patience = patience
        self.name = parsed.set(drivername=parsed.get_backend_name()).render_as_string(hide_password=True)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.path = Path(parsed.database or "") if self.is_sqlite else None
        self._writer, self._reader = _sqlite_engines(parsed) if self.is_sqlite else _postgres_engines(parsed)
        # Threads of one process queue here rather than poll for SQLite's file lock.
        self._turn = threading.Lock() if self.is_sqlite else nullcontext()
        self._is_open = False
        self.transact(_make_tables(self.name), lock="schema")
        self._is_open = True

    def transact(self, work: Callable[[Transaction], T], lock: Lock | None = None, durable: bool = True) -> T:
        """What ``work`` returns, its changes committed together; nothing is changed where it raises.

        Args:
            work: may be called again after a passing fault; where the answer to a commit was lost, with ``repeated``.
            lock: one transaction with this name at a time (SQLite: one writing transaction at a time anyway).
            durable: also against a power cut and a crash of PostgreSQL.
        """
        repeated = False

        def once() -> T:
            nonlocal repeated
            with self._turn, self._writer.connect().execution_options(durable=durable) as connection:
                transaction = connection.begin()
                if not self.is_sqlite:
                    if not durable:
                        connection.execute(text("SET LOCAL synchronous_commit = off"))
                    if lock:
                        connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _LOCK_NUMBERS[lock]})
                result = work(Transaction(connection, repeated))
                try:
                    transaction.commit()
                except DBAPIError:
                    repeated = True
                    raise
                return result

        return self._patiently(once)

    def read(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """The rows of one query, as of one moment. Takes no lock that a writer would wait for."""

        def once() -> Sequence[Row[Any]]:
            with self._reader.connect() as connection:
                return connection.execute(statement, parameters).all()

        return self._patiently(once)

    def checkpoint(self) -> None:
        """Let an SQLite database write its log from the beginning again, which takes no more room."""
        with contextlib.suppress(DBAPIError), self._reader.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(RESTART)")

    def check_writable(self) -> None:
        """Raise `RunError` where a transaction cannot begin. Nothing is changed, and the caller waits for no fault."""
        try:
            with self._turn, self._writer.connect() as connection, connection.begin():
                connection.execute(select(about.c.version))
        except (DBAPIError, NoConnectionLeft) as error:
            fault = str(getattr(error, "orig", error)).strip().partition("\n")[0]
            if getattr(getattr(error, "orig", None), "sqlite_errorcode", 0) & 0xFF in _SQLITE_PASSES:
                return  # somebody else writes
            raise RunError(f"{self.name}: {fault}; check the database") from None

    def now(self) -> float:
        """Unix seconds of the clock of `Transaction.now`."""
        return time.time() if self.is_sqlite else float(self.read(_NOW)[0][0])

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._writer.dispose()
        self._reader.dispose()

    def _patiently(self, once: Callable[[], T]) -> T:
        begun, pause = time.monotonic(), 0.05
        while True:
            try:
                return once()
            except NoConnectionLeft:
                raise RunError(f"{self.name}: all connections of this process are in use; try again later") from None
            except DBAPIError as error:
                fault = str(error.orig).strip().partition("\n")[0]
                if not _passes(error, fault):
                    if not isinstance(error, OperationalError) and not _is_broken(error):
                        raise  # a fault of a statement is a fault of ours
                    kind: type[Exception] = RunError if self._is_open else InputError
                    if getattr(error.orig, "sqlite_errorcode", 0) in _SQLITE_FULL:
                        kind = NoRoom
                    raise kind(f"{self.name}: {fault}; check the database's URL, permissions and free space") from None
                if time.monotonic() - begun > self.patience:
                    message = (
                        f"the database has been failing for {self.patience:g} s ({fault}); try again once it answers"
                    )
                    raise RunError(f"{self.name}: {message}") from None
                log.warning("%s: %s, trying again", self.name, fault)
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, 1.0)


def _parse(url: str) -> URL:
    expected = "expected sqlite:////absolute/path or postgresql://user:password@host/name"
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InputError(f"database: this is not a URL; {expected}") from None
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername != "sqlite":
        raise InputError(f"database: {parsed.drivername!r} is not supported; {expected}")
    if not parsed.database or not Path(parsed.database).is_absolute():
        raise InputError(f"database: {url!r} does not name a file by its absolute path; {expected}")
    return parsed


def _sqlite_engines(url: URL) -> tuple[Engine, Engine]:
    path = Path(url.database or "")
    with local_faults(path.parent, "choose another place"):
        path.parent.mkdir(parents=True, exist_ok=True)
    arguments = {"timeout": _SQLITE_BUSY_SECONDS, "check_same_thread": False, "isolation_level": None}
    writer = create_engine(url, connect_args=arguments, pool_size=2, max_overflow=0)
    reader = create_engine(
        url, connect_args=arguments, pool_size=16, max_overflow=48, isolation_level="AUTOCOMMIT",
        pool_reset_on_return=None,
    )  # fmt: skip

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        for setting in ("journal_mode = WAL", "journal_size_limit = 67108864", "temp_store = MEMORY"):
            connection.execute(f"PRAGMA {setting}").close()

    def begin(connection: Connection) -> None:
        # NORMAL leaves the log to be synced by the next durable commit, or by a checkpoint.
        durable = connection.get_execution_options().get("durable", True)
        connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    for engine in (writer, reader):
        event.listen(engine, "connect", connected)
    event.listen(writer, "begin", begin)
    return writer, reader


def _postgres_engines(url: URL) -> tuple[Engine, Engine]:
    alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
    arguments = {"connect_timeout": 5, "application_name": "cinemo", "options": _POSTGRES_OPTIONS, **alive}
    writer = create_engine(url, connect_args=arguments, pool_size=5, max_overflow=5, pool_timeout=30)
    return writer, writer.execution_options(isolation_level="AUTOCOMMIT")


def _make_tables(name: str) -> Callable[[Transaction], None]:
    def work(transaction: Transaction) -> None:
        there = set(inspect(transaction.connection).get_table_names())
        if about.name not in there:
            if "jobs" in there:
                message = "holds jobs of an earlier version of this server, which this one does not read"
                raise InputError(f"{name}: {message}; choose another database, or remove that one")
            metadata.create_all(transaction.connection)
            transaction.execute(insert(about), {"version": VERSION})
            return
        version = transaction.execute(select(about.c.version)).scalar_one()
        if version != VERSION:
            message = f"holds jobs in version {version}, but this server reads version {VERSION}"
            raise InputError(f"{name}: {message}; use the server that wrote it, or another database")
        if missing := [table for table in metadata.sorted_tables if table.name not in there]:
            metadata.create_all(transaction.connection, missing)  # of which earlier servers knew nothing

    return work


def _passes(error: DBAPIError, fault: str) -> bool:
    """Whether trying again makes sense."""
    if not isinstance(error, OperationalError) and not error.connection_invalidated:
        return False
    sqlite_code = getattr(error.orig, "sqlite_errorcode", None)
    if sqlite_code is not None:
        return sqlite_code & 0xFF in _SQLITE_PASSES
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # no connection, or none any more
        return not any(sign in fault for sign in _POSTGRES_HOPELESS)
    return error.connection_invalidated or state in _POSTGRES_PASSES or state.startswith("08")


def _is_broken(error: DBAPIError) -> bool:
    """The file holds no sound database."""
    return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _SQLITE_BROKEN
