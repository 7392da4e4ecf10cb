"""What the interface offers beside a job's plain life: previews, the picture, remixes, waiting, JSON, other origins."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from small_server import SIZE, Worker, complete_one, make_keys, open_store, png, running, small_api

from cinemo.animate import load_image
from cinemo.media.mp4 import write_video
from cinemo.media.variants import COLUMNS, gif, spritesheet, thumbnail
from cinemo.serving.http.api import ApiSettings
from cinemo.serving.settings import ServeSettings
from cinemo.serving.store.jobs import JobStore
from cinemo.serving.store.media import image_name

JSON = {"Content-Type": "application/json"}
UNKNOWN = "video_" + "0" * 24


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return open_store(tmp_path)


@pytest.fixture
def client(store: JobStore) -> Iterator[TestClient]:
    with TestClient(small_api(store, ApiSettings(sync_seconds=20)), raise_server_exceptions=False) as made:
        yield made


def post(
    client: Any, content: bytes | None = None, path: str = "/v1/videos", headers: Any = None, **fields: Any
) -> Any:
    files = {"input_reference": ("a.png", png() if content is None else content)}
    return client.post(path, data={"prompt": "waves"} | fields, files=files, headers=headers)


def fault(answer: Any) -> tuple[int, str]:
    assert set(answer.json()["error"]) == {"code", "message", "param", "type"}
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize(("frames", "rows"), [(1, 1), (6, 2), (16, 4), (40, 4)])
def test_previews_show_the_videos_own_frames(tmp_path: Path, frames: int, rows: int) -> None:
    shades = np.linspace(20, 235, frames).round().astype(np.uint8)
    write_video(tmp_path / "a.mp4", np.broadcast_to(shades[:, None, None, None], (frames, 160, 640, 3)), 8)
    middle = np.asarray(Image.open(io.BytesIO(thumbnail(tmp_path / "a.mp4"))))
    assert middle.shape == (128, 512, 3), "at most 512 pixels on the longer side"
    assert abs(int(middle.mean()) - int(shades[frames // 2])) <= 3
    sheet = np.asarray(Image.open(io.BytesIO(spritesheet(tmp_path / "a.mp4"))))
    assert sheet.shape == (rows * 64, COLUMNS * 256, 3)
    places = sheet.reshape(rows, 64, COLUMNS, 256, 3).mean((1, 3, 4)).ravel()
    shown = shades[np.linspace(0, frames - 1, min(frames, 16)).round().astype(int)]
    np.testing.assert_allclose(places[: len(shown)], shown, atol=3)
    assert (places[len(shown) :] < 3).all(), "the rest is black"


@pytest.mark.parametrize("frames", [1, 6, 150])
def test_a_gif_lasts_as_long_as_its_video_and_is_small(tmp_path: Path, frames: int) -> None:
    shades = np.linspace(20, 235, frames).round().astype(np.uint8)
    write_video(tmp_path / "a.mp4", np.broadcast_to(shades[:, None, None, None], (frames, 160, 640, 3)), 8)
    with Image.open(io.BytesIO(gif(tmp_path / "a.mp4"))) as made:
        assert (made.size, made.info.get("loop", 0)) == ((480, 120), 0)
        seen, seconds = [], 0.0
        for place in range(made.n_frames):
            made.seek(place)
            seen.append(float(np.asarray(made.convert("L")).mean()))
            seconds += made.info.get("duration", 0) / 1000
    count = min(frames, 64)
    assert len(seen) == count
    np.testing.assert_allclose(seen, shades[np.arange(count) * frames // count], atol=6)
    if frames > 1:
        assert seconds == pytest.approx(frames / 8, abs=0.01)


@pytest.mark.parametrize(
    ("prompt", "name", "everywhere"),
    [
        ("A fox in snow!", "a-fox-in-snow-seed7", None),
        ('"../../etc\\passwd"\r\nSet-Cookie: a=b', "etc-passwd-set-cookie-a-b-seed7", None),
        ("a very long prompt " * 20, "a-very-long-prompt-a-very-long-prompt-a-very-long-prompt-a-seed7", None),
        ("x" * 300, "x" * 60 + "-seed7", None),
        ("Ein Café", "ein-cafe-seed7", "ein-caf%C3%A9-seed7"),
        ("雪の中の狐", "seed7", "%E9%9B%AA%E3%81%AE%E4%B8%AD%E3%81%AE%E7%8B%90-seed7"),
        ("🚤", "video-seed7", None),
    ],
)
def test_downloads_are_named_after_what_was_asked(
    client: TestClient, store: JobStore, prompt: str, name: str, everywhere: str | None
) -> None:
    video_id = client.post(
        "/v1/videos", data={"prompt": prompt.replace("\r\n", " "), "seed": "7"}, files={"input_reference": png()}
    ).json()["id"]
    complete_one(store)
    for path, ending in [
        ("content", ".mp4"), ("content?variant=gif", "-animation.gif"),
        ("content?variant=thumbnail", "-thumbnail.webp"), ("input", "-input.png"),
    ]:  # fmt: skip
        told = client.get(f"/v1/videos/{video_id}/{path}").headers["content-disposition"]
        also = f"; filename*=UTF-8''{everywhere}{ending}" if everywhere else ""
        assert told == f'attachment; filename="{name}{ending}"{also}'


def test_a_model_says_how_large_pictures_may_be_and_whether_it_is_a_toy(store: JobStore) -> None:
    with TestClient(small_api(store, ApiSettings(body_bytes=5_000_000, pixels=900_000))) as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert model["picture_limits"] == {"bytes": 5_000_000, "pixels": 900_000}
        assert model["toy"] is True, "48x32"
        too_large = client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": png(1000, 901)})
        assert fault(too_large) == (413, "image_too_large")


@pytest.mark.parametrize(
    ("variant", "media_type", "form"),
    [("thumbnail", "image/webp", "WEBP"), ("spritesheet", "image/jpeg", "JPEG"), ("gif", "image/gif", "GIF")],
)
def test_a_preview_is_answered_as_a_video_is(
    client: TestClient, store: JobStore, variant: str, media_type: str, form: str
) -> None:
    video_id = post(client).json()["id"]
    url, params = f"/v1/videos/{video_id}/content", {"variant": variant}
    assert fault(client.get(url, params=params)) == (409, "video_not_ready")
    complete_one(store)
    answer = client.get(url, params=params)
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
    assert Image.open(io.BytesIO(answer.content)).format == form
    assert answer.headers["etag"] != client.get(url).headers["etag"]
    head = client.head(url, params=params)
    assert (head.content, head.headers["content-length"]) == (b"", str(len(answer.content)))
    part = client.get(url, params=params, headers={"Range": "bytes=2-5"})
    assert (part.status_code, part.content) == (206, answer.content[2:6])
    assert client.get(url, params=params, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert fault(client.get(url, params={"variant": "poster"})) == (400, "unsupported_variant")
    message = client.get(url, params={"variant": "poster"}).json()["error"]["message"]
    assert message == "variant: got 'poster', expected video or thumbnail or spritesheet or gif"


def test_previews_stay_with_their_video_and_go_with_it(client: TestClient, store: JobStore) -> None:
    video_id = post(client).json()["id"]
    complete_one(store)
    before = set(store.media.old(-1.0)[video_id])
    for _ in range(2):
        for variant in ("thumbnail", "spritesheet"):
            assert client.get(f"/v1/videos/{video_id}/content", params={"variant": variant}).status_code == 200
    made = set(store.media.old(-1.0)[video_id]) - before
    assert len(made) == 2
    object.__setattr__(store.limits, "stray_seconds", -1.0)
    store.sweep()
    assert set(store.media.old(-1.0)[video_id]) == before | made, "no strays"
    client.delete(f"/v1/videos/{video_id}")
    assert store.media.old(-1.0) == {}


def test_the_picture_of_a_job_makes_the_same_job_again(client: TestClient, store: JobStore) -> None:
    sent = png(form="WEBP")
    first = post(client, sent, seed=3).json()
    url = f"/v1/videos/{first['id']}/input"
    answer = client.get(url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    np.testing.assert_array_equal(load_image(answer.content), load_image(sent))
    again = post(client, answer.content, seed=3).json()
    assert store.media.read(image_name(again["id"])) == answer.content, "the same bytes, however often"
    assert client.head(url).headers["content-length"] == str(len(answer.content))
    assert client.get(url, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert fault(client.get(url, params={"name": "last_image"})) == (404, "picture_not_found")
    assert fault(client.get(f"/v1/videos/{UNKNOWN}/input")) == (404, "video_not_found")


def test_a_remix_keeps_what_is_not_changed(client: TestClient, store: JobStore) -> None:
    source = post(client, seed=11, motion_bucket=15, guidance_interval="0.1,0.9", size="32x48", frames=4).json()
    own = {"id", "created_at", "prompt", "remixed_from_video_id"}
    answer = client.post(f"/v1/videos/{source['id']}/remix", json={"prompt": "wind"})
    assert answer.status_code == 202
    remix = answer.json()
    assert answer.headers["location"] == f"/v1/videos/{remix['id']}"
    assert (remix["prompt"], remix["remixed_from_video_id"]) == ("wind", source["id"])
    assert source["remixed_from_video_id"] is None
    assert {name: remix[name] for name in remix.keys() - own} == {name: source[name] for name in source.keys() - own}
    assert store.media.read(image_name(remix["id"])) == store.media.read(image_name(source["id"]))
    changes = {"prompt": "wind", "seed": 12, "motion_strength": 1, "seconds": 1, "guidance_interval": [0, 0.5]}
    other = client.post(f"/v1/videos/{source['id']}/remix", json=changes).json()
    assert (other["seed"], other["motion_bucket"], other["frames"], other["seconds"]) == (12, 19, 8, "1")
    assert (other["guidance_interval"], other["size"]) == ([0.0, 0.5], "32x48")
    again = client.post(f"/v1/videos/{remix['id']}/remix", json={"prompt": "rain"}).json()
    assert again["remixed_from_video_id"] == remix["id"], "a remix of a remix"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 422, "missing_field", "prompt"),
        ({"prompt": "x", "motion_bucket": 20}, 422, "invalid_value", "motion_bucket"),
        ({"prompt": "x", "steps": 3}, 422, "unknown_field", "steps"),
        ({"prompt": "x", "input_reference": "data:,"}, 422, "unknown_field", "input_reference"),
        ({"prompt": "x", "model": "sora-2"}, 404, "model_not_found", "model"),
        ({"prompt": "a\ud800"}, 422, "invalid_value", "prompt"),
        ({"prompt": "x", "\ud800": 1}, 400, "malformed_request", None),
        ([], 400, "malformed_request", None),
    ],
)
def test_what_no_remix_can_be(client: TestClient, body: Any, status: int, code: str, param: str | None) -> None:
    source = post(client).json()["id"]
    answer = client.post(f"/v1/videos/{source}/remix", content=json.dumps(body), headers=JSON)
    assert fault(answer) == (status, code), answer.text
    assert answer.json()["error"]["param"] == param


def test_a_remix_needs_the_source_its_picture_and_its_owner(
    client: TestClient, store: JobStore, tmp_path: Path
) -> None:
    source = post(client).json()["id"]
    store.media.remove(source)
    assert fault(client.post(f"/v1/videos/{source}/remix", json={"prompt": "x"})) == (409, "picture_gone")
    assert fault(client.post(f"/v1/videos/{UNKNOWN}/remix", json={"prompt": "x"})) == (404, "video_not_found")
    keys, (mine, theirs) = make_keys(store, "mine", "theirs", max_active=1)
    guarded = TestClient(small_api(store, keys=keys))
    headers = [{"Authorization": f"Bearer {token}"} for token in (mine, theirs)]
    own = post(guarded, headers=headers[0]).json()["id"]
    assert fault(guarded.post(f"/v1/videos/{own}/remix", json={"prompt": "x"}, headers=headers[1]))[0] == 404
    assert fault(guarded.post(f"/v1/videos/{own}/remix", json={"prompt": "x"}, headers=headers[0])) == (
        429,
        "quota_exceeded",
    )


def test_a_job_as_json(client: TestClient, store: JobStore) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for reference in (url, {"image_url": url}):
        body = {"prompt": "waves", "input_reference": reference, "seconds": 0.75, "size": SIZE, "seed": None}
        answer = client.post("/v1/videos", json=body)
        assert answer.status_code == 202, answer.text
        np.testing.assert_array_equal(load_image(store.media.read(image_name(answer.json()["id"]))), load_image(png()))
    for wrong, param in (
        ({"file_id": "f"}, "input_reference[file_id]"),
        (5, "input_reference"),
        ([], "input_reference"),
    ):
        answer = client.post("/v1/videos", json={"prompt": "waves", "input_reference": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text
    for broken in (b"{", b"[" * 100_000, b"\xff", b"3"):
        assert fault(client.post("/v1/videos", content=broken, headers=JSON)) == (400, "malformed_request")


def test_waiting_for_the_video_itself(client: TestClient, store: JobStore) -> None:
    with Worker(store):
        answer = post(client, path="/v1/videos/sync")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    video_id = answer.headers["x-video-id"]
    assert answer.content == client.get(f"/v1/videos/{video_id}/content").content
    assert fault(post(client, path="/v1/videos/sync", motion_bucket=20)) == (422, "invalid_value")


def test_waiting_has_an_end_and_loses_nothing(store: JobStore) -> None:
    client = TestClient(small_api(store, ApiSettings(sync_seconds=0.05)))
    answer = post(client, path="/v1/videos/sync", headers={"Idempotency-Key": "a"})
    job = answer.json()
    assert (answer.status_code, job["status"]) == (202, "queued")
    assert answer.headers["location"] == f"/v1/videos/{job['id']}"
    assert answer.headers["x-video-id"] == job["id"]
    complete_one(store)
    again = post(client, path="/v1/videos/sync", headers={"Idempotency-Key": "a"})
    assert (again.status_code, again.headers["x-video-id"]) == (200, job["id"])


@pytest.mark.parametrize(
    ("code", "status"), [("invalid_request", 422), ("deadline_exceeded", 504), ("internal_error", 500)]
)
def test_waiting_for_a_job_that_fails(client: TestClient, store: JobStore, code: str, status: int) -> None:
    def fail() -> None:
        while not (claimed := store.claim("worker", 1)):
            pass
        store.fail(claimed[0], code, "the reason")

    worker = threading.Thread(target=fail)
    worker.start()
    answer = post(client, path="/v1/videos/sync")
    worker.join()
    assert fault(answer) == (status, code)
    assert store.get(answer.headers["x-video-id"]) is not None


def test_a_client_that_leaves_while_it_waits_keeps_its_job(store: JobStore) -> None:
    api = small_api(store, ApiSettings(sync_seconds=60))
    with running(api) as url:
        with httpx.Client(base_url=url, timeout=0.5) as client, pytest.raises(httpx.ReadTimeout):
            post(client, path="/v1/videos/sync")
        (job,) = store.page()
        assert job.status == "queued"
        for _ in range(500):
            if not len(api.state.streams):
                break
            threading.Event().wait(0.01)
        assert len(api.state.streams) == 0, "nobody waits for nobody"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/videos", "GET, HEAD, POST, OPTIONS"),
        ("POST", f"/v1/videos/{UNKNOWN}", "DELETE, GET, HEAD, OPTIONS"),
        ("POST", f"/v1/videos/{UNKNOWN}/content", "GET, HEAD, OPTIONS"),
        ("GET", f"/v1/videos/{UNKNOWN}/remix", "POST, OPTIONS"),
        ("GET", "/v1/models", None),
        ("POST", f"/v1/videos/{UNKNOWN}/events", "GET, OPTIONS"),
        ("POST", "/", "GET, HEAD, OPTIONS"),
        ("BREW", "/healthz", "GET, HEAD, OPTIONS"),
    ],
)
def test_allow_names_every_method_of_a_path(client: TestClient, method: str, path: str, allowed: str | None) -> None:
    answer = client.request(method, path)
    if allowed is None:
        assert "allow" not in answer.headers
        return
    assert fault(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed
    options = client.options(path)
    assert (options.status_code, options.headers["allow"], options.content) == (204, allowed, b"")


def test_every_answer_has_one_request_id(client: TestClient, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("lost")

    monkeypatch.setattr(JobStore, "page", broken)
    for method, path, status in [
        ("GET", "/healthz", 200), ("GET", "/v2", 404), ("PUT", "/v1/videos", 405), ("OPTIONS", "/v1/videos", 204),
        ("POST", "/v1/videos", 415), ("GET", "/v1/videos", 500), ("GET", "/", 200),
    ]:  # fmt: skip
        for given, echoed in [
            ("job-7:a/b", True),
            ("x" * 129, False),
            ("a b", False),
            ("<script>", False),
            (None, False),
        ]:
            answer = client.request(method, path, headers={"X-Request-Id": given} if given else None)
            (name,) = answer.headers.get_list("x-request-id")
            assert answer.status_code == status
            assert name == given if echoed else re.fullmatch("req_[0-9a-f]{24}", name)
    answer = client.get("/v1/videos", headers={"X-Request-Id": "mine"})
    assert "logged as mine" in answer.json()["error"]["message"]
    named = TestClient(small_api(store, ApiSettings(requests_named=True)))
    assert "x-request-id" not in named.get("/healthz").headers


def test_pages_of_other_origins(store: JobStore) -> None:
    origins = ServeSettings(bundle="b", cors_origins="https://A.example").origins
    keys, _ = make_keys(store, "someone")
    ours, theirs = {"Origin": "https://a.example"}, {"Origin": "https://b.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-os"}
    client = TestClient(
        small_api(
            store,
            ApiSettings(cors_origins=origins),
            keys=keys,
        )
    )
    answer = client.options("/v1/videos", headers=ours | asks)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    assert "DELETE" in answer.headers["access-control-allow-methods"]
    assert fault(client.options("/v1/videos", headers=theirs | asks)) == (400, "cors_refused")
    refused = client.get("/v1/videos", headers=ours)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example", "a page may read why"
    assert "X-Request-Id" in refused.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in client.get("/healthz", headers=theirs).headers
    assert "access-control-allow-origin" not in TestClient(small_api(store)).get("/healthz", headers=ours).headers
    assert TestClient(small_api(store)).options("/v1/videos", headers=ours | asks).status_code == 204


def test_the_interface_describes_what_is_beside(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    paths, schemas = document["paths"], document["components"]["schemas"]
    content = paths["/v1/videos/{video_id}/content"]["get"]
    assert set(content["responses"]["200"]["content"]) == {"video/mp4", "image/webp", "image/jpeg", "image/gif"}
    (variant,) = [each for each in content["parameters"] if each["name"] == "variant"]
    assert variant["schema"]["enum"] == ["video", "thumbnail", "spritesheet", "gif"]
    assert list(paths["/v1/videos/{video_id}/remix"]["post"]["requestBody"]["content"]) == ["application/json"]
    assert "input_reference" not in schemas["RemixJson"]["properties"]
    assert schemas["VideoJson"]["required"] == ["prompt", "input_reference"]
    assert "video/mp4" in paths["/v1/videos/sync"]["post"]["responses"]["200"]["content"]
    assert {"video.completed", "video.failed"} == set(document["webhooks"])
    assert "HTTPValidationError" not in json.dumps(document)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": "abc"}, "seconds: got 'abc', expected a number from 0.25 to 128"),
        ({"motion_bucket": "fast"}, "motion_bucket: got 'fast', expected a whole number from 0 to 19"),
        ({"seed": "-1"}, "seed: got '-1', expected a whole number from 0 to 9007199254740991"),
        ({"seed": str(2**53)}, "seed: got '9007199254740992', expected a whole number from 0 to 9007199254740991"),
        ({"guidance_scale": "nan"}, "guidance_scale: got 'nan', expected a number from 1 to 50"),
        ({"timeout": "0"}, "timeout: got '0', expected a number above 0 and at most 604800"),
        ({"solver": "euler"}, "solver: got 'euler', expected ddim or multistep"),
        ({"dct_init": "perhaps"}, "dct_init: got 'perhaps', expected true or false"),
        ({"guidance_interval": "x"}, "guidance_interval: got 'x', expected two numbers, such as 0.1,0.9"),
        ({"prompt": "x" * 4001}, f"prompt: got '{'x' * 59}... (4003 characters), expected a text of at most 4000"),
    ],
)
def test_errors_are_in_words(client: TestClient, fields: dict[str, str], message: str) -> None:
    told = post(client, **fields).json()["error"]["message"]
    assert told.startswith(message), told
    assert not re.search(r"(?i)input should|validat|pydantic|parse", told)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=0", "limit: got '0', expected a whole number from 1 to 100"),
        ("limit=x", "limit: got 'x', expected a whole number from 1 to 100"),
        ("order=up", "order: got 'up', expected asc or desc"),
        ("after=" + "v" * 65, "expected a text of at most 64 characters"),
    ],
)
def test_parameters_have_errors_in_words_too(client: TestClient, query: str, message: str) -> None:
    answer = client.get(f"/v1/videos?{query}")
    assert fault(answer) == (422, "invalid_value")
    assert message in answer.json()["error"]["message"]
    key = post(client, headers={"Idempotency-Key": "k" * 256}).json()["error"]
    assert key["message"].endswith("expected a text of 1 to 255 characters")


def test_a_prompt_that_is_cut_says_so(store: JobStore) -> None:
    def count(prompt: str) -> tuple[int, int]:
        return len(prompt.split()), 75

    client = TestClient(small_api(store, tokens=count))
    short = post(client, prompt="two words").json()
    assert short["prompt_tokens"] == {"used": 2, "limit": 75, "cut": False}
    once = {"Idempotency-Key": "a"}
    long = post(client, prompt="word " * 80, headers=once).json()
    assert long["prompt_tokens"] == {"used": 80, "limit": 75, "cut": True}
    assert client.get(f"/v1/videos/{long['id']}").json()["prompt_tokens"] == long["prompt_tokens"]
    uncounted = TestClient(small_api(store))
    assert post(uncounted, prompt="word " * 80, headers=once).json()["id"] == long["id"], "no part of what was asked"
    assert post(uncounted).json()["prompt_tokens"] is None
