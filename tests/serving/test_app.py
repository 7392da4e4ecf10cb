"""The real thing: Ray Serve over HTTP on a tiny bundle, killed in every part, stopped, updated, and started again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from ports import free_port
from serving.process import ROOT, Server, eventually, png
from tiny import FRAMES, SIZE, random_unet, tiny_adapter, tiny_bundle, tiny_recipe

from cinemo.bundle import read_card, save_bundle
from cinemo.media.mp4 import read_metadata
from cinemo.media.video import probe

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Jobs of a dead animator wait for their lease.
QUICK = ["--lease-seconds", "3", "--max-batch", "2", "--max-joined", "4", "--cpus", "1"]


def other_bundle(directory: Path, seed: int) -> Path:
    """A bundle of the same recipe with other weights, and so another digest."""
    recipe = tiny_recipe(directory / "encoders")
    unet = random_unet(recipe)
    torch.manual_seed(seed)
    with torch.no_grad():
        next(unet.parameters()).add_(torch.randn(()))
    save_bundle(directory / f"bundle-{seed}", recipe, {"unet": unet}, {"made": "by a test"})
    return directory / f"bundle-{seed}"


def serve(bundle: Path, state: Path, *flags: str) -> Server:
    port = free_port()
    words = ["pipelines/serve.py", "--bundle", bundle, "--state", state, "--port", str(port), *QUICK, *flags]
    return Server(words, port)


def metadata(server: Server, video_id: str, directory: Path) -> dict[str, Any]:
    """The settings that the video itself carries."""
    content = server.client.get(f"/v1/videos/{video_id}/content")
    assert content.status_code == 200, content.text
    path = directory / f"{video_id}.mp4"
    path.write_bytes(content.content)
    info = probe(path)
    assert (info.frames, info.height, info.width) == (FRAMES, *SIZE)
    return dict(json.loads(read_metadata(path)["comment"]))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``bundle`` and its encoders."""
    return tiny_bundle(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture(scope="module")
def server(bundles: Path) -> Iterator[Server]:
    """Two HTTP replicas and one animator; no test stops it, each leaves it working."""
    made = serve(bundles / "bundle", bundles / "state", "--http-replicas", "2")
    yield made
    made.stop()


def test_from_post_to_download(server: Server, bundles: Path, tmp_path: Path) -> None:
    video_id = server.submit(seed=5, motion_bucket=12)
    done = server.wait(video_id)
    assert (done["status"], done["progress"]) == ("completed", 100), done
    settings = metadata(server, video_id, tmp_path)
    assert (settings["seed"], settings["motion_bucket"]) == (5, 12)
    assert settings["bundle"] == read_card(bundles / "bundle").digest
    assert video_id in [video["id"] for video in server.client.get("/v1/videos").json()["data"]]


def test_a_killed_animator_loses_no_job(server: Server) -> None:
    running = server.submit(num_inference_steps=300)
    waiting = [server.submit(num_inference_steps=2) for _ in range(4)]
    server.begun(running)
    (animator,) = server.replicas("animator")
    animator.kill()
    eventually(lambda: server.client.get("/readyz").status_code == 503, 10)
    late = server.submit(num_inference_steps=2)  # accepted while no animator lives
    for video_id in [running, *waiting, late]:
        assert server.wait(video_id)["status"] == "completed"
    (second,) = server.replicas("animator")
    assert second.pid != animator.pid


def test_a_killed_http_replica_or_proxy_loses_no_job(server: Server) -> None:
    running = server.submit(num_inference_steps=300)
    before = server.begun(running)
    for name in ("ServeReplica:cinemo:http", "ProxyActor"):
        server.processes(name)[0].kill()
        eventually(lambda: server.video(running), 30)
    done = server.wait(running)
    assert (done["status"], done["created_at"]) == ("completed", before["created_at"])
    eventually(lambda: len(server.replicas("http")) == 2)


def test_a_bundle_is_updated_under_a_stream_of_requests(server: Server, bundles: Path, tmp_path: Path) -> None:
    """SIGHUP: a bundle replaced in its place is taken, a broken one refused; no request fails, each job has its own."""
    place, first = bundles / "bundle", read_card(bundles / "bundle").digest
    second = read_card(other_bundle(bundles, 2)).digest
    broken = shutil.copytree(other_bundle(bundles, 3), bundles / "broken")
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(bytes(weights.stat().st_size))  # of the right size, so that the card is whole
    stopping, failed, made = threading.Event(), [], []

    def stream() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not stopping.is_set():
                files = {"input_reference": ("a.png", png())}
                answers = [client.post("/v1/videos", data={"num_inference_steps": 2, "prompt": "x"}, files=files)]
                if answers[0].status_code == 202:
                    made.append(answers[0].json()["id"])
                    answers.append(client.get(f"/v1/videos/{made[-1]}"))
                answers += [client.get("/v1/models"), client.get("/readyz")]
                failed.extend(answer for answer in answers if answer.status_code >= 400)
                time.sleep(0.2)

    def replace(by: Path, line: str) -> None:
        shutil.rmtree(place)
        shutil.copytree(by, place)
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: line in server.output(), 120)

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        before = server.submit()
        server.wait(before)
        replace(bundles / "bundle-2", f"({second[:12]}) is now being served")
        between = server.submit()
        server.wait(between)
        replace(bundles / "broken", "update refused")
        after = server.submit()
        server.wait(after)
    finally:
        stopping.set()
        thread.join()
        shutil.rmtree(place)
        shutil.copytree(bundles / "bundle-2", place)
    assert not [(answer.request.url, answer.status_code, answer.text) for answer in failed]
    assert len(made) > 4  # about three a second, where nothing else runs
    assert all(server.wait(video_id)["status"] == "completed" for video_id in made)
    digests = [metadata(server, video_id, tmp_path)["bundle"] for video_id in (before, between, after)]
    assert digests == [first, second, second]
    assert len(server.replicas("animator")) == 1


@pytest.mark.release
def test_new_adapters_are_taken_without_a_restart(bundles: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    server = serve(bundles / "bundle", tmp_path / "state", "--lora", str(tmp_path / "lora"))

    def adapters() -> list[str]:
        found: list[str] = server.client.get("/v1/models").json()["data"][0]["adapters"]
        return found

    try:
        assert adapters() == []
        tiny_adapter(bundles / "encoders", tmp_path / "lora" / "snow")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "is now being served" in server.output(), 120)
        eventually(lambda: adapters() == ["snow"], 10)
        video_id = server.submit(lora="snow:0.5")
        assert server.wait(video_id)["status"] == "completed"
        assert metadata(server, video_id, tmp_path)["lora"] == "snow:0.5"
    finally:
        server.stop()


@pytest.mark.release
def test_the_queue_decides_how_many_animators_there_are_and_a_drain_finishes_what_it_can(
    bundles: Path, tmp_path: Path
) -> None:
    """SIGTERM: what fits into the drain is finished, the rest goes on at the next start, as all does after SIGKILL."""
    state = tmp_path / "state"
    flags = ["--max-replicas", "2", "--upscale-seconds", "1", "--downscale-seconds", "2", "--drain-seconds", "4"]
    first = serve(bundles / "bundle", state, *flags)
    try:
        jobs = [first.submit(num_inference_steps=300) for _ in range(5)]
        eventually(lambda: len(first.replicas("animator")) == 2, 180)
        assert all(first.wait(video_id, 240)["status"] == "completed" for video_id in jobs)
        eventually(lambda: len(first.replicas("animator")) == 1, 180)
        short, long = first.submit(num_inference_steps=40), first.submit(num_inference_steps=999)
        first.begun(long)
        begun = time.monotonic()
        assert "stopped; unfinished jobs will continue at the next start" in first.stop()
        assert time.monotonic() - begun < 40
    finally:
        first.kill()
    second = serve(bundles / "bundle", state)
    try:
        assert second.video(short)["status"] == "completed"
        assert second.begun(long)["status"] == "in_progress"
        waiting = second.submit(num_inference_steps=2)
    finally:
        second.kill()
    third = serve(bundles / "bundle", state)
    try:
        assert third.wait(long, 180)["status"] == "completed"
        assert third.wait(waiting)["status"] == "completed"
    finally:
        third.stop(signal.SIGINT)


@pytest.mark.release
def test_a_controller_that_hangs_does_not_keep_the_server(bundles: Path, tmp_path: Path) -> None:
    """SIGTERM while Serve's controller answers nothing: no drain can be asked for, and the process still ends."""
    server = serve(bundles / "bundle", tmp_path / "state", "--drain-seconds", "0")
    try:
        (controller,) = server.processes("ServeController")
        controller.suspend()
        assert "stopped; unfinished jobs will continue at the next start" in server.stop()
        assert not any(process.is_running() for process in server.family.values())
    finally:
        server.kill()


@pytest.mark.release
def test_serve_run_does_the_same(bundles: Path, tmp_path: Path) -> None:
    """`serve run` with a config file; a new bundle in the file and `serve deploy` replaces it without a restart."""
    port, config = free_port(), tmp_path / "serve.yaml"
    content = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
    content["http_options"] = {"host": "127.0.0.1", "port": port}
    application = content["applications"][0]
    application["args"] = {"bundle": str(bundles / "bundle"), "state": str(tmp_path / "state"), "cpus": 1}
    config.write_text(yaml.safe_dump(content))
    command = ["-c", "from ray.serve.scripts import cli; cli()"]
    server = Server([*command, "run", config], port, {"RAY_ADDRESS": "local"})
    try:
        before = server.submit()
        server.wait(before)
        digest = read_card(other_bundle(bundles, 4)).digest
        application["deployments"] = [{"name": "animator", "user_config": {"bundle": str(bundles / "bundle-4")}}]
        config.write_text(yaml.safe_dump(content))
        (animator,) = server.replicas("animator")
        dashboard = re.search(r"http://[\d.]+:\d+", server.output())
        assert dashboard, server.output()
        subprocess.run(
            [sys.executable, *command, "deploy", config, "-a", dashboard[0]],
            check=True, timeout=300, env=os.environ | {"RAY_AUTH_MODE": "token"},
        )  # fmt: skip

        def updated() -> bool:
            video_id = server.submit(num_inference_steps=2)
            assert server.wait(video_id)["status"] == "completed"
            return bool(metadata(server, video_id, tmp_path)["bundle"] == digest)

        eventually(updated, 180, every=1)
        assert server.replicas("animator") == [animator]
        assert server.video(before)["status"] == "completed"
    finally:
        server.stop(signal.SIGINT)
