"""The wire shape that open servers of OpenAI's video API share, as three clients speak it: OpenAI's own, which their
documents name, ours, and plain HTTP as the curl lines of those documents send it. Against the application, and against
a whole server."""

from __future__ import annotations

import base64
import io
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import httpx2
import openai
import pytest
from both_clients import opened
from ports import free_port
from serving.process import Server
from small_server import Worker, make_keys, open_store, png, running, small_api
from tiny import tiny_bundle

from cinemo import client as ours
from cinemo.serving.http.api import ApiSettings

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")

PICTURE = png()
DATA_URL = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
STATUSES = ["queued", "in_progress", "completed"]
_COUNT = itertools.count()


def new_prompt() -> str:
    """One that no other video has: a server may answer an equal request with the video that it made for the first."""
    return f"waves {next(_COUNT)}"


@dataclass
class Refused(Exception):
    """A fault, as a client tells it."""

    status: int
    code: str
    message: str
    param: str | None
    request_id: str | None


class Wire(Protocol):
    """What every client can do. Videos, pages and deletions are the JSON that came."""

    def create(self, picture: bytes | None, **fields: Any) -> dict[str, Any]: ...
    def create_sync(self, picture: bytes, **fields: Any) -> bytes: ...
    def remix(self, video_id: str, prompt: str) -> dict[str, Any]: ...
    def retrieve(self, video_id: str) -> dict[str, Any]: ...
    def ids(self, limit: int, order: str) -> list[str]: ...
    def content(self, video_id: str, variant: str = "video") -> bytes: ...
    def delete(self, video_id: str) -> dict[str, Any]: ...
    def models(self) -> list[str]: ...


class Official:
    """OpenAI's client; what it has no method for, or no type, is given as its documents say."""

    def __init__(self, url: str, key: str) -> None:
        self.client = openai.OpenAI(api_key=key, base_url=f"{url}/v1", max_retries=0)
        self.close = self.client.close

    def create(self, picture: bytes | None, **fields: Any) -> dict[str, Any]:
        own = {name: fields.pop(name) for name in ("prompt", "model", "size", "seconds") if name in fields}
        file = {} if picture is None else {"input_reference": ("a.png", io.BytesIO(picture), "image/png")}
        with self.told():
            return self.client.videos.create(**own, **file, extra_body=fields).model_dump()

    def create_in_json(self, **fields: Any) -> dict[str, Any]:
        with self.told():
            return self.client.post("/videos", body=fields, cast_to=openai.types.Video).model_dump()

    def create_sync(self, picture: bytes, **fields: Any) -> bytes:
        with self.told():
            options = {"headers": {"Content-Type": "multipart/form-data"}}
            files = [("input_reference", ("a.png", picture, "image/png"))]
            path = "/videos/sync"
            return self.client.post(path, body=fields, files=files, options=options, cast_to=httpx2.Response).content  # type: ignore[arg-type]

    def remix(self, video_id: str, prompt: str) -> dict[str, Any]:
        with self.told():
            return self.client.videos.remix(video_id, prompt=prompt).model_dump()

    def retrieve(self, video_id: str) -> dict[str, Any]:
        with self.told():
            return self.client.videos.retrieve(video_id).model_dump()

    def ids(self, limit: int, order: str) -> list[str]:
        with self.told():
            return [video.id for video in self.client.videos.list(limit=limit, order=order)]  # type: ignore[arg-type]

    def content(self, video_id: str, variant: str = "video") -> bytes:
        with self.told():
            return self.client.videos.download_content(video_id, variant=variant).read()  # type: ignore[arg-type]

    def delete(self, video_id: str) -> dict[str, Any]:
        with self.told():
            return self.client.videos.delete(video_id).model_dump()

    def models(self) -> list[str]:
        return [self.client.models.retrieve(model.id).id for model in self.client.models.list()]

    @contextmanager
    def told(self) -> Iterator[None]:
        try:
            yield
        except openai.APIStatusError as error:
            raise Refused(
                error.status_code,
                str(error.code),
                error.body["message"],
                error.param,
                error.request_id,  # type: ignore[index]
            ) from error


class Ours:
    """`cinemo.client`, of one kind."""

    def __init__(self, url: str, key: str, kind: str) -> None:
        self.opened = opened(kind, f"{url}/v1", api_key=key, max_retries=0)
        self.client = self.opened.__enter__()

    def close(self) -> None:
        self.opened.__exit__(None, None, None)

    def create(self, picture: bytes | None, **fields: Any) -> dict[str, Any]:
        url = fields.pop("input_reference[image_url]", None)
        with self.told():
            return self.client.create(url if picture is None else picture, fields.pop("prompt"), **fields).model_dump()

    def create_sync(self, picture: bytes, **fields: Any) -> bytes:
        with self.told():
            return self.client.create_sync(picture, fields.pop("prompt"), **fields).content

    def remix(self, video_id: str, prompt: str) -> dict[str, Any]:
        with self.told():
            return self.client.remix(video_id, prompt).model_dump()

    def retrieve(self, video_id: str) -> dict[str, Any]:
        with self.told():
            return self.client.retrieve(video_id).model_dump()

    def ids(self, limit: int, order: str) -> list[str]:
        with self.told():
            return [video.id for video in self.client.videos(page_size=limit, order=order)]  # type: ignore[arg-type]

    def content(self, video_id: str, variant: str = "video") -> bytes:
        with self.told():
            return self.client.content(video_id, variant=variant)  # type: ignore[arg-type]

    def delete(self, video_id: str) -> dict[str, Any]:
        with self.told():
            return self.client.delete(video_id).model_dump()

    def models(self) -> list[str]:
        return [self.client.model(model.id).id for model in self.client.models()]

    @contextmanager
    def told(self) -> Iterator[None]:
        try:
            yield
        except ours.APIError as error:
            raise Refused(error.status, error.code, error.message, error.param, error.request_id) from error


class Plain:
    """Requests as curl sends them: ``-F`` for forms, ``-d`` for JSON."""

    def __init__(self, url: str, key: str) -> None:
        self.client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        self.close = self.client.close

    def ask(self, method: str, path: str, expected: int = 200, **parts: Any) -> httpx.Response:
        answer = self.client.request(method, path, **parts)
        if answer.is_error:
            assert answer.headers["content-type"] == "application/json"
            assert answer.json().keys() == {"error"}
            error = answer.json()["error"]
            assert error.keys() == {"code", "message", "param", "type"}
            raise Refused(
                answer.status_code, error["code"], error["message"], error["param"], answer.headers["x-request-id"]
            )
        assert answer.status_code == expected
        return answer

    def create(self, picture: bytes | None, **fields: Any) -> dict[str, Any]:
        form = [(name, (None, str(value))) for name, value in fields.items()]
        file = [] if picture is None else [("input_reference", ("input.png", picture))]
        answer = self.ask("POST", "/v1/videos", 202, files=[*form, *file])
        assert answer.headers["location"] == f"/v1/videos/{answer.json()['id']}"
        return dict(answer.json())

    def create_in_json(self, **fields: Any) -> dict[str, Any]:
        return dict(self.ask("POST", "/v1/videos", 202, json=fields).json())

    def create_sync(self, picture: bytes, **fields: Any) -> bytes:
        answer = self.ask("POST", "/v1/videos/sync", data=fields, files={"input_reference": ("input.png", picture)})
        assert answer.headers["content-type"] == "video/mp4"
        assert self.retrieve(answer.headers["x-video-id"])["status"] == "completed"
        return answer.content

    def remix(self, video_id: str, prompt: str) -> dict[str, Any]:
        return dict(self.ask("POST", f"/v1/videos/{video_id}/remix", 202, json={"prompt": prompt}).json())

    def retrieve(self, video_id: str) -> dict[str, Any]:
        return dict(self.ask("GET", f"/v1/videos/{video_id}").json())

    def ids(self, limit: int, order: str) -> list[str]:
        found: list[str] = []
        while True:
            query = {"limit": limit, "order": order} | ({"after": found[-1]} if found else {})
            page = self.ask("GET", "/v1/videos", params=query).json()
            assert page["object"] == "list"
            assert len(page["data"]) <= limit
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            found += [video["id"] for video in page["data"]]
            if not page["has_more"]:
                return found

    def content(self, video_id: str, variant: str = "video") -> bytes:
        answer = self.ask("GET", f"/v1/videos/{video_id}/content", params={"variant": variant})
        assert int(answer.headers["content-length"]) == len(answer.content)
        return answer.content

    def delete(self, video_id: str) -> dict[str, Any]:
        return dict(self.ask("DELETE", f"/v1/videos/{video_id}").json())

    def models(self) -> list[str]:
        page = self.ask("GET", "/v1/models").json()
        assert page["object"] == "list"
        return [self.ask("GET", f"/v1/models/{model['id']}").json()["id"] for model in page["data"]]


@pytest.fixture(
    scope="module", params=["application", pytest.param("server", marks=[pytest.mark.slow, pytest.mark.ray])]
)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a server that makes videos, and a key for it."""
    directory = tmp_path_factory.mktemp("served")
    if request.param == "application":
        store = open_store(directory)
        keys, (key,) = make_keys(store, "one")
        with Worker(store, 0.002), running(small_api(store, ApiSettings(body_bytes=2**20), keys=keys)) as url:
            yield url, key
        return
    port, bundle = free_port(), tiny_bundle(directory)
    words = ["pipelines/serve.py", "--bundle", bundle, "--state", directory / "state", "--port", str(port)]
    server = Server([*words, "--max-batch", "4", "--cpus", "1"], port)
    yield server.url, "none"
    server.stop()


CLIENTS: dict[str, Callable[[str, str], Any]] = {
    "official": Official,
    "ours": lambda url, key: Ours(url, key, "sync"),
    "ours-async": lambda url, key: Ours(url, key, "async"),
    "plain": Plain,
}


@pytest.fixture(params=CLIENTS)
def wire(request: pytest.FixtureRequest, place: tuple[str, str]) -> Iterator[Wire]:
    made = CLIENTS[request.param](*place)
    yield made
    made.close()


def finished(wire: Wire, video: dict[str, Any], seconds: float = 90) -> dict[str, Any]:
    """The video polled to its end; no status ever goes back."""
    deadline, seen = time.monotonic() + seconds, [video]
    while seen[-1]["status"] not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < deadline, seen[-1]
        time.sleep(0.05)
        seen.append(wire.retrieve(video["id"]))
    order = [(STATUSES.index(each["status"]), each["progress"]) for each in seen]
    assert order == sorted(order)
    return seen[-1]


def is_mp4(content: bytes) -> bool:
    return content[4:8] == b"ftyp"


def test_create_poll_download_delete(wire: Wire) -> None:
    (model,), prompt = wire.models(), new_prompt()
    video = wire.create(PICTURE, prompt=prompt, model=model, size="48x32", seconds="0.75", seed=7, dct_init=False)
    assert (video["object"], video["status"], video["progress"]) in [("video", each, 0) for each in STATUSES[:2]]
    assert (video["model"], video["prompt"], video["size"], video["seconds"]) == (model, prompt, "48x32", "0.75")
    assert (video["seed"], video["dct_init"]) == (7, False)
    assert abs(video["created_at"] - time.time()) < 60
    assert (video["completed_at"], video["error"]) == (None, None)
    done = finished(wire, video)
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert done["expires_at"] > done["completed_at"] >= done["created_at"] == video["created_at"]
    assert is_mp4(wire.content(done["id"]))
    deleted = wire.delete(done["id"])
    assert deleted == {"id": done["id"], "object": "video.deleted", "deleted": True}
    with pytest.raises(Refused) as caught:
        wire.retrieve(done["id"])
    assert (caught.value.status, caught.value.code) == (404, "video_not_found")


@pytest.mark.parametrize("reference", [{"image_url": DATA_URL}, DATA_URL], ids=["object", "text"])
def test_creation_in_json(place: tuple[str, str], reference: Any) -> None:
    """As SGLang's document has it, and the official client where it sends no file."""
    for made in (Plain(*place), Official(*place)):
        video = made.create_in_json(
            prompt=new_prompt(), input_reference=reference, seconds="0.75", seed=7, dct_init=False
        )
        assert (video["status"], video["seed"], video["dct_init"]) == ("queued", 7, False)
        assert is_mp4(made.content(finished(made, video)["id"]))
        made.close()


def test_a_picture_as_openais_reference_object_in_a_form(wire: Wire) -> None:
    video = wire.create(None, prompt=new_prompt(), **{"input_reference[image_url]": DATA_URL})
    assert finished(wire, video)["status"] == "completed"


def test_synchronous_creation(wire: Wire) -> None:
    assert is_mp4(wire.create_sync(PICTURE, prompt=new_prompt(), num_inference_steps=2))


def test_a_remix_keeps_the_picture(wire: Wire) -> None:
    source = finished(wire, wire.create(PICTURE, prompt=new_prompt(), seed=3, num_inference_steps=2))
    remix = wire.remix(source["id"], "storm")
    assert (remix["remixed_from_video_id"], remix["prompt"], remix["seed"]) == (source["id"], "storm", 3)
    assert finished(wire, remix)["status"] == "completed"


def test_pictures_for_a_video(wire: Wire) -> None:
    video = finished(wire, wire.create(PICTURE, prompt=new_prompt(), num_inference_steps=2))
    assert wire.content(video["id"], "thumbnail")[8:12] == b"WEBP"
    assert wire.content(video["id"], "spritesheet").startswith(b"\xff\xd8\xff")


def test_lists_over_pages(wire: Wire) -> None:
    made = [wire.create(PICTURE, prompt=f"{k}", num_inference_steps=1)["id"] for k in range(5)]
    assert wire.ids(2, "desc")[:5] == made[::-1]
    assert wire.ids(3, "asc")[-5:] == made


def test_an_unfinished_video_has_no_content_and_deletion_cancels_it(wire: Wire) -> None:
    video = wire.create(PICTURE, prompt=new_prompt(), num_inference_steps=900)
    with pytest.raises(Refused) as caught:
        wire.content(video["id"])
    assert (caught.value.status, caught.value.code) == (409, "video_not_ready")
    assert wire.delete(video["id"])["deleted"] is False
    assert wire.retrieve(video["id"])["status"] == "cancelled"
    assert wire.delete(video["id"])["deleted"] is True


@pytest.mark.parametrize(
    ("picture", "fields", "status", "code", "param", "words"),
    [
        (PICTURE, {"size": "1280x720"}, 400, "unsupported_size", "size", "48x32"),
        (PICTURE, {"seconds": "400"}, 400, "unsupported_seconds", "seconds", "0.25 to 128"),
        (PICTURE, {"model": "sora-2"}, 404, "model_not_found", "model", "sora-2"),
        (PICTURE, {"seed": "x"}, 422, "invalid_value", "seed", "seed"),
        (PICTURE, {"wobble": "1"}, 422, "unknown_field", "wobble", "wobble"),
        (PICTURE, {"prompt": "a" * 100_000}, 422, "invalid_value", "prompt", "prompt"),
        (b"GIF89a", {}, 415, "unsupported_image", "input_reference", "a GIF"),
        (None, {"input_reference[image_url]": "http://a.example"}, 400, "url_not_supported", "input_reference", "URLs"),
    ],
)  # fmt: skip
def test_faults_have_one_shape(
    wire: Wire, picture: bytes | None, fields: dict[str, Any], status: int, code: str, param: str, words: str
) -> None:
    with pytest.raises(Refused) as caught:
        wire.create(picture, **{"prompt": "waves"} | fields)
    fault = caught.value
    assert (fault.status, fault.code, fault.param) == (status, code, param)
    assert words in fault.message
    assert fault.request_id


def test_faults_of_other_operations_have_it_too(wire: Wire) -> None:
    asked: list[Callable[[], Any]] = [
        lambda: wire.retrieve("video_0"), lambda: wire.content("video_0"), lambda: wire.delete("video_0"),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(Refused) as caught:
            ask()
        assert (caught.value.status, caught.value.code, caught.value.param) == (404, "video_not_found", "video_id")


def test_a_body_far_above_the_limit_is_an_answer_and_not_a_broken_connection(wire: Wire) -> None:
    with pytest.raises(Refused) as caught:
        wire.create(b"\0" * 30_000_000, prompt="waves")
    assert (caught.value.status, caught.value.code) == (413, "body_too_large")


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_wrong_key_and_a_full_queue(tmp_path: Path, kind: str) -> None:
    store = open_store(tmp_path, max_queued=1)
    keys, (key,) = make_keys(store, "one")
    with running(small_api(store, keys=keys)) as url:
        store.submit({"prompt": "first", "model": "m", "size": "48x32", "seconds": "1"}, PICTURE)
        for token, status, code in [("cin_0", 401, "invalid_api_key"), (key, 429, "queue_full")]:
            made = CLIENTS[kind](url, token)
            with pytest.raises(Refused) as caught:
                made.create(PICTURE, prompt="waves")
            assert (caught.value.status, caught.value.code) == (status, code)
            made.close()
