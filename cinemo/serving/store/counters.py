"""What a server has done so far, counted in the transaction that did it, so that it survives restarts and deletion."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import Row, func, insert, select, update

from cinemo.serving.store.database import Database, Transaction
from cinemo.serving.store.tables import counters, jobs

# Upper bounds of the histograms in seconds; what is longer is in the last, unbounded bucket.
BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


@dataclass(frozen=True)
class Histogram:
    """``counts[i]``: values in (BOUNDS[i - 1], BOUNDS[i]], the last one above all; ``total``: their sum in seconds."""

    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True)
class Statistics:
    """For /metrics and autoscaling.

    ``by_status``: jobs in the database now. ``oldest_waiting_seconds``: age of the oldest queued one, 0 for none.
    ``finished``: jobs that ever ended with a status, by status. ``queue_seconds``: from submission to the last start,
    ``run_seconds``: from there to the end, both of the finished jobs that had been started.
    """

    by_status: Mapping[str, int]
    oldest_waiting_seconds: float
    finished: Mapping[str, int]
    queue_seconds: Histogram
    run_seconds: Histogram

    @property
    def waiting(self) -> int:
        return self.by_status.get("queued", 0)

    @property
    def running(self) -> int:
        return self.by_status.get("in_progress", 0)


def count_finished(transaction: Transaction, status: str, rows: Iterable[Row[tuple[object, ...]]], now: float) -> None:
    """Count jobs that have just ended. Comes last in a transaction: everybody waits for these rows.

    Args:
        rows: with ``created_at`` and ``started_at``.
    """
    added: Counter[str] = Counter()
    amounts: dict[str, float] = {}
    for row in rows:
        added[f"finished.{status}"] += 1
        if row.started_at is None:
            continue
        for name, seconds in (("queue", row.started_at - row.created_at), ("run", now - row.started_at)):
            seconds = max(0.0, seconds)
            added[f"{name}.{bisect_left(BOUNDS, seconds)}"] += 1
            amounts[f"{name}.total"] = amounts.get(f"{name}.total", 0.0) + seconds
    # In one order, or two transactions would wait for each other.
    for name, amount in sorted({**added, **amounts}.items()):
        statement = update(counters).where(counters.c.name == name)
        transaction.execute(statement.values(value=counters.c.value + amount))


def make_counters(transaction: Transaction) -> None:
    """All counters, at nought; they are only ever updated afterwards."""
    names = [f"finished.{status}" for status in ("completed", "failed", "cancelled")]
    for name in ("queue", "run"):
        names += [f"{name}.total", *(f"{name}.{bucket}" for bucket in range(len(BOUNDS) + 1))]
    there = set(transaction.execute(select(counters.c.name)).scalars())
    missing = [{"name": name, "value": 0.0} for name in names if name not in there]
    if missing:
        transaction.execute(insert(counters), missing)


def read_statistics(database: Database, now: float) -> Statistics:
    """Three queries, each as of its moment; no lock is taken."""
    groups = select(jobs.c.status, func.count().label("jobs")).group_by(jobs.c.status)
    by_status = {row.status: int(row.jobs) for row in database.read(groups)}
    oldest = database.read(select(func.min(jobs.c.created_at)).where(jobs.c.status == "queued"))[0][0]
    values = {row.name: row.value for row in database.read(select(counters))}

    def histogram(name: str) -> Histogram:
        return Histogram(tuple(int(values[f"{name}.{i}"]) for i in range(len(BOUNDS) + 1)), values[f"{name}.total"])

    return Statistics(
        by_status,
        0.0 if oldest is None else max(0.0, now - oldest),
        {status: int(values[f"finished.{status}"]) for status in ("completed", "failed", "cancelled")},
        histogram("queue"),
        histogram("run"),
    )
