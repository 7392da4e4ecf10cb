"""The HTTP interface without Ray: shapes of answers, every kind of bad input, limits, and a runner behind it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from small_server import MODEL, always_ready, card, complete_one, open_store, png, small_api
from tiny import FRAMES, SIZE, tiny_bundle

from cinemo.animate import load_image
from cinemo.bundle import ModelBundle, load_bundle
from cinemo.media.mp4 import read_metadata
from cinemo.media.video import probe
from cinemo.methods.quality import QualityTable, Sampled
from cinemo.serving.engine.runner import JobRunner
from cinemo.serving.http.api import ApiSettings, build_api
from cinemo.serving.http.fetch import Fetcher
from cinemo.serving.http.schema import Video
from cinemo.serving.store.jobs import JobStore
from cinemo.serving.store.media import image_name, video_name
from cinemo.types import RunError

ERROR = {"code", "message", "param", "type"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("tiny")), "cpu")


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return open_store(tmp_path, max_queued=3)


@pytest.fixture
def client(store: JobStore) -> Iterator[TestClient]:
    settings = ApiSettings(body_bytes=200_000, pixels=10_000)
    with TestClient(small_api(store, settings), raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def runner(store: JobStore, bundle: ModelBundle) -> Iterator[JobRunner]:
    made = JobRunner(store, bundle)
    yield made
    made.close()


def post(client: TestClient, content: bytes | None = None, headers: Any = None, **fields: Any) -> Any:
    fields = {"prompt": "waves"} | fields
    picture = png() if content is None else content
    return client.post("/v1/videos", data=fields, files={"input_reference": ("a.png", picture)}, headers=headers)


def wait(client: TestClient, video_id: str) -> dict[str, Any]:
    for _ in range(500):
        video: dict[str, Any] = client.get(f"/v1/videos/{video_id}").json()
        if video["status"] not in ("queued", "in_progress"):
            return video
        time.sleep(0.02)
    raise AssertionError(f"not finished after 10 s: {video}")


def file(store: JobStore, name: str) -> Path:
    path = store.media.local_path(name)
    assert path is not None
    return path


def test_a_video_from_post_to_download(client: TestClient, runner: JobRunner, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "seed": 11, "motion_bucket": 15, "guidance_scale": 1.5, "negative_prompt": "blur", "solver": "multistep",
        "reuse_features": 2,
    }  # fmt: skip
    answer = post(client, num_inference_steps=3, guidance_interval="0.1,0.9", **asked)
    assert answer.status_code == 202
    queued = answer.json()
    assert answer.headers["location"] == f"/v1/videos/{queued['id']}"
    assert Video.model_validate(queued).status == "queued"
    assert (queued["object"], queued["progress"], queued["size"], queued["seconds"]) == ("video", 0, "48x32", "0.75")
    early = client.get(f"/v1/videos/{queued['id']}/content")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "video_not_ready")
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
    assert {name: settings[name] for name in asked} == asked
    assert (settings["steps"], settings["guidance_interval"]) == (3, [0.1, 0.9])


def test_absent_controls_are_the_models_defaults_and_the_seed_is_told(client: TestClient) -> None:
    defaults = client.get("/v1/models").json()["data"][0]["defaults"]
    first, second = post(client).json(), post(client, motion_bucket="", solver="").json()
    assert {name: first[name] for name in defaults} == defaults
    assert {name: second[name] for name in defaults} == defaults
    assert first["seed"] != second["seed"]
    assert post(client, motion_strength=1).json()["motion_bucket"] == 19


def test_supported_size_and_seconds_are_taken(client: TestClient) -> None:
    assert post(client, size="48x32", seconds="0.75", model=MODEL).status_code == 202
    upright = post(client, size="32x48").json()
    assert upright["size"] == "32x48"
    assert client.get(f"/v1/videos/{upright['id']}").json()["size"] == "32x48"


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"size": "1280x720"}, 400, "unsupported_size", "size"),  # more pixels than the model's own
        ({"size": "30x30"}, 400, "unsupported_size", "size"),
        ({"size": "48x"}, 400, "unsupported_size", "size"),
        ({"seconds": "0.1"}, 400, "unsupported_seconds", "seconds"),
        ({"seconds": "1e9"}, 400, "unsupported_seconds", "seconds"),
        ({"seconds": "soon"}, 400, "unsupported_seconds", "seconds"),
        ({"seconds": "8", "frames": "20"}, 400, "unsupported_seconds", "seconds"),
        ({"frames": "1"}, 422, "invalid_value", "frames"),
        ({"frames": "1025"}, 422, "invalid_value", "frames"),
        ({"frames": "20", "long_video": "loop"}, 422, "invalid_value", "long_video"),
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
        ({"solver": "euler"}, 422, "invalid_value", "solver"),
        ({"guidance_interval": "0.9,0.1"}, 422, "invalid_value", "guidance_interval"),
        ({"guidance_interval": "1-1,e"}, 422, "invalid_value", "guidance_interval"),
        ({"guidance_interval": "nan,1"}, 422, "invalid_value", "guidance_interval"),
        ({"reuse_features": "0"}, 422, "invalid_value", "reuse_features"),
        ({"timeout": "0"}, 422, "invalid_value", "timeout"),
        ({"timeout": "inf"}, 422, "invalid_value", "timeout"),
        ({"input_reference[image_url]": "data:,"}, 422, "invalid_value", None),
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


@pytest.mark.parametrize("value", [10**400, -(10**400), [1], {"a": 1}], ids=["huge", "negative", "list", "object"])
@pytest.mark.parametrize(
    "field", ["quality", "seconds", "size", "seed", "timeout", "guidance_interval", "input_reference", "lora"]
)
def test_bad_values_in_json_are_refused_in_words(client: TestClient, store: JobStore, field: str, value: Any) -> None:
    body = {"prompt": "waves", "input_reference": "data:image/png;base64,AAAA", field: value}
    answer = client.post("/v1/videos", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 422, error
    assert error["param"].startswith(field), error
    assert "received" not in error["message"]


def test_unsupported_values_say_what_is_supported(client: TestClient) -> None:
    assert "'48x32'" in post(client, size="9x9").json()["error"]["message"]
    assert "expected a number from 0.25 to 128" in post(client, seconds="900").json()["error"]["message"]
    assert "expected 2.5" in post(client, seconds="9", frames="20").json()["error"]["message"]


def test_quality_is_asked_by_name_where_it_was_measured(store: JobStore, client: TestClient) -> None:
    assert post(client, quality="draft").json()["error"]["code"] == "unsupported_quality"
    assert (refused := post(client, quality="draft", num_inference_steps="3")).status_code == 422
    assert "quality and steps are both given" in refused.json()["error"]["message"]
    assert post(client, quality="draft").status_code == 400
    way = partial(Sampled, solver="ddim", guidance_interval=(0.0, 1.0), reuse_features=1, motion=0.001)
    rows = (way(steps=3, passes=6.0, psnr=40.0, psnr_low=38.0), way(steps=9, passes=18.0, psnr=100.0, psnr_low=100.0))
    measured = replace(card(), quality=QualityTable("d" * 64, 2, rows))
    with TestClient(build_api(store, lambda: measured, always_ready)) as other:
        made = post(other, quality="draft").json()
        assert (made["num_inference_steps"], made["steps"], made["predicted_quality"]["psnr_low"]) == (3, 3, 38.0)
        assert "quality" not in made
        assert post(other, quality="42").json()["num_inference_steps"] == 9
        refused = post(other, quality="superb").json()["error"]
        assert refused["param"] == "quality"
        assert refused["message"].startswith("quality is 'superb', expected draft")
        qualities = other.get(f"/v1/models/{MODEL}").json()["qualities"]
    assert {name: each["passes"] for name, each in qualities.items()} == {"draft": 6, "standard": 18, "best": 18}


@pytest.mark.parametrize("beyond", [{"size": "32x32"}, {"frames": "12"}, {"lora": "snow"}])
def test_a_quality_is_not_predicted_where_it_was_not_measured(store: JobStore, beyond: dict[str, str]) -> None:
    row = Sampled(3, "ddim", (0.0, 1.0), 1, passes=6.0, psnr=100.0, psnr_low=100.0, motion=0.0)
    served = replace(card(), quality=QualityTable("d" * 64, 2, (row,)), adapters={"snow": "a" * 64})
    made = post(TestClient(build_api(store, lambda: served, always_ready)), quality="draft", **beyond).json()
    assert (made["num_inference_steps"], "predicted_quality" in made) == (3, False)


def test_a_strength_says_how_much_will_move_where_that_was_measured(store: JobStore, client: TestClient) -> None:
    assert "predicted_motion" not in post(client, motion_strength="1").json()
    measured = {"values": [0, 19], "curve": [0.1, 0.3], "interval": [[0.05, 0.2], [0.2, 0.4]]}
    served = replace(card(), motion=replace(card().motion, calibration=measured))
    other = TestClient(build_api(store, lambda: served, always_ready))
    made = post(other, motion_strength="1").json()
    assert (made["motion_bucket"], made["predicted_motion"]) == (19, {"mean": 0.3, "low": 0.2, "high": 0.4})
    assert "predicted_motion" not in post(other, motion_strength="1", frames="12").json()


def test_adapters_are_named_by_request(store: JobStore, client: TestClient) -> None:
    none = post(client, lora="snow")
    assert (none.status_code, none.json()["error"]["code"]) == (404, "lora_not_found")
    served = replace(card(), adapters={"snow": "a" * 64, "rain": "b" * 64})
    with TestClient(build_api(store, lambda: served, always_ready)) as other:
        assert other.get(f"/v1/models/{MODEL}").json()["adapters"] == ["rain", "snow"]
        missing = post(other, lora="fog")
        assert missing.status_code == 404
        assert missing.json()["error"]["message"] == "lora: there is no adapter 'fog'; there is rain, snow"
        refused = post(other, lora="snow:99").json()["error"]
        assert refused["message"].startswith("lora is 'snow:99', expected NAME"), refused
        assert post(other, lora="snow").json()["lora"] == "snow:1"
        assert post(other, lora="rain:0.5").json()["lora"] == "rain:0.5"
        assert "lora" not in post(other).json()


def test_length_is_asked_in_seconds_or_frames(client: TestClient) -> None:
    by_seconds, by_frames = post(client, seconds="2.5").json(), post(client, frames="20").json()
    for video in (by_seconds, by_frames):
        assert (video["frames"], video["seconds"], video["long_video"]) == (20, "2.5", "windows")
    fewer = post(client, frames="4", long_video="chain").json()
    assert (fewer["frames"], fewer["seconds"], "long_video" in fewer) == (4, "0.5", False)
    controls = {control["name"]: control for control in client.get("/v1/models").json()["data"][0]["controls"]}
    assert (controls["frames"]["default"], controls["long_video"]["default"]) == (6, "windows")


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


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_what_is_kept_of_a_picture_is_a_png_of_its_pixels(client: TestClient, store: JobStore, form: str) -> None:
    sent = png(form=form)
    kept = store.media.read(image_name(post(client, sent).json()["id"]))
    assert kept.startswith(b"\x89PNG")
    np.testing.assert_array_equal(load_image(kept), load_image(sent))


def test_a_declared_type_that_is_no_picture_is_refused(client: TestClient) -> None:
    for kind, status in [("image/gif", 415), ("text/html", 415), ("image/jpeg", 202), ("", 202)]:
        part = ("a.png", png(), kind)
        answer = client.post("/v1/videos", data={"prompt": "waves"}, files={"input_reference": part})
        assert answer.status_code == status, kind


def test_a_body_without_declared_length_is_limited_too(client: TestClient) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
    body = (chunk for chunk in [head, *[b"\0" * 10_000] * 40])
    answer = client.post("/v1/videos", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ({"json": {"prompt": "waves"}}, 422),
        ({"content": b"garbage", "headers": {"Content-Type": "text/plain"}}, 415),
        ({"content": b"garbage"}, 415),
        ({"content": b"garbage", "headers": FORM}, 400),
        ({"content": b"garbage", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ({"content": b"--x\r\n\r\n", "headers": FORM}, 400),
        ({"content": b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--", "headers": FORM}, 400),
        ({"content": b'--x\r\nContent-Disposition: form-data; name="pr', "headers": FORM}, 422),
        ({"content": b"--x--\r\n", "headers": FORM}, 422),
        ({"content": b"prompt=%ff%fe", "headers": {"Content-Type": "application/x-www-form-urlencoded"}}, 422),
        ({"data": {"prompt": "waves"}}, 422),
        ({"data": {"prompt": "waves", "input_reference": "a text"}}, 400),
        ({"files": {"input_reference": ("a.png", png())}}, 422),
        ({"data": {"input_reference": "x"}, "files": {"prompt": ("a.png", png())}}, 422),
        ({"data": {f"field{k}": "x" for k in range(2000)}, "files": {"input_reference": ("a", b"")}}, 400),
    ],
)
def test_forms_that_are_no_forms(client: TestClient, store: JobStore, kind: Any, status: int) -> None:
    answer = client.post("/v1/videos", **kind)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == ERROR
    assert store.page() == []


def test_a_picture_as_data_url(client: TestClient, store: JobStore) -> None:
    import base64

    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for name in ("input_reference", "input_reference[image_url]"):
        answer = client.post("/v1/videos", data={"prompt": "waves", name: url})
        assert answer.status_code == 202, answer.text
        np.testing.assert_array_equal(load_image(store.media.read(image_name(answer.json()["id"]))), load_image(png()))
    answer = client.post("/v1/videos", data={"prompt": "waves", "input_reference": "data:text/html;base64,aGk="})
    assert answer.status_code == 415


def test_urls_are_not_fetched_unless_enabled_and_then_with_care(client: TestClient, store: JobStore) -> None:
    fields = {"prompt": "waves", "input_reference": "http://pictures.example/a.png"}
    answer = client.post("/v1/videos", data=fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "url_not_supported")

    async def private(name: str, port: int) -> list[str]:
        return ["10.0.0.7"]

    api = small_api(store, ApiSettings(fetch_urls=True), fetcher=Fetcher(1000, resolve=private))
    answer = TestClient(api).post("/v1/videos", data=fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "url_not_allowed")
    enabled = TestClient(small_api(store, ApiSettings(fetch_urls=True)))
    answer = enabled.post("/v1/videos", data=fields | {"input_reference": "http://169.254.169.254/latest/meta-data"})
    assert answer.json()["error"]["code"] == "url_not_allowed"


def test_a_full_queue_says_when_to_come_back(client: TestClient) -> None:
    for _ in range(3):
        assert post(client).status_code == 202
    answer = post(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1


def test_an_idempotency_key_gives_the_same_job_again(client: TestClient, store: JobStore) -> None:
    once = {"Idempotency-Key": "a"}
    first, again = post(client, headers=once).json(), post(client, headers=once).json()
    assert first == again, "though no seed was given"
    assert post(client, headers={"Idempotency-Key": "b"}).json()["id"] != first["id"]
    for change in ({"prompt": "wind"}, {"seed": 5}, {"content": png(61)}):
        answer = post(client, headers=once, **change)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert len(store.page()) == 2
    for bad in ("", "x" * 256):
        assert post(client, headers={"Idempotency-Key": bad}).status_code == 422


def test_a_timeout_becomes_a_deadline(client: TestClient, runner: JobRunner) -> None:
    video = post(client, timeout=0.3, num_inference_steps=999).json()
    assert video["deadline_at"] - video["created_at"] in (0, 1)
    runner.start()
    done = wait(client, video["id"])
    assert (done["status"], done["error"]["code"]) == ("failed", "deadline_exceeded")
    answer = client.get(f"/v1/videos/{video['id']}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_failed")


def test_unknown_things(client: TestClient) -> None:
    for method, path, status in [
        ("GET", "/v1/videos/video_none", 404), ("GET", "/v1/videos/video_none/content", 404),
        ("GET", "/v1/videos/video_none/events", 404), ("DELETE", "/v1/videos/video_none", 404), ("GET", "/v2", 404),
        ("PUT", "/v1/videos", 405), ("GET", "/v1/videos?limit=0", 422), ("GET", "/v1/videos?order=up", 422),
        ("GET", "/v1/videos/..%2f..%2fjobs.sqlite/content", 404), ("GET", "/v1/videos/%00%ff", 404),
        ("GET", "/v1/models/sora-2", 404), ("GET", "/docs", 404), ("GET", "/redoc", 404),
    ]:  # fmt: skip
        answer = client.request(method, path)
        assert answer.status_code == status, (path, answer.text)
        assert set(answer.json()["error"]) == ERROR


def test_pages(client: TestClient) -> None:
    ids = [post(client).json()["id"] for _ in range(3)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert ([video["id"] for video in page["data"]], page["has_more"], page["last_id"]) == (ids[:0:-1], True, ids[1])
    page = client.get("/v1/videos", params={"limit": 2, "after": page["last_id"]}).json()
    assert ([video["id"] for video in page["data"]], page["has_more"]) == (ids[:1], False)
    page = client.get("/v1/videos", params={"order": "asc"}).json()
    assert [video["id"] for video in page["data"]] == ids


def test_delete_cancels_first_and_removes_second(client: TestClient, store: JobStore) -> None:
    video_id = post(client).json()["id"]
    cancelled = client.delete(f"/v1/videos/{video_id}").json()
    assert (cancelled["status"], cancelled["deleted"]) == ("cancelled", False)
    answer = client.get(f"/v1/videos/{video_id}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_cancelled")
    gone = client.delete(f"/v1/videos/{video_id}").json()
    assert gone == {"id": video_id, "object": "video.deleted", "deleted": True}
    assert client.get(f"/v1/videos/{video_id}").status_code == 404
    assert not file(store, image_name(video_id)).exists()


def test_cancelling_removes_nothing(client: TestClient, runner: JobRunner) -> None:
    waiting = post(client).json()["id"]
    for _ in range(2):
        answer = client.post(f"/v1/videos/{waiting}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    runner.start()
    done = post(client).json()["id"]
    assert wait(client, done)["status"] == "completed"
    answer = client.post(f"/v1/videos/{done}/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_completed")
    assert client.get(f"/v1/videos/{done}/content").status_code == 200
    assert client.post(f"/v1/videos/video_{'0' * 24}/cancel").status_code == 404


def test_a_running_job_is_cancelled_between_steps(client: TestClient, runner: JobRunner, store: JobStore) -> None:
    video_id = post(client, num_inference_steps=999).json()["id"]
    runner.start()
    while client.get(f"/v1/videos/{video_id}").json()["step"] < 3:
        time.sleep(0.01)
    assert client.delete(f"/v1/videos/{video_id}").json()["status"] == "cancelled"
    assert wait(client, post(client).json()["id"])["status"] == "completed"
    assert client.get(f"/v1/videos/{video_id}").json()["status"] == "cancelled"
    assert not file(store, video_name(video_id, 1)).exists()


def test_a_fault_fails_the_job_and_tells_no_secrets(client: TestClient, runner: JobRunner, store: JobStore) -> None:
    broken, good = post(client).json()["id"], post(client).json()["id"]
    file(store, image_name(broken)).unlink()
    runner.start()
    failed = wait(client, broken)
    assert failed["status"] == "failed"
    assert store.media.uri not in json.dumps(failed)
    assert wait(client, good)["status"] == "completed", "the runner goes on"


def test_content_whole_in_ranges_and_not_at_all(client: TestClient, store: JobStore) -> None:
    video_id = post(client).json()["id"]
    job = complete_one(store)
    url, whole = f"/v1/videos/{video_id}/content", store.media.read(str(job.media_name))
    answer = client.get(url)
    assert (answer.status_code, answer.content) == (200, whole)
    assert answer.headers["content-length"] == str(len(whole))
    assert answer.headers["content-disposition"] == 'attachment; filename="waves-seed{}.mp4"'.format(
        job.request["seed"]
    )
    assert answer.headers["accept-ranges"] == "bytes"
    etag, size = answer.headers["etag"], len(whole)
    for asked, part in [
        ("bytes=0-9", whole[:10]), ("bytes=10-", whole[10:]), ("bytes=-7", whole[-7:]), ("bytes=5-5", whole[5:6]),
        (f"bytes=3-{size + 50}", whole[3:]), (f"bytes=-{size + 50}", whole),
    ]:  # fmt: skip
        answer = client.get(url, headers={"Range": asked})
        assert (answer.status_code, answer.content) == (206, part), asked
        start = whole.index(part) if len(part) > 1 else 5
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(part) - 1}/{size}"
    for ignored in ("bytes=9-3", "bytes=a-b", "bytes=-", "lines=1-2", "bytes=0-1,4-5", "bytes=" + "9" * 30 + "-"):
        assert client.get(url, headers={"Range": ignored}).status_code == 200, ignored
    for behind in (f"bytes={size}-", "bytes=-0"):
        answer = client.get(url, headers={"Range": behind})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")
        assert answer.json()["error"]["code"] == "range_not_satisfiable"
    assert client.get(url, headers={"If-None-Match": f'"x", W/{etag}'}).status_code == 304
    assert client.get(url, headers={"If-None-Match": '"x"'}).status_code == 200
    assert client.get(url, headers={"Range": "bytes=0-3", "If-Range": '"old"'}).content == whole
    assert client.get(url, headers={"Range": "bytes=0-3", "If-Range": etag}).content == whole[:4]
    head = client.head(url)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(size))
    assert client.get(url, params={"variant": "video"}).status_code == 200
    store.media.remove(video_id)
    assert client.get(url).status_code == 404


@pytest.mark.s3
def test_content_from_s3(s3_endpoint: str, tmp_path: Path) -> None:
    from cinemo.serving.store.database import Database
    from cinemo.serving.store.media import MediaStore

    store = JobStore(Database(f"sqlite:///{tmp_path}/s.sqlite"), MediaStore("s3://cinemo-test/http-media"))
    client = TestClient(small_api(store))
    video_id = post(client).json()["id"]
    whole = store.media.read(str(complete_one(store).media_name))
    assert client.get(f"/v1/videos/{video_id}/content").content == whole
    answer = client.get(f"/v1/videos/{video_id}/content", headers={"Range": "bytes=4-7"})
    assert (answer.status_code, answer.content) == (206, b"ftyp")


def test_health_and_readiness(store: JobStore) -> None:
    is_ready = True

    async def ready() -> bool:
        return is_ready

    from small_server import card

    from cinemo.serving.http.api import build_api

    client = TestClient(build_api(store, card, ready))
    assert client.get("/healthz").json()["status"] == "ok"
    post(client)
    assert client.get("/readyz").json() == {"status": "ok", "queued": 1}
    is_ready = False
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"], answer.headers["retry-after"]) == (503, "starting", "2")
    assert client.get("/healthz").status_code == 200


def test_models(client: TestClient) -> None:
    (listed,) = client.get("/v1/models").json()["data"]
    assert listed == client.get(f"/v1/models/{MODEL}").json()
    assert (listed["id"], listed["size"], listed["seconds"], listed["motion_buckets"]) == (MODEL, "48x32", "0.75", 20)


def test_head_says_what_get_does_without_the_body(client: TestClient) -> None:
    video_id = post(client).json()["id"]
    for path in ("/healthz", "/readyz", "/metrics", "/v1/models", f"/v1/models/{MODEL}", "/v1/videos", "/v1/models/x"):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.headers["content-type"]) == (got.status_code, got.headers["content-type"]), path
        assert not head.content
    assert client.head(f"/v1/videos/{video_id}").headers["openai-poll-after-ms"] == "500"
    assert client.head(f"/v1/videos/{video_id}/events").status_code == 405
    assert "head" not in {method for path in client.get("/openapi.json").json()["paths"].values() for method in path}


def test_a_failing_store_is_an_answer_without_its_reasons(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for fault, status in [(RunError(f"{store.media.uri}: lost"), 503), (OSError(f"{store.media.uri}: lost"), 500)]:

        def broken(*_: object, fault: Exception = fault) -> None:
            raise fault

        monkeypatch.setattr(JobStore, "get", broken)
        monkeypatch.setattr(JobStore, "statistics", broken)
        client = TestClient(small_api(store), raise_server_exceptions=False)
        for path in ("/v1/videos/video_x", "/metrics"):
            answer = client.get(path)
            assert (answer.status_code, set(answer.json()["error"])) == (status, ERROR)
            assert store.media.uri not in answer.text
            assert ("retry-after" in answer.headers) == (status == 503)


def test_metrics_tell_jobs_and_requests(client: TestClient, store: JobStore) -> None:
    for _ in range(2):
        post(client)
    complete_one(store)
    client.get("/v1/videos/video_secret")
    client.get("/nowhere/secret")
    text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['cinemo_jobs{status="queued"}'] == "1.0"
    assert lines['cinemo_jobs_finished_total{status="completed"}'] == "1.0"
    assert lines["cinemo_job_run_seconds_count"] == "1.0"
    assert float(lines["cinemo_oldest_waiting_seconds"]) >= 0
    assert "secret" not in text, "labels are templates, not what strangers ask"
    asked = [line for line in lines if line.startswith("cinemo_http_request_seconds_count")]
    assert any('route="/v1/videos/{video_id}"' in line and 'status="404"' in line for line in asked)
    kind = client.get("/metrics", headers={"Accept": "application/openmetrics-text"}).headers["content-type"]
    assert kind.startswith("application/openmetrics-text")
    assert TestClient(small_api(store, ApiSettings(metrics="off"))).get("/metrics").status_code == 404


def test_the_interface_describes_itself(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    creation = document["paths"]["/v1/videos"]["post"]
    assert set(creation["responses"]) >= {"202", "400", "413", "415", "422", "429"}
    assert list(creation["requestBody"]["content"]) == ["multipart/form-data", "application/json"]
    form = document["components"]["schemas"]["VideoForm"]
    assert form["required"] == ["prompt"]
    assert {"required": ["input_reference"]} in form["anyOf"]
    paths = document["paths"]
    assert "video/mp4" in paths["/v1/videos/{video_id}/content"]["get"]["responses"]["200"]["content"]
    assert "text/event-stream" in paths["/v1/videos/{video_id}/events"]["get"]["responses"]["200"]["content"]
    errors = [
        answer["content"]["application/json"]["schema"]["$ref"]
        for operations in paths.values()
        for operation in operations.values()
        for status, answer in operation["responses"].items()
        if status >= "400" and "Health" not in str(answer)
    ]
    assert set(errors) == {"#/components/schemas/ErrorBody"}
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert named <= set(document["components"]["schemas"]), "no reference leads nowhere"


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({"prompt": "x"}, {"motion_bucket": ("b.png", png())}, "motion_bucket"),
        ({}, {"prompt": ("b.png", png())}, "prompt"),
        ({"prompt": "x"}, {"source": ("v.mp4", b"a video")}, "source"),
        ({"prompt": "x", "source_prompt": "a video"}, {}, "source_prompt"),
        ({"prompt": "x", "seed": str(2**53)}, {}, "seed"),
        ({"prompt": ["x", "y"], "motion_bucket": ["3", "20"]}, {}, "motion_bucket"),
    ],
)
def test_a_form_that_lies_is_told_which_field(client: Any, data: Any, files: Any, param: str) -> None:
    answer = client.post("/v1/videos", data=data, files={"input_reference": ("a.png", png())} | files)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param
