"""Processes that are killed amid their transactions, a database that restarts, answers that are lost on the way."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from postgres_server import PostgresServer

from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import FINAL, JobStore, QueueLimits
from cinemo.serving.store.media import MediaStore, video_name
from cinemo.types import RunError

LIMITS = QueueLimits(max_queued=1000, max_attempts=1000, lease_seconds=0.5)
SPAWN = multiprocessing.get_context("spawn")


def open_store(url: str, media: str, limits: QueueLimits = LIMITS) -> JobStore:
    return JobStore(Database(url), MediaStore(media), limits)


def work_for_ever(url: str, media: str, ends: str) -> None:
    """Submit, claim, beat and end jobs; every end that the store accepted is a line in the file ``ends``."""
    store, worker = open_store(url, media), f"worker-{os.getpid()}"
    with open(ends, "a", buffering=1) as file:
        while True:
            store.submit({}, b"pixels", client=random.choice("ab"))
            for job in store.claim(worker, 2):
                for step in range(3):
                    store.beat(worker, {job.id: (step, 3)})
                name = video_name(job.id, job.attempts)
                store.media.write(name, b"video")
                if random.random() < 0.2:
                    store.cancel(job.id)
                elif store.complete(job, name):
                    file.write(f"{job.id} {name}\n")


@pytest.mark.slow
def test_killed_processes_lose_nothing_and_end_nothing_twice(database_url: str, tmp_path: Path) -> None:
    media, chance = str(tmp_path / "media"), random.Random(0)
    # All begin with an empty place at once: the tables are made once.
    started, ends = [], []
    for generation in range(10):
        running = []
        for n in range(3):
            ends.append(tmp_path / f"ends-{generation}-{n}")
            running.append(SPAWN.Process(target=work_for_ever, args=(database_url, media, str(ends[-1]))))
            running[-1].start()
        deadline = time.monotonic() + 60
        while not any(path.exists() and path.stat().st_size for path in ends[-3:]):
            assert all(process.is_alive() for process in running)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(chance.uniform(0.1, 0.6))
        for process in running:
            process.kill()  # wherever it is just now
        for process in running:
            process.join()
        started += running
        store = open_store(database_url, media)
        if generation and any(job.status == "in_progress" for job in store.page(10_000)):
            break  # as a kill may also hit between two jobs
    time.sleep(LIMITS.lease_seconds)
    left = 0
    while jobs := store.claim("last", 50):
        left += len(jobs)
        assert all(store.complete(job, "by the last") for job in jobs)
    found = {job.id: job for job in store.page(10_000)}
    assert {job.status for job in found.values()} <= {"completed", "cancelled"}, "none is lost, stuck or half-done"
    finished = store.statistics().finished
    assert sum(finished.values()) == len(found), "every job ended exactly once"
    lines = [line.split() for path in ends if path.exists() for line in path.read_text().splitlines()]
    assert len(lines) == len({job_id for job_id, _ in lines}), "one worker alone ended each"
    for job_id, name in lines:
        assert found[job_id].media_name == name
        assert store.media.read(name) == b"video"
    assert left > 0, "no process was killed at work"
    store.database.close()


def claim_all(url: str, media: str, barrier: Barrier, taken: str) -> None:
    store = open_store(url, media, QueueLimits())
    barrier.wait(60)
    ids = [job.id for _ in range(30) for job in store.claim(f"worker-{os.getpid()}", 2)]
    Path(taken).write_text("\n".join(ids))


def test_two_processes_claim_at_once(database_url: str, tmp_path: Path) -> None:
    media = str(tmp_path / "media")
    store = open_store(database_url, media, QueueLimits())
    submitted = {store.submit({}, b"").id for _ in range(40)}
    barrier = SPAWN.Barrier(2)
    paths = [tmp_path / f"taken-{n}" for n in range(2)]
    processes = [SPAWN.Process(target=claim_all, args=(database_url, media, barrier, str(path))) for path in paths]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    taken = [path.read_text().split() for path in paths]
    assert sorted(taken[0] + taken[1]) == sorted(submitted)
    store.database.close()


def test_what_was_answered_is_there_after_the_process_was_killed(tmp_path: Path) -> None:
    """The log of SQLite that nobody checkpointed is read by the next process."""
    url, media, ends = f"sqlite:///{tmp_path}/state.sqlite", str(tmp_path / "media"), tmp_path / "ends"
    process = SPAWN.Process(target=work_for_ever, args=(url, media, str(ends)))
    process.start()
    while not ends.exists() or not ends.stat().st_size:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert (tmp_path / "state.sqlite-wal").stat().st_size > 0
    with closing(open_store(url, media).database) as database:
        known = JobStore(database, MediaStore(media)).many(line.split()[0] for line in ends.read_text().splitlines())
        assert {job.status for job in known.values()} == {"completed"}


@pytest.mark.postgres
@pytest.mark.parametrize("how", ["immediate", "fast"])
def test_a_restart_of_postgresql_is_waited_for(
    postgres: PostgresServer, tmp_path: Path, open_database: Callable[..., Database], how: str
) -> None:
    store = JobStore(open_database(postgres.new_database()), MediaStore(str(tmp_path)))
    before = store.submit({}, b"")
    [job] = store.claim("a", 1)
    postgres.stop(how)
    later = threading.Timer(1.0, postgres.start)
    later.start()
    try:
        assert store.beat("a", {job.id: (1, 2)}) == {}
        assert store.get(before.id) is not None
        assert store.complete(job, "video")
        assert store.submit({}, b"").number > before.number
    finally:
        later.join()
    assert store.statistics().finished["completed"] == 1


@pytest.mark.postgres
def test_a_database_that_stays_away_is_a_run_error_without_its_password(
    postgres: PostgresServer, tmp_path: Path, open_database: Callable[..., Database]
) -> None:
    url = postgres.new_database().replace("tester@", "tester:s3cret@")
    store = JobStore(open_database(url, patience=0.5), MediaStore(str(tmp_path)))
    postgres.stop()
    try:
        begun = time.monotonic()
        with pytest.raises(RunError, match=r"has been failing for 0\.5 s") as error:
            store.waiting()
        assert time.monotonic() - begun < 5
        assert "s3cret" not in str(error.value)
    finally:
        postgres.start()
    assert store.waiting() == 0


@contextmanager
def cutting_commits(upstream: Path, cut: threading.Event) -> Iterator[str]:
    """A socket before PostgreSQL that, where ``cut`` is set, forwards one COMMIT and hangs up before its answer."""
    with tempfile.TemporaryDirectory(prefix="cinemo-cut-") as directory:
        path = f"{directory}/{upstream.name}"
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        server.listen()

        def pump(source: socket.socket, target: socket.socket, is_client: bool) -> None:
            with suppress(OSError):
                while data := source.recv(65536):
                    if is_client and b"COMMIT" in data and cut.is_set():
                        cut.clear()
                        source.shutdown(socket.SHUT_RDWR)
                        target.sendall(data)
                        time.sleep(0.2)  # so that it is carried out
                        break
                    target.sendall(data)
            for end in (source, target):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = server.accept()
                    behind = socket.socket(socket.AF_UNIX)
                    behind.connect(str(upstream))
                    for pair in ((client, behind, True), (behind, client, False)):
                        threading.Thread(target=pump, args=pair, daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield directory
        server.close()


@pytest.mark.postgres
def test_a_commit_whose_answer_is_lost_counts_once(
    postgres: PostgresServer, tmp_path: Path, open_database: Callable[..., Database]
) -> None:
    cut = threading.Event()
    name = postgres.new_database().split("@/")[1].split("?")[0]
    with cutting_commits(postgres.socket, cut) as directory:
        store = JobStore(open_database(postgres.url(name, directory)), MediaStore(str(tmp_path)))

        def losing(call: Callable[[], object]) -> object:
            cut.set()
            answer = call()
            assert not cut.is_set(), "no commit was cut"
            return answer

        losing(lambda: store.submit({}, b"", "client"))
        assert len(store.page()) == 1
        [job] = store.claim("a", 1)
        assert losing(lambda: store.beat("a", {job.id: (1, 2)})) == {}
        assert losing(lambda: store.complete(job, "video")) is True
        other = store.submit({}, b"")
        assert losing(lambda: store.cancel(other.id)) is True
        assert losing(lambda: store.delete(other.id)) is True
        statistics = store.statistics()
        assert statistics.finished == {"completed": 1, "failed": 0, "cancelled": 1}
        assert statistics.by_status == {"completed": 1}
        assert store.page()[0].status in FINAL
        store.database.close()


@pytest.mark.postgres
def test_a_frozen_process_does_not_hold_the_queue(
    postgres: PostgresServer, tmp_path: Path, open_database: Callable[..., Database]
) -> None:
    """One that stops amid a transaction holds its locks for at most as long as PostgreSQL is told to bear it."""
    url = postgres.new_database()
    first, second = open_database(url), open_database(url)
    with first._writer.connect() as connection:
        settings = connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar_one()
        assert settings == "30s"
        connection.exec_driver_sql("SET idle_in_transaction_session_timeout = '1s'")
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (0x63696E01,))
        begun = time.monotonic()
        JobStore(second, MediaStore(str(tmp_path))).submit({}, b"")
        assert 0.5 < time.monotonic() - begun < 10
        connection.invalidate()
