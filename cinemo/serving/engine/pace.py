"""How fast this device denoises, measured, and when each of the videos that take turns will be sampled.

Work is counted in rows of the network at the model's own size: a guided call of one video is 2. A step of the engine
takes a + b work, fitted to the last steps: on a CPU b decides, on an accelerator with room left a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MEMORY = 0.97  # weight of a step against the one after it
_VIDEOS = 0.8  # the same of whole videos
_SPREAD = 1e-3  # of the work, as a share of its square: below, all steps were alike, and only their mean is known


@dataclass(frozen=True)
class Cost:
    """What was measured. A step takes ``per_step + per_row * work`` seconds; a call of a video is ``rows`` of work."""

    per_step: float
    per_row: float
    rows: float

    def round_seconds(self, rows: Sequence[float], places: int) -> float:
        """Until each of several videos, with so much work in a call, has had its turn; ``places`` of them in a step."""
        return self.per_step * max(1.0, len(rows) / places) + self.per_row * sum(rows)

    def ends(self, videos: Sequence[tuple[int, float]], places: int, tail: float = 0.0) -> list[float]:
        """Seconds until each of ``videos`` (calls left, work in each) ends, if no other joins.

        ``tail``: what a video takes after its last call, which the others wait for: the device decodes it.
        """
        found, rows = [0.0] * len(videos), [work for _, work in videos]
        at, done = 0.0, 0
        order = sorted(range(len(videos)), key=lambda place: videos[place][0])
        for position, place in enumerate(order):
            still = [rows[each] for each in order[position:]]
            at += (videos[place][0] - done) * self.round_seconds(still, places)
            at += tail
            done, found[place] = videos[place][0], at
        return found


class Pace:
    """Running averages of what steps and videos cost.

    Args:
        before: what was measured by an earlier process, which counts as one step.
    """

    def __init__(self, before: Cost | None = None) -> None:
        self._before = before
        self._count = self._work = self._square = self._seconds = self._product = 0.0
        self._rows: float | None = None

    def step(self, work: float, seconds: float) -> None:
        """Count a step of the engine."""
        sums = (1.0, work, work * work, seconds, work * seconds)
        kept = (self._count, self._work, self._square, self._seconds, self._product)
        self._count, self._work, self._square, self._seconds, self._product = (
            _MEMORY * old + new for old, new in zip(kept, sums, strict=True)
        )

    def video(self, calls: int, work: float) -> None:
        """Count a whole video: its calls, and the work in all of them."""
        rows = work / calls
        self._rows = rows if self._rows is None else _VIDEOS * self._rows + (1 - _VIDEOS) * rows

    @property
    def rows(self) -> float | None:
        """Mean work in a call of a whole video; None where none was seen."""
        return self._rows if self._rows is not None or self._before is None else self._before.rows

    def cost(self, rows: float = 1.0) -> Cost | None:
        """None where nothing was measured. ``rows``: of a call, where no whole video was seen."""
        rows = self.rows or rows
        if not self._count:
            return self._before
        work, seconds = self._work / self._count, self._seconds / self._count
        variance = self._square / self._count - work * work
        slope = seconds / work
        if variance > _SPREAD * work * work:
            slope = min(max(0.0, (self._product / self._count - work * seconds) / variance), slope)
        return Cost(seconds - slope * work, slope, rows)
