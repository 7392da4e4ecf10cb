"""How long is left: what steps cost, measured, and the queue laid behind what runs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_server import card, png, small_api
from sqlalchemy import select, update
from starlette.testclient import TestClient
from tiny import tiny_bundle

from cinemo.animate import AnimateRequest
from cinemo.bundle import ModelBundle, load_bundle
from cinemo.methods.long import expected_calls
from cinemo.serving.engine.pace import Cost, Pace
from cinemo.serving.engine.runner import promised
from cinemo.serving.engine.sampling import SamplingEngine
from cinemo.serving.store import estimates
from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import FINAL, JobStore, QueueLimits
from cinemo.serving.store.media import MediaStore
from cinemo.serving.store.tables import paces

PICTURE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("tiny")), "cpu")


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@given(st.floats(0, 2), st.floats(0.001, 2), st.lists(st.sampled_from([1.0, 2.0, 4.0, 7.0]), min_size=2, max_size=60))
def test_what_a_step_costs_is_found_again(per_step: float, per_row: float, work: list[float]) -> None:
    pace = Pace()
    assert pace.cost() is None
    for each in work:
        pace.step(each, per_step + per_row * each)
    cost = pace.cost()
    assert cost is not None
    for each in set(work):
        assert cost.per_step + cost.per_row * each == pytest.approx(per_step + per_row * each, rel=0.05)
    assert cost.per_step > -1e-9
    assert cost.per_row >= 0


@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([1.0, 1.5, 2.0])), min_size=1, max_size=7),
    st.integers(1, 4),
)
def test_ends_are_those_of_turns_that_are_really_taken(videos: list[tuple[int, float]], places: int) -> None:
    cost, found = Cost(0.5, 0.25, 1.0), {}
    turns, left, at = list(range(len(videos))), [calls for calls, _ in videos], 0.0
    while turns:
        now, turns = turns[:places], turns[places:]
        at += cost.per_step + cost.per_row * sum(videos[place][1] for place in now)
        for place in now:
            left[place] -= 1
            if not left[place]:
                found[place] = at
        turns += [place for place in now if left[place]]
    one_round = cost.round_seconds([work for _, work in videos], 1)
    for place, end in enumerate(cost.ends(videos, places)):
        assert end == pytest.approx(found[place], abs=one_round + 1e-6), "to within a round of turns"


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_engine_knows_when_its_videos_end(bundle: ModelBundle, ahead: int) -> None:
    """A simulated device: a call takes 1 s and half a second a row."""
    clock = Clock()
    engine = SamplingEngine(bundle, 2, ahead, clock=clock)

    def took(_: Any, given: tuple[Any, ...], __: Any) -> None:
        clock.now += 1 + 0.5 * len(given[0])

    def go(joining: dict[int, dict[str, Any]]) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
        said: dict[str, list[tuple[float, float]]] = {}
        ended, promises, step = {}, dict[str, float](), 0
        while step in joining or len(engine):
            if step in joining:
                engine.join(str(step), AnimateRequest(PICTURE, "waves", **joining[step]))
            outcome = engine.step()
            ended |= {key: clock.now for key, (done, of) in outcome.progress.items() if done == of}
            for key, left in engine.seconds_left().items():
                promises[key] = promised(promises.get(key), clock.now, left)
                said.setdefault(key, []).append((clock.now, promises[key] - clock.now))
            step += 1
        return said, ended

    handle = bundle.method.unet.register_forward_hook(took)
    try:
        assert engine.seconds_left() == {}
        go({0: {"steps": 12, "guidance_interval": (0.5, 1.0)}})
        usual: dict[str, Any] = {"guidance_interval": (0.5, 1.0)}
        said, ended = go({0: {"steps": 12} | usual, 1: {"steps": 20} | usual, 2: {"steps": 8} | usual})
        alone, alone_ended = go({0: {"steps": 20} | usual})
    finally:
        handle.remove()
    for key in said:
        for at, left in said[key][3:]:
            true = ended[key] - at
            assert true / 1.5 - 3 <= left <= 1.5 * true + 3, f"{key}: {left} s said, {true} s it was"
    lefts = [left for _, left in alone["0"]]
    assert lefts == sorted(lefts, reverse=True), "falls on a quiet server"
    begin, left = alone["0"][0]
    assert left == pytest.approx(alone_ended["0"] - begin, rel=0.25)


def open_store(directory: Path, clock: Clock, **limits: Any) -> JobStore:
    database = Database(f"sqlite:///{directory}/state.sqlite")
    return JobStore(database, MediaStore(str(directory / "media")), QueueLimits(lease_seconds=1e6, **limits), clock)


def test_what_another_version_tells_is_passed_over(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(tmp_path, clock)
    job = store.submit({"prompt": "waves"}, b"x", steps=4)
    store.tell_pace("w", estimates.Pace("d", 0.0, 0.5, 1.0, places=1, joined=1, tail=0.0), {})
    told = store.database.read(select(paces.c.told))[0][0]
    for later in (told.replace("per_row", "per_token"), told.replace('"tail"', '"new": 1, "tail"')):
        store.database.transact(
            lambda transaction, text=later: transaction.execute(update(paces).values(told=text)).rowcount
        )
        clock.now += 1
        (found,) = store.page()
        assert (found.id, found.seconds_left, store.last_pace("d")) == (job.id, None, None)


def test_waiting_jobs_end_when_the_queue_says(tmp_path: Path) -> None:
    """Six jobs, one worker of two places that needs 0.5 s for each step of a job: what is said of each at any moment is
    near what comes, and falls."""
    clock = Clock()
    store = open_store(tmp_path, clock)
    pace = estimates.Pace("d", 0.0, 0.5, 1.0, places=2, joined=2, tail=0.0)
    sizes = [10, 20, 10, 30, 5, 10]
    ids = [store.submit({"prompt": "waves"}, b"x", client=f"c{k % 2}", steps=size).id for k, size in enumerate(sizes)]
    assert all(job.seconds_left is None for job in store.page()), "nothing was measured"
    store.tell_pace("w", pace, {})
    clock.now += 1
    held: dict[str, tuple[Any, int]] = {}
    said: dict[str, list[tuple[float, float]]] = {job_id: [] for job_id in ids}
    ended: dict[str, float] = {}
    while len(ended) < len(ids):
        for job in store.claim("w", 2 - len(held)):
            held[job.id] = (job, job.steps)
        left = {key: Cost(0, 0.5, 1).ends([(n, 1.0) for _, n in held.values()], 2)[k] for k, key in enumerate(held)}
        store.tell_pace("w", pace, left)
        for job in store.many(ids).values():
            if job.status not in FINAL:
                assert job.seconds_left is not None
                said[job.id].append((clock.now, job.seconds_left))
        clock.now += 0.5 * len(held)
        for key, (job, n) in list(held.items()):
            held[key] = (job, n - 1)
            if n == 1:
                assert store.complete(job, "x")
                del held[key]
                ended[key] = clock.now
    for key, told in said.items():
        for at, seconds in told:
            true = ended[key] - at
            assert true / 1.6 - 1 <= seconds <= 1.6 * true + 3, f"{sizes[ids.index(key)]} steps: {seconds}, {true}"
        falls = [after - before for (_, before), (_, after) in pairwise(told)]
        assert max(falls) <= 5, "what others do moves it little"
    last = store.get(ids[-1])
    assert last is not None
    assert last.seconds_left is None, "nothing is left"


def test_an_estimate_falls_between_two_looks_at_the_queue(tmp_path: Path) -> None:
    clock = Clock()
    store = open_store(tmp_path, clock)
    job = store.submit({"prompt": "waves"}, b"x", steps=10)
    store.tell_pace("w", estimates.Pace("d", 1.0, 0.0, 1.0, 4, 8, tail=2.0), {})
    clock.now += 1
    seen = []
    for _ in range(12):
        now = store.get(job.id)
        assert now is not None
        assert now.seconds_left is not None
        seen.append(now.seconds_left)
        if len(seen) == 1:
            store.claim("w", 1)
            store.tell_pace("w", estimates.Pace("d", 1.0, 0.0, 1.0, 4, 8, tail=2.0), {job.id: 12.0})
        clock.now += 1.2
    assert seen[0] == pytest.approx(12)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 0, "late, but not below nothing"
    pace = store.last_pace("d")
    assert pace is not None
    assert (pace.per_step, store.last_pace("another")) == (1.0, None)


def test_a_database_of_an_older_server_gets_the_table(tmp_path: Path) -> None:
    store = open_store(tmp_path, Clock())
    store.database.transact(lambda transaction: estimates.paces.drop(transaction.connection))
    again = open_store(tmp_path, Clock())
    again.tell_pace("w", None, {})
    assert again.last_pace("d") is None


def test_a_video_says_how_long_it_will_take(tmp_path: Path) -> None:
    store = open_store(tmp_path, Clock())
    with TestClient(small_api(store)) as client:

        def post(**fields: str) -> dict[str, Any]:
            form = {"prompt": "waves"} | fields
            made: dict[str, Any] = client.post("/v1/videos", data=form, files={"input_reference": png()}).json()
            return made

        first = post()
        assert first["estimated_seconds_left"] is None
        assert (first["step"], first["steps"]) == (0, 4)
        store.tell_pace("w", estimates.Pace("d", 0.25, 0.0, 1.0, 1, 1, tail=0.5), {})
        store._clock.now += 1  # type: ignore[union-attr]
        assert client.get(f"/v1/videos/{first['id']}").json()["estimated_seconds_left"] == 1.5
        assert post(num_inference_steps="8")["estimated_seconds_left"] in (None, 4.0)
        store._clock.now += 1  # type: ignore[union-attr]
        assert [video["estimated_seconds_left"] for video in client.get("/v1/videos").json()["data"]] == [4.0, 1.5]


def test_calls_are_known_from_settings(bundle: ModelBundle) -> None:
    for controls in ({"steps": 5}, {"steps": 5, "frames": 30, "long_video": "chain"}, {"steps": 5, "frames": 40}):
        request = AnimateRequest(PICTURE, "waves", **controls)
        engine = SamplingEngine(bundle)
        calls = engine.join("a", request)
        assert expected_calls(bundle.recipe, request.settings(bundle.recipe)) == pytest.approx(calls, rel=0.25)
    assert expected_calls(card().recipe, {"steps": 4}) == 4
