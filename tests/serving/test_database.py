"""The database: what URLs are taken, whose tables are read, and one writer at a time without losing a write."""

from __future__ import annotations

import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from postgres_server import PostgresServer
from sqlalchemy import select, text, update
from sqlalchemy.schema import DropTable

from cinemo.serving.store.counters import make_counters
from cinemo.serving.store.database import Database, Transaction
from cinemo.serving.store.jobs import JobStore
from cinemo.serving.store.media import MediaStore
from cinemo.serving.store.tables import about, counters, paces, previews, results, webhooks
from cinemo.types import InputError, RunError


@pytest.mark.parametrize(
    "url",
    [
        "",
        "no url",
        "sqlite://",
        "sqlite:///relative.sqlite",
        "mysql://host/name",
        "sqlite:////proc/nowhere/state.sqlite",
    ],
)
def test_a_place_that_cannot_be_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(InputError, match=r"expected|choose") as error:
        Database(url)
    assert "\n" not in str(error.value)


@pytest.mark.postgres
def test_a_database_or_role_that_is_not_there_is_bad_input(postgres: PostgresServer) -> None:
    for change in (("/postgres", "/nothing"), ("tester@", "nobody:pw@")):
        with pytest.raises(InputError, match="does not exist") as error:
            Database(postgres.url().replace(*change), patience=20)
        assert "pw" not in str(error.value)


def test_a_file_that_is_no_database_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    path.write_bytes(b"certainly not a database" * 100)
    with pytest.raises(InputError, match="not a database"):
        Database(f"sqlite:///{path}")
    assert path.read_bytes().startswith(b"certainly")


def test_jobs_of_the_earlier_server_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    with closing(sqlite3.connect(path)) as old:
        old.execute("CREATE TABLE jobs (number INTEGER PRIMARY KEY, id TEXT)")
        old.execute("INSERT INTO jobs VALUES (1, 'video_1')")
        old.commit()
    with pytest.raises(InputError, match="earlier version of this server"):
        Database(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as old:
        assert old.execute("SELECT * FROM jobs").fetchall() == [(1, "video_1")]


def test_another_versions_tables_are_refused(database_url: str, open_database: Callable[..., Database]) -> None:
    open_database(database_url).transact(lambda transaction: transaction.execute(update(about).values(version=99)))
    with pytest.raises(InputError, match="version 99"):
        Database(database_url)


def test_many_open_an_empty_place_at_once(database_url: str, open_database: Callable[..., Database]) -> None:
    with ThreadPoolExecutor(6) as pool:
        databases = list(pool.map(lambda _: open_database(database_url), range(6)))
    assert len(databases[0].read(select(about))) == 1


def test_no_increment_is_lost_among_writers(database_url: str, open_database: Callable[..., Database]) -> None:
    databases = [open_database(database_url) for _ in range(3)]
    databases[0].transact(make_counters)

    def increment(transaction: Transaction) -> None:
        found = select(counters.c.value).where(counters.c.name == "run.total")
        value = transaction.execute(found).scalar_one()
        time.sleep(0.001)
        transaction.execute(update(counters).where(counters.c.name == "run.total").values(value=value + 1))

    with ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda n: databases[n % 3].transact(increment, lock="submit", durable=False), range(60)))
    rows = databases[1].read(select(counters.c.value).where(counters.c.name == "run.total"))
    assert rows[0][0] == 60


def test_nothing_is_changed_where_the_work_raises(database_url: str, open_database: Callable[..., Database]) -> None:
    database = open_database(database_url)

    def work(transaction: Transaction) -> None:
        transaction.execute(update(about).values(version=99))
        raise KeyError

    with pytest.raises(KeyError):
        database.transact(work)
    assert database.read(select(about.c.version))[0][0] == 1


def test_readers_do_not_wait_for_a_writer(tmp_path: Path, open_database: Callable[..., Database]) -> None:
    database = open_database(f"sqlite:///{tmp_path}/state.sqlite")
    inside, done = threading.Event(), threading.Event()

    def work(transaction: Transaction) -> None:
        transaction.execute(update(about).values(version=1))
        inside.set()
        assert done.wait(10)

    writer = threading.Thread(target=database.transact, args=(work,))
    writer.start()
    assert inside.wait(10)
    begun = time.monotonic()
    assert database.read(select(about.c.version))[0][0] == 1
    assert time.monotonic() - begun < 1
    done.set()
    writer.join()


@pytest.mark.slow
def test_a_lock_that_another_process_keeps_too_long_is_a_run_error(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/state.sqlite"
    Database(url).close()
    with closing(sqlite3.connect(tmp_path / "state.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match="locked"):
            Database(url, patience=0.2)


def test_the_durable_are_synced_and_the_others_are_not(tmp_path: Path, open_database: Callable[..., Database]) -> None:
    database = open_database(f"sqlite:///{tmp_path}/state.sqlite")

    def level(transaction: Transaction) -> int:
        return int(transaction.execute(text("PRAGMA synchronous")).scalar_one())

    assert [database.transact(level, durable=durable) for durable in (True, False, True)] == [2, 1, 2]


def test_a_directory_that_may_not_be_written_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    Database(f"sqlite:///{path}").close()
    path.chmod(stat.S_IRUSR)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with path.open("r+b"):
            pytest.skip("this user may write everywhere")
    except PermissionError:
        with pytest.raises(InputError, match=r"readonly|unable to open"):
            Database(f"sqlite:///{path}")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_database_without_the_later_tables_is_taken_over_with_its_jobs(
    database_url: str, tmp_path: Path, open_database: Callable[..., Database]
) -> None:
    database, media = open_database(database_url), MediaStore(str(tmp_path / "media"))
    ids = [JobStore(database, media).submit({"prompt": "waves", "previews": True}, b"").id for _ in range(2)]
    for table in (results, previews, paces, webhooks):
        database.transact(lambda transaction, table=table: transaction.execute(DropTable(table)).rowcount)
    store = JobStore(open_database(database_url), media)
    first, second = store.claim("worker", 2)
    assert [first.id, second.id] == ids
    assert store.complete(first, "video", "digest")
    assert store.fail(second, "code", "why")
    assert store.delete(first.id)
    assert [job.status for job in store.page()] == ["failed"]
