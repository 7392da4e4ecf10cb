"""Server-sent events over a real port: order, ends, coming back, leaving, and what many streams cost the store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from small_server import Worker, complete_one, finish, open_store, running, small_api

from cinemo.serving.http.api import ApiSettings
from cinemo.serving.store.jobs import Job, JobStore
from cinemo.types import RunError

REQUEST = {
    "model": "m", "prompt": "waves", "negative_prompt": "", "motion_bucket": 1, "seed": 1, "num_inference_steps": 8,
    "guidance_scale": 1.0, "dct_init": True, "size": "48x32", "seconds": "0.75",
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return open_store(tmp_path, max_queued=1000)


@pytest.fixture
def api(store: JobStore) -> FastAPI:
    return small_api(store, ApiSettings(event_seconds=0.1, keep_alive_seconds=0.5, event_streams=60))


@pytest.fixture
def url(api: FastAPI) -> Iterator[str]:
    with running(api) as base:
        yield f"{base}/v1/videos"


CLIENT = httpx.Client(timeout=20, limits=httpx.Limits(max_connections=100))


def submit(store: JobStore) -> str:
    return store.submit(REQUEST, b"picture").id


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The events of a stream, as a browser reads them; comments as ``{"comment": text}``."""
    event: dict[str, Any] = {}
    for line in lines:
        if not line:
            if "data" in event:
                yield event
            event = {}
        elif line.startswith(":"):
            yield {"comment": line[1:].strip()}
        else:
            name, _, value = line.partition(": ")
            event[name] = json.loads(value) if name == "data" else value


def follow(url: str, job_id: str, **options: Any) -> list[dict[str, Any]]:
    with CLIENT.stream("GET", f"{url}/{job_id}/events", **options) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        return list(events(answer.iter_lines()))


def until(done: Callable[[], bool]) -> None:
    for _ in range(500):
        if done():
            return
        time.sleep(0.02)
    raise AssertionError("not within 10 s")


def test_progress_rises_to_the_final_event(url: str, store: JobStore) -> None:
    job_id = submit(store)
    with Worker(store, step_seconds=0.15):
        told = [event for event in follow(url, job_id) if "comment" not in event]  # sent where nothing happens
    *before, last = told
    assert {event["event"] for event in before} == {"progress"}
    assert (last["event"], last["id"], last["data"]["status"], last["data"]["progress"]) == (
        "completed", "completed", "completed", 100,
    )  # fmt: skip
    steps = [event["data"]["step"] for event in before]
    assert steps == sorted(set(steps)) or steps[:2] == [0, 0], "every change once, in order"
    assert len(before) >= 5
    assert [int(event["id"]) for event in before] == steps
    assert last["data"] == httpx.get(f"{url}/{job_id}").json(), "events and polls show the same"


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "deleted"])
def test_every_end_has_its_event(url: str, api: FastAPI, store: JobStore, end: str) -> None:
    job_id = submit(store)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(follow, url, job_id)
        until(lambda: len(api.state.streams) == 1)
        if end == "completed":
            complete_one(store)
        elif end == "failed":
            assert store.fail(store.claim("w", 1)[0], "not_finite", "the sampler diverged")
        else:
            assert store.cancel(job_id)
            if end == "deleted":
                assert store.delete(job_id)
        last = told.result(10)[-1]
    assert last["event"] in ({"deleted", "cancelled"} if end == "deleted" else {end})
    if end == "failed":
        assert last["data"]["error"] == {"code": "not_finite", "message": "the sampler diverged"}


def test_a_finished_job_is_one_event_and_coming_back_after_it_nothing(url: str, store: JobStore) -> None:
    job_id = submit(store)
    complete_one(store)
    (only,) = follow(url, job_id)
    assert only["event"] == "completed"
    answer = httpx.get(f"{url}/{job_id}/events", headers={"Last-Event-ID": only["id"]})
    assert answer.status_code == 204, "which tells an EventSource not to come back"


def test_who_comes_back_is_told_the_present_state(url: str, api: FastAPI, store: JobStore) -> None:
    job_id = submit(store)
    (job,) = store.claim("w", 1)
    store.beat("w", {job_id: (2, 8)})
    with httpx.stream("GET", f"{url}/{job_id}/events") as answer:
        assert next(events(answer.iter_lines()))["id"] == "2"
    until(lambda: len(api.state.streams) == 0)
    store.beat("w", {job_id: (5, 8)})
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(follow, url, job_id, headers={"Last-Event-ID": "2"})
        until(lambda: len(api.state.streams) == 1)
        finish(store, job)
        assert [event["id"] for event in told.result(10)] == ["5", "completed"]


def test_silence_is_broken_by_comments(url: str, store: JobStore) -> None:
    job_id = submit(store)
    with httpx.stream("GET", f"{url}/{job_id}/events", timeout=5) as answer:
        told = events(answer.iter_lines())
        assert next(told)["event"] == "progress"
        assert [next(told).get("comment") for _ in range(2)] == ["still here"] * 2


def test_who_leaves_is_forgotten_and_the_store_left_alone(
    url: str, api: FastAPI, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    many = JobStore.many

    def counted(self: JobStore, ids: Any) -> dict[str, Job]:
        nonlocal asked
        asked += 1
        return many(self, ids)

    monkeypatch.setattr(JobStore, "many", counted)
    streams = api.state.streams
    job_id = submit(store)
    with httpx.stream("GET", f"{url}/{job_id}/events") as answer:
        told = events(answer.iter_lines())
        next(told)
        assert len(streams) == 1
    until(lambda: len(streams) == 0)
    time.sleep(0.3)
    before = asked
    time.sleep(0.5)
    assert asked == before, "no stream, no query"
    assert follow_some(url, job_id, 1), "and the next one is served again"


def follow_some(url: str, job_id: str, count: int) -> list[dict[str, Any]]:
    with httpx.stream("GET", f"{url}/{job_id}/events", timeout=20) as answer:
        told = events(answer.iter_lines())
        return [next(told) for _ in range(count)]


def test_fifty_streams_share_one_query_at_a_time(
    url: str, api: FastAPI, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    many = JobStore.many

    def counted(self: JobStore, ids: Any) -> dict[str, Job]:
        times.append(time.monotonic())
        return many(self, ids)

    monkeypatch.setattr(JobStore, "many", counted)
    made = [submit(store) for _ in range(50)]
    with ThreadPoolExecutor(50) as pool:
        told = [pool.submit(follow, url, job_id) for job_id in made]
        until(lambda: len(api.state.streams) == 50)
        time.sleep(1)
        for job_id in made:
            assert store.cancel(job_id)
        assert all(future.result(20)[-1]["event"] == "cancelled" for future in told)
    assert (len(times) - 1) / (times[-1] - times[0]) <= 10.5, "queries a second, whatever the number of streams"
    until(lambda: len(api.state.streams) == 0)


def test_too_many_streams_are_refused(store: JobStore) -> None:
    job_id = submit(store)
    with (
        running(small_api(store, ApiSettings(event_streams=1))) as base,
        httpx.stream("GET", f"{base}/v1/videos/{job_id}/events") as first,
    ):
        told = events(first.iter_lines())  # kept, because to drop it is to leave
        next(told)
        answer = httpx.get(f"{base}/v1/videos/{job_id}/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_streams")
        assert answer.headers["retry-after"] == "10"


def test_a_store_that_fails_for_a_while_ends_no_stream(
    url: str, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(store)
    many, broken = JobStore.many, threading.Event()

    def failing(self: JobStore, ids: Any) -> dict[str, Job]:
        if not broken.is_set():
            broken.set()
            raise RunError("the database is away")
        return many(self, ids)

    monkeypatch.setattr(JobStore, "many", failing)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(follow, url, job_id)
        assert broken.wait(5)
        complete_one(store)
        assert told.result(15)[-1]["event"] == "completed"


def test_closing_ends_the_streams_so_that_clients_go_elsewhere(url: str, api: FastAPI, store: JobStore) -> None:
    job_id = submit(store)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(follow, url, job_id)
        until(lambda: len(api.state.streams) == 1)
        api.state.streams.close()
        assert [event["event"] for event in told.result(10) if "event" in event] == ["progress"]
