"""Several datasets in one training, in shares: the same canonical order whatever the number of workers.

Every lane deals its positions out to the datasets, in shares that at any point are right to within a sample, and reads
from each dataset that dataset's own stream of the lane (`cinemo.data.loading.order`). So each dataset has its own
epochs, in each of which all of its samples come once, and any step can be found without reading what lies before it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count
from typing import Any, Self

import numpy as np

from cinemo.data.loading.loader import LatentLoader, Skipped, StepBatch
from cinemo.data.loading.order import Place
from cinemo.types import LatentSample


class Shares:
    """Which source each position of a lane's stream belongs to.

    A source takes its share of what those before it leave; lanes begin at different places of the pattern, so that a
    global batch holds the shares as well.
    """

    def __init__(self, weights: Sequence[Fraction], lanes: int) -> None:
        shares = [weight / sum(weights[place:]) for place, weight in enumerate(weights[:-1])]
        self._of_rest = [(share.numerator * lanes, share.denominator, share.denominator * lanes) for share in shares]

    def counts(self, lane: int, position: int) -> list[int]:
        """How many of a lane's samples before a position belong to each source."""
        return self._counts(lane, position)

    def table(self, lanes: range, positions: range) -> np.ndarray:
        """`counts` of some lanes at some positions: (sources, lanes, positions)."""
        largest = max((positions.stop * share + whole for share, _, whole in self._of_rest), default=positions.stop)
        kind = np.int64 if largest < 1 << 62 else object  # a share of many digits
        return np.stack(
            self._counts(np.array(lanes, kind)[:, None], np.tile(np.array(positions, kind), (len(lanes), 1)))
        )

    def _counts(self, lane: Any, position: Any) -> list[Any]:
        taken, left = [], position
        for share, offset, whole in self._of_rest:  # floor(left * share + lane / lanes), in whole numbers
            taken.append((left * share + lane * offset) // whole)
            left = left - taken[-1]
        return [*taken, left]


@dataclass(frozen=True)
class MixedPlace:
    """A place in one of the sources."""

    source: int
    place: Place


class MixedLoader:
    """One rank's share of every global batch, out of several loaders of the same rank, batch and lanes.

    Where there are several, sample keys say which one a sample is from: ``1/000000017-0``.

    Args:
        first_step: the global step that reads the first samples.
    """

    def __init__(self, loaders: Sequence[LatentLoader], weights: Sequence[Fraction], first_step: int = 0) -> None:
        self._weights = weights
        self._earlier: MixedLoader | None = None
        self._use(loaders, first_step)

    def _use(self, loaders: Sequence[LatentLoader], first_step: int) -> None:
        self.loaders, self._first_step, self._order = list(loaders), first_step, loaders[0].order
        self._shares = Shares(self._weights, self._order.lanes)

    def changed(self, step: int, global_batch: int, lanes: int) -> Self:
        """The loader that takes this one's place from global step ``step`` on, with another batch and lanes.

        What no lane has read of the epochs that are begun comes first (`SampleOrder.changed`).
        """
        made = copy.copy(self)
        loaders = [
            loader.changed(self.read_before(step, source), global_batch, lanes)
            for source, loader in enumerate(self.loaders)
        ]
        made._use(loaders, step)
        made._earlier = self
        return made

    @property
    def global_batch(self) -> int:
        return self._order.global_batch

    def at(self, step: int) -> MixedLoader:
        """The loader that a global step was read with: this one, or one whose place it took."""
        return self if step >= self._first_step or self._earlier is None else self._earlier.at(step)

    @property
    def skipped(self) -> Skipped:
        """What damaged shards have cost so far."""
        parts = [loader.skipped for loader in self.loaders]
        return Skipped(sum(part.shards for part in parts), sum(part.samples for part in parts))

    def epoch(self, step: int, source: int = 0) -> int:
        """The epoch of a source in which global step ``step`` begins, as for all below one of this loader's own."""
        return self.loaders[source].order.epoch_at(sum(self.read_before(step, source)))

    def read_before(self, step: int, source: int) -> list[int]:
        """How many samples of a source each lane of this loader has read before global step ``step``."""
        position = (step - self._first_step) * self._order.per_lane
        return [self._shares.counts(lane, position)[source] for lane in range(self._order.lanes)]

    def key(self, source: int, key: str) -> str:
        """What a sample of a source is called in this training."""
        return f"{source}/{key}" if len(self.loaders) > 1 else key

    def places(self, step: int, lanes: range | None = None) -> list[MixedPlace]:
        """The samples of some lanes (None: all) in global step ``step``, lane by lane."""
        chosen = range(self._order.lanes) if lanes is None else lanes
        found: dict[int, MixedPlace] = {}
        for source, (slots, places, _) in enumerate(self._dealt(step, chosen)):
            found |= {slot: MixedPlace(source, place) for slot, place in zip(slots, places, strict=True)}
        return [found[slot] for slot in range(len(found))]

    def _dealt(self, step: int, lanes: range) -> list[tuple[list[int], list[Place], list[int]]]:
        """Of each source the slots that it has in a step of some lanes, what lies in them, and how many of its samples
        each lane has read after the step.
        """
        per_lane, step = self._order.per_lane, step - self._first_step
        counts = self._shares.table(lanes, range(step * per_lane, (step + 1) * per_lane + 1))
        dealt = []
        for loader, (first, last), mine in zip(
            self.loaders, counts[:, :, [0, -1]].swapaxes(1, 2).tolist(), np.diff(counts, axis=2), strict=True
        ):
            read = [
                place
                for lane, begin, end in zip(lanes, first, last, strict=True)
                for place in loader.order.read(lane, begin, end - begin)
            ]
            dealt.append((np.flatnonzero(mine).tolist(), read, last))
        return dealt

    def batches(self, start_step: int = 0) -> Iterator[StepBatch]:
        """Batches from global step ``start_step`` on, without end."""
        return map(self.batch, count(start_step))

    def batch(self, step: int) -> StepBatch:
        if len(self.loaders) == 1:
            return replace(self.loaders[0].batch(step - self._first_step), step=step)
        rank, world = self.loaders[0].rank, self.loaders[0].world
        own, share = self._order.lanes_of(rank, world), self._order.share_of(rank, world)
        size, before = len(share), share.start - own.start * self._order.per_lane  # of its first lane: other ranks'
        samples: list[LatentSample | None] = [None] * size
        weights, epochs, skipping = [1.0] * size, [0] * size, False
        begun = [self.epoch(step, source) for source in range(len(self.loaders))]
        for number, (all_slots, all_places, ends) in enumerate(self._dealt(step, own)):
            slots = [slot - before for slot in all_slots if 0 <= slot - before < size]
            if not slots:
                continue
            places = [place for slot, place in zip(all_slots, all_places, strict=True) if 0 <= slot - before < size]
            loader = self.loaders[number]
            lanes = zip(own, ends, strict=True)
            following = [loader.order.shard_after(lane, end - 1) for lane, end in lanes if end]
            read, weighed = loader.read(places, following)
            skipping |= weighed is not None
            later = begun[0] - begun[number]
            for slot, sample, weight, place in zip(slots, read, weighed or [1.0] * len(slots), places, strict=True):
                samples[slot], weights[slot] = sample.changed(key=self.key(number, sample.key)), weight
                epochs[slot] = later + place.epoch
        there = [sample for sample in samples if sample is not None]
        return StepBatch(step, begun[0], there, weights if skipping else None, epochs)
