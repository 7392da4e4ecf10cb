"""The HTTP interface without Ray: shapes of answers, every kind of bad input, limits, and a runner behind it."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from tiny import FRAMES, SIZE, tiny_bundle

from cinemo.bundle import ModelBundle, load_bundle, read_card
from cinemo.media.mp4 import read_metadata
from cinemo.media.video import probe
from cinemo.serving.api import Limits, build_api
from cinemo.serving.database import Database
from cinemo.serving.jobs import JobStore, QueueLimits
from cinemo.serving.media import MediaStore, image_name, video_name
from cinemo.serving.runner import JobRunner
from cinemo.serving.schema import Video


def png(width: int = 60, height: int = 40, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def bundle(location: Path) -> ModelBundle:
    return load_bundle(location, "cpu")


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    database = Database(f"sqlite:///{tmp_path}/state.sqlite")
    return JobStore(database, MediaStore(str(tmp_path / "media")), QueueLimits(max_queued=3))


class Readiness:
    value = True

    async def __call__(self) -> bool:
        return self.value


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
def client(location: Path, store: JobStore, readiness: Readiness) -> Iterator[TestClient]:
    limits = Limits(body_bytes=200_000, pixels=10_000)
    with TestClient(build_api(store, read_card(location), readiness, limits), raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def runner(store: JobStore, bundle: ModelBundle) -> Iterator[JobRunner]:
    made = JobRunner(store, bundle, poll_seconds=0.01)
    yield made
    made.close()


def file(store: JobStore, name: str) -> Path:
    path = store.media.local_path(name)
    assert path is not None
    return path


def post(client: TestClient, content: bytes | None = None, **fields: Any) -> Any:
    fields = {"prompt": "waves"} | fields
    return client.post(
        "/v1/videos", data=fields, files={"input_reference": ("a.png", png() if content is None else content)}
    )


def wait(client: TestClient, video_id: str) -> dict[str, Any]:
    for _ in range(500):
        video: dict[str, Any] = client.get(f"/v1/videos/{video_id}").json()
        if video["status"] not in ("queued", "in_progress"):
            return video
        time.sleep(0.02)
    raise AssertionError(f"not finished after 10 s: {video}")


def test_a_video_from_post_to_download(client: TestClient, runner: JobRunner, tmp_path: Path) -> None:
    answer = post(client, seed=11, motion_bucket=15, num_inference_steps=3, guidance_scale=1.5, negative_prompt="blur")
    assert answer.status_code == 202
    queued = answer.json()
    assert Video.model_validate(queued).status == "queued"
    assert (queued["object"], queued["progress"], queued["size"], queued["seconds"]) == ("video", 0, "48x32", "0.75")
    early = client.get(f"/v1/videos/{queued['id']}/content")
    assert early.status_code == 409
    assert early.json()["error"]["code"] == "video_not_ready"
    runner.start()
    done = wait(client, queued["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert done["expires_at"] > done["completed_at"] >= done["created_at"]
    content = client.get(f"/v1/videos/{queued['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    (tmp_path / "a.mp4").write_bytes(content.content)
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.height, info.width) == (FRAMES, *SIZE)
    settings = json.loads(read_metadata(tmp_path / "a.mp4")["comment"])
    asked = {"seed": 11, "motion_bucket": 15, "steps": 3, "guidance_scale": 1.5, "negative_prompt": "blur"}
    assert {name: settings[name] for name in asked} == asked


def test_absent_controls_are_the_models_defaults_and_the_seed_is_told(client: TestClient) -> None:
    defaults = client.get("/v1/models").json()["data"][0]["defaults"]
    first, second = post(client).json(), post(client, motion_bucket="").json()
    assert {name: first[name] for name in defaults} == defaults
    assert first["seed"] != second["seed"]
    assert post(client, motion_strength=1).json()["motion_bucket"] == 19


def test_supported_size_and_seconds_are_taken(client: TestClient) -> None:
    assert post(client, size="48x32", seconds="0.75", model="random-32x48").status_code == 202


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"size": "1280x720"}, 400, "unsupported_size", "size"),
        ({"seconds": "8"}, 400, "unsupported_seconds", "seconds"),
        ({"model": "sora-2"}, 404, "model_not_found", "model"),
        ({"motion_bucket": "20"}, 422, "invalid_value", "motion_bucket"),
        ({"motion_bucket": "fast"}, 422, "invalid_value", "motion_bucket"),
        ({"motion_strength": "nan"}, 422, "invalid_value", "motion_strength"),
        ({"motion_bucket": "3", "motion_strength": "0.5"}, 422, "invalid_value", None),
        ({"num_inference_steps": "0"}, 422, "invalid_value", "num_inference_steps"),
        ({"guidance_scale": "inf"}, 422, "invalid_value", "guidance_scale"),
        ({"seed": "-1"}, 422, "invalid_value", "seed"),
        ({"seed": "1e400"}, 422, "invalid_value", "seed"),
        ({"prompt": "x" * 4001}, 422, "invalid_value", "prompt"),
        ({"prompt": "a\0b"}, 422, "invalid_value", "prompt"),
        ({"steps": "9"}, 422, "unknown_field", "steps"),
    ],
)
def test_bad_fields(
    client: TestClient, store: JobStore, fields: dict[str, str], status: int, code: str, param: str | None
) -> None:
    answer = post(client, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert error["message"]
    assert store.page() == []


def test_unsupported_values_say_what_is_supported(client: TestClient) -> None:
    assert "'48x32'" in post(client, size="9x9").json()["error"]["message"]
    assert "'0.75'" in post(client, seconds="9").json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 415, "unsupported_image"),
        (b"hello", 415, "unsupported_image"),
        (png(form="BMP"), 415, "unsupported_image"),
        (png()[:-200], 422, "invalid_image"),
        (png(4, 90), 422, "invalid_image"),
        (png(101, 100), 413, "image_too_large"),
        (png() + b"\0" * 200_000, 413, "body_too_large"),
    ],
    ids=["empty", "text", "bmp", "truncated", "thin", "pixels", "bytes"],
)
def test_bad_pictures(client: TestClient, store: JobStore, content: bytes, status: int, code: str) -> None:
    answer = post(client, content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert store.page() == []
    assert store.media.uri not in answer.text


def test_a_body_without_declared_length_is_limited_too(client: TestClient) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
    body = (chunk for chunk in [head, *[b"\0" * 10_000] * 40])
    answer = client.post("/v1/videos", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_other_picture_formats(client: TestClient, form: str) -> None:
    assert post(client, png(form=form)).status_code == 202


def test_forms_that_are_no_forms(client: TestClient) -> None:
    kinds = [
        {"json": {"prompt": "waves"}},
        {"content": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        {"content": b"garbage", "headers": {"Content-Type": "multipart/form-data"}},
        {"data": {"prompt": "waves"}},
        {"data": {"prompt": "waves", "input_reference": "a text"}},
        {"files": {"input_reference": ("a.png", png())}},
        {"data": {"input_reference": "x"}, "files": {"prompt": ("a.png", png())}},
    ]
    for kind in kinds:
        answer = client.post("/v1/videos", **kind)  # type: ignore[arg-type]
        assert answer.status_code in (400, 422), (kind, answer.text)
        assert set(answer.json()["error"]) == {"code", "message", "param"}


def test_a_full_queue_says_when_to_come_back(client: TestClient) -> None:
    for _ in range(3):
        assert post(client).status_code == 202
    answer = post(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1


def test_unknown_things(client: TestClient) -> None:
    for method, path, status in [
        ("GET", "/v1/videos/video_none", 404), ("GET", "/v1/videos/video_none/content", 404),
        ("DELETE", "/v1/videos/video_none", 404), ("GET", "/v2", 404), ("PUT", "/v1/videos", 405),
        ("GET", "/v1/videos?limit=0", 422), ("GET", "/v1/videos?order=up", 422),
        ("GET", "/v1/videos/..%2f..%2fjobs.sqlite/content", 404),
    ]:  # fmt: skip
        answer = client.request(method, path)
        assert answer.status_code == status, (path, answer.text)
        assert set(answer.json()["error"]) == {"code", "message", "param"}


def test_pages(client: TestClient) -> None:
    ids = [post(client).json()["id"] for _ in range(3)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert ([video["id"] for video in page["data"]], page["has_more"], page["last_id"]) == (ids[:0:-1], True, ids[1])
    page = client.get("/v1/videos", params={"limit": 2, "after": page["last_id"]}).json()
    assert ([video["id"] for video in page["data"]], page["has_more"]) == (ids[:1], False)


def test_delete_cancels_first_and_removes_second(client: TestClient, store: JobStore) -> None:
    video_id = post(client).json()["id"]
    assert client.delete(f"/v1/videos/{video_id}").json()["status"] == "cancelled"
    answer = client.get(f"/v1/videos/{video_id}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_cancelled")
    assert client.delete(f"/v1/videos/{video_id}").json() == {
        "id": video_id, "object": "video.deleted", "deleted": True,
    }  # fmt: skip
    assert client.get(f"/v1/videos/{video_id}").status_code == 404
    assert not file(store, image_name(video_id)).exists()


def test_a_running_job_is_cancelled_between_steps(client: TestClient, runner: JobRunner, store: JobStore) -> None:
    video_id = post(client, num_inference_steps=999).json()["id"]
    runner.start()
    while client.get(f"/v1/videos/{video_id}").json()["progress"] < 1:
        time.sleep(0.01)
    assert client.delete(f"/v1/videos/{video_id}").json()["status"] == "cancelled"
    assert wait(client, post(client).json()["id"])["status"] == "completed"
    assert client.get(f"/v1/videos/{video_id}").json()["status"] == "cancelled"
    assert not file(store, video_name(video_id, 1)).exists()


def test_a_closed_runner_leaves_its_job_to_the_next(
    client: TestClient, runner: JobRunner, store: JobStore, bundle: ModelBundle
) -> None:
    video_id = post(client, num_inference_steps=60).json()["id"]
    runner.start()
    while client.get(f"/v1/videos/{video_id}").json()["progress"] < 1:
        time.sleep(0.01)
    runner.close()
    assert not runner.alive()
    job = store.get(video_id)
    assert job is not None
    assert (job.status, job.progress, job.attempts) == ("queued", 0, 0)
    second = JobRunner(store, bundle, poll_seconds=0.01)
    second.start()
    assert wait(client, video_id)["status"] == "completed"
    second.close()


def test_a_fault_fails_the_job_and_tells_no_secrets(client: TestClient, runner: JobRunner, store: JobStore) -> None:
    broken, good = post(client).json()["id"], post(client).json()["id"]
    file(store, image_name(broken)).unlink()
    runner.start()
    failed = wait(client, broken)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "internal_error")
    assert store.media.uri not in json.dumps(failed)
    assert wait(client, good)["status"] == "completed", "the runner goes on"


def test_health_and_readiness(client: TestClient, readiness: Readiness) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    post(client)
    assert client.get("/readyz").json() == {"status": "ok", "queued": 1}
    readiness.value = False
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "starting")
    assert client.get("/healthz").status_code == 200


def test_the_interface_describes_itself(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    form = schema["components"]["schemas"]["VideoForm"]
    assert {"prompt", "input_reference"} <= set(form["required"])
    assert set(schema["paths"]["/v1/videos"]["post"]["responses"]) >= {"202", "400", "413", "415", "422", "429"}
