"""Samples of several shapes in one training: every step is of one shape, on all ranks.

Steps are dealt out to the shapes in proportion to their samples, at any point right to within a step for each shape,
and each shape has the canonical order (`cinemo.data.loading.order`) of its own samples, as if there were no others. So
all shapes come to the ends of their epochs at about the same time, every sample comes once in each epoch of its shape,
and a shape that has fewer samples than a batch repeats some in its rare batches. Which shape a step has, and which
samples, follows from the step alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from cinemo.data.loading.loader import LatentLoader, NothingLeft, StepBatch
from cinemo.data.loading.mix import MixedLoader, MixedPlace, Shares


class ShapesLoader(MixedLoader):
    """One rank's share of every global batch, out of loaders of one shape each, which take turns."""

    def __init__(self, loaders: Sequence[LatentLoader], first_step: int = 0) -> None:
        super().__init__(loaders, [Fraction(1)] * len(loaders), first_step)
        self._turns = Shares([Fraction(loader.order.samples) for loader in loaders], lanes=1)

    def turn(self, step: int) -> tuple[int, int]:
        """The loader that global step ``step`` belongs to, and how many steps before it did since the first one."""
        step -= self._first_step
        before, after = self._turns.counts(0, step), self._turns.counts(0, step + 1)
        source = next(number for number, taken in enumerate(before) if after[number] != taken)
        return source, before[source]

    def read_before(self, step: int, source: int) -> list[int]:
        steps = self._turns.counts(0, step - self._first_step)[source]
        return [steps * self._order.per_lane] * self._order.lanes

    def key(self, source: int, key: str) -> str:
        return key

    def places(self, step: int, lanes: range | None = None) -> list[MixedPlace]:
        source, own = self.turn(step)
        order, chosen = self.loaders[source].order, range(self._order.lanes) if lanes is None else lanes
        found = (order.read(lane, own * order.per_lane, order.per_lane) for lane in chosen)
        return [MixedPlace(source, place) for places in found for place in places]

    def batch(self, step: int) -> StepBatch:
        source, own = self.turn(step)
        try:
            return replace(self.loaders[source].batch(own), step=step)
        except NothingLeft:  # of this shape: samples of another one stand in, which do not count
            for loader in self.loaders:
                with contextlib.suppress(NothingLeft):
                    found = loader.batch(0).samples
                    epoch = self.loaders[source].order.epoch(own)
                    return StepBatch(step, epoch, found, [0.0] * len(found), [epoch] * len(found))
            raise
