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
from ports import free_port
from serving.disk import fill, small_disk
from serving.process import ROOT, Server, eventually
from serving.slow_clients import slow_clients, slowest_answer
from tiny import tiny_bundle

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """On a small disk, where one can be mounted."""
    place = tmp_path_factory.mktemp("hostile") / "state"
    with small_disk(place):
        yield place


@pytest.fixture(scope="module")
def server(state: Path) -> Iterator[Server]:
    port = free_port()
    flags = ["--state", state, "--port", port, "--cpus", 1, "--host", "127.0.0.1"]
    flags += ["--request-seconds", 2, "--http-concurrency", 32, "--max-connections", 1000]
    started = Server(["pipelines/serve.py", "--bundle", tiny_bundle(state.parent / "tiny"), *flags], port)
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


def test_a_full_disk_is_told_once_and_ends_with_the_room(server: Server, state: Path) -> None:
    if not state.is_mount():
        pytest.skip("no small disk can be mounted here")
    video_id = server.submit(num_inference_steps="1")
    server.wait(video_id)
    filler = fill(state)
    eventually(lambda: server.client.get("/readyz").status_code == 503, 20)
    for _ in range(5):
        answer = server.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "insufficient_storage")
    assert server.client.delete(f"/v1/videos/{video_id}").json()["deleted"]
    assert not (state / "media" / video_id).exists()
    assert all(any(folder.iterdir()) for folder in (state / "media").iterdir()), "a refused job left its folder"
    eventually(lambda: "no new jobs are taken" in server.output(), 20)
    filler.unlink()
    eventually(lambda: server.client.get("/readyz").status_code == 200, 20)
    server.wait(server.submit(num_inference_steps="1"))
    eventually(lambda: "can be used again" in server.output(), 20)
    assert server.output().count("no new jobs are taken") == 1


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


@pytest.mark.release
def test_a_ray_that_starts_too_late_is_started_again() -> None:
    """On a busy machine half a minute, which is what Ray waits for a node of its own, is little. Nothing is left of the
    first one."""
    program = """
import time
import psutil
import ray
from ray._private import services
from cinemo.data.precompute.cluster import connect
known, seen = services.get_node, []

def late(address, node):
    if address not in seen:
        seen.append(address)
    if address == seen[0]:
        time.sleep(1)
        raise RuntimeError("this node is not there yet")
    return known(address, node)

services.get_node = late
connect(2)
names = [process.name() for process in psutil.Process().children(recursive=True)]
print(ray.get(ray.remote(lambda: 7).remote()), len(seen), names.count("gcs_server"), names.count("raylet"), flush=True)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == ["7", "2", "1", "1"], done.stdout + done.stderr
