"""How the HTTP interface behaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cinemo.serving.store.results import Reuse


@dataclass(frozen=True)
class ApiSettings:
    """How the HTTP interface behaves.

    Args:
        body_bytes: of a request's whole body, which must have arrived after ``body_seconds`` and as long as it takes
            with ``body_rate`` bytes per second.
        pixels: of a picture; checked before it is decoded.
        fetch_urls: whether ``input_reference`` may be an http(s) URL, which is then fetched under guard (`fetch`),
            within ``fetch_seconds``, from ``fetch_ports`` alone.
        event_seconds: between two looks at the jobs with open event streams; ``event_streams``: of them at once, in
            one process; ``keep_alive_seconds``: of silence on a stream.
        sync_seconds: how long ``POST /v1/videos/sync`` waits for its video.
        cors_origins: of pages elsewhere that may use the interface; ``*``: any.
        requests_named: whether every answer gets an ``X-Request-Id`` from what stands before this application.
        metrics: who may read ``/metrics``: everybody, holders of an API key, or nobody.
        reuse: whose finished videos answer a request that asks for the same.
    """

    body_bytes: int = 20 * 2**20
    body_seconds: float = 10.0
    body_rate: int = 16384
    pixels: int = 40_000_000
    fetch_urls: bool = False
    fetch_seconds: float = 10.0
    fetch_ports: tuple[int, ...] = (80, 443)
    event_seconds: float = 0.15
    event_streams: int = 1000
    keep_alive_seconds: float = 15.0
    sync_seconds: float = 300.0
    cors_origins: tuple[str, ...] = ()
    requests_named: bool = False
    metrics: Literal["open", "key", "off"] = "open"
    reuse: Reuse = "own"
