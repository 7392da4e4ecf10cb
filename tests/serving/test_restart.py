"""The official client of OpenAI follows jobs while every part of the server is killed, and while it is restarted."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from ports import free_port
from serving.process import Server, eventually, png
from sqlalchemy import select
from tiny import tiny_bundle

from cinemo.media.mp4 import read_metadata
from cinemo.serving.store.database import Database
from cinemo.serving.store.tables import jobs

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API")]

LEASE = 300  # nothing here waits for it


@contextmanager
def customer(url: str, directory: Path) -> Iterator[list[Path]]:
    """Animates one picture after the other and downloads the videos; whatever the client raises fails the test."""
    videos: list[Path] = []
    faults: list[Exception] = []
    leaving = threading.Event()

    def work() -> None:
        # It asks again by itself after lost connections and after 408, 409, 429 and 5xx, and after no other answer.
        with openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=40) as client:
            while not leaving.is_set() and not faults:
                picture = ("a.png", io.BytesIO(png()), "image/png")
                steps = {"num_inference_steps": 60}
                try:
                    video = client.videos.create_and_poll(prompt="waves", input_reference=picture, extra_body=steps)
                    assert video.status == "completed", video
                    videos.append(directory / f"{video.id}.mp4")
                    client.videos.download_content(video.id).write_to_file(videos[-1])
                except Exception as error:
                    faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield videos
    finally:
        leaving.set()
        thread.join(120)
    assert not faults, faults
    assert not thread.is_alive()


@pytest.mark.release
def test_a_client_gets_its_videos_through_kills_and_a_restart(tmp_path: Path) -> None:
    port, state = free_port(), tmp_path / "state"
    words = ["pipelines/serve.py", "--bundle", tiny_bundle(tmp_path), "--state", state, "--port", str(port)]
    words += ["--cpus", "1", "--drain-seconds", "4", "--lease-seconds", str(LEASE)]
    server = Server(words, port)
    try:
        with customer(server.url, tmp_path) as videos:
            eventually(lambda: videos)
            running = server.submit(num_inference_steps=999)
            server.begun(running)

            server.replicas("http")[0].kill()
            assert eventually(lambda: server.video(running), 20)["id"] == running  # 1 s where nothing else runs

            server.replicas("animator")[0].kill()
            database = Database(f"sqlite:///{state}/serving.sqlite")
            lease = select(jobs.c.lease_until, jobs.c.attempts).where(jobs.c.id == running)

            def noticed() -> bool:
                [row] = database.read(lease)
                return bool(row.attempts > 1 or row.lease_until <= time.time())

            eventually(noticed, 60)  # a second where nothing else runs; the lease is longer
            for name in ("HAProxyManager", "ProxyActor"):
                server.processes(name)[0].kill()
            so_far = len(videos)
            eventually(lambda: len(videos) > so_far, 120)

            answers: list[httpx.Response] = []
            stopping = threading.Thread(target=server.stop)
            running = server.submit(num_inference_steps=999)
            stopping.start()
            eventually(lambda: server.post().status_code == 503, 10)
            refused = server.post()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["Retry-After"]) >= 1
            while stopping.is_alive():
                try:
                    answers.append(httpx.get(f"{server.url}/v1/videos/{running}"))
                except httpx.TransportError:  # it is gone
                    break
            stopping.join()
            database.close()
            assert len(answers) > 10
            assert {answer.status_code for answer in answers} == {200}

            server = Server(words, port)
            so_far = len(videos)
            eventually(lambda: len(videos) > so_far, 120)
            assert server.wait(running, 120)["status"] == "completed"
        assert all(read_metadata(video) for video in videos)
    finally:
        server.kill()
