"""How a precompute run is doing: counts from its workers, figures over the last minute, lines for people.

Only the standard library: `Meter` runs in a process of its own, which must start quickly and stay small.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from cinemo.progress import REWRITE_SECONDS, heard, rate, times

_WINDOW_SECONDS = 60.0
_LINE_SECONDS = 5.0


class Meter:
    """Sums what the workers of a run report, piece by piece, long before a shard is full."""

    def __init__(self) -> None:
        self.clips: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def add(self, stage: str, clips: float, seconds: Mapping[str, float], reasons: Mapping[str, int]) -> None:
        """``clips`` went through ``stage``; ``seconds`` by stage were spent and ``reasons`` refused some."""
        self.clips[stage] += clips  # type: ignore[assignment]
        self.seconds.update(seconds)
        self.reasons.update(reasons)

    def read(self) -> dict[str, dict[str, float]]:
        """Sums since the beginning: ``clips`` by stage, ``seconds`` by stage, ``reasons``."""
        return {"clips": dict(self.clips), "seconds": dict(self.seconds), "reasons": dict(self.reasons)}


@dataclass(frozen=True)
class Figures:
    """A run at one moment. Rates and ``use`` are those of the last minute.

    ``decoded``, ``encoded`` and ``committed`` count clips, ``bytes`` are those of committed shards; ``use`` is the busy
    share of a stage's processes, 0..1.
    """

    clips: int
    decoded: int
    encoded: int
    committed: int
    shards: int
    all_shards: int
    bytes: int
    seconds: float
    rate: float
    megabytes_per_second: float
    use: Mapping[str, float]
    reasons: Mapping[str, int]

    @property
    def seconds_left(self) -> float | None:
        return (self.clips - self.encoded) / self.rate if self.rate else None

    def line(self) -> str:
        """One line for a person."""
        head = f"{self.committed}/{self.clips} clips in {self.shards}/{self.all_shards} shards"
        if self.committed < self.encoded or self.encoded < self.decoded:
            head += f" (decoded {self.decoded}, encoded {self.encoded})"
        if not self.decoded:
            return f"{head}, starting workers, {times(self.seconds)}"
        parts = [head, rate(self.rate, 1, "clips"), f"{self.megabytes_per_second:.1f} MB/s"]
        parts.append(times(self.seconds, self.seconds_left))
        parts.append("busy: " + " ".join(f"{stage} {share:.0%}" for stage, share in self.use.items()))
        if self.reasons:
            parts.append(f"refused {sum(self.reasons.values())}: {describe(self.reasons)}")
        return ", ".join(parts)

    def metrics(self) -> dict[str, float]:
        """The same for MLflow."""
        return {
            "clips_per_second": self.rate,
            "megabytes_per_second": self.megabytes_per_second,
            "clips_decoded": self.decoded,
            "clips_encoded": self.encoded,
            "clips_committed": self.committed,
            "shards": self.shards,
            "quarantined": sum(self.reasons.values()),
            **{f"quarantined.{reason}": count for reason, count in self.reasons.items()},
            **{f"use.{stage}": share for stage, share in self.use.items()},
        }


class Progress:
    """Watches a run from a thread of its own for the length of a ``with`` block.

    Args:
        clips, shards: how many there are to do.
        capacity: processes that can work at a time, by stage.
        read: the latest `Meter.read`, or None where it does not answer.
        listener: told the figures at every line.
        stream: where lines go; on a terminal one line is rewritten.

    Attributes:
        refused: clips of committed shards that were refused, by reason.
    """

    def __init__(
        self,
        clips: int,
        shards: int,
        capacity: Mapping[str, float],
        read: Callable[[], Mapping[str, Mapping[str, float]] | None],
        listener: Callable[[Figures], None] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.clips, self.all_shards, self.capacity = clips, shards, dict(capacity)
        self._read, self._listener, self._stream = read, listener, stream or sys.stdout
        self.refused: Counter[str] = Counter()
        self._committed = self._shards = self._bytes = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._started = time.perf_counter()
        self._latest: Mapping[str, Mapping[str, float]] = {"clips": {}, "seconds": {}, "reasons": {}}
        # Begins with the run: a short one is over before it is looked at twice.
        self._history: deque[tuple[float, int, int, dict[str, float]]] = deque([(self._started, 0, 0, {})])
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show(last=True)

    def add(self, shard: Mapping[str, Any]) -> None:
        """Count a committed shard (a row of `stages.COMMITTED`)."""
        with self._lock:
            self._committed += shard["clips"]
            self._shards += 1
            self._bytes += shard["bytes"]
            self.refused.update(json.loads(shard["reasons"]))

    def figures(self) -> Figures:
        """Ask the meter, and compare with what was a minute ago."""
        self._latest = self._read() or self._latest
        clips, now = self._latest["clips"], time.perf_counter()
        with self._lock:
            committed, shards, size, refused = self._committed, self._shards, self._bytes, Counter(self.refused)
        encoded = max(round(clips.get("encode", 0)), committed)
        decoded = max(round(clips.get("decode", 0)), encoded)
        seconds = {stage: self._latest["seconds"].get(stage, 0.0) for stage in self.capacity}
        if not decoded:
            self._history.clear()  # the window begins with the first clip, not with the workers
        self._history.append((now, encoded, size, seconds))
        while len(self._history) > 2 and now - self._history[1][0] > _WINDOW_SECONDS:
            self._history.popleft()
        then, encoded_then, size_then, seconds_then = self._history[0]
        span = max(now - then, 1e-6)
        return Figures(
            clips=self.clips,
            decoded=decoded,
            encoded=encoded,
            committed=committed,
            shards=shards,
            all_shards=self.all_shards,
            bytes=size,
            seconds=now - self._started,
            rate=(encoded - encoded_then) / span,
            megabytes_per_second=(size - size_then) / span / 1e6,
            use={
                stage: min(1.0, (seconds[stage] - seconds_then.get(stage, 0.0)) / span / self.capacity[stage])
                for stage in self.capacity
            },
            reasons={reason: int(count) for reason, count in (refused | Counter(self._latest["reasons"])).items()},
        )

    def _watch(self) -> None:
        pause = REWRITE_SECONDS if self._stream.isatty() else _LINE_SECONDS
        while not self._stop.wait(pause):
            self._show()

    def _show(self, last: bool = False) -> None:
        figures = self.figures()
        text = figures.line()
        if self._stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{text[:width]}" + ("\n" if last else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
        heard()
        if self._listener:
            self._listener(figures)


def describe(reasons: Mapping[str, int]) -> str:
    """``missing 3, too_few_frames 1``: the most frequent reason first."""
    return ", ".join(
        f"{reason} {count}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    )
