"""The figures of a precompute run, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from cinemo import monitoring
from cinemo.data.precompute.progress import Figures
from cinemo.monitoring import record


class Exported:
    """Records every figure that it is told, and passes it on.

    Args:
        output: the dataset, which all its metrics are labelled with.
        listener: who is told after it.
    """

    def __init__(self, output: str, listener: Callable[[Figures], None] | None = None) -> None:
        self._output, self._listener = output, listener
        self._growth = monitoring.Growth()
        self._shards, self._committed_at = 0, time.time()

    def __call__(self, figures: Figures) -> None:
        output = self._output
        count = self._growth.record
        for stage, clips in (
            ("decode", figures.decoded),
            ("encode", figures.encoded),
            ("commit", figures.committed),
        ):
            count(monitoring.CLIPS, clips, output=output, stage=stage)
        for reason, clips in figures.reasons.items():
            count(monitoring.QUARANTINED, clips, output=output, reason=reason)
        count(monitoring.SHARDS, figures.shards, output=output)
        count(monitoring.BYTES, figures.bytes, output=output)
        if figures.shards > self._shards:
            self._shards, self._committed_at = figures.shards, time.time()
        record(monitoring.COMMITTED_AT, self._committed_at, output=output)
        record(monitoring.SHARDS_LEFT, figures.all_shards - figures.shards, output=output)
        record(monitoring.REFUSED, sum(figures.reasons.values()) / max(1, figures.decoded), output=output)
        for stage, share in figures.use.items():
            record(monitoring.BUSY, share, output=output, stage=stage)
        if figures.seconds_left is not None:
            record(monitoring.LEFT, figures.seconds_left, output=output)
        if self._listener:
            self._listener(figures)
