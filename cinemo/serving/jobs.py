"""The durable job store: what was asked for, how far it is and what came of it, in one SQLite file.

A job moves ``queued -> in_progress -> completed | failed | cancelled``; a queued one may be cancelled at once.
Every transition is one transaction that names the state it leaves, so that two processes never both make it. A job that
was in progress when its runner died is queued again, a bounded number of times.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
FINAL: tuple[Status, ...] = ("completed", "failed", "cancelled")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL CHECK (status IN ('queued', 'in_progress', 'completed', 'failed', 'cancelled')),
    progress INTEGER NOT NULL DEFAULT 0 CHECK (progress BETWEEN 0 AND 100),
    attempts INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    expires_at REAL,
    request TEXT NOT NULL,
    error_code TEXT,
    error_message TEXT
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
"""
_COLUMNS = (
    "number, id, status, progress, attempts, created_at, started_at, completed_at, expires_at, request, "
    "error_code, error_message"
)


class QueueFull(Exception):
    """No more jobs are taken now. ``retry_after``: seconds after which asking again is reasonable."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} jobs are waiting")
        self.waiting, self.retry_after = waiting, retry_after


@dataclass(frozen=True)
class Job:
    """One row. Times are Unix seconds; ``progress`` is 0..100; ``request`` are the controls as they were accepted."""

    number: int
    id: str
    status: Status
    progress: int
    attempts: int
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    request: Mapping[str, Any]
    error_code: str | None
    error_message: str | None


class JobStore:
    """Jobs and their files in a directory that outlives every process. Safe for several processes and threads.

    Args:
        directory: made where it is missing; holds ``jobs.sqlite`` and one folder a job under ``files/``.
        max_queued: jobs that may wait; `submit` raises `QueueFull` above.
        keep_seconds: how long a finished job and its video stay.
        max_attempts: how often a job is started before a dying runner makes it fail.
    """

    def __init__(
        self,
        directory: str | Path,
        max_queued: int = 64,
        keep_seconds: float = 24 * 3600,
        max_attempts: int = 3,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = Path(directory)
        self.max_queued, self.keep_seconds, self.max_attempts = max_queued, keep_seconds, max_attempts
        self._clock = clock
        (self.directory / "files").mkdir(parents=True, exist_ok=True)
        with self._connect() as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)

    def image_path(self, job_id: str) -> Path:
        """Where a job's input image lies (the bytes as they were sent)."""
        return self.directory / "files" / job_id / "image"

    def video_path(self, job_id: str) -> Path:
        """Where a completed job's video lies."""
        return self.directory / "files" / job_id / "video.mp4"

    def submit(self, request: Mapping[str, Any], image: bytes) -> Job:
        """Queue a job. Its image is on disk before the job can be claimed. Raises `QueueFull`."""
        job_id = f"video_{secrets.token_hex(12)}"
        path = self.image_path(job_id)
        path.parent.mkdir()
        try:
            path.write_bytes(image)
            with self._transaction() as db:
                waiting = int(db.execute("SELECT count(*) FROM jobs WHERE status = 'queued'").fetchone()[0])
                if waiting >= self.max_queued:
                    raise QueueFull(waiting, self._retry_after(db))
                db.execute(
                    "INSERT INTO jobs (id, status, created_at, request) VALUES (?, 'queued', ?, ?)",
                    (job_id, self._clock(), json.dumps(dict(request))),
                )
        except BaseException:
            shutil.rmtree(path.parent, ignore_errors=True)
            raise
        job = self.get(job_id)
        assert job is not None
        return job

    def get(self, job_id: str) -> Job | None:
        with self._connect() as db:
            return _job(db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone())

    def page(self, limit: int = 20, after: str | None = None, newest_first: bool = True) -> list[Job]:
        """Jobs in the order of their coming, beginning behind the job ``after`` (unknown: an empty page)."""
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        where = f"WHERE number {sign} (SELECT number FROM jobs WHERE id = :after)" if after else ""
        query = f"SELECT {_COLUMNS} FROM jobs {where} ORDER BY number {order} LIMIT :limit"
        with self._connect() as db:
            rows = db.execute(query, {"after": after, "limit": limit}).fetchall()
        return [job for row in rows if (job := _job(row)) is not None]

    def waiting(self) -> int:
        """Jobs that are queued."""
        with self._connect() as db:
            return int(db.execute("SELECT count(*) FROM jobs WHERE status = 'queued'").fetchone()[0])

    def claim(self) -> Job | None:
        """Take the oldest queued job: it becomes in_progress for the caller alone. None where nothing waits."""
        with self._transaction() as db:
            row = db.execute(
                "UPDATE jobs SET status = 'in_progress', progress = 0, attempts = attempts + 1, started_at = ? WHERE "
                f"number = (SELECT min(number) FROM jobs WHERE status = 'queued') RETURNING {_COLUMNS}",
                (self._clock(),),
            ).fetchone()
        return _job(row)

    def report_progress(self, job_id: str, percent: int) -> bool:
        """Note how far a job is (never backwards). False: it is no longer in progress, so work on it should stop."""
        return self._change(
            "UPDATE jobs SET progress = max(progress, ?) WHERE id = ? AND status = 'in_progress'", (percent, job_id)
        )

    def complete(self, job_id: str) -> bool:
        """in_progress -> completed; its video must lie at `video_path`. False: it was cancelled meanwhile."""
        return self._finish(job_id, "completed", None, None, 100, ("in_progress",))

    def fail(self, job_id: str, code: str, message: str) -> bool:
        """in_progress -> failed, with a stable code and one line for a person."""
        return self._finish(job_id, "failed", code, message, None, ("in_progress",))

    def release(self, job_id: str) -> bool:
        """in_progress -> queued: its runner is being closed in good order, so the attempt does not count."""
        return self._change(
            "UPDATE jobs SET status = 'queued', progress = 0, started_at = NULL, attempts = attempts - 1 "
            "WHERE id = ? AND status = 'in_progress'",
            (job_id,),
        )

    def cancel(self, job_id: str) -> bool:
        """queued or in_progress -> cancelled; a running job's runner stops at its next step."""
        return self._finish(job_id, "cancelled", None, None, None, ("queued", "in_progress"))

    def delete(self, job_id: str) -> bool:
        """Remove a finished job with its files. False: unknown, or not finished."""
        deleted = self._change(f"DELETE FROM jobs WHERE id = ? AND status IN ({_marks(FINAL)})", (job_id, *FINAL))
        if deleted:
            shutil.rmtree(self.image_path(job_id).parent, ignore_errors=True)
        return deleted

    def recover(self) -> tuple[int, int]:
        """Call before the only runner starts: jobs left in progress are queued again, or fail after too many attempts.

        Returns:
            how many were queued again, and how many failed.
        """
        message = "the job was interrupted too often; submit it again"
        now = self._clock()
        with self._transaction() as db:
            failed = db.execute(
                "UPDATE jobs SET status = 'failed', error_code = 'interrupted', error_message = ?, completed_at = ?, "
                "expires_at = ? WHERE status = 'in_progress' AND attempts >= ?",
                (message, now, now + self.keep_seconds, self.max_attempts),
            ).rowcount
            queued = db.execute(
                "UPDATE jobs SET status = 'queued', progress = 0, started_at = NULL WHERE status = 'in_progress'"
            ).rowcount
        return queued, failed

    def sweep(self) -> int:
        """Remove finished jobs whose time is over, and their files; returns how many."""
        with self._connect() as db:
            rows = db.execute("SELECT id FROM jobs WHERE expires_at <= ?", (self._clock(),)).fetchall()
        return sum(self.delete(str(row[0])) for row in rows)

    def _finish(
        self,
        job_id: str,
        status: Status,
        code: str | None,
        message: str | None,
        progress: int | None,
        leaves: tuple[Status, ...],
    ) -> bool:
        now = self._clock()
        return self._change(
            "UPDATE jobs SET status = ?, error_code = ?, error_message = ?, progress = coalesce(?, progress), "
            f"completed_at = ?, expires_at = ? WHERE id = ? AND status IN ({_marks(leaves)})",
            (status, code, message, progress, now, now + self.keep_seconds, job_id, *leaves),
        )

    def _change(self, statement: str, values: tuple[Any, ...]) -> bool:
        with self._transaction() as db:
            return db.execute(statement, values).rowcount == 1

    def _retry_after(self, db: sqlite3.Connection) -> int:
        """Seconds until a place is free: how long the last jobs took, 10 where none is known."""
        took = db.execute(
            "SELECT avg(took) FROM (SELECT completed_at - started_at AS took FROM jobs "
            "WHERE status = 'completed' ORDER BY number DESC LIMIT 8)"
        ).fetchone()[0]
        return min(600, max(1, round(took if took is not None else 10)))

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.directory / "jobs.sqlite", timeout=30, isolation_level=None)
        try:
            yield db
        finally:
            db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connect() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")


def _marks(values: tuple[Any, ...]) -> str:
    return ", ".join("?" * len(values))


def _job(row: tuple[Any, ...] | None) -> Job | None:
    if row is None:
        return None
    number, job_id, status, progress, attempts, created, started, completed, expires, request, code, message = row
    return Job(
        number,
        job_id,
        status,
        progress,
        attempts,
        created,
        started,
        completed,
        expires,
        json.loads(request),
        code,
        message,
    )
