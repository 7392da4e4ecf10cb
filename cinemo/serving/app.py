"""The Ray Serve application: an HTTP ingress over the job store, and the model in a replica of its own.

Both share the state directory (one machine); jobs survive a restart of either. ``serve_forever`` is what
``pipelines/serve.py`` calls.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from fastapi import FastAPI
from ray import serve

from cinemo import storage
from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle, read_card
from cinemo.data.precompute import connect
from cinemo.serving.api import Limits, build_api
from cinemo.serving.jobs import JobStore
from cinemo.serving.runner import JobRunner
from cinemo.types import InputError

_READY_TIMEOUT = 3.0


class Animator:
    """Loads the bundle once, warms up, and works jobs off in a thread; its methods answer while it computes."""

    def __init__(self, bundle: str, state: str, max_queued: int) -> None:
        loaded = load_bundle(bundle, "cuda" if torch.cuda.is_available() else "cpu")
        height, width = loaded.recipe.data.size
        animate(loaded, AnimateRequest(np.full((height, width, 3), 128, np.uint8), "warm-up", steps=1))
        self._runner = JobRunner(JobStore(state, max_queued), loaded)
        self._runner.start()

    def ready(self) -> bool:
        return self._runner.alive()

    def check_health(self) -> None:
        if not self._runner.alive():
            raise RuntimeError("the job runner died")

    def __del__(self) -> None:
        if hasattr(self, "_runner"):
            self._runner.close()


class Ingress:
    """The HTTP interface; knows the model's card only."""

    def __init__(self, animator: Any, bundle: str, state: str, max_queued: int, limits: Limits) -> None:
        self._animator, self._bundle, self._limits = animator, bundle, limits
        self._store = JobStore(state, max_queued)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._store, read_card(self._bundle), self._ready, self._limits)

    async def _ready(self) -> bool:
        try:
            return bool(await asyncio.wait_for(self._animator.ready.remote(), _READY_TIMEOUT))
        except (TimeoutError, ray.exceptions.RayError):
            return False


def application(bundle: str, state: str, max_queued: int, gpus: float = 0, limits: Limits | None = None) -> Any:
    """The Serve application of a bundle; ``state`` is the absolute path of the job store."""
    animator = serve.deployment(
        Animator,
        name="animator",
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        max_ongoing_requests=8,
        graceful_shutdown_timeout_s=10,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress), name="http", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=256
    )
    return ingress.bind(animator.bind(bundle, state, max_queued), bundle, state, max_queued, limits or Limits())


def serve_forever(bundle: str, host: str, port: int, state: str, max_queued: int) -> None:
    """Check the input, serve until SIGINT or SIGTERM, then leave quietly.

    Raises:
        InputError: no whole bundle there, the state directory cannot be written, or the port is taken.
    """
    card = read_card(bundle)
    storage.check_writable(state)
    _check_port(host, port)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, _interrupt)
    try:
        connect()
        serve.start(http_options={"host": host, "port": port})
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        serve.run(application(storage.absolute(bundle), str(Path(state).absolute()), max_queued, gpus), name="cinemo")
        print(f"{card.recipe.name} ({card.digest[:12]}) at http://{host}:{port}/v1/videos", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("stopping; unfinished jobs go on at the next start", flush=True)
    finally:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        serve.shutdown()
        ray.shutdown()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there ({error}); choose another port") from None
