"""Both clients against a real server in this process, and against answers that are made up: faults, cuts, strangers."""

from __future__ import annotations

import base64
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from both_clients import KINDS, opened
from hypothesis import given
from hypothesis import strategies as st
from small_server import MODEL, SECONDS, SIZE, Worker, complete_one, make_keys, open_store, png, running, small_api

from cinemo.client import (
    AsyncClient,
    Client,
    Conflict,
    ConnectionFailed,
    Forbidden,
    Invalid,
    NotFound,
    ServerFault,
    TooMany,
    UnexpectedAnswer,
    Video,
    VideoFailed,
    VideoServerError,
    WaitTimeout,
    clients,
)
from cinemo.client.flows import Events
from cinemo.client.types import CancelledVideo, DeletedVideo
from cinemo.media.mp4 import read_metadata
from cinemo.serving.http.api import ApiSettings
from cinemo.serving.store.jobs import JobStore

Make = Callable[..., Client]
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return open_store(tmp_path, max_queued=5)


@pytest.fixture
def client(kind: str, store: JobStore) -> Iterator[Client]:
    keys, (token, _) = make_keys(store, "one", "two")
    api = small_api(store, ApiSettings(body_bytes=2**20, event_seconds=0.02), keys=keys)
    with running(api) as url, opened(kind, url, api_key=token, max_retries=0) as made:
        yield made


@pytest.fixture
def faked(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Client, list[float]]]]:
    """A client whose answers a function makes, and the seconds of its pauses, which take no time."""
    pauses: list[float] = []

    async def asynchronously(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(clients, "time", SimpleNamespace(sleep=pauses.append))
    others = {"to_thread": anyio.to_thread, "CancelScope": anyio.CancelScope}
    monkeypatch.setattr(clients, "anyio", SimpleNamespace(sleep=asynchronously, **others))
    closing = []

    def made(answer: Answer, **options: Any) -> tuple[Client, list[float]]:
        closing.append(opened(kind, "http://there", httpx.MockTransport(answer), **options))
        return closing[-1].__enter__(), pauses

    yield made
    for each in closing:
        each.__exit__(None, None, None)


def in_turn(*answers: httpx.Response | Exception) -> tuple[Answer, list[httpx.Request]]:
    """Answers one after the other, and the requests that they were given to."""
    left, asked = list(answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        request.read()
        asked.append(request)
        now = left.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    return answer, asked


def video(status: str = "queued", **fields: Any) -> dict[str, Any]:
    return {"id": "v1", "status": status, **fields}


def refused(status: int, code: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"code": code, "message": "no", "param": None}}, headers=headers)


# --- against the server ----------------------------------------------------------------------------------------------


def test_create_wait_download_delete(client: Client, store: JobStore, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    seen: list[Video] = []
    with Worker(store):
        asked = client.create(
            tmp_path / "a.png", "waves", model=MODEL, size=SIZE, seconds=SECONDS, seed=7, motion_strength=0.5,
            num_inference_steps=20, dct_init=False, guidance_interval=(0.1, 0.9), negative_prompt=None,
        )  # fmt: skip
        done = client.wait(asked, progress=seen.append)
    assert (asked.status, done.status, done.progress, done.error) == ("queued", "completed", 100, None)
    assert (done.model, done.size, done.seconds, done.prompt) == (MODEL, SIZE, SECONDS, "waves")
    told = done.controls
    assert (told["seed"], told["motion_bucket"], told["num_inference_steps"], told["dct_init"]) == (7, 10, 20, False)
    assert told["guidance_interval"] == [0.1, 0.9]
    steps = [each.step for each in seen]
    assert steps == sorted(steps)
    assert len(set(steps)) > 3
    assert seen[-1] == done
    path = client.download(done, tmp_path / "out.mp4")
    assert read_metadata(path)["comment"] == "waves"
    assert client.content(done.id) == path.read_bytes()
    assert sorted(each.name for each in tmp_path.glob("*out*")) == ["out.mp4"]
    assert isinstance(client.delete(done), DeletedVideo)
    with pytest.raises(NotFound) as caught:
        client.retrieve(done)
    fault = caught.value
    assert (fault.status, fault.code, fault.param) == (404, "video_not_found", "video_id")
    assert fault.request_id
    assert fault.request_id in str(fault)


def test_a_picture_may_be_a_path_bytes_a_file_or_a_data_url(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    for picture in (str(tmp_path / "a.png"), png(form="JPEG"), io.BytesIO(png(form="WEBP")), url):
        assert client.create(picture, "waves").status == "queued"
    with pytest.raises(Invalid) as caught:
        client.create("https://pictures.example/a.png", "waves")
    assert (caught.value.code, caught.value.param) == ("url_not_supported", "input_reference")
    with pytest.raises(FileNotFoundError):
        client.create(tmp_path / "none.png", "waves")


def test_all_videos_over_pages(client: Client) -> None:
    made = [client.create(png(), f"{k}").id for k in range(5)]
    assert [each.id for each in client.videos(page_size=2)] == made[::-1]
    assert [each.id for each in client.videos(page_size=5, order="asc")] == made


def test_cancelling(client: Client, store: JobStore) -> None:
    first, second, third = (client.create(png(), "waves") for _ in range(3))
    assert client.cancel(first).status == "cancelled"
    answer = client.delete(second)
    assert isinstance(answer, CancelledVideo)
    assert (answer.status, answer.deleted) == ("cancelled", False)
    with pytest.raises(VideoFailed, match="cancelled") as caught:
        client.wait(second)
    assert (caught.value.code, caught.value.video.id) == ("cancelled", second.id)
    complete_one(store)
    with pytest.raises(Conflict) as conflict:
        client.cancel(third)
    assert conflict.value.code == "video_completed"


def test_faults_are_exceptions_by_their_kind(client: Client) -> None:
    with pytest.raises(Invalid, match="48x32"):
        client.create(png(), "waves", size="1280x720")
    with pytest.raises(Invalid) as caught:
        client.create(png(), "waves", wobble=3)
    assert (caught.value.status, caught.value.code, caught.value.param) == (422, "unknown_field", "wobble")
    with pytest.raises(Invalid) as caught:
        client.create(b"GIF89a", "waves")
    assert caught.value.status == 415
    asked = client.create(png(), "waves")
    with pytest.raises(Conflict):
        client.content(asked)
    for _ in range(4):
        client.create(png(), "waves")
    with pytest.raises(TooMany) as full:
        client.create(png(), "waves")
    assert full.value.retry_after is not None
    assert full.value.retry_after >= 1


def test_a_key_is_needed(kind: str, client: Client, store: JobStore) -> None:
    keys, _ = make_keys(store, "three")
    with (
        running(small_api(store, keys=keys)) as url,
        opened(kind, url, api_key="cin_0") as stranger,
        pytest.raises(Forbidden) as caught,
    ):
        stranger.models()
    assert caught.value.code == "invalid_api_key"


def test_models_with_their_controls(client: Client) -> None:
    (model,) = client.models()
    assert (model.id, model.size, model.seconds) == (MODEL, SIZE, SECONDS)
    assert client.model(MODEL) == model
    assert {"seed", "num_inference_steps"} <= {control.name for control in model.controls}


def test_the_same_key_makes_one_video(client: Client) -> None:
    assert client.create(png(), "waves", idempotency_key="a") == client.create(png(), "waves", idempotency_key="a")
    assert client.create(png(), "waves") != client.create(png(), "waves")


def test_a_creation_whose_answer_is_lost_makes_one_video(kind: str, store: JobStore) -> None:
    """The server takes the request and the connection breaks before its answer: it is sent again."""
    with running(small_api(store)) as url:
        lost = []

        def answer(request: httpx.Request) -> httpx.Response:
            taken = httpx.post(f"{url}/v1/videos", content=request.read(), headers=dict(request.headers))
            assert taken.status_code in (200, 202)
            lost.append(taken.json()["id"])
            if len(lost) == 1:
                raise httpx.ReadError("cut", request=request)
            return httpx.Response(202, content=taken.content)

        with opened(kind, url, httpx.MockTransport(answer)) as client:
            assert client.create(png(), "waves").id == lost[0]
    assert lost == [lost[0]] * 2


def test_a_wait_has_an_end(client: Client) -> None:
    asked, began = client.create(png(), "waves"), time.monotonic()
    with pytest.raises(WaitTimeout, match=r"after 0\.3 s \(queued, 0 %\)") as caught:
        client.wait(asked.id, timeout=0.3)
    assert time.monotonic() - began < 5
    assert caught.value.video == asked
    assert isinstance(caught.value, TimeoutError)


def test_a_wait_goes_on_over_a_restart(faked: Make, store: JobStore) -> None:
    """The server ends its streams and goes away; another one takes its place and the video is completed there."""
    nowhere, told = "http://127.0.0.1:1", []
    with running(small_api(store)) as url:
        asked = store.submit({"model": "m", "prompt": "", "size": SIZE, "seconds": SECONDS}, png()).id
        places = [url, *[nowhere] * 3, url]

        def answer(request: httpx.Request) -> httpx.Response:
            place = places.pop(0)
            headers = {name: value for name, value in request.headers.items() if name != "host"}
            got = httpx.request(request.method, place + request.url.path, headers=headers, timeout=1)
            return httpx.Response(got.status_code, headers=got.headers, content=got.content)

        def progress(video: Video) -> None:
            told.append(video.status)
            if len(told) == 1:
                complete_one(store)

        assert faked(answer)[0].wait(asked, progress=progress).status == "completed"
    assert places == []
    assert told == ["queued", "completed"]


def test_an_asynchronous_progress_is_awaited(store: JobStore) -> None:
    told: list[int] = []

    async def progress(video: Video) -> None:
        await anyio.sleep(0)
        told.append(video.progress)

    async def use(url: str) -> None:
        async with AsyncClient(url) as client, anyio.create_task_group() as tasks:
            asked = [await client.create(png(), "waves", num_inference_steps=3) for _ in range(3)]
            for each in asked:
                tasks.start_soon(lambda each=each: client.wait(each, progress=progress))

    with Worker(store), running(small_api(store)) as url:
        anyio.run(use, url)
    assert told.count(100) == 3


# --- retries ---------------------------------------------------------------------------------------------------------


def test_faults_that_pass_are_tried_again_with_growing_pauses(faked: Make) -> None:
    broken = httpx.ConnectError("refused", request=httpx.Request("GET", "http://there"))
    answer, asked = in_turn(
        broken, httpx.Response(502, text="<html>"), refused(503, "draining", **{"retry-after": "7"}),
        refused(429, "queue_full", **{"retry-after": "1"}), httpx.Response(202, json=video()),
    )  # fmt: skip
    client, pauses = faked(answer)
    assert client.create(png(), "waves").id == "v1"
    assert len({request.headers["idempotency-key"] for request in asked}) == 1
    assert len({request.content.replace(boundary(request), b"") for request in asked}) == 1
    low, high = [0.375, 0.75, 7.0, 3.0], [0.5, 1.0, 7.0, 4.0]
    assert all(a <= pause <= b for a, pause, b in zip(low, pauses, high, strict=True)), pauses


def boundary(request: httpx.Request) -> bytes:
    return request.headers["content-type"].partition("boundary=")[2].encode()


def test_a_deletion_whose_answer_is_lost_has_happened(faked: Make) -> None:
    broken, gone = httpx.ReadError("cut", request=httpx.Request("DELETE", "http://there")), "video_not_found"
    client, _ = faked(in_turn(broken, refused(404, gone), refused(404, gone))[0])
    assert client.delete("v1") == DeletedVideo(id="v1")
    with pytest.raises(NotFound):
        client.delete("v1")


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        (400, {}, Invalid), (401, {}, Forbidden), (404, {}, NotFound), (409, {}, Conflict), (422, {}, Invalid),
        (501, {}, ServerFault), (429, {"retry-after": "3600"}, TooMany),
    ],
)  # fmt: skip
def test_faults_that_stay_are_not_tried_again(
    faked: Make, status: int, headers: dict[str, str], error: type[Exception]
) -> None:
    answer, asked = in_turn(refused(status, "x", **headers))
    client, pauses = faked(answer)
    with pytest.raises(error):
        client.retrieve("v1")
    assert (len(asked), pauses) == (1, [])


def test_retries_end(faked: Make) -> None:
    answer, asked = in_turn(*[httpx.Response(503, text="busy", headers={"content-type": "text/plain"})] * 3)
    client, _ = faked(answer, max_retries=2)
    with pytest.raises(ServerFault, match="503 http_503: busy"):
        client.retrieve("v1")
    assert len(asked) == 3
    client, pauses = faked(in_turn(httpx.ConnectTimeout("slow", request=asked[0]))[0], max_retries=0)
    with pytest.raises(ConnectionFailed, match=r"http://there/v1/videos/v1: slow"):
        client.retrieve("v1")
    assert len(pauses) == 2


def test_what_is_no_server_of_videos_is_said(faked: Make) -> None:
    client, _ = faked(in_turn(httpx.Response(200, text="<html>Welcome</html>"))[0])
    with pytest.raises(UnexpectedAnswer, match=r"was not answered with a ModelList.*is the address"):
        client.models()
    for wrong in ("127.0.0.1:8000", "ftp://there"):
        with pytest.raises(ValueError, match="expected http://HOST:PORT"):
            Client(wrong)
    assert issubclass(UnexpectedAnswer, VideoServerError)


def test_odd_headers_of_strangers_break_nothing(faked: Make) -> None:
    client, _ = faked(in_turn(*[httpx.Response(503, headers=[(b"retry-after", b"\xb2")])] * 2)[0], max_retries=1)
    with pytest.raises(ServerFault):
        client.retrieve("v1")


def test_pages_that_never_end_are_an_error(faked: Make) -> None:
    page = {"object": "list", "data": [video()], "has_more": True, "first_id": None, "last_id": None}
    client, _ = faked(in_turn(*[httpx.Response(200, json=page)] * 2)[0])
    with pytest.raises(UnexpectedAnswer, match="says that there are more"):
        list(client.videos())


# --- other servers, and newer ones -----------------------------------------------------------------------------------


def test_fields_that_are_not_known_are_kept_and_absent_ones_do_no_harm(faked: Make) -> None:
    client, _ = faked(in_turn(httpx.Response(200, json=video("paused", seconds_left=4.5, new={"a": [1]})))[0])
    got = client.retrieve("v1")
    assert (got.status, got.finished, got.progress, got.prompt) == ("paused", False, 0, None)
    assert got.controls == {"seconds_left": 4.5, "new": {"a": [1]}}


@pytest.mark.parametrize("status", [404, 405, 429, 501])
def test_a_server_without_streams_of_events_is_asked_again_and_again(faked: Make, status: int) -> None:
    answer, asked = in_turn(
        httpx.Response(200, json=video()), httpx.Response(status, text="none"),
        httpx.Response(200, json=video("in_progress", progress=50)), httpx.Response(200, json=video("completed")),
    )  # fmt: skip
    client, pauses = faked(answer)
    assert client.wait("v1", interval=3.5).status == "completed"
    assert [request.url.path.rpartition("/")[2] for request in asked] == ["v1", "events", "v1", "v1"]
    assert pauses == [3.5, 3.5]


def test_previews_are_told(faked: Make) -> None:
    events = [
        ("progress", video("in_progress", step=1)),
        ("preview", {"id": "v1", "object": "video.preview", "step": 1, "frames": ["data:image/webp;base64,AA=="]}),
        ("later", {}), ("completed", video("completed")),
    ]  # fmt: skip
    content = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    stream = httpx.Response(200, content=content.encode(), headers={"content-type": "text/event-stream; charset=utf-8"})
    seen: list[Any] = []
    client, _ = faked(in_turn(httpx.Response(200, json=video()), stream)[0])
    client.wait("v1", progress=lambda each: seen.append(each.status), preview=lambda each: seen.append(each.frames))
    assert seen == ["queued", "in_progress", ["data:image/webp;base64,AA=="], "completed"]


def test_a_404_of_a_proxy_is_not_the_servers(faked: Make) -> None:
    """In a restart a proxy may know no route for a moment; a server that has no such video says so in its own words."""
    plain = httpx.Response(404, text="Not Found")
    client, _ = faked(in_turn(plain, plain, httpx.Response(200, json=video("completed")))[0])
    assert client.wait(Video(**video())).status == "completed"
    client, _ = faked(in_turn(refused(404, "video_not_found"))[0])
    with pytest.raises(NotFound):
        client.wait(Video(**video()))
    client, _ = faked(in_turn(plain)[0])
    with pytest.raises(NotFound):
        client.wait("v1")


def test_an_outage_in_a_wait_has_an_end(faked: Make) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    client, pauses = faked(answer)
    with pytest.raises(ConnectionFailed):
        client.wait("v1", outage=0.05)
    assert max(pauses) <= 8


def test_a_failed_video_says_why(faked: Make) -> None:
    failed = video("failed", error={"code": "deadline", "message": "it took too long"})
    client, _ = faked(in_turn(httpx.Response(200, json=failed))[0])
    with pytest.raises(VideoFailed, match=r"it is failed: it took too long \(deadline\)") as caught:
        client.wait("v1")
    assert caught.value.code == "deadline"


# --- synchronous creation, remix, pictures ---------------------------------------------------------------------------


def test_a_synchronous_creation(faked: Make, tmp_path: Path) -> None:
    answer, asked = in_turn(httpx.Response(200, content=b"mp4", headers={"x-video-id": "v1"}))
    client, _ = faked(answer)
    made = client.create_sync(png(), "waves", seed=3)
    assert (made.id, made.save(tmp_path / "a.mp4").read_bytes()) == ("v1", b"mp4")
    assert asked[0].url.path == "/v1/videos/sync"
    assert b'name="seed"\r\n\r\n3\r\n' in asked[0].content


def test_a_synchronous_creation_that_takes_longer_is_waited_for(faked: Make) -> None:
    answer, asked = in_turn(
        httpx.Response(202, json=video()), httpx.Response(200, json=video("completed")),
        httpx.Response(200, content=b"mp4"),
    )  # fmt: skip
    made = faked(answer)[0].create_sync(png(), "waves")
    assert (made.id, made.content) == ("v1", b"mp4")
    assert asked[-1].url.path == "/v1/videos/v1/content"


def test_a_video_that_fails_in_a_synchronous_creation_is_not_made_again(faked: Make) -> None:
    late = video("failed", error={"code": "deadline", "message": "it took too long"})
    answer, asked = in_turn(refused(504, "deadline", **{"x-video-id": "v1"}), httpx.Response(200, json=late))
    with pytest.raises(VideoFailed, match="it took too long") as caught:
        faked(answer)[0].create_sync(png(), "waves")
    assert caught.value.video.id == "v1"
    assert [request.url.path for request in asked] == ["/v1/videos/sync", "/v1/videos/v1"]


def test_a_remix_is_asked_for_in_json(faked: Make) -> None:
    answer, asked = in_turn(httpx.Response(202, json=video(remixed_from_video_id="v0")))
    client, _ = faked(answer)
    assert client.remix("v0", "storm", seed=3, guidance_interval=(0.1, 0.9), other=None).id == "v1"
    assert (asked[0].method, asked[0].url.path) == ("POST", "/v1/videos/v0/remix")
    assert json.loads(asked[0].content) == {"prompt": "storm", "seed": 3, "guidance_interval": [0.1, 0.9]}
    assert asked[0].headers["idempotency-key"]


def test_ids_are_quoted(faked: Make) -> None:
    answer, asked = in_turn(refused(404, "video_not_found"))
    client, _ = faked(answer)
    with pytest.raises(NotFound):
        client.picture("../models?a=b")
    client, _ = faked(in_turn(httpx.Response(200, content=b"png"))[0])
    assert client.picture("v1", "other") == b"png"
    assert asked[0].url.raw_path == b"/v1/videos/..%2Fmodels%3Fa%3Db/input"
    with pytest.raises(ValueError, match="empty"):
        client.retrieve("")


# --- downloads -------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 40


class Cut(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Bytes that break off after ``until``, or, where they do not, end."""

    def __init__(self, content: bytes, until: int | None) -> None:
        self.content, self.until = content, until

    def pieces(self) -> Iterator[bytes]:
        for start in range(0, len(self.content), 1000):
            if self.until is not None and start >= self.until:
                raise httpx.ReadError("cut")
            yield self.content[start : start + 1000]

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces()

    async def __aiter__(self) -> Any:
        for piece in self.pieces():
            yield piece


def file_server(cuts: list[int | None], tag: str | None = '"t"') -> tuple[Answer, list[str | None]]:
    """Serves `CONTENT`, its answers cut one after the other; and the ranges that it was asked for."""
    ranges: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked = request.headers.get("range")
        ranges.append(asked)
        start = int(asked[6:-1]) if asked else 0
        assert request.headers.get("if-range") == (tag if asked else None)
        if start >= len(CONTENT):
            return refused(416, "range_not_satisfiable")
        rest = CONTENT[start:]
        headers = {"content-length": str(len(rest))} | ({"etag": tag} if tag else {})
        if asked:
            headers["content-range"] = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        return httpx.Response(206 if asked else 200, headers=headers, stream=Cut(rest, cuts.pop(0)))

    return answer, ranges


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_download_goes_on_where_it_broke_off(faked: Make, tmp_path: Path) -> None:
    answer, ranges = file_server([3000, 2000, None])
    client, pauses = faked(answer)
    (tmp_path / "a.mp4").write_bytes(b"older")
    assert client.download("v1", tmp_path / "a.mp4").read_bytes() == CONTENT
    assert ranges == [None, "bytes=3000-", "bytes=5000-"]
    assert len(pauses) == 2
    assert names(tmp_path) == ["a.mp4"]


def test_a_download_that_fails_leaves_the_old_file_and_is_continued_by_the_next(faked: Make, tmp_path: Path) -> None:
    client, _ = faked(file_server([4000, 0])[0], max_retries=1)
    (tmp_path / "a.mp4").write_bytes(b"older")
    with pytest.raises(ConnectionFailed, match="cut"):
        client.download("v1", tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == b"older"
    answer, ranges = file_server([None, None])
    client, _ = faked(answer)
    client.download("v1", tmp_path / "a.mp4")
    assert (ranges, (tmp_path / "a.mp4").read_bytes()) == ([None, "bytes=4000-"], CONTENT)
    assert names(tmp_path) == ["a.mp4"]


def test_other_content_is_not_continued(faked: Make, tmp_path: Path) -> None:
    client, _ = faked(file_server([4000], tag='"other"')[0], max_retries=0)
    with pytest.raises(ConnectionFailed):
        client.download("v1", tmp_path / "a.mp4")
    answer, ranges = file_server([None])
    client, _ = faked(answer)
    assert client.download("v1", tmp_path / "a.mp4").read_bytes() == CONTENT
    assert ranges == [None]


def test_without_a_strong_tag_a_download_begins_anew(faked: Make, tmp_path: Path) -> None:
    for tag in (None, 'W/"t"'):
        answer, ranges = file_server([3000, None], tag)
        client, _ = faked(answer)
        assert client.download("v1", tmp_path / "a.mp4").read_bytes() == CONTENT
        assert ranges == [None, None]
        with pytest.raises(ConnectionFailed):
            faked(file_server([3000], tag)[0], max_retries=0)[0].download("v1", tmp_path / "a.mp4")
        assert names(tmp_path) == ["a.mp4"]


def test_a_part_that_is_too_long_is_thrown_away(faked: Make, tmp_path: Path) -> None:
    with pytest.raises(ConnectionFailed):
        faked(file_server([4000])[0], max_retries=0)[0].download("v1", tmp_path / "a.mp4")
    (part,) = tmp_path.iterdir()
    part.write_bytes(CONTENT + b"more")
    answer, ranges = file_server([None, None])
    assert faked(answer)[0].download("v1", tmp_path / "a.mp4").read_bytes() == CONTENT
    assert ranges == [None, f"bytes={len(CONTENT) + 4}-", None]


def test_a_download_of_another_size_is_an_error(faked: Make, tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-length": "9000"}, stream=Cut(b"short", None))

    with pytest.raises(UnexpectedAnswer, match="5 bytes, expected 9000"):
        faked(answer, max_retries=1)[0].download("v1", tmp_path / "a.mp4")
    assert names(tmp_path) == []


@pytest.mark.parametrize("begin", [2000, 5000])
def test_a_part_that_begins_elsewhere_leaves_no_hole(faked: Make, tmp_path: Path, begin: int) -> None:
    honest, _ = file_server([3000, None])

    def answer(request: httpx.Request) -> httpx.Response:
        response = honest(request)
        if response.status_code == 206:
            response.headers["content-range"] = f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}"
        return response

    with pytest.raises(UnexpectedAnswer, match=f"from byte {begin} on, expected 3000"):
        faked(answer)[0].download("v1", tmp_path / "a.mp4")
    assert "a.mp4" not in names(tmp_path)


def test_a_download_needs_its_directory(faked: Make, tmp_path: Path) -> None:
    client, _ = faked(in_turn()[0])
    with pytest.raises(FileNotFoundError, match="make it first"):
        client.download("v1", tmp_path / "none" / "a.mp4")


def test_variants_are_asked_for_by_name(faked: Make, tmp_path: Path) -> None:
    answer, asked = in_turn(*[httpx.Response(200, content=b"picture")] * 3)
    client, _ = faked(answer)
    assert client.content("v1", variant="thumbnail") == b"picture"
    client.download("v1", tmp_path / "a.webp", variant="spritesheet")
    client.content("v1")
    assert [str(request.url.query, "ascii") for request in asked] == ["variant=thumbnail", "variant=spritesheet", ""]


# --- events ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 200)), st.sampled_from(["\n", "\r\n"]))
def test_events_are_the_same_however_their_bytes_are_cut(cuts: list[int], end: str) -> None:
    lines = [
        "retry: 2000",
        "",
        ": still here",
        "",
        "id: 1",
        "event: progress",
        "data: {é",
        "data:  1}",
        "",
        "data: x",
        "",
    ]
    content = (end.join(lines) + end).encode()
    events, found = Events(), []
    edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    for start, stop in itertools.pairwise(edges):
        found += events.feed(content[start:stop])
    assert found == [("progress", "{é\n 1}"), ("message", "x")]


# --- the import ------------------------------------------------------------------------------------------------------


def test_the_client_is_light() -> None:
    """It can be copied into an application, or installed without what a model needs."""
    heavy = ("torch", "ray", "numpy", "fastapi", "sqlalchemy", "transformers", "diffusers", "av", "cv2")
    program = (
        "import sys, cinemo.client\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
        "print(sorted(name for name in sys.modules if name.startswith('cinemo.') and 'client' not in name))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
