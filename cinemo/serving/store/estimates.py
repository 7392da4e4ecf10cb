"""When jobs will be done: what workers tell of their pace, and the queue worked off at that pace.

A worker tells what steps take on its device and when each job that it runs will end. Whoever is asked for a job lays
the queue behind these: the job that is next begins where a place becomes free.
"""

from __future__ import annotations

import heapq
import json
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Self

from sqlalchemy import delete, insert, select, update

from cinemo.serving.store.database import Database, Transaction
from cinemo.serving.store.fairness import fair_order
from cinemo.serving.store.tables import jobs, paces, turns

_FRESH_SECONDS = 0.5  # for which a look at the queue serves all that ask
_NEWS_SECONDS = 0.02  # the same where somebody asks for a job that was not there
_ALIVE_SECONDS = 30.0  # since a worker last told something
_KEEP_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class Pace:
    """What a worker measured of the bundle ``digest``.

    A step takes ``per_step + per_row * rows`` seconds for all rows in it; a call of a usual video has ``rows``.
    ``places``: videos in one step; ``joined``: that take turns. ``tail``: seconds from a video's last step until it is
    stored.
    """

    digest: str
    per_step: float
    per_row: float
    rows: float
    places: int
    joined: int
    tail: float

    @classmethod
    def read(cls, told: Mapping[str, Any] | None) -> Self | None:
        """None where nothing was told, or another version told it."""
        try:
            return cls(**told) if told else None
        except TypeError:
            return None

    def seconds(self, calls: int, company: int) -> float:
        """From a video's start to its end where ``company`` videos take turns, itself among them."""
        there = min(company, self.joined)
        return (
            calls * (self.per_step * max(1.0, there / self.places) + self.per_row * self.rows * there)
            + self.tail * there
        )


def tell(transaction: Transaction, worker: str, now: float, pace: Pace | None, ends: Mapping[str, float]) -> None:
    """Keep what a worker says. ``ends``: Unix seconds, by job id."""
    about = json.dumps({"pace": pace and asdict(pace), "ends": dict(ends)})
    values = {"told_at": now, "told": about}
    if not transaction.execute(update(paces).where(paces.c.worker == worker).values(values)).rowcount:
        transaction.execute(delete(paces).where(paces.c.told_at < now - _KEEP_SECONDS))
        transaction.execute(insert(paces).values(worker=worker, **values))


def last_pace(database: Database, digest: str) -> Pace | None:
    """What was told last of a bundle, by whichever worker."""
    found = (Pace.read(json.loads(row.told)["pace"]) for row in database.read(_PACES))
    return next((pace for pace in found if pace and pace.digest == digest), None)


class Estimates:
    """When unfinished jobs will be done; one look at the database for all who ask within half a second."""

    def __init__(self, database: Database, clock: Callable[[], float], ticks: Callable[[], float]) -> None:
        """``clock``: the database's; ``ticks``: any that costs nothing to look at."""
        self._database, self._clock, self._ticks = database, clock, ticks
        self._turn = threading.Lock()
        self._looked_at, self._left = -float("inf"), dict[str, float]()

    def seconds_left(self, ids: Collection[str]) -> dict[str, float]:
        """Of these jobs, by id; without those of which nothing can be said."""
        with self._turn:
            since = self._ticks() - self._looked_at
            is_news = bool(self._left) and not self._left.keys() >= set(ids)
            if not 0 <= since < (_NEWS_SECONDS if is_news else _FRESH_SECONDS):
                now, self._looked_at, since = self._clock(), self._ticks(), 0.0
                self._left = {job_id: end - now for job_id, end in self._ends(now).items()}
            return {job_id: max(0.0, self._left[job_id] - since) for job_id in ids if job_id in self._left}

    def _ends(self, now: float) -> dict[str, float]:
        told = [(row, json.loads(row.told)) for row in self._database.read(_PACES)]
        pace = next((pace for _, each in told if (pace := Pace.read(each["pace"]))), None)
        if pace is None:
            return {}
        said = {(row.worker, job_id): end for row, each in told for job_id, end in each["ends"].items()}
        alive = sum(row.told_at > now - _ALIVE_SECONDS for row, _ in told)
        unfinished = self._database.read(_UNFINISHED)
        running = [row for row in unfinished if row.status == "in_progress"]
        last_turns = {row.client: row.turn for row in self._database.read(_TURNS)} if running else {}
        waiting = {row.number: row for row in unfinished if row.status == "queued"}
        pairs = [(row.client, row.number) for row in waiting.values()]
        order = fair_order(pairs, Counter(row.client for row in running), last_turns)
        workers = max(1, alive)
        found = {}
        for row in running:
            usual = (row.started_at or now) + pace.seconds(row.steps, ceil(len(running) / workers))
            found[row.id] = said.get((row.worker, row.id), usual)
        free = workers * pace.joined
        ends = sorted(found.values())
        for there, (_, number) in enumerate(order, len(running) + 1):
            begin = now if len(ends) < free else max(now, heapq.heappop(ends))
            row = waiting[number]
            found[row.id] = begin + pace.seconds(row.steps, ceil(there / workers))
            heapq.heappush(ends, found[row.id])
        return found


_PACES = select(paces).order_by(paces.c.told_at.desc())
_TURNS = select(turns)
_UNFINISHED = select(
    jobs.c.number, jobs.c.id, jobs.c.client, jobs.c.status, jobs.c.worker, jobs.c.steps, jobs.c.started_at
).where(jobs.c.status.in_(("queued", "in_progress")))
