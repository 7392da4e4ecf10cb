"""The interface behind Serve and its proxy: headers as they arrive, the model's own tokenizer, webhooks over a kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ports import free_port
from serving.process import Server, eventually, png
from serving.test_webhooks import SECRET, Receiver
from tiny import tiny_bundle

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver(free_port())
    yield made
    made.close()


def serve(bundle: Path, state: Path) -> Server:
    port = free_port()
    flags = ["--webhook-secret", SECRET, "--webhook-addresses", "any", "--cors-origins", "https://a.example"]
    words = ["pipelines/serve.py", "--bundle", bundle, "--state", state, "--port", str(port), "--cpus", "1", *flags]
    return Server(words, port)


def sync(server: Server, **fields: str) -> httpx.Response:
    files = {"input_reference": ("a.png", png())}
    data = {"prompt": "x" * 80, "num_inference_steps": "3"} | fields
    return server.client.post("/v1/videos/sync", data=data, files=files)


@pytest.mark.release
def test_what_clients_get_and_what_survives_a_kill(bundle: Path, tmp_path: Path, receiver: Receiver) -> None:
    server = serve(bundle, tmp_path)
    try:
        answer = sync(server, webhook_url=receiver.url)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4"), answer.text
        video = server.video(answer.headers["x-video-id"])
        assert video["prompt_tokens"] == {"used": 80, "limit": 75, "cut": True}
        for path in ("/healthz", "/v2", f"/v1/videos/{video['id']}/content?variant=thumbnail"):
            for given in ({}, {"X-Request-Id": "mine"}):
                names = server.client.get(path, headers=given).headers.get_list("x-request-id")
                assert len(names) == 1, (path, names)
                assert not given or names == ["mine"]
        refused = server.client.put("/v1/videos")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, POST, OPTIONS")
        asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert server.client.options("/v1/videos", headers=asks).status_code == 200
    finally:
        server.kill()
    assert receiver.received == []
    receiver.start()
    server = serve(bundle, tmp_path)
    try:
        eventually(lambda: receiver.received, seconds=90)
        assert json.loads(receiver.received[0][1])["data"] == {"id": video["id"]}
        os.kill(server.process.pid, signal.SIGTERM)
    finally:
        server.kill()
