"""The Ray Serve application: an HTTP ingress over the job store, and the model in a replica of its own.

Both share the state directory (one machine); jobs survive a restart of either. ``serve_forever`` is what
``pipelines/serve.py`` calls.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import ray
from fastapi import FastAPI
from ray import serve

from cinemo import storage
from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle, read_card
from cinemo.data.cluster import connect
from cinemo.serving.api import ApiSettings, build_api
from cinemo.serving.database import Database
from cinemo.serving.jobs import JobStore, QueueLimits
from cinemo.serving.media import MediaStore
from cinemo.serving.runner import JobRunner
from cinemo.types import InputError

_NAME = "cinemo"
_READY_TIMEOUT = 3.0
_MAX_CPUS = 8.0


class Animator:
    """Loads the bundle once, warms up, and works jobs off in a thread; its methods answer while it computes."""

    def __init__(self, bundle: str, state: str, max_queued: int) -> None:
        loaded = load_bundle(bundle)
        height, width = loaded.recipe.data.size
        animate(loaded, AnimateRequest(np.full((height, width, 3), 128, np.uint8), "warm-up", steps=1))
        self._runner = JobRunner(open_store(state, max_queued), loaded)
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

    def __init__(self, animator: Any, bundle: str, state: str, max_queued: int, limits: ApiSettings) -> None:
        self._animator, self._bundle, self._limits = animator, bundle, limits
        self._store = open_store(state, max_queued)

    def __serve_build_asgi_app__(self) -> FastAPI:
        card = read_card(self._bundle)
        return build_api(self._store, lambda: card, self._ready, self._limits)

    async def _ready(self) -> bool:
        try:
            return bool(await asyncio.wait_for(self._animator.ready.remote(), _READY_TIMEOUT))
        except (TimeoutError, ray.exceptions.RayError):
            return False


def open_store(state: str, max_queued: int) -> JobStore:
    """The job store of a state directory, by its absolute path."""
    database = Database(f"sqlite:///{state}/jobs.sqlite")
    return JobStore(database, MediaStore(f"{state}/media"), QueueLimits(max_queued=max_queued))


def application(
    bundle: str, state: str, max_queued: int, cpus: float = 1, gpus: float = 0, limits: ApiSettings | None = None
) -> Any:
    """The Serve application of a bundle.

    Args:
        state: absolute path of the job store.
        cpus, gpus: of the model's replica; Ray gives it as many threads as CPUs.
    """
    animator = serve.deployment(
        Animator,
        name="animator",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=8,
        graceful_shutdown_timeout_s=10,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress), name="http", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=256
    )
    return ingress.bind(animator.bind(bundle, state, max_queued), bundle, state, max_queued, limits or ApiSettings())


def serve_forever(bundle: str, host: str, port: int, state: str, max_queued: int) -> None:
    """Check the input, serve until SIGINT or SIGTERM, then leave quietly.

    Raises:
        InputError: no whole bundle there, the state directory cannot be written, or the port is taken.
    """
    card = read_card(bundle)
    _check_port(host, port)
    storage.check_writable(state)
    open_store(str(Path(state).absolute()), max_queued)  # a wrong place is told at once
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, _interrupt)
    try:
        with ExitStack() as leaving:
            connect()
            leaving.callback(ray.shutdown)
            serve.start(http_options={"host": host, "port": port})
            # The application alone: on a shared cluster others may use Serve too.
            leaving.callback(serve.delete, _NAME)
            leaving.callback(_ignore_interrupts)
            cpus, gpus = _resources()
            app = application(storage.absolute(bundle), str(Path(state).absolute()), max_queued, cpus, gpus)
            serve.run(app, name=_NAME)
            print(f"{card.recipe.name} ({card.digest[:12]}) at http://{host}:{port}/v1/videos", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        print("stopped; unfinished jobs go on at the next start", flush=True)


def _resources() -> tuple[float, float]:
    """CPUs and GPUs of the model's replica: one GPU where there is one, else what one node has (at most 8 CPUs)."""
    if ray.cluster_resources().get("GPU", 0):
        return 1, 1
    return min(_MAX_CPUS, max(node["Resources"].get("CPU", 1) for node in ray.nodes())), 0


def _ignore_interrupts() -> None:
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there ({error}); choose another port") from None
