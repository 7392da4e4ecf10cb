"""Metrics for Prometheus: the jobs of the whole server (from its database) and the requests of this process."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cinemo import monitoring
from cinemo.serving.store.counters import BOUNDS, Statistics
from cinemo.serving.store.counters import Histogram as Counted

_STATUSES = ("queued", "in_progress", "completed", "failed", "cancelled")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._~:+/=-]{1,128}")


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
        asked = monitoring.REQUESTS
        self._requests = Histogram(
            asked.name, asked.meaning, asked.labels, buckets=asked.bounds, registry=self._registry
        )
        self._jobs = _Jobs(statistics, streams, self._process)
        self._registry.register(self._jobs)
        ProcessCollector(registry=self._registry)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Note a request that was answered."""
        self._requests.labels(self._process, method, route, str(status)).observe(seconds)

    def render(self, accept: str, is_ready: bool) -> tuple[bytes, str]:
        """The text in the format that ``accept`` prefers, and its content type."""
        self._jobs.is_ready = is_ready
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind


class _Jobs(Collector):
    def __init__(self, statistics: Callable[[], Statistics], streams: Callable[[], int], process: str) -> None:
        self._statistics, self._streams, self._process = statistics, streams, process
        self.is_ready = False

    def describe(self) -> list[Metric]:
        return []  # nothing is read from the database before the first scrape

    def collect(self) -> Iterator[Metric]:
        found = self._statistics()
        yield _family(GaugeMetricFamily, monitoring.READY, {(): self.is_ready})
        yield _family(GaugeMetricFamily, monitoring.JOBS, {(key,): found.by_status.get(key, 0) for key in _STATUSES})
        yield _family(CounterMetricFamily, monitoring.FINISHED, {(key,): n for key, n in found.finished.items()})
        yield _family(GaugeMetricFamily, monitoring.WAITING, {(): found.oldest_waiting_seconds})
        yield _histogram(monitoring.QUEUED, found.queue_seconds)
        yield _histogram(monitoring.RAN, found.run_seconds)
        yield _family(GaugeMetricFamily, monitoring.STREAMS, {(self._process,): self._streams()})


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    metric: monitoring.Metric,
    values: Mapping[tuple[str, ...], float],
) -> Metric:
    """``values`` by the values of the metric's labels."""
    family = kind(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, float(value))
    return family


def _histogram(metric: monitoring.Metric, counted: Counted) -> HistogramMetricFamily:
    buckets, below = [], 0
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), counted.counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return HistogramMetricFamily(metric.name, metric.meaning, buckets, counted.total)


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
