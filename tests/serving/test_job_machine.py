"""Any interleaving of clients, workers and time: the job store agrees with a plain model, on both databases."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st
from postgres_server import PostgresServer

from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import FINAL, Job, JobStore, QueueFull, QueueLimits
from cinemo.serving.store.media import MediaStore

LIMITS = QueueLimits(max_queued=4, max_attempts=2, keep_seconds=50, lease_seconds=10)
WORKERS = ("x", "y", "z")


@dataclass
class Model:
    """What the store must say of one job."""

    status: str = "queued"
    worker: str | None = None
    attempts: int = 0
    lease_until: float = 0
    deadline: float | None = None
    expires: float | None = None
    handles: list[Job] = field(default_factory=list)  # every claim of it, outdated ones too


class AnyInterleaving(stateful.RuleBasedStateMachine):
    urls: Any = None  # an iterator of URLs of fresh databases; None: SQLite

    def __init__(self) -> None:
        super().__init__()
        self.scratch = TemporaryDirectory()
        self.now = 1_000_000.0
        url = next(self.urls) if self.urls else f"sqlite:///{self.scratch.name}/state.sqlite"
        self.databases = [Database(url) for _ in range(2)]
        media = MediaStore(f"{self.scratch.name}/media")
        self.stores = [JobStore(database, media, LIMITS, lambda: self.now) for database in self.databases]
        self.turn = itertools.cycle(self.stores)
        self.jobs: dict[str, Model] = {}
        self.finished = dict.fromkeys(FINAL, 0)

    @property
    def store(self) -> JobStore:
        """The two processes act in turn."""
        return next(self.turn)

    def teardown(self) -> None:
        for database in self.databases:
            database.close()
        self.scratch.cleanup()

    def end(self, model: Model, status: str) -> None:
        assert model.status in ("queued", "in_progress"), "a final state is left by nothing"
        model.status, model.expires = status, self.now + LIMITS.keep_seconds
        self.finished[status] += 1  # type: ignore[index]

    def end_overdue(self) -> None:
        for model in self.jobs.values():
            if model.status in FINAL:
                continue
            lapsed = model.status == "in_progress" and model.lease_until <= self.now
            late = model.deadline is not None and model.deadline <= self.now
            if late or (lapsed and model.attempts >= LIMITS.max_attempts):
                self.end(model, "failed")

    def holds(self, model: Model, handle: Job) -> bool:
        mine = (model.worker, model.attempts) == (handle.worker, handle.attempts)
        return model.status == "in_progress" and mine

    def pick(self, data: Any) -> tuple[str, Model] | None:
        # By place, for ids are random and an example must mean the same when it is run again.
        return list(self.jobs.items())[data.draw(st.integers(0, len(self.jobs) - 1))] if self.jobs else None

    @stateful.rule(client=st.sampled_from(["", "a", "b"]), timeout=st.sampled_from([None, None, 15.0]))
    def submit(self, client: str, timeout: float | None) -> None:
        full = sum(model.status == "queued" for model in self.jobs.values()) >= LIMITS.max_queued
        try:
            job = self.store.submit({}, b"", client, timeout=timeout)
        except QueueFull:
            assert full
            return
        assert not full
        self.jobs[job.id] = Model(deadline=None if timeout is None else self.now + timeout)

    @stateful.rule(worker=st.sampled_from(WORKERS), count=st.integers(1, 3))
    def claim(self, worker: str, count: int) -> None:
        self.end_overdue()
        claimed = self.store.claim(worker, count)
        assert len(claimed) <= count
        live = [model for model in self.jobs.values() if model.status == "in_progress" and model.lease_until > self.now]
        for job in claimed:
            model = self.jobs[job.id]
            lapsed = model.status == "in_progress" and model.lease_until <= self.now
            assert model.status == "queued" or lapsed, "never two owners"
            assert (job.worker, job.attempts) == (worker, model.attempts + 1)
            if job.attempts == LIMITS.max_attempts:
                assert len(claimed) == 1
                assert not any(other.worker == worker for other in live), "the last attempt is made alone"
            model.status, model.worker, model.attempts = "in_progress", worker, job.attempts
            model.lease_until = self.now + LIMITS.lease_seconds
            model.handles.append(job)
        if not claimed and not any(model.worker == worker for model in live):
            claimable = [model for model in self.jobs.values() if model.status == "queued"]
            assert not claimable, "an idle worker is given work where there is some"

    @stateful.rule(worker=st.sampled_from(WORKERS), step=st.integers(0, 10))
    def beat(self, worker: str, step: int) -> None:
        known = {job_id: model for job_id, model in self.jobs.items() if any(h.worker == worker for h in model.handles)}
        gone = self.store.beat(worker, dict.fromkeys(known, (step, 10)))
        for job_id, model in known.items():
            if model.status == "in_progress" and model.worker == worker:
                if model.deadline is not None and model.deadline <= self.now:
                    self.end(model, "failed")
                    assert gone.pop(job_id) == "deadline_exceeded"
                else:
                    model.lease_until = self.now + LIMITS.lease_seconds
                    assert job_id not in gone
            else:
                reasons = {"cancelled": {"cancelled"}, "failed": {"deadline_exceeded", "lost"}}
                assert gone.pop(job_id) in reasons.get(model.status, {"lost"})
        assert gone == {}

    @stateful.rule(action=st.sampled_from(["complete", "fail", "release"]), data=st.data())
    def finish(self, action: str, data: Any) -> None:
        """A worker tells of a claim, maybe an outdated one."""
        picked = self.pick(data)
        if picked is None or not picked[1].handles:
            return
        model = picked[1]
        handle = model.handles[data.draw(st.integers(0, len(model.handles) - 1))]
        held = self.holds(model, handle)
        repeated = model.status in FINAL and (model.worker, model.attempts) == (handle.worker, handle.attempts)
        unique = f"{handle.worker}-{handle.attempts}"
        if action == "release":
            assert self.store.release(handle) == held
            if held:
                model.status, model.worker, model.attempts = "queued", None, model.attempts - 1
            return
        answer = (
            self.store.complete(handle, unique) if action == "complete" else self.store.fail(handle, "code", unique)
        )
        status = "completed" if action == "complete" else "failed"
        if held:
            assert answer
            self.end(model, status)
        elif answer:
            assert repeated, "only what had the same effect before"
            assert model.status == status

    @stateful.rule(data=st.data())
    def cancel(self, data: Any) -> None:
        if (picked := self.pick(data)) is not None:
            possible = picked[1].status not in FINAL
            assert self.store.cancel(picked[0]) == possible
            if possible:
                self.end(picked[1], "cancelled")

    @stateful.rule(data=st.data())
    def delete(self, data: Any) -> None:
        if (picked := self.pick(data)) is not None:
            finished = picked[1].status in FINAL
            assert self.store.delete(picked[0]) == finished
            if finished:
                del self.jobs[picked[0]]

    @stateful.rule()
    def sweep(self) -> None:
        self.end_overdue()
        over = [
            job_id for job_id, model in self.jobs.items() if model.expires is not None and model.expires <= self.now
        ]
        assert self.store.sweep() == len(over)
        for job_id in over:
            del self.jobs[job_id]

    @stateful.rule(seconds=st.sampled_from([0.5, 4.0, 9.0, 11.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @stateful.invariant()
    def agrees(self) -> None:
        seen = {job.id: job for job in self.store.page(1000, newest_first=False)}
        assert list(seen) == list(self.jobs), "none lost, none invented, in the order of their coming"
        for job_id, model in self.jobs.items():
            job = seen[job_id]
            assert (job.status, job.attempts, job.expires_at) == (model.status, model.attempts, model.expires)
            assert job.status != "in_progress" or job.worker == model.worker

    @stateful.invariant()
    def counters_equal_history(self) -> None:
        assert self.store.statistics().finished == self.finished


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(
    max_examples=25, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)


@pytest.mark.postgres
def test_any_interleaving_on_postgresql(postgres: PostgresServer) -> None:
    class OnPostgres(AnyInterleaving):
        urls = iter(postgres.new_database, "")

    chosen = settings(max_examples=8, stateful_step_count=30, suppress_health_check=list(HealthCheck))
    stateful.run_state_machine_as_test(OnPostgres, settings=chosen)
