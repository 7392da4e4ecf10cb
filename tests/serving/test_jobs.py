"""The job store on both databases: transitions, who holds a job, fairness, bounds, and what is swept."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import FINAL, Job, JobStore, KeyReused, QueueFull, QueueLimits, Quota, QuotaExceeded
from cinemo.serving.store.media import MediaStore, image_name, input_name, video_name
from cinemo.serving.store.previews import Preview
from cinemo.serving.store.tables import previews

REQUEST = {"prompt": "waves", "seed": 3}
LIMITS = QueueLimits(max_queued=5, max_attempts=3, keep_seconds=100, lease_seconds=30, stray_seconds=3600)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database_url: str, tmp_path: Path, clock: Clock, open_database: Callable[..., Database]) -> JobStore:
    return JobStore(open_database(database_url), MediaStore(str(tmp_path / "media")), LIMITS, clock)


def reopened(store: JobStore, **changes: Any) -> JobStore:
    return JobStore(store.database, store.media, replace(store.limits, **changes), store._clock)


def there(store: JobStore, job_id: str) -> Job:
    job = store.get(job_id)
    assert job is not None
    return job


def test_a_job_runs_to_completion(store: JobStore, clock: Clock) -> None:
    job = store.submit(REQUEST, b"pixels")
    assert (job.status, job.progress, job.request, job.number) == ("queued", 0, REQUEST, 1)
    assert store.media.read(image_name(job.id)) == b"pixels"
    clock.now += 2
    [claimed] = store.claim("a", 4)
    assert (claimed.id, claimed.status, claimed.attempts, claimed.worker) == (job.id, "in_progress", 1, "a")
    assert store.beat("a", {job.id: (4, 10)}) == {}
    assert store.beat("a", {job.id: (2, 10)}) == {}
    assert (there(store, job.id).progress, there(store, job.id).step) == (40, 4), "progress never goes backwards"
    store.beat("a", {job.id: (10, 10)})
    assert there(store, job.id).progress == 99, "decoding and writing come after the last step"
    clock.now += 7
    assert store.complete(claimed, video_name(job.id, 1))
    done = there(store, job.id)
    assert (done.status, done.progress, done.completed_at, done.expires_at, done.media_name) == (
        "completed", 100, clock.now, clock.now + 100, video_name(job.id, 1),
    )  # fmt: skip
    statistics = store.statistics()
    assert (statistics.queue_seconds.total, statistics.run_seconds.total) == (2, 7)


def test_a_result_told_twice_is_one_result_and_no_other_replaces_it(store: JobStore) -> None:
    store.submit(REQUEST, b"")
    [job] = store.claim("a", 1)
    assert store.complete(job, "first")
    assert store.complete(job, "first"), "the answer to the first call may have been lost"
    assert not store.complete(job, "second")
    assert not store.fail(job, "internal_error", "late")
    assert not store.cancel(job.id)
    assert not store.release(job)
    assert there(store, job.id).media_name == "first"
    assert store.statistics().finished == {"completed": 1, "failed": 0, "cancelled": 0}


def test_a_lease_that_ran_out_is_anothers_and_the_first_worker_is_fenced(store: JobStore, clock: Clock) -> None:
    submitted = store.submit(REQUEST, b"")
    [first] = store.claim("a", 1)
    store.beat("a", {first.id: (6, 10)})
    clock.now += 29.9
    assert store.claim("b", 1) == []
    clock.now += 0.1
    [second] = store.claim("b", 1)
    assert (second.id, second.attempts, second.progress) == (submitted.id, 2, 0)
    assert store.beat("a", {first.id: (7, 10)}) == {first.id: "lost"}
    assert not store.complete(first, "a's")
    assert not store.fail(first, "out_of_memory", "a's")
    assert not store.release(first)
    assert there(store, first.id).worker == "b"
    assert store.complete(second, "b's")


def test_a_dead_workers_jobs_are_claimed_at_once_and_count_as_tried(store: JobStore) -> None:
    for _ in range(3):
        store.submit(REQUEST, b"")
    [first] = store.claim("a", 1)
    [second] = store.claim("b", 1)
    assert store.expire("a") == 1
    assert store.expire("a") == 0
    assert store.beat("b", {second.id: (1, 2)}) == {}
    again = store.claim("c", 5)
    assert sorted((job.number, job.attempts) for job in again) == [(1, 2), (3, 1)]
    assert not store.complete(first, "video")
    assert store.complete(second, "video")


def test_a_worker_that_lives_after_all_keeps_what_nobody_has_claimed(store: JobStore) -> None:
    store.submit(REQUEST, b"")
    [job] = store.claim("a", 1)
    assert store.expire("a") == 1
    assert store.beat("a", {job.id: (1, 2)}) == {}
    assert store.claim("b", 1) == []
    assert store.complete(job, "video")


def test_a_beat_renews_the_lease(store: JobStore, clock: Clock) -> None:
    store.submit(REQUEST, b"")
    [job] = store.claim("a", 1)
    for _ in range(5):
        clock.now += 20
        assert store.beat("a", {job.id: (1, 10)}) == {}
        assert store.claim("b", 1) == []


def test_a_worker_of_the_same_name_is_fenced_by_the_attempt(store: JobStore, clock: Clock) -> None:
    store.submit(REQUEST, b"")
    [first] = store.claim("a", 1)
    clock.now += 31
    [second] = store.claim("a", 1)
    assert not store.complete(first, "old")
    assert store.complete(second, "new")


def test_jobs_fail_after_too_many_interruptions(store: JobStore, clock: Clock) -> None:
    job = store.submit(REQUEST, b"")
    for attempt in (1, 2, 3):
        [claimed] = store.claim(f"worker-{attempt}", 1)
        assert claimed.attempts == attempt
        clock.now += 31
    assert store.claim("worker-4", 1) == []
    failed = there(store, job.id)
    assert (failed.status, failed.error_code, failed.attempts) == ("failed", "interrupted", 3)
    assert store.statistics().finished["failed"] == 1


def test_the_last_attempt_is_made_alone(store: JobStore, clock: Clock) -> None:
    """A job that kills its worker every time: those that shared a batch with it all complete."""
    poison = store.submit(REQUEST, b"", client="mallory").id
    innocent = {store.submit(REQUEST, b"", client=f"c{n}").id for n in range(3)}
    for death in range(10):
        batch = store.claim(f"worker-{death}", 4)
        if not batch:
            break
        if poison in {job.id for job in batch}:
            clock.now += 31  # the whole worker died
            continue
        for job in batch:
            assert store.complete(job, "video")
    assert there(store, poison).error_code == "interrupted"
    assert {there(store, job_id).status for job_id in innocent} == {"completed"}


def test_a_busy_worker_drains_for_a_last_attempt_and_takes_nothing_beside_it(store: JobStore, clock: Clock) -> None:
    twice = store.submit(REQUEST, b"", client="a")
    for worker in ("x", "y"):
        assert [job.id for job in store.claim(worker, 1)] == [twice.id]
        clock.now += 20
        other = store.submit(REQUEST, b"", client="b") if worker == "y" else None
        clock.now += 11 if other is None else 0
    assert other is not None
    [beside] = store.claim("z", 1)
    assert beside.id == other.id
    clock.now += 11
    assert store.claim("z", 3) == [], "it would be next, and this worker is busy"
    assert store.complete(beside, "video")
    store.submit(REQUEST, b"", client="b")
    [last] = store.claim("z", 3)
    assert (last.id, last.attempts) == (twice.id, 3)
    assert store.claim("z", 3) == [], "nothing beside it"
    assert len(store.claim("w", 3)) == 1, "others are served meanwhile"


def test_a_released_attempt_does_not_count(store: JobStore) -> None:
    job = store.submit(REQUEST, b"")
    for _ in range(5):
        [claimed] = store.claim("a", 1)
        assert claimed.attempts == 1
        store.beat("a", {job.id: (5, 10)})
        assert store.release(claimed)
        released = there(store, job.id)
        assert (released.status, released.progress, released.attempts, released.started_at) == ("queued", 0, 0, None)
    assert store.beat("a", {job.id: (6, 10)}) == {job.id: "lost"}
    [anothers] = store.claim("b", 1)
    assert anothers.attempts == claimed.attempts
    assert not store.complete(claimed, "a's"), "the number of the attempt alone does not tell whose it is"
    assert store.complete(anothers, "b's")


def test_cancelling_reaches_the_worker_at_its_next_beat(store: JobStore) -> None:
    waiting, running = store.submit(REQUEST, b""), store.submit(REQUEST, b"")
    assert store.cancel(waiting.id)
    [claimed] = store.claim("a", 4)
    assert claimed.id == running.id
    assert store.cancel(running.id)
    assert not store.cancel(running.id)
    assert store.beat("a", {running.id: (5, 10)}) == {running.id: "cancelled"}
    assert not store.complete(claimed, "video")
    assert store.statistics().finished["cancelled"] == 2
    assert store.delete(running.id)
    assert store.beat("a", {running.id: (6, 10)}) == {running.id: "lost"}


@pytest.mark.parametrize("end", ["cancel", "beat", "sweep", "complete", "fail", "release", "lapse"])
def test_previews_go_with_the_attempt_that_made_them(store: JobStore, clock: Clock, end: str) -> None:
    job = store.submit({**REQUEST, "previews": True}, b"", timeout=50)
    [claimed] = store.claim("a", 1)
    store.show(claimed, Preview(3, ("data:,",)))
    assert store.previews([claimed])[job.id].step == 3
    if end in ("beat", "sweep"):
        clock.now += 50
        store.beat("a", {job.id: (4, 10)}) if end == "beat" else store.sweep()
    elif end == "cancel":
        store.cancel(job.id)
    elif end == "complete":
        store.complete(claimed, "video")
    elif end == "fail":
        store.fail(claimed, "a", "b")
    else:
        store.release(claimed) if end == "release" else store.expire("a")
        assert store.claim("b", 1)
    assert store.database.read(select(previews)) == []


@pytest.mark.parametrize("notices", ["claim", "beat", "sweep"])
def test_a_deadline_ends_a_job_whoever_notices(store: JobStore, clock: Clock, notices: str) -> None:
    running, waiting = store.submit(REQUEST, b"", timeout=10), store.submit(REQUEST, b"", timeout=12)
    [claimed] = store.claim("a", 1)
    assert claimed.id == running.id
    assert store.beat("a", {running.id: (1, 10)}) == {}
    clock.now += 10
    if notices == "beat":
        assert store.beat("a", {running.id: (2, 10)}) == {running.id: "deadline_exceeded"}
    elif notices == "sweep":
        store.sweep()
    else:
        assert [job.id for job in store.claim("b", 1)] == [waiting.id]
    failed = there(store, running.id)
    assert (failed.status, failed.error_code) == ("failed", "deadline_exceeded")
    assert store.beat("a", {running.id: (3, 10)}) == {running.id: "deadline_exceeded"}
    assert not store.complete(claimed, "video")
    assert store.statistics().finished["failed"] == 1


def test_the_client_with_the_fewest_running_jobs_is_served_first(store: JobStore) -> None:
    store = reopened(store, max_queued=50)
    flood = [store.submit(REQUEST, b"", client="flood").id for _ in range(6)]
    late = [store.submit(REQUEST, b"", client="late").id for _ in range(2)]
    assert [job.id for job in store.claim("a", 3)] == [flood[0], late[0], flood[1]]
    third = store.submit(REQUEST, b"", client="third").id
    assert [job.id for job in store.claim("b", 3)] == [third, late[1], flood[2]]


def test_among_equals_the_one_served_longest_ago_is_next(store: JobStore) -> None:
    for client in ("a", "b", "c"):
        for _ in range(2):
            reopened(store, max_queued=50).submit(REQUEST, b"", client=client)
    served = []
    for _ in range(6):
        [job] = store.claim("w", 1)
        store.complete(job, "video")
        served.append(job.client)
    assert served == ["a", "b", "c", "a", "b", "c"]


def test_a_full_queue_refuses_and_keeps_nothing(store: JobStore, clock: Clock, tmp_path: Path) -> None:
    for _ in range(5):
        store.submit(REQUEST, b"")
    with pytest.raises(QueueFull) as full:
        store.submit(REQUEST, b"left over?")
    assert (full.value.waiting, full.value.retry_after) == (5, 10)
    assert len(list((tmp_path / "media").iterdir())) == 5
    [job] = store.claim("a", 1)
    store.submit(REQUEST, b"")
    clock.now += 20
    store.complete(job, "video")
    with pytest.raises(QueueFull) as full:
        store.submit(REQUEST, b"")
    assert full.value.retry_after == 20, "as long as the last job took"


def test_quotas_bound_a_client_and_deletion_gives_no_day_back(store: JobStore, clock: Clock) -> None:
    clock.now = 86400 * 20_000 + 100.0
    quota = Quota(max_active=2, per_day=3)
    jobs = [store.submit(REQUEST, b"", "key", quota=quota) for _ in range(2)]
    with pytest.raises(QuotaExceeded, match="2 at once"):
        store.submit(REQUEST, b"", "key", quota=quota)
    store.submit(REQUEST, b"", "other", quota=quota)
    for job in jobs:
        store.cancel(job.id)
        store.delete(job.id)
    store.submit(REQUEST, b"", "key", quota=quota)
    with pytest.raises(QuotaExceeded, match="3 a day") as exceeded:
        store.submit(REQUEST, b"", "key", quota=quota)
    assert exceeded.value.retry_after == 86300
    clock.now += 86300
    store.submit(REQUEST, b"", "key", quota=quota)


def test_an_idempotency_key_gives_the_same_job(store: JobStore, tmp_path: Path) -> None:
    key = "k\0\ud800" * 100  # whatever a header can hold
    job = store.submit(REQUEST, b"pixels", "a", key, quota=Quota(per_day=1))
    assert store.submit(dict(reversed(REQUEST.items())), b"pixels", "a", key, quota=Quota(per_day=1)) == job
    for request, image in (({**REQUEST, "seed": 4}, b"pixels"), (REQUEST, b"other")):
        with pytest.raises(KeyReused):
            store.submit(request, image, "a", key)
    assert store.submit(REQUEST, b"pixels", "b", key).id != job.id, "another client's key is another key"
    assert len(list((tmp_path / "media").iterdir())) == 2
    with pytest.raises(KeyReused):
        store.submit(REQUEST, b"pixels", "a", key, others={"last_image": b"another picture"})
    drawn = store.submit(REQUEST, b"pixels", "a", "second", drawn=["seed"])
    assert store.submit({**REQUEST, "seed": 99}, b"pixels", "a", "second", drawn=["seed"]) == drawn
    with pytest.raises(KeyReused):
        store.submit(REQUEST, b"pixels", "a", "second")


def test_one_idempotency_key_from_eight_threads_is_one_job(store: JobStore, tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def submit(_: int) -> str:
        barrier.wait()
        return store.submit(REQUEST, b"pixels", "a", "key").id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(submit, range(8)))) == 1
    assert [path.name for path in (tmp_path / "media").iterdir()] == [store.page()[0].id]


def test_many_threads_claim_every_job_once_and_fill_the_queue_exactly(store: JobStore) -> None:
    store = reopened(store, max_queued=20)

    def submit(_: int) -> int:
        try:
            store.submit(REQUEST, b"")
        except QueueFull:
            return 0
        return 1

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(submit, range(30))) == 20
        batches = list(pool.map(lambda n: store.claim(f"worker-{n}", 3), range(10)))
    taken = [job.id for batch in batches for job in batch]
    assert len(taken) == len(set(taken)) == 20


def test_a_client_sees_its_own_jobs_alone(store: JobStore) -> None:
    mine, yours = store.submit(REQUEST, b"", "me"), store.submit(REQUEST, b"", "you")
    assert store.get(yours.id, "me") is None
    assert store.get(yours.id) == store.get(yours.id, "you") == yours
    assert not store.cancel(yours.id, "me")
    assert [job.id for job in store.page(client="me")] == [mine.id]
    assert store.page(client="me", after=yours.id, newest_first=False) == []
    store.cancel(yours.id, "you")
    assert not store.delete(yours.id, "me")
    assert store.delete(yours.id, "you")


@pytest.mark.parametrize(
    "job_id", ["", "video_", "video_\0", "video_" + "Z" * 24, "../etc", "\ud800", "video_" + "0" * 24]
)
def test_an_id_that_is_none_is_unknown(store: JobStore, job_id: str) -> None:
    assert store.get(job_id) is None
    assert store.many([job_id]) == {}
    assert store.page(after=job_id) == []
    assert not store.cancel(job_id)
    assert not store.delete(job_id)


def test_pages_cover_every_job_once(store: JobStore) -> None:
    store = reopened(store, max_queued=50)
    ids = [store.submit(REQUEST, b"").id for _ in range(7)]
    seen: list[str] = []
    after = None
    while page := store.page(3, after):
        seen += [job.id for job in page]
        after = seen[-1]
    assert seen == ids[::-1]
    assert [job.id for job in store.page(2, ids[1], newest_first=False)] == ids[2:4]
    assert {job_id: job.id for job_id, job in store.many(ids[:3]).items()} == {job_id: job_id for job_id in ids[:3]}


def test_messages_that_a_database_cannot_hold_are_kept_as_well_as_can_be(store: JobStore) -> None:
    store.submit({"prompt": "\0\ud800"}, b"")
    [job] = store.claim("a", 1)
    assert job.request == {"prompt": "\0\ud800"}
    assert store.fail(job, "internal_error", "bad\0 \ud800")
    assert there(store, job.id).error_message == "bad ?"


def test_only_finished_jobs_are_deleted_and_with_their_files(store: JobStore, tmp_path: Path) -> None:
    job = store.submit(REQUEST, b"")
    assert not store.delete(job.id)
    [claimed] = store.claim("a", 1)
    assert not store.delete(job.id)
    store.fail(claimed, "internal_error", "it broke")
    assert store.delete(job.id)
    assert store.get(job.id) is None
    assert list((tmp_path / "media").iterdir()) == []
    assert store.statistics().finished["failed"] == 1, "what was done stays counted"


def test_finished_jobs_expire_with_their_files(store: JobStore, clock: Clock, tmp_path: Path) -> None:
    old, waiting = store.submit(REQUEST, b""), store.submit(REQUEST, b"")
    [job] = store.claim("a", 1)
    store.media.write(video_name(old.id, 1), b"video")
    store.complete(job, video_name(old.id, 1))
    clock.now += 99
    assert store.sweep() == 0
    clock.now += 1
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda _: store.sweep(), range(4))) == 1, "several may sweep at once"
    assert store.get(old.id) is None
    assert [path.name for path in (tmp_path / "media").iterdir()] == [waiting.id]


def test_old_files_of_no_job_are_swept(store: JobStore, clock: Clock, tmp_path: Path) -> None:
    media, root = store.media, tmp_path / "media"
    store.submit(REQUEST, b"", others={"last_image": b"last"})
    [job] = store.claim("a", 1)
    for attempt in (1, 2):
        media.write(video_name(job.id, attempt), b"video")
    store.complete(replace(job), video_name(job.id, 1))
    stray, fresh = "video_" + "a" * 24, "video_" + "b" * 24
    media.write(image_name(stray), b"")
    (root / stray / ".image.x.partial").write_bytes(b"half")
    media.write(image_name(fresh), b"")
    (root / "mine.txt").write_bytes(b"not ours")
    hour_ago = time.time() - 3601
    for path in [*(root / job.id).iterdir(), *(root / stray).iterdir(), root / "mine.txt"]:
        os.utime(path, (hour_ago, hour_ago))
    store.sweep()
    left = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    own = {image_name(job.id), input_name(job.id, "last_image"), video_name(job.id, 1)}
    assert left == own | {image_name(fresh), "mine.txt"}
    store.delete(job.id)
    assert not (root / job.id).exists()


def test_statistics_tell_how_things_stand(store: JobStore, clock: Clock) -> None:
    jobs = [store.submit(REQUEST, b"") for _ in range(4)]
    clock.now += 3
    [running, failing] = store.claim("a", 2)
    clock.now += 40
    store.fail(failing, "not_finite", "NaN")
    store.cancel(jobs[2].id)
    found = store.statistics()
    assert found.by_status == {"queued": 1, "in_progress": 1, "failed": 1, "cancelled": 1}
    assert (found.waiting, found.running, found.oldest_waiting_seconds) == (1, 1, 43)
    assert found.finished == {"completed": 0, "failed": 1, "cancelled": 1}
    assert (found.run_seconds.total, sum(found.run_seconds.counts)) == (40, 1), "one had been started"
    assert found.run_seconds.counts[8] == 1, "in (30, 60]"
    store.complete(running, "video")
    assert reopened(store).statistics().run_seconds.total == 80


def test_times_are_the_databases_own_without_a_clock(store: JobStore) -> None:
    store = JobStore(store.database, store.media, replace(LIMITS, lease_seconds=0.3))
    job = store.submit(REQUEST, b"", timeout=600)
    assert abs(job.created_at - time.time()) < 30
    [first] = store.claim("a", 1)
    assert store.claim("b", 1) == []
    time.sleep(0.35)
    [second] = store.claim("b", 1)
    assert (second.id, second.attempts) == (first.id, 2)
    assert json.loads(json.dumps(second.request)) == REQUEST
    assert there(store, job.id).status not in FINAL
