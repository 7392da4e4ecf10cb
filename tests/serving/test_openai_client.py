"""The official client of OpenAI drives the server, unchanged: what an application that knows it would do."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from small_server import MODEL, SECONDS, SIZE, Worker, make_keys, open_store, png, running, small_api

from cinemo.media.mp4 import read_metadata
from cinemo.serving.http.api import ApiSettings
from cinemo.serving.store.jobs import JobStore

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return open_store(tmp_path, max_queued=5)


@pytest.fixture
def client(store: JobStore) -> Iterator[openai.OpenAI]:
    keys, (token, _) = make_keys(store, "one", "two")
    with (
        running(small_api(store, ApiSettings(body_bytes=2**20), keys=keys)) as url,
        openai.OpenAI(api_key=token, base_url=f"{url}/v1", max_retries=0) as made,
    ):
        yield made


def picture(content: bytes | None = None) -> tuple[str, io.BytesIO, str]:
    return "a.png", io.BytesIO(png() if content is None else content), "image/png"


def test_create_poll_download_list_delete(client: openai.OpenAI, store: JobStore, tmp_path: Path) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "cinemo"
    with Worker(store):
        video = client.videos.create_and_poll(
            prompt="waves",
            input_reference=picture(),
            model=MODEL,
            size=SIZE,  # type: ignore[arg-type]
            seconds=SECONDS,  # type: ignore[arg-type]
            extra_body={"seed": 7, "motion_strength": 0.5, "num_inference_steps": 20, "dct_init": False},
            poll_interval_ms=20,
        )
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.model, video.size, video.seconds, video.prompt) == (MODEL, SIZE, SECONDS, "waves")
    told = video.model_extra or {}
    assert (told["seed"], told["motion_bucket"], told["num_inference_steps"], told["dct_init"]) == (7, 10, 20, False)
    client.videos.download_content(video.id).write_to_file(tmp_path / "a.mp4")
    assert read_metadata(tmp_path / "a.mp4")["comment"] == "waves"
    with client.videos.with_streaming_response.download_content(video.id, variant="video") as answer:
        assert b"".join(answer.iter_bytes()) == (tmp_path / "a.mp4").read_bytes()
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.retrieve(video.id)
    assert caught.value.code == "video_not_found"
    assert caught.value.request_id is not None


def test_lists_are_followed_over_pages(client: openai.OpenAI) -> None:
    made = [client.videos.create(prompt=f"{k}", input_reference=picture()).id for k in range(5)]
    assert [video.id for video in client.videos.list(limit=2)] == made[::-1]
    assert [video.id for video in client.videos.list(limit=2, order="asc")] == made
    page = client.videos.list(limit=2, after=made[3])
    assert ([video.id for video in page.data], page.has_more) == (made[2:0:-1], True)


def test_a_picture_as_openais_reference_object(client: openai.OpenAI) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    body = {"input_reference": {"image_url": url}}  # as an argument this client takes files alone, against its types
    assert client.videos.create(prompt="waves", extra_body=body).status == "queued"
    body["input_reference"]["image_url"] = "https://pictures.example/a.png"
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="waves", extra_body=body)
    assert (caught.value.code, caught.value.param) == ("url_not_supported", "input_reference")


def test_cancelling_through_delete_and_polling_ends(client: openai.OpenAI) -> None:
    video = client.videos.create(prompt="waves", input_reference=picture())
    answer = client.videos.delete(video.id)
    assert answer.deleted is False
    assert client.videos.poll(video.id).status == "cancelled"


def test_faults_arrive_as_the_clients_own_exceptions(client: openai.OpenAI, store: JobStore) -> None:
    with pytest.raises(openai.BadRequestError, match="48x32"):
        client.videos.create(prompt="waves", input_reference=picture(), size="1280x720")
    with pytest.raises(openai.BadRequestError, match=r"expected a number from 0\.25 to 128"):
        client.videos.create(prompt="waves", input_reference=picture(), seconds="400")  # type: ignore[arg-type]
    with pytest.raises(openai.UnprocessableEntityError, match="input_reference"):
        client.videos.create(prompt="waves")
    with pytest.raises(openai.APIStatusError) as caught:
        client.videos.create(prompt="waves", input_reference=picture(b"GIF89a"))
    assert caught.value.status_code == 415
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="cin_0").videos.list()
    video = client.videos.create(prompt="waves", input_reference=picture())
    with pytest.raises(openai.ConflictError):
        client.videos.download_content(video.id)
    for _ in range(4):
        client.videos.create(prompt="waves", input_reference=picture())
    with pytest.raises(openai.RateLimitError) as limited:
        client.videos.create(prompt="waves", input_reference=picture())
    assert int(limited.value.response.headers["retry-after"]) >= 1


def test_a_body_far_above_the_limit_is_an_answer_and_not_a_broken_connection(client: openai.OpenAI) -> None:
    for _ in range(5):
        with pytest.raises(openai.APIStatusError) as caught:
            client.videos.create(prompt="waves", input_reference=picture(b"\0" * 30_000_000))
        assert caught.value.status_code == 413


def test_an_idempotency_key_by_header(client: openai.OpenAI) -> None:
    made = [
        client.videos.create(prompt="waves", input_reference=picture(), extra_headers={"Idempotency-Key": "a"}).id
        for _ in range(2)
    ]
    assert made[0] == made[1]
