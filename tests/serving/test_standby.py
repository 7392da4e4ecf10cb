"""What the started process answers by itself, before its replicas are there and while it drains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving.process import eventually, png
from tiny import tiny_bundle

from cinemo.serving.settings import ServeSettings, open_store
from cinemo.serving.standby import Standby
from cinemo.serving.store.media import video_name


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServeSettings:
    directory = tmp_path_factory.mktemp("tiny")
    return ServeSettings(bundle=str(tiny_bundle(directory)), state=str(directory / "state"))  # type: ignore[call-arg]


@pytest.fixture
def standby(settings: ServeSettings, tmp_path: Path) -> Iterator[Standby]:
    with Standby(settings, tmp_path / "s.sock") as made:
        eventually((tmp_path / "s.sock").exists)
        yield made


@pytest.fixture
def client(standby: Standby) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(standby.socket))
    with httpx.Client(transport=transport, base_url="http://server", timeout=30) as made:
        yield made


def submit(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/videos", data={"prompt": "waves"}, files={"input_reference": ("a.png", png())})


def test_while_it_drains_everything_is_answered_and_new_jobs_alone_are_refused(
    settings: ServeSettings, standby: Standby, client: httpx.Client
) -> None:
    ids = [eventually(lambda: submit(client)).json()["id"] for _ in range(2)]
    store = open_store(settings)
    [job] = store.claim("worker", 1)
    standby.drain()
    refused = submit(client)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert int(refused.headers["Retry-After"]) >= 1
    assert {client.get(f"/v1/videos/{video_id}").status_code for video_id in ids} == {200}
    assert len(client.get("/v1/videos").json()["data"]) == 2
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200
    name = video_name(job.id, job.attempts)
    store.media.write(name, b"0123")
    assert store.complete(job, name)
    assert client.get(f"/v1/videos/{job.id}/content").content == b"0123"
    assert "event: completed" in client.get(f"/v1/videos/{job.id}/events").text
    [other] = set(ids) - {job.id}
    assert client.post(f"/v1/videos/{other}/cancel").json()["status"] == "cancelled"
    assert client.delete(f"/v1/videos/{job.id}").json()["deleted"] is True
    assert client.get(f"/v1/videos/{job.id}").json()["error"]["code"] == "video_not_found"
