"""The HTTP interface of a server, in a replica of Ray Serve or in any process beside (`standby`)."""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from fastapi import FastAPI
from ray.exceptions import ActorDiedError

from cinemo.bundle import BundleCard, load_tokenizer
from cinemo.networks.tokenizer import Tokenizer
from cinemo.serving.http.api import ApiSettings, build_api
from cinemo.serving.http.webhooks import Receivers, WebhookSender
from cinemo.serving.settings import ServeSettings, open_keys, open_store, served_card
from cinemo.serving.store.storage_health import StorageWatch
from cinemo.serving.store.webhooks import WebhookQueue

log = logging.getLogger("ray.serve")

ANSWER_SECONDS = 3.0
HTTP_PATIENCE = 5.0  # for which a request waits for a database that is away
# HTTP asks the animators so often which bundle they serve; where none has answered for `_SILENCE`, after which Serve
# takes them for dead, it is not ready. A shorter one would take a busy machine's replicas out of service.
_ASK_SECONDS, _SILENCE = 1.0, 30.0
_WATCH_SECONDS = 0.5  # between two looks whether the animators' processes live


@dataclass(frozen=True)
class Served:
    """What an animator says of itself.

    Args:
        worker, actor: its name in the job store, and the actor that it is.
        refused: why the last update of the bundle was not taken; None where it was, or is still being loaded.
    """

    worker: str
    actor: Any
    location: str
    card: BundleCard
    refused: str | None = None
    loading: bool = False


class Ingress:
    """The HTTP interface. It decodes pictures, and knows of the model what the animators say of it.

    Until an animator first answers (they load for long) it is the card of the bundle in the settings. Of those that
    have answered it sees the death at once, and gives their jobs to others.

    Args:
        animator: handle of the deployment; None: this is no replica, and is given it later, with `attach`.
        say: told in a line when the storage fails, and when it works again.
    """

    def __init__(self, animator: Any, settings: ServeSettings, say: Callable[[str], object] = log.error) -> None:
        self._animator, self._settings = animator, settings
        self._store = open_store(settings)
        self._store.database.patience = HTTP_PATIENCE
        self._storage = StorageWatch(self._store, say)
        self._card = served_card(settings.bundle, settings)
        self._tokenizer: Tokenizer | None = None
        self._sender: WebhookSender | None = None
        self._heard: float | None = None
        self._living: dict[str, Any] = {}
        self._draining = False
        self._threads: list[threading.Thread] = []
        self._asked, self._detached = threading.Event(), threading.Event()
        self._is_replica = animator is not None
        if self._is_replica:
            listen_on_loopback()
            self.attach(animator)
            self._asked.wait(ANSWER_SECONDS)  # one that joins others is ready when it is first asked, as they are

    def attach(self, animator: Any) -> None:
        """Ask this deployment from now on."""
        self._animator = animator
        for name, work in (("cinemo-card", self._ask), ("cinemo-watch", self._watch)):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()

    def detach(self) -> None:
        """Ask no more: whoever asks a Ray that has ended starts another."""
        self._detached.set()
        for thread in self._threads:
            thread.join(ANSWER_SECONDS + 2)

    def drain(self) -> None:
        """Be ready for no jobs any more."""
        self._draining = True

    def __serve_build_asgi_app__(self) -> FastAPI:
        keys = open_keys(self._settings) if self._settings.require_keys else None
        limits = ApiSettings(
            body_bytes=self._settings.max_body_bytes,
            body_seconds=self._settings.request_seconds,
            body_rate=self._settings.min_upload_rate,
            pixels=self._settings.max_pixels,
            fetch_urls=self._settings.allow_urls,
            sync_seconds=self._settings.sync_seconds,
            cors_origins=self._settings.origins,
            requests_named=self._is_replica,  # by Serve, as the client or HAProxy did
            metrics=self._settings.metrics,
            reuse=self._settings.reuse,
        )
        receivers = None
        if (secret := self._settings.webhook_secret) is not None:
            receivers = Receivers(anywhere=self._settings.webhook_addresses == "any")
            if self._is_replica:
                self._sender = WebhookSender(WebhookQueue(self._store.database), secret, receivers)
                self._sender.start()
        return build_api(
            self._store, self._current_card, self._ready, limits, keys, receivers=receivers, tokens=self._count_tokens
        )

    def _count_tokens(self, prompt: str) -> tuple[int, int] | None:
        return None if self._tokenizer is None else self._tokenizer.count(prompt)

    def _read_tokenizer(self, location: str, card: BundleCard) -> None:
        """Prompts are counted where the tokenizer can be read here; else nothing is said of them."""
        try:
            self._tokenizer = load_tokenizer(location, card.recipe)
        except Exception as error:
            log.warning("prompts are not counted: %s", error)
            self._tokenizer = None

    def _current_card(self) -> BundleCard:
        return self._card

    async def _ready(self) -> bool:
        is_heard = self._heard is not None and time.monotonic() - self._heard < _SILENCE
        return is_heard and not self._draining and self._storage.fault is None

    def _ask(self) -> None:
        location, read = self._settings.bundle, ""
        while not self._detached.is_set():
            answer = self._animator.served.remote()
            try:
                served: Served = answer.result(timeout_s=ANSWER_SECONDS)
                location, self._card = served.location, served.card
                self._living[served.worker] = served.actor
                self._heard = time.monotonic()
            except Exception:  # none lives, or it is just dying: asked again for ever
                answer.cancel()
            self._asked.set()
            if read != self._card.digest:
                self._read_tokenizer(location, self._card)
                read = self._card.digest
            self._detached.wait(_ASK_SECONDS)

    def _watch(self) -> None:
        while not self._detached.wait(_WATCH_SECONDS):
            for worker, actor in list(self._living.items()):
                try:
                    ray.get(actor.__ray_ready__.remote(), timeout=_WATCH_SECONDS)
                except ActorDiedError:
                    self._bury(worker)
                except Exception:  # busy, or out of reach: then its leases tell
                    continue

    def _bury(self, worker: str) -> None:
        try:
            count = self._store.expire(worker)
        except Exception as error:
            log.warning("%s is dead, but its jobs were not given back (%s); trying again", worker, error)
            return
        del self._living[worker]
        if not self._living:
            self._heard = None
        if count:
            log.warning("%s is dead; its %d jobs go to others", worker, count)


def listen_on_loopback() -> None:
    """Before this replica serves: where Ray uses the loopback address, so does Serve's own server between replicas,
    which takes what it is sent for pickles, and for which Serve names every interface."""
    from ray.serve._private import replica

    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        return
    bind = getattr(replica, "add_port_to_grpc_server", None)
    if bind is None:  # no part of Ray's interface: a later version may have it elsewhere
        log.error("Ray %s: the server between replicas listens on every interface; close its ports", ray.__version__)
        return
    replica.add_port_to_grpc_server = lambda server, address: bind(server, address.replace("[::]", "127.0.0.1"))
