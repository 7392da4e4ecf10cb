"""A whole server in this process: the HTTP interface on a real port, a real store, and an idle worker."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from PIL import Image

from cinemo.bundle import BundleCard
from cinemo.config import DataConfig, EncodersConfig
from cinemo.media.motion import MotionScale
from cinemo.media.mp4 import write_video
from cinemo.methods.cinemo import CinemoRecipe, CinemoSample
from cinemo.serving.http.api import ApiSettings, build_api
from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import Job, JobStore, QueueLimits
from cinemo.serving.store.keys import KeyStore
from cinemo.serving.store.media import MediaStore, video_name

SIZE, SECONDS, MODEL = "48x32", "0.75", "random-32x48"


def png(width: int = 60, height: int = 40, form: str = "PNG", seed: int = 0) -> bytes:
    written = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(written, form)
    return written.getvalue()


def card() -> BundleCard:
    recipe = CinemoRecipe(
        name=MODEL,
        data=DataConfig(size=(32, 48), frames=6),
        encoders=EncodersConfig(vae="vae", text_encoder="text_encoder", tokenizer="tokenizer"),
        sample=CinemoSample(steps=4, guidance_scale=2.0, motion_bucket=7, fps=8),
    )
    return BundleCard(recipe, MotionScale(tuple(k / 20 for k in range(1, 20))), "d" * 64, {})


def open_store(directory: Path, **limits: Any) -> JobStore:
    """A store in ``directory``, whose name must never be seen in an answer."""
    database = Database(f"sqlite:///{directory}/state.sqlite")
    return JobStore(database, MediaStore(str(directory / "media")), QueueLimits(**limits))


async def always_ready() -> bool:
    return True


def small_api(store: JobStore, settings: ApiSettings | None = None, **parts: Any) -> FastAPI:
    return build_api(store, card, always_ready, settings or ApiSettings(), **parts)


def make_keys(store: JobStore, *names: str, **quota: int) -> tuple[KeyStore, list[str]]:
    keys = KeyStore(store.database)
    return keys, [keys.create(name, **quota)[1] for name in names]


class Worker:
    """Works jobs off in a thread: a beat a step, then a video of noise."""

    def __init__(self, store: JobStore, step_seconds: float = 0.01) -> None:
        self.store, self.step_seconds, self._stop = store, step_seconds, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            for job in self.store.claim("worker", 1):
                self._work(job)

    def _work(self, job: Job) -> None:
        steps = job.request["num_inference_steps"]
        for step in range(1, steps + 1):
            if self._stop.is_set() or self.store.beat("worker", {job.id: (step, steps)}):
                return
            time.sleep(self.step_seconds)
        finish(self.store, job)


def finish(store: JobStore, job: Job) -> None:
    """Give a claimed job a video of noise and complete it."""
    name = video_name(job.id, job.attempts)
    frames = np.random.default_rng(job.number).integers(0, 256, (6, 32, 48, 3), dtype=np.uint8)
    with store.media.writing(name) as path:
        write_video(path, frames, 8, {"comment": job.request["prompt"]})
    assert store.complete(job, name)


def complete_one(store: JobStore) -> Job:
    """Claim the next job and complete it at once."""
    (job,) = store.claim("worker", 1)
    finish(store, job)
    done = store.get(job.id)
    assert done is not None
    return done


@contextmanager
def running(api: FastAPI) -> Iterator[str]:
    """Serve on a free port of loopback; yields the base URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(api, log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
