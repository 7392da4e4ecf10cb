"""What a video will look like, while it is made: of the engine, through the store, over the event stream."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from small_server import open_store, png, running, small_api
from sqlalchemy import select
from tiny import FRAMES, tiny_bundle, tiny_longer_bundle

from cinemo.animate import AnimateRequest
from cinemo.bundle import ModelBundle, load_bundle
from cinemo.serving.engine.runner import JobRunner
from cinemo.serving.engine.sampling import SamplingEngine
from cinemo.serving.http.api import ApiSettings
from cinemo.serving.store.previews import Preview
from cinemo.serving.store.tables import previews as table

_ALL = select(table)
PICTURE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("tiny")), "cpu")


def run(bundle: ModelBundle, seconds: float, ahead: int, previews: bool = True, **controls: Any) -> tuple[Any, Any]:
    """(the animation, its previews by step) where every look at the clock is so many seconds after the one before."""
    now = [100.0]

    def clock() -> float:
        now[0] += seconds
        return now[0]

    engine, seen, made = SamplingEngine(bundle, ahead=ahead, clock=clock), {}, None
    engine.join("a", AnimateRequest(PICTURE, "waves", **controls), previews=previews)
    engine.join("quiet", AnimateRequest(PICTURE, "waves", steps=3))
    while len(engine):
        outcome = engine.step()
        assert not outcome.failed
        assert "quiet" not in outcome.previews
        seen |= dict([outcome.previews["a"]] if "a" in outcome.previews else [])
        made = outcome.finished.get("a", made)
    return made, seen


@pytest.mark.parametrize("ahead", [0, 1])
def test_previews_become_the_video_and_change_nothing(bundle: ModelBundle, ahead: int) -> None:
    made, seen = run(bundle, 1.0, ahead, steps=8)
    assert list(seen) == list(range(1, 9))
    assert all(frames.shape == (4, 4, 6, 3) and frames.dtype == np.uint8 for frames in seen.values())
    latents = made.latents_CFHW[:, [0, 2, 3, 5]]
    true = ((latents.permute(1, 2, 3, 0) @ bundle.colours[:-1] + bundle.colours[-1]) / 2 + 0.5).clamp(0, 1) * 255
    far = [float((torch.from_numpy(frames).float() - true).abs().mean()) for frames in seen.values()]
    assert far[-1] < 0.5 * far[0], "the last one is close to what was made"
    assert np.abs(seen[1][0].astype(int) - seen[8][0]).max() <= 1, "the first frame is given"
    plain, none = run(bundle, 1.0, ahead, previews=False, steps=8)
    assert none == {}
    assert np.array_equal(plain.frames_FHWC, made.frames_FHWC)


def test_there_are_two_a_second_at_most(bundle: ModelBundle) -> None:
    _, seen = run(bundle, 0.05, 0, steps=24)
    assert 2 <= len(seen) <= 12


def test_nothing_is_computed_for_those_who_do_not_ask(bundle: ModelBundle, tmp_path: Path) -> None:
    fresh = load_bundle(bundle.location, "cpu")
    run(fresh, 1.0, 0, previews=False, steps=2)
    assert "colours" not in vars(fresh)


@pytest.mark.parametrize("way", ["phased", "windows", "chain"])
def test_long_videos_have_them_too(bundle: ModelBundle, way: str) -> None:
    _, seen = run(bundle, 1.0, 0, steps=4, frames=2 * FRAMES, long_video=way)
    assert len(seen) >= 4


def test_another_method_has_them(tmp_path: Path) -> None:
    other = load_bundle(tiny_longer_bundle(tmp_path), "cpu")
    _, seen = run(other, 1.0, 0, steps=3)
    assert len(seen) == 3


def test_over_the_event_stream(bundle: ModelBundle, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    asked: dict[str, Any] = {"prompt": "waves", "num_inference_steps": "40", "seed": "3"}
    with running(small_api(store, ApiSettings(event_seconds=0.02))) as url, httpx.Client(base_url=url) as client:
        wanted = asked | {"previews": "true"}
        video = client.post("/v1/videos", data=wanted, files={"input_reference": png()}).json()
        assert video["previews"] is True
        runner = JobRunner(store, bundle)
        runner.start()
        try:
            told = client.get(f"/v1/videos/{video['id']}/events", timeout=60).text
        finally:
            runner.close()
    events = [dict(line.partition(": ")[::2] for line in each.splitlines()) for each in told.split("\n\n") if each]
    shown = [json.loads(event["data"]) for event in events if event.get("event") == "preview"]
    assert shown
    assert all("id" not in event for event in events if event.get("event") == "preview")
    assert events[-1]["event"] == "completed"
    kind, _, content = shown[0]["frames"][0].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (kind, picture.size, len(shown[0]["frames"])) == ("data:image/webp;base64", (6, 4), 4)
    job = store.get(video["id"])
    assert job is not None
    assert store.database.read(_ALL) == [], "nothing is left of them"


def test_only_who_holds_a_job_shows_it_and_only_to_those_who_asked(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    loud = store.submit({"prompt": "a", "previews": True}, b"x")
    quiet = store.submit({"prompt": "b"}, b"x")
    assert store.previews([loud, quiet]) == {}
    held = {job.id: job for job in store.claim("w", 2)}
    preview = Preview(3, ("data:image/webp;base64,AA",))
    for job in held.values():
        store.show(job, preview)
    store.show(held[loud.id], Preview(4, ("data:,x",)))
    assert store.previews(held.values()) == {loud.id: Preview(4, ("data:,x",))}
    assert store.cancel(loud.id)
    store.show(held[loud.id], preview)
    assert store.delete(loud.id)
    assert [row.job_id for row in store.database.read(_ALL)] == [quiet.id]
    with TestClient(small_api(store)) as client:
        assert client.post("/v1/videos", data={"prompt": "x", "previews": "maybe"}).status_code == 422
