"""Whether one more job is taken: the bounded queue, what a key allows, and requests that come twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Row, Select, bindparam, func, insert, select, update

from cinemo.serving.store.database import Transaction
from cinemo.serving.store.keys import Quota
from cinemo.serving.store.tables import jobs, usage

WAITING = select(func.count()).where(jobs.c.status == "queued")

_DAY = 86400
_LAST_RUNS = 8
_MAX_RETRY_AFTER = 600


class QueueFull(Exception):
    """No more jobs are taken now. ``retry_after``: seconds after which asking again is reasonable."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} jobs are waiting")
        self.waiting, self.retry_after = waiting, retry_after


class QuotaExceeded(Exception):
    """This client has what its key allows. ``message``: one line for it; ``retry_after``: seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.message, self.retry_after = message, retry_after


class KeyReused(Exception):
    """An idempotency key came again with another request."""


def fingerprint(
    request: Mapping[str, Any], image: bytes, drawn: Collection[str], others: Mapping[str, bytes] | None = None
) -> str:
    """sha256 of what a client asked for: the request without what the server drew itself, and the pictures."""
    asked = {name: value for name, value in request.items() if name not in drawn}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode() + b"\0" + image)
    for name, content in sorted((others or {}).items()):
        digest.update(f"\0{name}\0{hashlib.sha256(content).hexdigest()}".encode())
    return digest.hexdigest()


def earlier(client: str, idempotency_key: str) -> Select[Any]:
    """The job that came with this idempotency key, if any."""
    return select(jobs).where(jobs.c.client == client, jobs.c.idempotency_hash == key_hash(idempotency_key))


def key_hash(idempotency_key: str) -> str:
    """What is stored of an idempotency key: a text of one length, whatever was sent."""
    return hashlib.sha256(idempotency_key.encode("utf-8", "surrogatepass")).hexdigest()


def check_same(row: Row[Any], asked: str) -> None:
    """Raises `KeyReused` where a job was asked for by another fingerprint."""
    if row.fingerprint != asked:
        raise KeyReused(f"the key was used before with another request, job {row.id}")


def admit(transaction: Transaction, client: str, quota: Quota, max_queued: int, now: float) -> None:
    """Count one more job for ``client``, inside the lock ``submit``. Raises `QueueFull` or `QuotaExceeded`."""
    waiting = int(transaction.execute(WAITING).scalar_one())
    if waiting >= max_queued:
        raise QueueFull(waiting, _retry_after(transaction))
    if quota.max_active is not None:
        mine = select(func.count()).where(jobs.c.status.in_(("queued", "in_progress")), jobs.c.client == client)
        if (active := int(transaction.execute(mine).scalar_one())) >= quota.max_active:
            message = f"{active} of your jobs are unfinished; this key allows {quota.max_active} at once"
            raise QuotaExceeded(message, _retry_after(transaction))
    count_submission(transaction, client, quota, now)


def count_submission(transaction: Transaction, client: str, quota: Quota, now: float) -> None:
    """Count a job for ``client`` on this day, inside the lock ``submit``. Raises `QuotaExceeded`."""
    day = int(now // _DAY)
    today = (usage.c.client == client, usage.c.day == day)
    used = transaction.execute(select(usage.c.jobs).where(*today)).scalar_one_or_none()
    if quota.per_day is not None and (used or 0) >= quota.per_day:
        message = f"you submitted {used} jobs today; this key allows {quota.per_day} a day (UTC)"
        raise QuotaExceeded(message, max(1, int((day + 1) * _DAY - now)))
    if used is None:
        transaction.execute(insert(usage).values(client=client, day=day, jobs=1))
    else:
        transaction.execute(update(usage).where(*today).values(jobs=usage.c.jobs + 1))


def _retry_after(transaction: Transaction) -> int:
    """Seconds until a place is free: how long the last jobs took (10 where none is known) among those that run."""
    last = (
        select((jobs.c.completed_at - jobs.c.started_at).label("took"))
        .where(jobs.c.status == "completed")
        .order_by(jobs.c.number.desc())
        .limit(bindparam("last"))
        .subquery()
    )
    took: float | None = transaction.execute(select(func.avg(last.c.took)), {"last": _LAST_RUNS}).scalar_one()
    running: int = transaction.execute(select(func.count()).where(jobs.c.status == "in_progress")).scalar_one()
    return min(_MAX_RETRY_AFTER, max(1, round((10 if took is None else took) / max(1, running))))
