"""Metrics for Prometheus: the jobs of the whole server (from its database) and the requests of this process."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cinemo.serving.store.counters import BOUNDS, Statistics
from cinemo.serving.store.counters import Histogram as Counted

_STATUSES = ("queued", "in_progress", "completed", "failed", "cancelled")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._~:+/=-]{1,128}")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Exposition:
    """The metrics of one application.

    Args:
        statistics: of the jobs, read anew at every scrape. They are the same whichever replica is asked.
        streams: how many event streams are open here.
    """

    def __init__(self, statistics: Callable[[], Statistics], streams: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        # Replicas behind one address answer in turn: the label keeps their own counters apart.
        self._process = f"{socket.gethostname()}:{os.getpid()}"
        self._requests = Histogram(
            "cinemo_http_request_seconds",
            "Seconds until an answer begins",
            ["process", "method", "route", "status"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Jobs(statistics, streams, self._process))
        ProcessCollector(registry=self._registry)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Note a request that was answered."""
        self._requests.labels(self._process, method, route, str(status)).observe(seconds)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text in the format that ``accept`` prefers, and its content type."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind


class _Jobs(Collector):
    def __init__(self, statistics: Callable[[], Statistics], streams: Callable[[], int], process: str) -> None:
        self._statistics, self._streams, self._process = statistics, streams, process

    def describe(self) -> list[Metric]:
        return []  # nothing is read from the database before the first scrape

    def collect(self) -> Iterator[Metric]:
        found = self._statistics()
        jobs = GaugeMetricFamily("cinemo_jobs", "Jobs in the database now", labels=["status"])
        finished = CounterMetricFamily("cinemo_jobs_finished", "Jobs that have ended so far", labels=["status"])
        for status in _STATUSES:
            jobs.add_metric([status], found.by_status.get(status, 0))
        for status, count in found.finished.items():
            finished.add_metric([status], count)
        yield jobs
        yield finished
        yield GaugeMetricFamily(
            "cinemo_oldest_waiting_seconds", "Age of the oldest queued job", found.oldest_waiting_seconds
        )
        yield _histogram("cinemo_job_queue_seconds", "From submission to the last start", found.queue_seconds)
        yield _histogram("cinemo_job_run_seconds", "From the last start to the end", found.run_seconds)
        streams = GaugeMetricFamily("cinemo_event_streams", "Open event streams", labels=["process"])
        streams.add_metric([self._process], self._streams())
        yield streams


def _histogram(name: str, text: str, counted: Counted) -> HistogramMetricFamily:
    buckets, below = [], 0
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), counted.counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return HistogramMetricFamily(name, text, buckets, counted.total)


class Observed:
    """Times every answer until it begins, by the route's template (never by the path itself, which strangers choose),
    and names every request in ``X-Request-Id``: as the client did, where that is a plain name.

    Args:
        named: whether answers have that header already, from what stands before this application.
    """

    def __init__(self, app: ASGIApp, exposition: Exposition, named: bool = False) -> None:
        self.app, self.exposition, self.named = app, exposition, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _PLAIN_NAME.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        began = time.perf_counter()
        scope.setdefault("state", {})["request_id"] = request_id

        async def timed(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self.exposition.observe(method, route, message["status"], time.perf_counter() - began)
                if not self.named:
                    message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        await self.app(scope, receive, timed)


_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
