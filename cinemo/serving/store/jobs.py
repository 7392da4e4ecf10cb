"""The durable job store: what was asked for, how far it is and what came of it.

A job moves ``queued -> in_progress -> completed | failed | cancelled``; a queued one may end at once. Every transition
is one transaction that names the state it leaves. A running job is leased to one worker, which renews the lease with
every `JobStore.beat`; where it ran out, another worker may claim the job, and the first one, should it still live, can
change it no more: whoever ends a job must hold it under its own name and in the same attempt.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

from sqlalchemy import ColumnElement, Row, bindparam, delete, insert, select, update

from cinemo.serving.store.admission import (
    WAITING,
    KeyReused,
    QueueFull,
    QuotaExceeded,
    admit,
    check_same,
    count_submission,
    earlier,
    fingerprint,
    key_hash,
)
from cinemo.serving.store.counters import Statistics, make_counters, read_statistics
from cinemo.serving.store.database import Database, Transaction
from cinemo.serving.store.endings import settle
from cinemo.serving.store.estimates import Estimates, Pace, last_pace, tell
from cinemo.serving.store.job import FINAL, Job, Status, job_of
from cinemo.serving.store.keys import Quota
from cinemo.serving.store.leases import QueueLimits, choose, due, end, end_overdue, fail_late, next_turns
from cinemo.serving.store.media import MediaStore, image_name, input_name, is_job_id, video_name
from cinemo.serving.store.previews import Preview, hide, show, shown
from cinemo.serving.store.results import Reuse, asked_key, deciding, expect, find, forget, keep
from cinemo.serving.store.storage_health import Reserve, check_room
from cinemo.serving.store.tables import jobs, usage
from cinemo.serving.store.webhooks import owe
from cinemo.types import InputError, NoRoom, RunError

__all__ = [
    "FINAL",
    "Job",
    "JobStore",
    "KeyReused",
    "QueueFull",
    "QueueLimits",
    "Quota",
    "QuotaExceeded",
    "Statistics",
    "Status",
]

log = logging.getLogger(__name__)
T = TypeVar("T")

_AT_ONCE = 200  # rows of one sweeping transaction
_GET = select(jobs).where(jobs.c.id == bindparam("id"))
_MANY = select(jobs).where(jobs.c.id.in_(bindparam("ids", expanding=True)))


class JobStore:
    """Jobs in a database and their files in a media store. Safe for any number of processes and threads.

    Args:
        clock: Unix seconds; None: the database's own, so that machines need not agree about the time.
    """

    def __init__(
        self,
        database: Database,
        media: MediaStore,
        limits: QueueLimits = QueueLimits(),  # noqa: B008
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.database, self.media, self.limits, self._clock = database, media, limits, clock
        self.reserve = Reserve(database.path)
        self._strays_at = -float("inf")
        self._estimates = Estimates(database, self._time, clock or time.monotonic)
        database.transact(make_counters, lock="schema")

    def submit(
        self,
        request: Mapping[str, Any],
        image: bytes,
        client: str = "",
        idempotency_key: str | None = None,
        timeout: float | None = None,
        quota: Quota | None = None,
        drawn: Collection[str] = (),
        others: Mapping[str, bytes] | None = None,
        steps: int = 0,
        digest: str = "",
        reuse: Reuse = "off",
        webhook_url: str | None = None,
    ) -> Job:
        """Queue a job. Its pictures are stored before the job can be claimed.

        Args:
            image: the picture to animate. ``others``: what its model takes beside it, by name.
            idempotency_key: with the same one, the same request and pictures are the same job again, while it is kept.
            timeout: seconds until its deadline.
            steps: of the sampler, as far as can be said before it begins.
            digest, reuse: of the bundle that would make the video; whose finished ones may stand in its place, which is
                then a completed job at once. Nothing does where something was drawn.
            drawn: names in ``request`` that the server drew itself (a seed): no part of what the client asked for.
            webhook_url: told of its end, see `cinemo.serving.store.webhooks`.

        Raises:
            QueueFull, QuotaExceeded: nothing was kept.
            KeyReused: the idempotency key came before with another request.
            NoRoom, BadPlace, RunError: its pictures or its row cannot be stored.
        """
        others = others or {}
        hook = {"webhook_url": webhook_url} if webhook_url else {}
        asked = fingerprint({**request, **hook}, image, drawn, others)
        same_key = None if idempotency_key is None else earlier(client, idempotency_key)
        if same_key is not None and (rows := self.database.read(same_key)):
            check_same(rows[0], asked)
            return job_of(rows[0])
        check_room(self)
        job_id, key = f"video_{secrets.token_hex(12)}", asked_key(request, image, others)
        twin = None
        if reuse != "off" and not deciding(drawn):
            twin = self._copied(find(self.database, key, digest, client if reuse == "own" else None), job_id)
        kept = {**request, "inputs": sorted(others)} if others else dict(request)

        def work(transaction: Transaction) -> Row[Any]:
            if transaction.repeated and (row := transaction.execute(_GET, {"id": job_id}).one_or_none()):
                return cast(Row[Any], row)
            if same_key is not None and (row := transaction.execute(same_key).one_or_none()):
                check_same(row, asked)  # it came twice at once, and the other was first
                return cast(Row[Any], row)
            now = self._now(transaction)
            if twin is None:
                admit(transaction, client, quota or Quota(), self.limits.max_queued, now)
            else:  # which keeps nobody waiting
                count_submission(transaction, client, quota or Quota(), now)
            values = {
                "id": job_id, "client": client, "status": "queued", "created_at": now,
                "deadline_at": None if timeout is None else now + timeout, "request": json.dumps(kept),
                "idempotency_hash": None if idempotency_key is None else key_hash(idempotency_key),
                "fingerprint": asked, "steps": steps,
            }  # fmt: skip
            if webhook_url:
                owe(transaction, job_id, client, webhook_url)
            if twin is not None:  # never started: its time counts in no average
                done = {"status": "completed", "step": twin.steps, "steps": twin.steps, "completed_at": now}
                place = {"media_name": video_name(job_id, 0), "expires_at": now + self.limits.keep_seconds}
                values |= done | place | {"request": json.dumps(kept | {"reused": True})}
            row = transaction.execute(insert(jobs).values(**values).returning(*jobs.c)).one()
            expect(transaction, job_id, key)
            if twin is not None:
                keep(transaction, job_id, digest)
                settle(transaction, "completed", [row], now)
            return cast(Row[Any], row)

        try:
            self.media.write(image_name(job_id), image)
            for name, content in others.items():
                self.media.write(input_name(job_id, name), content)
            row = self.database.transact(work, lock="submit")
        except (QueueFull, QuotaExceeded, KeyReused, OSError):
            self._remove_media(job_id)
            raise
        except RunError:
            if self.database.is_sqlite:  # elsewhere it may have been committed: what is a stray, a sweep finds out
                self._remove_media(job_id)
            raise
        if row.id != job_id:
            self._remove_media(job_id)
        return self._estimated([row])[0]

    def get(self, job_id: str, client: str | None = None) -> Job | None:
        """A job. Where ``client`` is given, another's job is unknown; so it is in `page`, `cancel` and `delete`."""
        if not is_job_id(job_id):
            return None
        rows = self.database.read(_GET, {"id": job_id})
        return self._estimated(rows)[0] if rows and client in (None, rows[0].client) else None

    def many(self, job_ids: Iterable[str]) -> dict[str, Job]:
        """Those of the jobs that there are, by id, with one query."""
        ids = [job_id for job_id in job_ids if is_job_id(job_id)]
        return {job.id: job for job in self._estimated(self.database.read(_MANY, {"ids": ids}))} if ids else {}

    def page(
        self, limit: int = 20, after: str | None = None, newest_first: bool = True, client: str | None = None
    ) -> list[Job]:
        """Jobs in the order of their coming, beginning behind the job ``after`` (unknown: an empty page)."""
        query = select(jobs).order_by(jobs.c.number.desc() if newest_first else jobs.c.number).limit(limit)
        if client is not None:
            query = query.where(jobs.c.client == client)
        if after is not None:
            start = self.get(after, client)
            if start is None:
                return []
            query = query.where(jobs.c.number < start.number if newest_first else jobs.c.number > start.number)
        return self._estimated(self.database.read(query))

    def waiting(self) -> int:
        """Jobs that are queued."""
        return int(self.database.read(WAITING)[0][0])

    def claim(self, worker: str, count: int) -> list[Job]:
        """Take up to ``count`` jobs: queued ones, and running ones whose lease ran out. They are the caller's alone.

        Fair between clients (`fair_order`). Where the answer of a commit is lost, its jobs come back when their lease
        has run out. A job that the caller runs already was lost to it meanwhile: this is its next attempt.
        """
        if count < 1 or not self._is_anything_due():
            return []

        def work(transaction: Transaction) -> list[Row[Any]]:
            now = self._now(transaction)
            ended = end_overdue(transaction, now, self.limits)
            chosen = choose(transaction, worker, count, now, self.limits)
            taken = {}
            if chosen:
                lease = {"worker": worker, "lease_until": now + self.limits.lease_seconds, "started_at": now}
                values = {"status": "in_progress", "step": 0, "attempts": jobs.c.attempts + 1, **lease}
                statement = update(jobs).where(jobs.c.number.in_(chosen)).values(values).returning(*jobs.c)
                taken = {row.number: row for row in transaction.execute(statement)}
                hide(transaction, [row.id for row in taken.values()])  # of an earlier attempt
                next_turns(transaction, [taken[number].client for number in chosen])
            settle(transaction, "failed", ended, now)
            return [taken[number] for number in chosen]

        return [job_of(row) for row in self.database.transact(work, lock="claim")]

    def beat(self, worker: str, progress: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """Note how far a worker's jobs are and renew their leases.

        Args:
            progress: ``{job id: (step, steps)}``; a step never goes backwards within an attempt.

        Returns:
            the jobs that are no longer the worker's, with ``cancelled``, ``deadline_exceeded`` (it failed, maybe just
            now) or ``lost``: work on them should stop.
        """
        if not progress:
            return {}

        def work(transaction: Transaction) -> dict[str, str]:
            now = self._now(transaction)
            query = _MANY.order_by(jobs.c.number).with_for_update()
            rows = {row.id: row for row in transaction.execute(query, {"ids": list(progress)})}
            until = now + self.limits.lease_seconds
            gone, late, mine = {}, [], []
            for job_id, (step, steps) in progress.items():
                row = rows.get(job_id)
                if row is None or row.status != "in_progress" or row.worker != worker:
                    gone[job_id] = _why_gone(row)
                elif row.deadline_at is not None and row.deadline_at <= now:
                    gone[job_id] = "deadline_exceeded"
                    late.append(row)
                else:
                    mine.append({"row": row.number, "at": max(step, row.step), "of": steps, "until": until})
            if mine:
                renewed: dict[str, Any] = {
                    "step": bindparam("at"),
                    "steps": bindparam("of"),
                    "lease_until": bindparam("until"),
                }
                transaction.execute(update(jobs).where(jobs.c.number == bindparam("row")).values(renewed), mine)
            if late:
                fail_late(transaction, late, now, self.limits)
                settle(transaction, "failed", late, now)
            return gone

        return self.database.transact(work, durable=False)

    def expire(self, worker: str) -> int:
        """End the leases of a worker whose process is dead, so that its jobs are claimed at once; returns how many.

        Should it live after all, its next beat renews those that nobody has claimed meanwhile.
        """

        def work(transaction: Transaction) -> int:
            now = self._now(transaction)
            held = (jobs.c.status == "in_progress", jobs.c.worker == worker, jobs.c.lease_until > now)
            return int(transaction.execute(update(jobs).where(*held).values(lease_until=now)).rowcount)

        return self.database.transact(work, durable=False)

    def tell_pace(self, worker: str, pace: Pace | None, left: Mapping[str, float]) -> None:
        """Keep what a worker measured, and in how many seconds it expects each of its jobs to end, by id."""

        def work(transaction: Transaction) -> None:
            now = self._now(transaction)
            tell(transaction, worker, now, pace, {job_id: now + seconds for job_id, seconds in left.items()})

        self.database.transact(work, durable=False)

    def show(self, job: Job, preview: Preview) -> None:
        """Keep how a job's video looks by now, while it is this worker's."""

        def work(transaction: Transaction) -> None:
            if transaction.execute(select(jobs.c.id).where(*_held(job))).one_or_none():
                show(transaction, job.id, preview)

        self.database.transact(work, durable=False)

    def previews(self, jobs: Iterable[Job]) -> dict[str, Preview]:
        """By id, of those that are being made, asked for them and have one."""
        asked = [job.id for job in jobs if job.status == "in_progress" and job.request.get("previews")]
        return shown(self.database, asked)

    def last_pace(self, digest: str) -> Pace | None:
        """What any worker last measured of a bundle."""
        return last_pace(self.database, digest)

    def complete(self, job: Job, media_name: str, digest: str | None = None) -> bool:
        """in_progress -> completed. False: it is not this worker's any more, which then removes its video.

        ``digest``: of the bundle that made it; without, no other request is answered by it.
        """
        return self._finish(job, "completed", digest, media_name=media_name)

    def fail(self, job: Job, code: str, message: str) -> bool:
        """in_progress -> failed, with a stable code and one line for a person. False: not this worker's any more."""
        return self._finish(job, "failed", error_code=_storable(code), error_message=_storable(message))

    def release(self, job: Job) -> bool:
        """in_progress -> queued: its worker is being closed in good order, so the attempt does not count."""

        def work(transaction: Transaction) -> bool:
            values = {"status": "queued", "step": 0, "attempts": job.attempts - 1, "started_at": None}
            statement = update(jobs).where(*_held(job)).values(worker=None, lease_until=None, **values)
            return bool(transaction.execute(statement).rowcount)

        return self.database.transact(work, durable=False)

    def cancel(self, job_id: str, client: str | None = None) -> bool:
        """queued or in_progress -> cancelled; its worker learns of it at its next beat. False: unknown, or finished."""
        if not is_job_id(job_id):
            return False

        def work(transaction: Transaction) -> bool:
            row = transaction.execute(_GET.with_for_update(), {"id": job_id}).one_or_none()
            if row is None or client not in (None, row.client):
                return False
            if row.status in FINAL:
                return transaction.repeated and row.status == "cancelled"
            now = self._now(transaction)
            end(transaction, [row], now, self.limits.keep_seconds, status="cancelled")
            settle(transaction, "cancelled", [row], now)
            return True

        return self._end(work)

    def delete(self, job_id: str, client: str | None = None) -> bool:
        """Remove a finished job with its files. False: unknown, or not finished."""
        if not is_job_id(job_id):
            return False

        def work(transaction: Transaction) -> bool:
            statement = delete(jobs).where(jobs.c.id == job_id, jobs.c.status.in_(FINAL))
            if client is not None:
                statement = statement.where(jobs.c.client == client)
            if transaction.execute(statement).rowcount:
                forget(transaction, [job_id])
                return True
            return transaction.repeated

        deleted = self._end(work)
        if deleted:
            self._remove_media(job_id)
        return deleted

    def sweep(self) -> int:
        """Remove the finished jobs whose time is over, with their files, and old files of no job; returns how many.

        Jobs behind their deadline and those interrupted too often fail here as well, although no worker is left.
        """
        self._end(self._tidy, durable=False)
        removed = 0
        while True:
            ids = self._end(self._delete_expired)
            for job_id in ids:
                self._remove_media(job_id)
            removed += len(ids)
            if len(ids) < _AT_ONCE:
                break
        self._remove_strays()
        return removed

    def statistics(self) -> Statistics:
        """How things stand, and what was done since the database was made."""
        return read_statistics(self.database, self._time())

    def _end(self, work: Callable[[Transaction], T], durable: bool = True) -> T:
        """A transaction that ends or removes jobs: it may use the reserve of a full disk."""
        while True:
            try:
                return self.database.transact(work, durable=durable)
            except NoRoom:
                if not self.reserve.give_up():
                    raise
                self.database.checkpoint()

    def _now(self, transaction: Transaction) -> float:
        return transaction.now() if self._clock is None else self._clock()

    def _time(self) -> float:
        return self.database.now() if self._clock is None else self._clock()

    def _estimated(self, rows: Iterable[Row[Any]]) -> list[Job]:
        """The jobs of ``rows``, with what is known of their ends."""
        found = [job_of(row) for row in rows]
        unfinished = [job.id for job in found if job.status not in FINAL]
        if not unfinished:
            return found
        left = self._estimates.seconds_left(unfinished)
        return [replace(job, seconds_left=left.get(job.id)) for job in found]

    def _is_anything_due(self) -> bool:
        """Workers ask several times a second: they take no lock where there is nothing to do."""
        now = self._time()
        return bool(self.database.read(select(jobs.c.number).where(due(now)).limit(1)))

    def _finish(self, job: Job, status: Status, digest: str | None = None, **values: Any) -> bool:
        def work(transaction: Transaction) -> bool:
            now = self._now(transaction)
            statement = update(jobs).where(*_held(job)).values(
                status=status, completed_at=now, expires_at=now + self.limits.keep_seconds, lease_until=None, **values
            )  # fmt: skip
            row = transaction.execute(
                statement.returning(jobs.c.id, jobs.c.created_at, jobs.c.started_at)
            ).one_or_none()
            if row is not None:
                if digest is not None:
                    keep(transaction, job.id, digest)
                settle(transaction, status, [row], now)
                return True
            # It may have been this very call before, whose answer was lost.
            row = transaction.execute(_GET, {"id": job.id}).one_or_none()
            wanted = {"status": status, "worker": job.worker, "attempts": job.attempts, **values}
            return row is not None and all(getattr(row, name) == value for name, value in wanted.items())

        return self._end(work)

    def _tidy(self, transaction: Transaction) -> None:
        now = self._now(transaction)
        transaction.execute(delete(usage).where(usage.c.day < int(now // 86400) - 1))
        settle(transaction, "failed", end_overdue(transaction, now, self.limits), now)

    def _delete_expired(self, transaction: Transaction) -> list[str]:
        expired = select(jobs.c.number).where(jobs.c.expires_at <= self._now(transaction)).limit(_AT_ONCE)
        statement = delete(jobs).where(jobs.c.number.in_(expired.with_for_update(skip_locked=True)))
        ids = list(transaction.execute(statement.returning(jobs.c.id)).scalars())
        forget(transaction, ids)
        return ids

    def _copied(self, twin: Row[Any] | None, job_id: str) -> Row[Any] | None:
        """``twin``, its video stored under a new job's name as well; None where there is none, or none any more."""
        if twin is None:
            return None
        try:
            self.media.copy(twin.media_name, video_name(job_id, 0))
        except (OSError, InputError, RunError):  # then it is made again
            return None
        return twin

    def _remove_strays(self) -> None:
        """Remove the files of jobs that are gone, and of attempts that came to nothing. Looks now and then only."""
        now = self._time()
        if now - self._strays_at < self.limits.stray_seconds / 6:
            return
        self._strays_at = now
        old = self.media.old(self.limits.stray_seconds)
        ids = list(old)
        for begin in range(0, len(ids), _AT_ONCE):
            known = self.many(ids[begin : begin + _AT_ONCE])
            for job_id in ids[begin : begin + _AT_ONCE]:
                job = known.get(job_id)
                if job is None:
                    self._remove_media(job_id)
                elif job.status in FINAL:
                    previews = str(job.media_name).removesuffix(".mp4") + "-"
                    for name in set(old[job_id]) - {*job.files.values(), job.media_name}:
                        if job.media_name and name.startswith(previews):
                            continue
                        self.media.remove_file(name)

    def _remove_media(self, job_id: str) -> None:
        try:
            self.media.remove(job_id)
        except (OSError, InputError, RunError) as error:
            log.warning("%s: its files were not removed (%s); a later sweep tries again", job_id, error)


def _held(job: Job) -> tuple[ColumnElement[bool], ...]:
    """The row of a job while it is its worker's, in the same attempt."""
    mine = (jobs.c.worker == job.worker, jobs.c.attempts == job.attempts)
    return (jobs.c.id == job.id, jobs.c.status == "in_progress", *mine)


def _why_gone(row: Row[Any] | None) -> str:
    if row is not None and row.status == "cancelled":
        return "cancelled"
    return "deadline_exceeded" if row is not None and row.error_code == "deadline_exceeded" else "lost"


def _storable(text: str) -> str:
    """PostgreSQL stores no NUL, and nobody stores half a surrogate."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()
