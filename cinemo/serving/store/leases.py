"""Who holds which job: the choice of the next ones, and the end of those that nobody finishes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, insert, or_, select, update

from cinemo.serving.store.database import Transaction
from cinemo.serving.store.fairness import fair_order
from cinemo.serving.store.tables import jobs, turns

_INTERRUPTED = "the job was interrupted too often; submit it again"
_LATE = "the job was not finished before its deadline"


@dataclass(frozen=True)
class QueueLimits:
    """What a job store allows.

    ``max_queued``: jobs that may wait. ``max_attempts``: how often a job is started before dying workers make it fail;
    the last attempt is made alone, so that a job that kills its worker never makes its neighbours fail as well.
    ``keep_seconds``: how long a finished job and its video stay. ``lease_seconds``: how long a worker may be silent
    before its jobs are another's. ``stray_seconds``: age at which a file of no job is removed; longer than any upload.
    """

    max_queued: int = 64
    max_attempts: int = 3
    keep_seconds: float = 86400.0
    lease_seconds: float = 30.0
    stray_seconds: float = 3600.0


# First of every condition, for the index: finished jobs are many.
_UNFINISHED = jobs.c.status.in_(("queued", "in_progress"))


def claimable(now: float) -> ColumnElement[bool]:
    """Queued jobs, and running ones whose worker has been silent for too long."""
    return and_(_UNFINISHED, or_(jobs.c.status == "queued", jobs.c.lease_until <= now))


def overdue(now: float) -> ColumnElement[bool]:
    """Unfinished jobs behind their deadline."""
    return and_(_UNFINISHED, jobs.c.deadline_at <= now)


def due(now: float) -> ColumnElement[bool]:
    """Jobs for which `JobStore.claim` may have something to do."""
    return and_(_UNFINISHED, or_(jobs.c.status == "queued", jobs.c.lease_until <= now, jobs.c.deadline_at <= now))


def choose(transaction: Transaction, worker: str, count: int, now: float, limits: QueueLimits) -> list[int]:
    """Numbers of up to ``count`` claimable jobs, locked, in the order in which they are to be served.

    Inside the lock ``claim``. A job's last attempt is given to an idle worker alone, and while it runs, that worker is
    given nothing else; a busy worker for which it would be next is given nothing, so that it becomes idle.
    """
    live = select(jobs.c.client, jobs.c.worker, jobs.c.attempts).where(
        jobs.c.status == "in_progress", jobs.c.lease_until > now
    )
    running = transaction.execute(live).all()
    own = [row.attempts for row in running if row.worker == worker]
    if any(_is_last(attempts, limits) for attempts in own):
        return []
    place = func.row_number().over(partition_by=jobs.c.client, order_by=jobs.c.number).label("place")
    free = select(jobs.c.client, jobs.c.number, jobs.c.attempts, place).where(claimable(now)).subquery()
    candidates = {row.number: row for row in transaction.execute(select(free).where(free.c.place <= count))}
    if not candidates:
        return []
    last_turns: dict[str, int] = dict(transaction.execute(select(turns.c.client, turns.c.turn)).tuples().all())
    chosen: list[int] = []
    pairs = [(row.client, row.number) for row in candidates.values()]
    for _, number in fair_order(pairs, Counter(row.client for row in running), last_turns):
        if _is_last(candidates[number].attempts + 1, limits):
            if not own and not chosen:
                chosen.append(number)
            break
        chosen.append(number)
        if len(chosen) == count:
            break
    # Another transaction may be changing one of them just now: it is left alone.
    locked = select(jobs.c.number).where(jobs.c.number.in_(chosen), claimable(now)).order_by(jobs.c.number)
    there = set(transaction.execute(locked.with_for_update(skip_locked=True)).scalars()) if chosen else set()
    return [number for number in chosen if number in there]


def next_turns(transaction: Transaction, clients: list[str]) -> None:
    """Note that these clients were served, in this order. Inside the lock ``claim``."""
    turn = transaction.execute(select(func.max(turns.c.turn))).scalar_one() or 0
    for client in clients:
        turn += 1
        if not transaction.execute(update(turns).where(turns.c.client == client).values(turn=turn)).rowcount:
            transaction.execute(insert(turns).values(client=client, turn=turn))


def end(transaction: Transaction, rows: list[Row[Any]], now: float, keep_seconds: float, **values: Any) -> None:
    """Bring locked, unfinished jobs to a final state; ``values``: status, and why."""
    numbers = [row.number for row in rows]
    statement = update(jobs).where(jobs.c.number.in_(numbers))
    transaction.execute(statement.values(completed_at=now, expires_at=now + keep_seconds, lease_until=None, **values))


def end_overdue(transaction: Transaction, now: float, limits: QueueLimits) -> list[Row[Any]]:
    """Fail the jobs that are behind their deadline or were interrupted too often; returns them as they were."""
    late = _lock(transaction, overdue(now))
    if late:
        fail_late(transaction, late, now, limits)
    lapsed = and_(jobs.c.status == "in_progress", jobs.c.lease_until <= now)
    interrupted = _lock(transaction, and_(lapsed, jobs.c.attempts >= limits.max_attempts))
    if interrupted:
        reason = {"error_code": "interrupted", "error_message": _INTERRUPTED}
        end(transaction, interrupted, now, limits.keep_seconds, status="failed", **reason)
    return late + interrupted


def fail_late(transaction: Transaction, rows: list[Row[Any]], now: float, limits: QueueLimits) -> None:
    """Fail locked jobs that are behind their deadline."""
    reason = {"error_code": "deadline_exceeded", "error_message": _LATE}
    end(transaction, rows, now, limits.keep_seconds, status="failed", **reason)


def _lock(transaction: Transaction, condition: ColumnElement[bool]) -> list[Row[Any]]:
    query = select(jobs).where(condition).order_by(jobs.c.number).with_for_update(skip_locked=True)
    return list(transaction.execute(query).all())


def _is_last(attempts: int, limits: QueueLimits) -> bool:
    return limits.max_attempts > 1 and attempts >= limits.max_attempts
