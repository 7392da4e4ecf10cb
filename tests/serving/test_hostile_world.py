"""A whole server under slow clients and on a full disk, and who can reach its processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from listening import exposed
from serving.disk import fill
from serving.process import ROOT, Server, eventually, free_port
from serving.slow_clients import slow_clients, slowest_answer
from tiny import tiny_bundle

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch, port = tmp_path_factory.mktemp("hostile"), free_port()
    flags = ["--state", scratch / "state", "--port", port, "--cpus", 1, "--host", "127.0.0.1"]
    flags += ["--request-seconds", 2, "--http-concurrency", 32, "--max-connections", 1000]
    started = Server(["pipelines/serve.py", "--bundle", tiny_bundle(scratch / "tiny"), *flags], port)
    yield started
    started.kill()


def test_a_server_for_one_machine_is_reached_from_no_other(server: Server) -> None:
    server.wait(server.submit(num_inference_steps="1"))
    assert exposed(psutil.Process(server.process.pid)) == set()


@pytest.mark.parametrize("kind", ["headers", "body", "late-body"])
def test_status_polls_are_answered_among_slow_clients(server: Server, kind: str) -> None:
    video_id = server.submit(num_inference_steps="1")
    with slow_clients(server.port, kind, 300):  # type: ignore[arg-type]
        time.sleep(3)
        slowest, answers, failures = slowest_answer(f"{server.url}/v1/videos/{video_id}", 3)
        assert failures == 0
        assert answers > 5
        assert slowest < 1
        if kind != "late-body":
            assert server.post(num_inference_steps="1").status_code == 202
    eventually(lambda: server.post(num_inference_steps="1").status_code == 202, 20)


def test_a_full_disk_is_told_once_and_ends_with_the_room(small_disk: Path) -> None:
    flags = ["--state", small_disk, "--port", free_port(), "--cpus", 1]
    bundle = tiny_bundle(small_disk.parent / "tiny")
    with_little = Server(["pipelines/serve.py", "--bundle", bundle, *flags], int(flags[3]))
    try:
        video_id = with_little.submit(num_inference_steps="1")
        with_little.wait(video_id)
        filler = fill(small_disk)
        eventually(lambda: with_little.client.get("/readyz").status_code == 503, 20)
        for _ in range(5):
            answer = with_little.post()
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage")
        assert with_little.client.delete(f"/v1/videos/{video_id}").json()["deleted"]
        assert list((small_disk / "media").iterdir()) == []
        eventually(lambda: "no new jobs are taken" in with_little.output(), 20)
        filler.unlink()
        eventually(lambda: with_little.client.get("/readyz").status_code == 200, 20)
        with_little.wait(with_little.submit(num_inference_steps="1"))
        eventually(lambda: "can be used again" in with_little.output(), 20)
        assert with_little.output().count("no new jobs are taken") == 1
    finally:
        with_little.kill()


def test_a_ray_that_is_started_here_is_reached_from_no_other_machine() -> None:
    """What precompute, train and evaluate start."""
    program = """
import ray
from cinemo.data.precompute.cluster import connect
connect(2)
actor = ray.remote(lambda: ray.data.range(100).map(lambda row: row).count())
print(ray.get(actor.remote()), flush=True)
input()
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "100"
        assert exposed(psutil.Process(process.pid)) == set()
    finally:
        process.communicate("\n", timeout=60)
