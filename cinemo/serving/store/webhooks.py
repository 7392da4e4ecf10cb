"""Events that are owed to receivers: written with the job, due with its end, kept until they were received.

An event becomes due in the transaction that ends its job, so that none is lost, whatever dies. Whoever delivers one
leases it by moving its time, so that it comes again where nothing more is heard: at least once, under one id.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sqlalchemy import delete, func, insert, select, update

from cinemo.serving.store.database import Database, Transaction
from cinemo.serving.store.tables import webhooks


@dataclass(frozen=True)
class Delivery:
    """One event on its way. ``attempt`` counts from 1; ``created_at``: Unix seconds of the job's end."""

    event_id: str
    type: str
    job_id: str
    client: str
    url: str
    attempt: int
    created_at: float


def owe(transaction: Transaction, job_id: str, client: str, url: str) -> None:
    """Note that somebody is to be told of a job's end."""
    values = {"event_id": f"evt_{secrets.token_hex(12)}", "job_id": job_id, "client": client, "url": url}
    transaction.execute(insert(webhooks).values(**values))


def announce(transaction: Transaction, status: str, job_ids: Collection[str], now: float) -> None:
    """The end of jobs, in the transaction that ends them: due where they are completed or failed, else off."""
    mine = webhooks.c.job_id.in_(job_ids)
    if status == "cancelled":
        transaction.execute(delete(webhooks).where(mine))
    elif job_ids:
        values = {"type": f"video.{status}", "created_at": now, "due_at": now}
        transaction.execute(update(webhooks).where(mine).values(**values))


class WebhookQueue:
    """The events of a database.

    Args:
        lease_seconds: after which an attempt of which nothing is heard is made again; longer than any takes.
        clock: Unix seconds; None: the database's own.
    """

    def __init__(
        self, database: Database, lease_seconds: float = 60.0, clock: Callable[[], float] | None = None
    ) -> None:
        self._database, self._lease_seconds, self._clock = database, lease_seconds, clock

    def claim(self, count: int) -> list[Delivery]:
        """Up to ``count`` events that are due, each the caller's for the lease: of every client the one that is due
        longest, then every client's next, so that whose receivers answer slowly delays nobody else's."""
        now = self._database.now() if self._clock is None else self._clock()
        is_due = webhooks.c.due_at <= now
        if count < 1 or not self._database.read(select(webhooks.c.number).where(is_due).limit(1)):
            return []
        place = func.row_number().over(partition_by=webhooks.c.client, order_by=webhooks.c.due_at).label("place")
        due = select(webhooks.c.number, webhooks.c.due_at, place).where(is_due).subquery()
        first = select(due.c.number).order_by(due.c.place, due.c.due_at).limit(count)

        def work(transaction: Transaction) -> list[Delivery]:
            chosen = select(webhooks.c.number).where(webhooks.c.number.in_(first), is_due)
            values = {"due_at": now + self._lease_seconds, "attempts": webhooks.c.attempts + 1}
            statement = (
                update(webhooks)
                .where(webhooks.c.number.in_(chosen.with_for_update(skip_locked=True)))
                .values(values)
                .returning(*webhooks.c)
            )
            return [
                Delivery(row.event_id, row.type, row.job_id, row.client, row.url, row.attempts, row.created_at)
                for row in transaction.execute(statement)
            ]

        return self._database.transact(work)

    def done(self, delivery: Delivery) -> None:
        """It was received, or is given up."""
        statement = delete(webhooks).where(webhooks.c.event_id == delivery.event_id)
        self._database.transact(lambda transaction: transaction.execute(statement).rowcount)

    def again(self, delivery: Delivery, seconds: float) -> None:
        """Try once more in so many seconds."""
        now = self._database.now() if self._clock is None else self._clock()
        mine = (webhooks.c.event_id == delivery.event_id, webhooks.c.attempts == delivery.attempt)
        statement = update(webhooks).where(*mine).values(due_at=now + seconds)
        self._database.transact(lambda transaction: transaction.execute(statement).rowcount, durable=False)

    def waiting(self) -> int:
        """Events that are due or being delivered."""
        return len(self._database.read(select(webhooks.c.number).where(webhooks.c.due_at.is_not(None))))
