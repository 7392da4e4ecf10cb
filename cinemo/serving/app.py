"""The Ray Serve application: HTTP replicas over the job store, and animators, which hold the model and work jobs off.

They share the database and the media, nothing else: HTTP answers while no animator lives, an animator works while no
HTTP does, and either is replaced by Serve when it dies. ``serve run`` calls `build` with the settings of its config
file, ``pipelines/serve.py`` calls `serve_forever` with its flags; from there on both are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from cinemo import storage, tracking
from cinemo.bundle import BundleCard, ModelBundle, load_bundle
from cinemo.data.precompute.cluster import connect, disconnect, ended_within
from cinemo.progress import doing
from cinemo.serving.engine.runner import JobRunner
from cinemo.serving.engine.warmup import warm_up
from cinemo.serving.ingress import ANSWER_SECONDS, HTTP_PATIENCE, Ingress, Served, listen_on_loopback
from cinemo.serving.proxy import proxy_environment
from cinemo.serving.scaling import QueueDemand
from cinemo.serving.settings import ServeSettings, open_store, parse_settings, served_card
from cinemo.serving.standby import Standby
from cinemo.serving.store.storage_health import StorageWatch
from cinemo.types import InputError, RunError

log = logging.getLogger("ray.serve")

_NAME = "cinemo"
_MAX_CPUS = 8.0
_HEALTH_SECONDS = 1.0  # after which Serve sees at the latest that a replica is dead
# What a replica gets beside the drain itself: open requests, the release of jobs, its own end.
_EXIT_SECONDS = 15.0
_SIGNAL_SECONDS = 1.0
_UPDATE_SECONDS = 1800.0  # for loading and warming a bundle beside the served one
_HTTP_EXIT_SECONDS = 5.0  # event streams are cut after this; clients come back by themselves


class Animator:
    """Loads the bundle, warms up, then works jobs off in threads of its own; its methods answer while it computes.

    Serve calls `reconfigure` with ``user_config`` before the replica counts as ready, and again at every change of it.
    """

    def __init__(self, settings: ServeSettings) -> None:
        listen_on_loopback()
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        torch.set_num_threads(max(1, round(cpus)))  # Ray leaves the OMP_NUM_THREADS=1 of our clusters alone
        self._settings = settings
        self._runner: JobRunner | None = None
        self._served: Served | None = None
        self._updates = threading.Lock()
        self._asked = 0

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve the bundle of ``user_config["bundle"]``.

        The first call returns when it is loaded and warm. A later one returns at once, for Serve sends a replica no
        requests before: the old bundle goes on while the new one is loaded beside it. Serve calls at a change of
        ``user_config`` only; where a bundle or adapters changed in their place, ``digest`` and ``adapters`` say so.
        """
        location = str(user_config["bundle"])
        self._asked += 1
        if self._runner is None:
            self._begin(location)
        else:
            threading.Thread(target=self._update, args=(location, self._asked), name="cinemo-update").start()

    def served(self) -> Served:
        """What this replica serves; raises where its runner died."""
        self.check_health()
        assert self._served is not None
        return self._served

    def check_health(self) -> None:
        if self._runner is None or not self._runner.alive():
            raise RuntimeError("the job runner died")

    def __del__(self) -> None:
        """Serve calls this once, before it ends the replica: no more claims, finish, give the rest back."""
        runner = getattr(self, "_runner", None)
        if runner is not None:
            runner.close(self._settings.drain_seconds)

    def _begin(self, location: str) -> None:
        refused = None
        try:
            card, bundle = served_card(location, self._settings), self._load(location)
        except Exception as error:
            if location == self._settings.bundle:
                raise
            # An update that was refused is still Serve's target: a replica that starts later must not fail of it.
            refused, location = f"{location}: {error}", self._settings.bundle
            log.error("bundle %s is refused; serving %s instead", refused, location)
            card, bundle = served_card(location, self._settings), self._load(location)
        worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        store = open_store(self._settings)
        self._runner = JobRunner(
            store, bundle, worker, max_batch=self._settings.max_batch, max_joined=self._settings.max_joined
        )
        self._served = Served(worker, ray.get_runtime_context().current_actor, location, card, refused)
        self._runner.start()

    def _update(self, location: str, asked: int) -> None:
        with self._updates:
            if asked != self._asked:
                return  # another update came meanwhile
            assert self._served is not None
            assert self._runner is not None
            before = self._served
            self._served = replace(before, loading=True, refused=None)
            try:
                card = served_card(location, self._settings)
                if card.weights == before.card.weights:
                    self._served = replace(before, location=location, card=card, refused=None)
                    return
                bundle = self._load(location)
            except Exception as error:  # whatever is wrong with the new one, the old one works
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                log.error("bundle %s is refused; still serving %s: %s", location, before.location, reason)
                self._served = replace(before, refused=reason)
                return
            self._runner.swap(bundle)
            self._served = replace(before, location=location, card=card, refused=None)
            log.warning("now serving bundle %s (%s)", location, card.digest[:12])

    def _load(self, location: str) -> ModelBundle:
        bundle = load_bundle(location, lora=self._settings.lora)
        warm_up(bundle, self._settings.max_batch)
        return bundle


def build(args: ServeSettings | dict[str, Any]) -> serve.Application:
    """The Serve application of some settings; what a config file's ``import_path`` names, called with its ``args``.

    Raises:
        InputError: bad settings, no whole bundle there, or state or database cannot be used.
    """
    settings = (args if isinstance(args, ServeSettings) else parse_settings(args)).absolute()
    if settings.bundle.startswith("models:/"):
        pinned = tracking.pinned(settings.bundle)  # the same for replicas that start later
        settings = settings.model_copy(update={"bundle": pinned})
    card = served_card(settings.bundle, settings)
    storage.check_writable(settings.state)
    open_store(settings)  # made here once, and refused here in one line
    cpus, gpus = _resources(settings)
    # What else than a bundle is new makes other replicas necessary. (A config file is compared by Serve itself.)
    rest = settings.model_dump_json(exclude={"bundle"})
    version = {"version": hashlib.sha256(rest.encode()).hexdigest()[:16], "_internal": True}
    animator = serve.deployment(
        Animator,
        name="animator",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        user_config={"bundle": settings.bundle, "digest": card.digest, "adapters": dict(card.adapters)},
        max_ongoing_requests=64,
        graceful_shutdown_timeout_s=settings.drain_seconds + _EXIT_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_SECONDS,
        **_replicas(settings),
    ).options(**version)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="http",
        num_replicas=settings.http_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.http_concurrency,
        graceful_shutdown_timeout_s=_HTTP_EXIT_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=_HEALTH_SECONDS,
        logging_config=LoggingConfig(enable_access_log=False),
    ).options(**version)
    return ingress.bind(animator.bind(settings), settings)


def _replicas(settings: ServeSettings) -> dict[str, Any]:
    if settings.min_replicas == settings.max_replicas:
        return {"num_replicas": settings.max_replicas}
    demand = {"database": settings.database_url, "slots": settings.max_batch}
    return {
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "upscale_delay_s": settings.upscale_seconds,
            "downscale_delay_s": settings.downscale_seconds,
            "policy": {"policy_function": QueueDemand, "policy_kwargs": demand},
        }
    }


def _resources(settings: ServeSettings) -> tuple[float, float]:
    """CPUs and GPUs of an animator, where the settings leave them open.

    One GPU where there is one, else what a node has, shared by the animators there may be (at most 8 CPUs for each).
    """
    have = ray.cluster_resources() if ray.is_initialized() else {}
    gpus = settings.gpus if settings.gpus is not None else float(have.get("GPU", 0) > 0)
    if settings.cpus is not None:
        return settings.cpus, gpus
    if gpus:
        return 1, gpus
    nodes = [node["Resources"].get("CPU", 1) for node in ray.nodes()] if have else [os.cpu_count() or 1]
    return min(_MAX_CPUS, max(1, max(nodes) // settings.max_replicas)), 0


def serve_forever(
    settings: ServeSettings, host: str, port: int, reload: Callable[[], ServeSettings] | None = None
) -> None:
    """Check the input, serve until SIGINT or SIGTERM, drain, and leave quietly.

    Args:
        reload: the settings as they are now; at SIGHUP their bundle replaces the served one. Without it the bundle is
            looked at again where it lies.

    Raises:
        InputError: as `build`, or the port is taken.
    """
    settings = settings.absolute()
    card = served_card(settings.bundle, settings)
    _check_port(host, port)
    storage.check_writable(settings.state)
    store = open_store(settings)
    store.database.patience = HTTP_PATIENCE
    log.setLevel(logging.ERROR)
    hangup = threading.Event()
    signal.signal(signal.SIGHUP, lambda *_: hangup.set())
    _handle_signals(_interrupt)
    try:
        with ExitStack() as leaving:
            standby: Standby | None = None
            if not os.environ.get("RAY_ADDRESS"):
                scratch = tempfile.TemporaryDirectory(prefix="cinemo-", ignore_cleanup_errors=True)
                directory = Path(leaving.enter_context(scratch))
                standby = leaving.enter_context(Standby(settings, directory / "standby.sock"))
                for name, value in proxy_environment(directory, settings.proxy_limits, standby.socket).items():
                    os.environ.setdefault(name, value)
            connect()
            leaving.callback(disconnect)
            if standby:
                leaving.callback(standby.detach)
            _handle_signals(_interrupt)  # again: Ray's own handler of SIGTERM ends the process at once
            with doing("starting the server"):
                serve.start(http_options={"host": host, "port": port})
            # The application alone: on a shared cluster others may use Serve too.
            leaving.callback(_delete, settings)
            if standby:
                leaving.callback(standby.drain)
            leaving.callback(_handle_signals, signal.SIG_IGN)
            _deploy(settings)
            if standby:
                standby.attach(serve.get_deployment_handle("animator", _NAME))
            print(f"{card.recipe.name} ({card.digest[:12]}) at http://{host}:{port}/v1/videos", flush=True)
            StorageWatch(store, lambda line: print(line, flush=True))
            while True:
                # Not without end: a signal that another thread gets is acted on when this one next runs.
                if not hangup.wait(_SIGNAL_SECONDS):
                    continue
                hangup.clear()
                settings = _take_bundle(settings, reload)
    except KeyboardInterrupt:
        print("stopped; unfinished jobs will continue at the next start", flush=True)


def _deploy(settings: ServeSettings) -> None:
    """Start the application, or change the running one; returns when it serves.

    Raises:
        InputError: as `build`.
        RunError: no animator came up.
    """
    application = build(settings)
    try:
        with doing("loading the model and warming it up"):
            serve.run(application, name=_NAME)
    except RuntimeError as error:
        causes = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RunError(f"bundle {settings.bundle}: no animator could start: {causes[-1]}") from None


def _take_bundle(settings: ServeSettings, reload: Callable[[], ServeSettings] | None) -> ServeSettings:
    """Have the bundle served that ``reload`` names; says what came of it, and returns what is served from now on."""
    try:
        asked = reload().absolute() if reload else settings
        wanted = settings.model_copy(update={"bundle": asked.bundle})
        card = served_card(wanted.bundle, wanted)
        _deploy(wanted)
        with doing("waiting for the new bundle to be loaded"):
            served = _wait_for_update(card)
    except (InputError, RunError) as error:
        print(f"update refused: {error}; still serving the old bundle", flush=True)
        return settings
    if served.card.weights == card.weights:
        print(f"{card.recipe.name} ({card.digest[:12]}) is now being served", flush=True)
        return wanted
    print(f"update refused: {served.refused}; still serving {served.card.digest[:12]}", flush=True)
    with contextlib.suppress(
        InputError, RunError
    ):  # or a replica that starts later would look for the refused one first
        _deploy(settings)
    return settings


def _wait_for_update(card: BundleCard) -> Served:
    """The first word of an animator on an update: it has the bundle, or refuses it.

    Raises:
        RunError: there is none for `_UPDATE_SECONDS`.
    """
    animator = serve.get_deployment_handle("animator", _NAME)
    deadline = time.monotonic() + _UPDATE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # one that is being replaced does not answer
            served: Served = animator.served.remote().result(timeout_s=ANSWER_SECONDS)
            if served.card.weights == card.weights or served.refused:
                return served
        time.sleep(0.2)
    raise RunError(f"no animator has loaded bundle {card.digest[:12]} within {_UPDATE_SECONDS:g} s")


def _delete(settings: ServeSettings) -> None:
    """Remove the application, and wait for its drain; not for a controller that does not answer."""

    def drain() -> None:
        with contextlib.suppress(RayError, RayServeException):  # the controller is dead: there is nobody to drain
            serve.delete(_NAME, _blocking=False)
            while _NAME in serve.status().applications:
                time.sleep(0.1)

    with doing("finishing what is being animated"):
        ended_within(settings.drain_seconds + 2 * _EXIT_SECONDS, drain)


def _handle_signals(handler: Any) -> None:
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, handler)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there ({error}); choose another port") from None
