"""What Prometheus can be told: every metric by name, and the way to it, which is Ray's.

Ray exports what its processes record at the metrics port of their node, under the name with ``ray_`` before it. A
process without Ray records nothing. Metrics of a whole server come from its database, at its own ``/metrics``
(`cinemo.serving.http.exposition`).
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """``name``: as it is recorded. ``unit``: of its values; a ratio is 0..1, a time is Unix time in seconds.

    ``bounds``: upper ones of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        source = "" if self in SERVER else "ray_"
        return f"{source}{self.name}{'_total' if self.kind == 'counter' else ''}"


def _precompute(name: str, kind: Literal["counter", "gauge"], unit: str, meaning: str, *labels: str) -> Metric:
    return Metric(f"cinemo_precompute_{name}", kind, unit, meaning, ("output", *labels))


def _train(name: str, kind: Literal["counter", "gauge"], unit: str, meaning: str) -> Metric:
    return Metric(f"cinemo_train_{name}", kind, unit, meaning, ("output",))


# A precompute run; `output` is the dataset.
CLIPS = _precompute("clips", "counter", "clips", "Clips that went through a stage: decode, encode, commit", "stage")
QUARANTINED = _precompute("quarantined", "counter", "clips", "Refused clips by reason", "reason")
SHARDS = _precompute("shards", "counter", "shards", "Shards committed")
BYTES = _precompute("bytes", "counter", "bytes", "Bytes of the shards committed")
SHARDS_LEFT = _precompute("shards_left", "gauge", "shards", "Shards that this run has still to commit")
REFUSED = _precompute("refused_ratio", "gauge", "ratio", "Refused clips of this run as a share of those decoded")
BUSY = _precompute("busy_ratio", "gauge", "ratio", "Busy share of a stage's processes over the last minute", "stage")
LEFT = _precompute("left_seconds", "gauge", "seconds", "Estimate of the time that is left; absent where unknown")
COMMITTED_AT = _precompute("committed_time", "gauge", "time", "When a shard was last committed, at first the start")

# A training; `output` is its output directory.
STEPS = _train("steps", "counter", "steps", "Optimiser steps")
SAMPLES = _train("samples", "counter", "samples", "Samples trained on")
CHECKPOINTS = _train("checkpoints", "counter", "checkpoints", "Checkpoints stored")
STARTS = _train("starts", "counter", "starts", "Starts of the worker group: one more than it had to be restarted")
STEP = _train("step", "gauge", "steps", "The last reported optimiser step")
STEPS_PLANNED = _train("steps_planned", "gauge", "steps", "train.max_steps")
STEP_SECONDS = _train("step_seconds", "gauge", "seconds", "Time of a step, mean since the report before")
SPEED = _train("samples_per_second", "gauge", "samples/s", "Of all workers, mean since the report before")
DATA_WAIT = _train("data_wait_ratio", "gauge", "ratio", "Share of the time spent waiting for data, mean over workers")
MFU = _train("mfu_ratio", "gauge", "ratio", "Model FLOPs utilisation; absent where the peak is unknown")
MEMORY = _train("memory_bytes", "gauge", "bytes", "The most that any worker has held")
LOSS = _train("loss", "gauge", "loss", "Mean loss since the report before")
VAL_LOSS = _train("val_loss", "gauge", "loss", "Loss on held-out shards, when last measured")
GRAD_NORM = _train("grad_norm", "gauge", "norm", "Gradient norm before clipping, of the last step that moved weights")
SKIPPED = _train("skipped_steps", "gauge", "steps", "Steps of this job that moved no weights: gradient not finite")
REPORTED_AT = _train("reported_time", "gauge", "time", "When steps were last reported, at first the start")

# An animator of a server.
DENOISING = Metric(
    "cinemo_serve_step_seconds",
    "histogram",
    "seconds",
    "Time of a denoising step: one call of the network for all videos whose turn it is",
    bounds=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
VIDEO_STEPS = Metric("cinemo_serve_video_steps", "counter", "steps", "Steps of single videos, of which a call has some")

RECORDED = (
    *(CLIPS, QUARANTINED, SHARDS, BYTES, SHARDS_LEFT, REFUSED, BUSY, LEFT, COMMITTED_AT),
    *(STEPS, SAMPLES, CHECKPOINTS, STARTS, STEP, STEPS_PLANNED, STEP_SECONDS, SPEED, DATA_WAIT, MFU, MEMORY, LOSS),
    *(VAL_LOSS, GRAD_NORM, SKIPPED, REPORTED_AT),
    *(DENOISING, VIDEO_STEPS),
)

# What a server's /metrics says, whichever process answers; what has the label `process` is of that one alone.
READY = Metric(
    "cinemo_ready", "gauge", "0 or 1", "Whether an animator is loaded and the storage works, as /readyz says"
)
JOBS = Metric("cinemo_jobs", "gauge", "jobs", "Jobs in the database now", ("status",))
FINISHED = Metric("cinemo_jobs_finished", "counter", "jobs", "Jobs that have ended so far", ("status",))
WAITING = Metric("cinemo_oldest_waiting_seconds", "gauge", "seconds", "Age of the oldest queued job, 0 for none")
QUEUED = Metric("cinemo_job_queue_seconds", "histogram", "seconds", "From submission to the last start")
RAN = Metric("cinemo_job_run_seconds", "histogram", "seconds", "From the last start to the end")
STREAMS = Metric("cinemo_event_streams", "gauge", "streams", "Open event streams", ("process",))
REQUESTS = Metric(
    "cinemo_http_request_seconds",
    "histogram",
    "seconds",
    "Seconds until an answer begins",
    ("process", "method", "route", "status"),
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
SERVER = (READY, JOBS, FINISHED, WAITING, QUEUED, RAN, STREAMS, REQUESTS)


def record(metric: Metric, value: float, **labels: str) -> None:
    """Add to a counter, set a gauge, or observe a value of a histogram. Costs some microseconds and waits for nothing.

    Ray sends what was recorded to the agent of its node every ten seconds, and forgets a gauge that is not set again
    for twenty. Without Ray nothing happens.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    instrument = _instrument(metric)
    if metric.kind == "counter":
        if value > 0:
            instrument.inc(value, labels)
    elif metric.kind == "gauge":
        instrument.set(value, labels)
    else:
        instrument.observe(value, labels)


@functools.cache
def _instrument(metric: Metric) -> Any:
    from ray.util import metrics

    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, metric.meaning, [*metric.bounds], metric.labels)
    kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return kind(metric.name, metric.meaning, metric.labels)


class Growth:
    """Counters that follow sums known elsewhere: what one has grown by since it was last told is counted."""

    def __init__(self) -> None:
        self._told: dict[tuple[Metric, tuple[str, ...]], float] = {}

    def record(self, metric: Metric, total: float, **labels: str) -> None:
        key = metric, tuple(labels.values())
        record(metric, total - self._told.get(key, 0.0), **labels)
        self._told[key] = max(total, self._told.get(key, 0.0))
