"""The job store: transitions, order, bounds, what survives a crash, and any interleaving of all of it."""

from __future__ import annotations

import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st

from cinemo.serving.jobs import FINAL, JobStore, QueueFull

REQUEST = {"prompt": "waves", "seed": 3}


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> JobStore:
    return JobStore(tmp_path, max_queued=3, keep_seconds=100, max_attempts=2, clock=clock)


def test_a_job_runs_to_completion(store: JobStore, clock: Clock) -> None:
    job = store.submit(REQUEST, b"pixels")
    assert (job.status, job.progress, job.request) == ("queued", 0, REQUEST)
    assert store.image_path(job.id).read_bytes() == b"pixels"
    claimed = store.claim()
    assert claimed is not None
    assert (claimed.id, claimed.status, claimed.attempts) == (job.id, "in_progress", 1)
    assert store.report_progress(job.id, 40)
    assert store.report_progress(job.id, 20)
    clock.now += 7
    running = store.get(job.id)
    assert running is not None
    assert running.progress == 40, "progress never goes backwards"
    assert store.complete(job.id)
    done = store.get(job.id)
    assert done is not None
    assert (done.status, done.progress, done.completed_at, done.expires_at) == (
        "completed", 100, clock.now, clock.now + 100,
    )  # fmt: skip


def test_jobs_are_claimed_in_the_order_they_came(store: JobStore) -> None:
    ids = [store.submit(REQUEST, b"").id for _ in range(3)]
    claimed = [store.claim() for _ in range(4)]
    assert [job.id if job else None for job in claimed] == [*ids, None]


def test_one_job_is_claimed_once_by_many_threads(tmp_path: Path) -> None:
    store = JobStore(tmp_path, max_queued=100)
    ids = {store.submit(REQUEST, b"").id for _ in range(20)}
    taken: list[str] = []

    def claim_all() -> None:
        own = JobStore(tmp_path)
        while job := own.claim():
            taken.append(job.id)

    threads = [threading.Thread(target=claim_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(ids)


def test_a_full_queue_refuses_and_keeps_nothing(store: JobStore, tmp_path: Path, clock: Clock) -> None:
    for _ in range(3):
        store.submit(REQUEST, b"")
    with pytest.raises(QueueFull) as full:
        store.submit(REQUEST, b"left over?")
    assert full.value.waiting == 3
    assert full.value.retry_after >= 1
    assert len(list((tmp_path / "files").iterdir())) == 3
    job = store.claim()
    assert job is not None
    store.submit(REQUEST, b"")
    clock.now += 42
    store.complete(job.id)
    with pytest.raises(QueueFull) as full:
        store.submit(REQUEST, b"")
    assert full.value.retry_after == 42, "as long as the last job took"


def test_cancelling_stops_a_running_job(store: JobStore) -> None:
    job = store.submit(REQUEST, b"")
    store.claim()
    assert store.cancel(job.id)
    assert not store.report_progress(job.id, 50), "the runner learns that it should stop"
    assert not store.complete(job.id)
    assert not store.cancel(job.id)
    cancelled = store.get(job.id)
    assert cancelled is not None
    assert cancelled.status == "cancelled"


def test_a_cancelled_job_is_not_claimed(store: JobStore) -> None:
    first, second = store.submit(REQUEST, b""), store.submit(REQUEST, b"")
    store.cancel(first.id)
    claimed = store.claim()
    assert claimed is not None
    assert claimed.id == second.id


def test_only_finished_jobs_are_deleted(store: JobStore) -> None:
    job = store.submit(REQUEST, b"")
    assert not store.delete(job.id)
    store.claim()
    assert not store.delete(job.id)
    store.fail(job.id, "internal_error", "it broke")
    failed = store.get(job.id)
    assert failed is not None
    assert (failed.status, failed.error_code, failed.error_message) == ("failed", "internal_error", "it broke")
    assert store.delete(job.id)
    assert store.get(job.id) is None
    assert not store.image_path(job.id).parent.exists()


def test_jobs_of_a_dead_runner_are_queued_again_but_not_for_ever(tmp_path: Path) -> None:
    store = JobStore(tmp_path, max_attempts=2)
    job, waiting = store.submit(REQUEST, b"pixels"), store.submit(REQUEST, b"")
    store.claim()
    store.report_progress(job.id, 60)
    again = JobStore(tmp_path, max_attempts=2)
    assert again.recover() == (1, 0)
    recovered = again.claim()
    assert recovered is not None
    assert (recovered.id, recovered.progress, recovered.attempts) == (job.id, 0, 2), "its place in the queue is kept"
    assert JobStore(tmp_path, max_attempts=2).recover() == (0, 1)
    failed = store.get(job.id)
    assert failed is not None
    assert (failed.status, failed.error_code) == ("failed", "interrupted")
    untouched = store.get(waiting.id)
    assert untouched is not None
    assert untouched.status == "queued"


def test_finished_jobs_expire_with_their_files(store: JobStore, clock: Clock) -> None:
    old = store.submit(REQUEST, b"")
    store.claim()
    store.video_path(old.id).write_bytes(b"video")
    store.complete(old.id)
    waiting = store.submit(REQUEST, b"")
    clock.now += 99
    assert store.sweep() == 0
    clock.now += 1
    assert store.sweep() == 1
    assert store.get(old.id) is None
    assert not store.video_path(old.id).parent.exists()
    assert store.get(waiting.id) is not None


def test_pages_cover_every_job_once(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    ids = [store.submit(REQUEST, b"").id for _ in range(7)]
    seen: list[str] = []
    after = None
    while page := store.page(3, after):
        seen += [job.id for job in page]
        after = seen[-1]
    assert seen == ids[::-1]
    assert [job.id for job in store.page(2, ids[1], newest_first=False)] == ids[2:4]
    assert store.page(3, after="video_unknown") == []


class AnyInterleaving(stateful.RuleBasedStateMachine):
    """Two processes' stores over one directory agree with a model of the states, through crashes of the runner."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = TemporaryDirectory()
        self.stores = [JobStore(self.scratch.name, max_queued=4, max_attempts=2) for _ in range(2)]
        self.status: dict[str, str] = {}
        self.attempts: dict[str, int] = {}

    def teardown(self) -> None:
        self.scratch.cleanup()

    def pick(self, data: Any) -> str | None:
        # By place, for ids are random and an example must mean the same when it is run again.
        return list(self.status)[data.draw(st.integers(0, len(self.status) - 1))] if self.status else None

    @stateful.rule(which=st.sampled_from([0, 1]))
    def submit(self, which: int) -> None:
        full = sum(status == "queued" for status in self.status.values()) >= 4
        try:
            job = self.stores[which].submit(REQUEST, b"")
        except QueueFull:
            assert full
            return
        assert not full
        self.status[job.id], self.attempts[job.id] = "queued", 0

    @stateful.rule(which=st.sampled_from([0, 1]))
    def claim(self, which: int) -> None:
        queued = [job_id for job_id, status in self.status.items() if status == "queued"]
        job = self.stores[which].claim()
        assert (job.id if job else None) == (queued[0] if queued else None)
        if job:
            self.status[job.id] = "in_progress"
            self.attempts[job.id] += 1

    @stateful.rule(
        which=st.sampled_from([0, 1]), action=st.sampled_from(["complete", "fail", "cancel", "release"]), data=st.data()
    )
    def finish(self, which: int, action: str, data: Any) -> None:
        job_id = self.pick(data)
        if job_id is None:
            return
        arguments = (job_id, "code", "message") if action == "fail" else (job_id,)
        allowed = ("queued", "in_progress") if action == "cancel" else ("in_progress",)
        possible = self.status[job_id] in allowed
        assert getattr(self.stores[which], action)(*arguments) == possible
        if possible:
            after = {"complete": "completed", "fail": "failed", "cancel": "cancelled", "release": "queued"}
            self.status[job_id] = after[action]
            self.attempts[job_id] -= action == "release"

    @stateful.rule(data=st.data())
    def delete(self, data: Any) -> None:
        job_id = self.pick(data)
        if job_id is not None and self.stores[0].delete(job_id):
            assert self.status.pop(job_id) in FINAL

    @stateful.rule()
    def crash(self) -> None:
        self.stores[0] = JobStore(self.scratch.name, max_queued=4, max_attempts=2)
        self.stores[0].recover()
        for job_id, status in self.status.items():
            if status == "in_progress":
                self.status[job_id] = "failed" if self.attempts[job_id] >= 2 else "queued"

    @stateful.invariant()
    def agrees(self) -> None:
        jobs = self.stores[1].page(1000, newest_first=False)
        assert {job.id: job.status for job in jobs} == self.status
        assert all((job.expires_at is not None) == (job.status in FINAL) for job in jobs)


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
