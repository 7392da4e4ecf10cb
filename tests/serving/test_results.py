"""The same request again is answered from the finished video, under an id of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from small_server import card, make_keys, open_store, png, small_api

from cinemo.media.mp4 import write_video
from cinemo.serving.http.api import ApiSettings
from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import Job, JobStore, QueueFull, QueueLimits, Quota, QuotaExceeded
from cinemo.serving.store.media import MediaStore, video_name

DIGEST = card().digest
REQUEST = {"model": "m", "prompt": "waves", "seed": 3, "num_inference_steps": 4}


def make(store: JobStore, content: bytes = b"an mp4", digest: str = DIGEST) -> Job:
    """Work off the next job."""
    (job,) = store.claim("w", 1)
    name = video_name(job.id, job.attempts)
    store.media.write(name, content)
    assert store.complete(job, name, digest)
    done = store.get(job.id)
    assert done is not None
    return done


def again(store: JobStore, request: dict[str, Any] = REQUEST, image: bytes = b"png", **options: Any) -> Job:
    return store.submit(request, image, **{"digest": DIGEST, "reuse": "own", "steps": 4} | options)


@pytest.fixture
def store(database_url: str, tmp_path: Path, open_database: Callable[..., Database]) -> JobStore:
    return JobStore(open_database(database_url), MediaStore(str(tmp_path / "media")), QueueLimits(max_queued=2))


def test_the_same_request_is_done_at_once_and_stands_alone(store: JobStore) -> None:
    assert again(store).status == "queued"
    first = make(store)
    second = again(store)
    assert (second.status, second.progress, second.step, second.started_at) == ("completed", 100, 4, None)
    assert second.id != first.id
    assert second.request == REQUEST | {"reused": True}
    assert store.media.read(second.files["image"]) == b"png"
    assert store.delete(first.id)
    assert store.media.read(str(second.media_name)) == b"an mp4"
    third = again(store)
    assert third.status == "completed", "a copy is as good"
    assert store.delete(third.id)
    assert store.media.read(str(second.media_name)) == b"an mp4"
    assert store.delete(second.id)
    assert again(store).status == "queued", "nothing is left"
    assert store.statistics().finished["completed"] == 3
    assert sum(store.statistics().run_seconds.counts) == 1, "what took no time counts in no average"


def test_whatever_differs_is_made(store: JobStore) -> None:
    again(store)
    make(store)
    others: list[tuple[dict[str, Any], bytes, dict[str, Any]]] = [
        (REQUEST | {"seed": 4}, b"png", {}),
        (REQUEST, b"another", {}),
        (REQUEST, b"png", {"digest": "e" * 64}),
        (REQUEST, b"png", {"reuse": "off"}),
        (REQUEST, b"png", {"drawn": ("seed",)}),
        (REQUEST, b"png", {"client": "somebody"}),
        (REQUEST, b"png", {"others": {"last_image": b"x"}}),
    ]
    for request, image, options in others:
        made = again(store, request, image, **options)
        assert made.status == "queued", options
        assert store.cancel(made.id)
    assert again(store, client="somebody", reuse="all").status == "completed"
    unfinished = again(store, REQUEST | {"seed": 9})
    assert again(store, REQUEST | {"seed": 9}).id != unfinished.id


def test_a_video_whose_file_is_gone_is_made_again(store: JobStore) -> None:
    again(store)
    store.media.remove_file(str(make(store).media_name))
    assert again(store).status == "queued"


def test_quotas_and_keys_hold_all_the_same(store: JobStore) -> None:
    again(store)
    make(store)
    for seed in (5, 6):
        again(store, REQUEST | {"seed": seed})
    with pytest.raises(QueueFull):
        again(store, REQUEST | {"seed": 7})
    full = again(store, idempotency_key="k")
    assert full.status == "completed", "it keeps no place in the queue"
    assert again(store, idempotency_key="k").id == full.id
    with pytest.raises(QuotaExceeded):
        again(store, quota=Quota(per_day=1))
    assert len(store.page()) == 4


def test_a_new_copy_is_no_stray(tmp_path: Path) -> None:
    media = MediaStore(str(tmp_path))
    a, b = ("video_" + letter * 24 for letter in "ab")
    media.write(f"{a}/video-1.mp4", b"x")
    path = media.local_path(f"{a}/video-1.mp4")
    assert path is not None
    import os

    os.utime(path, (0, 0))
    media.copy(f"{a}/video-1.mp4", f"{b}/video-0.mp4")
    assert b not in media.old(60)
    media.remove(a)
    assert media.read(f"{b}/video-0.mp4") == b"x"


def test_over_http(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys, (one, two) = make_keys(store, "one", "two")

    def post(client: TestClient, key: str, **fields: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        form, files = {"prompt": "waves", "seed": "7"} | fields, {"input_reference": png()}
        made: dict[str, Any] = client.post("/v1/videos", data=form, files=files, headers=headers).json()
        return made

    def work() -> None:
        (job,) = store.claim("w", 1)
        name = video_name(job.id, job.attempts)
        with store.media.writing(name) as path:
            write_video(path, np.zeros((6, 32, 48, 3), np.uint8), 8, {})
        store.complete(job, name, DIGEST)

    with TestClient(small_api(store, keys=keys)) as client:
        first = post(client, one)
        work()
        second = post(client, one)
        assert (second["status"], second["reused"], second["seed"]) == ("completed", True, 7)
        assert second["id"] != first["id"]
        answer = client.get(f"/v1/videos/{second['id']}/content", headers={"Authorization": f"Bearer {one}"})
        assert answer.status_code == 200
        assert answer.content[4:8] == b"ftyp"
        assert post(client, one, reuse="false")["status"] == "queued"
        assert post(client, two)["status"] == "queued", "another key's video is not shown"
        assert post(client, one, seed="")["status"] == "queued"
    with TestClient(small_api(store, ApiSettings(reuse="all"), keys=keys)) as client:
        assert post(client, two)["status"] == "completed"
    with TestClient(small_api(store, ApiSettings(reuse="off"), keys=keys)) as client:
        assert post(client, one)["status"] == "queued"
