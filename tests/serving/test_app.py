"""The real thing: Ray Serve over HTTP on a tiny bundle, as a process that is started, asked, stopped, started again."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tiny import FRAMES, SIZE, tiny_bundle

from cinemo.bundle import read_card
from cinemo.media.mp4 import read_metadata
from cinemo.media.video import probe

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Server:
    """`pipelines/serve.py` as a process of its own, with its state beside the bundle."""

    def __init__(self, bundle: Path) -> None:
        self.port = free_port()
        self.state = bundle.parent / "state"
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [
                sys.executable, "pipelines/serve.py", "--bundle", str(bundle), "--port", str(self.port),
                "--state", str(self.state), "--max-queued", "8",
            ],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        deadline = time.monotonic() + 240
        while True:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "not ready after 240 s"
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)

    def post(self, **fields: Any) -> httpx.Response:
        files = {"input_reference": ("a.png", png())}
        return self.client.post("/v1/videos", data={"prompt": "waves"} | fields, files=files)

    def wait(self, video_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while True:
            video: dict[str, Any] = self.client.get(f"/v1/videos/{video_id}").json()
            if video["status"] not in ("queued", "in_progress"):
                return video
            assert time.monotonic() < deadline, video
            time.sleep(0.1)

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=90)
        assert self.process.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    made = Server(bundle)
    yield made
    if made.process.poll() is None:
        made.stop()


def test_from_post_to_download(server: Server, bundle: Path, tmp_path: Path) -> None:
    answer = server.post(seed=5, motion_bucket=12)
    assert answer.status_code == 202, answer.text
    done = server.wait(answer.json()["id"])
    assert (done["status"], done["progress"]) == ("completed", 100), done
    content = server.client.get(f"/v1/videos/{done['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    (tmp_path / "a.mp4").write_bytes(content.content)
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.height, info.width) == (FRAMES, *SIZE)
    settings = json.loads(read_metadata(tmp_path / "a.mp4")["comment"])
    assert (settings["seed"], settings["motion_bucket"]) == (5, 12)
    assert settings["bundle"] == read_card(bundle).digest
    assert done["id"] in [video["id"] for video in server.client.get("/v1/videos").json()["data"]]


def test_bad_input_has_the_error_body(server: Server) -> None:
    for fields, status in [({"size": "1x1"}, 400), ({"motion_bucket": 99}, 422), ({"prompt": ""}, 422)]:
        answer = server.post(**fields)
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"code", "message", "param"}
    too_large = server.client.post("/v1/videos", files={"input_reference": ("a.png", png() + bytes(21 * 2**20))})
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "body_too_large")
    assert server.client.get("/v1/videos/video_none").json()["error"]["code"] == "video_not_found"


def test_a_taken_port_is_one_line(server: Server, bundle: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "pipelines/serve.py", "--bundle", str(bundle), "--port", str(server.port),
            "--state", str(server.state),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"--port {server.port}" in done.stderr


def test_jobs_outlive_the_server(server: Server, bundle: Path) -> None:
    running = server.post(num_inference_steps=999).json()["id"]
    waiting = server.post(num_inference_steps=2).json()["id"]
    while server.client.get(f"/v1/videos/{running}").json()["progress"] < 1:
        time.sleep(0.05)
    assert "http://127.0.0.1" in server.stop()
    second = Server(bundle)
    try:
        assert second.wait(running)["status"] == "completed"
        assert second.wait(waiting)["status"] == "completed"
    finally:
        second.stop()
