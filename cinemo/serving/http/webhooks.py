"""Webhooks: OpenAI's events, signed as Standard Webhooks says, delivered at least once to addresses that may be asked.

Deliveries are rows of the database (`cinemo.serving.store.webhooks`); any number of processes may send them.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
import time
from collections.abc import Callable, Collection, Sequence
from urllib.parse import urlsplit

import anyio
import httpcore
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from cinemo.serving.http.fetch import CheckedNetwork, Forbidden, Resolve, check_url, is_public, resolve
from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.schema import WebhookEvent
from cinemo.serving.http.signatures import read_secret, secret_of, signature
from cinemo.serving.http.uploads import PARAM
from cinemo.serving.store.webhooks import Delivery, WebhookQueue

log = logging.getLogger("ray.serve")

FIELD = "webhook_url"
_PUBLIC_PORTS = (80, 443)
_RETRY_SECONDS = (5.0, 30.0, 120.0, 600.0, 3600.0, 7200.0, 18000.0, 36000.0)  # 16 hours in all
_LOOK_UP_SECONDS = 5.0


def describe_webhooks(api: FastAPI) -> None:
    """The events in the OpenAPI document; they are no routes."""

    @api.webhooks.post("video.completed")
    def completed(event: WebhookEvent) -> None:
        """A video is there. Headers: ``webhook-id``, ``webhook-timestamp``, ``webhook-signature`` (v1)."""

    @api.webhooks.post("video.failed")
    def failed(event: WebhookEvent) -> None:
        """A job failed; the video says why."""


class Receivers:
    """Which addresses events may go to.

    Args:
        anywhere: also to private addresses and any port: for a network in which every client is trusted.
        resolve, allowed: how a name becomes addresses, and which of them are let through.
        tls: for a private certificate authority.
    """

    def __init__(
        self,
        anywhere: bool = False,
        resolve: Resolve = resolve,
        allowed: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._ports: Collection[int] | None = None if anywhere else _PUBLIC_PORTS
        self._resolve, self._allowed = resolve, (lambda _: True) if anywhere else allowed
        self._network, self._tls = CheckedNetwork(resolve, self._allowed), tls or ssl.create_default_context()

    async def check(self, url: str) -> None:
        """Raises `Refused` (422): not such a URL, or it leads nowhere or to an address that is not to be asked."""
        try:
            check_url(url, self._ports)
            parts = urlsplit(url)
            try:
                with anyio.fail_after(_LOOK_UP_SECONDS):
                    addresses = await self._resolve(str(parts.hostname), parts.port or 443)
            except (OSError, TimeoutError, UnicodeError):
                addresses = []
            if not addresses:
                raise Refused(422, "invalid_url", f"{PARAM}: the URL's host has no address", PARAM)
            if not all(map(self._allowed, addresses)):
                message = f"{PARAM}: the URL leads to an address that this server does not send to"
                raise Refused(422, "url_not_allowed", message, PARAM)
        except Refused as fault:
            raise fault.about(PARAM, FIELD) from None

    async def post(self, url: str, headers: Sequence[tuple[str, str]], body: bytes, seconds: float) -> int:
        """The status of the answer; its body is not read, redirects are not followed.

        Raises:
            OSError, httpcore errors, TimeoutError: no answer. Forbidden: the address is not to be asked any more.
        """
        with anyio.fail_after(seconds):
            async with (
                httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=self._network) as pool,
                pool.stream("POST", url, headers=headers, content=body) as answer,
            ):
                return answer.status


class WebhookSender:
    """Sends what is due, in a thread of its own.

    Args:
        secret: ``whsec_...``, see `secret_of`.
        retry_seconds: pauses after the first and every later failure; then the event is given up, with a line in the
            log.
        answer_seconds: for which one attempt waits; less than the queue's lease.
        at_once: deliveries under way at a time.
        poll_seconds: between two looks at the database.
    """

    def __init__(
        self,
        queue: WebhookQueue,
        secret: str,
        receivers: Receivers,
        retry_seconds: Sequence[float] = _RETRY_SECONDS,
        answer_seconds: float = 15.0,
        at_once: int = 32,
        poll_seconds: float = 1.0,
    ) -> None:
        read_secret(secret)
        self._queue, self._secret, self._receivers = queue, secret, receivers
        self._retry_seconds, self._answer_seconds = retry_seconds, answer_seconds
        self._at_once, self._poll_seconds = at_once, poll_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="cinemo-webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop; what is under way is delivered again by another sender."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)

    async def _run(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        while not self._stopped.is_set():
            try:
                for delivery in await run_in_threadpool(self._queue.claim, self._at_once - len(tasks)):
                    task = asyncio.create_task(self._deliver(delivery))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            except Exception as error:  # the database may come back
                log.warning("webhooks wait: %s", error)
            await asyncio.sleep(self._poll_seconds)

    async def _deliver(self, delivery: Delivery) -> None:
        told = {"id": delivery.event_id, "created_at": int(delivery.created_at), "type": delivery.type}
        event = WebhookEvent.model_validate(told | {"data": {"id": delivery.job_id}})
        body, now = event.model_dump_json().encode(), int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "cinemo",
            "webhook-id": delivery.event_id,
            "webhook-timestamp": str(now),
            "webhook-signature": signature(secret_of(self._secret, delivery.client), delivery.event_id, now, body),
        }
        try:
            status = await self._receivers.post(delivery.url, list(headers.items()), body, self._answer_seconds)
            why = f"status {status}"
        except Forbidden:
            status, why = 410, "its address is not to be asked"
        except Exception as error:  # whatever a stranger's server does
            status, why = 0, f"no answer ({type(error).__name__})"
        try:
            if 200 <= status < 300:
                await run_in_threadpool(self._queue.done, delivery)
            elif status == 410 or delivery.attempt > len(self._retry_seconds):
                log.warning("webhook %s of %s is given up: %s", delivery.event_id, delivery.job_id, why)
                await run_in_threadpool(self._queue.done, delivery)
            else:
                await run_in_threadpool(self._queue.again, delivery, self._retry_seconds[delivery.attempt - 1])
        except Exception as error:
            log.warning("webhook %s: %s; it is sent again when its lease runs out", delivery.event_id, error)
