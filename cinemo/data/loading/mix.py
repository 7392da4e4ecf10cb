"""Several datasets in one training, in shares: the same canonical order whatever the number of workers.

Every lane deals its positions out to the datasets, in shares that at any point are right to within a sample, and reads
from each dataset that dataset's own stream of the lane (`cinemo.data.loading.order`). So each dataset has its own
epochs, in each of which all of its samples come once, and any step can be found without reading what lies before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count, pairwise

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
        taken, left = [], position
        for share, offset, whole in self._of_rest:  # floor(left * share + lane / lanes), in whole numbers
            taken.append((left * share + lane * offset) // whole)
            left -= taken[-1]
        return [*taken, left]


@dataclass(frozen=True)
class MixedPlace:
    """A place in one of the sources."""

    source: int
    place: Place


class MixedLoader:
    """One rank's share of every global batch, out of several loaders of the same rank, batch and lanes.

    Where there are several, sample keys say which one a sample is from: ``1/000000017-0``.
    """

    def __init__(self, loaders: Sequence[LatentLoader], weights: Sequence[Fraction]) -> None:
        self.loaders, first = list(loaders), loaders[0]
        self._order, self._lanes = first.order, first.order.lanes_of(first.rank, first.world)
        self._shares = Shares(weights, self._order.lanes)

    @property
    def skipped(self) -> Skipped:
        """What damaged shards have cost so far."""
        parts = [loader.skipped for loader in self.loaders]
        return Skipped(sum(part.shards for part in parts), sum(part.samples for part in parts))

    def epoch(self, step: int, source: int = 0) -> int:
        """The epoch of a source in which global step ``step`` begins."""
        return self.loaders[source].order.epoch_at(sum(self.read_before(step, source)))

    def read_before(self, step: int, source: int) -> list[int]:
        """How many samples of a source each lane has read before global step ``step``."""
        position = step * self._order.per_lane
        return [self._shares.counts(lane, position)[source] for lane in range(self._order.lanes)]

    def key(self, source: int, key: str) -> str:
        """What a sample of a source is called in this training."""
        return f"{source}/{key}" if len(self.loaders) > 1 else key

    def places(self, step: int, lanes: range | None = None) -> list[MixedPlace]:
        """The samples of some lanes (None: all) in global step ``step``, lane by lane."""
        chosen, per_lane = range(self._order.lanes) if lanes is None else lanes, self._order.per_lane
        orders = [loader.order for loader in self.loaders]
        found = []
        for lane in chosen:
            counts = [self._shares.counts(lane, step * per_lane + place) for place in range(per_lane + 1)]
            streams = [
                iter(order.read(lane, first, last - first))
                for order, first, last in zip(orders, counts[0], counts[-1], strict=True)
            ]
            for before, after in pairwise(counts):
                source = next(k for k, taken in enumerate(before) if after[k] != taken)
                found.append(MixedPlace(source, next(streams[source])))
        return found

    def batches(self, start_step: int = 0) -> Iterator[StepBatch]:
        """Batches from global step ``start_step`` on, without end."""
        return map(self.batch, count(start_step))

    def batch(self, step: int) -> StepBatch:
        if len(self.loaders) == 1:
            return self.loaders[0].batch(step)
        places = self.places(step, self._lanes)
        samples: list[LatentSample | None] = [None] * len(places)
        weights, skipping = [1.0] * len(places), False
        for number, loader in enumerate(self.loaders):
            mine = [slot for slot, one in enumerate(places) if one.source == number]
            if not mine:
                continue
            ends = [
                (lane, self._shares.counts(lane, (step + 1) * self._order.per_lane)[number]) for lane in self._lanes
            ]
            following = [loader.order.shard_after(lane, end - 1) for lane, end in ends if end]
            read, weighed = loader.read([places[slot].place for slot in mine], following)
            skipping |= weighed is not None
            for slot, sample, weight in zip(mine, read, weighed or [1.0] * len(mine), strict=True):
                samples[slot], weights[slot] = replace(sample, key=self.key(number, sample.key)), weight
        begun = [self.epoch(step, source) for source in range(len(self.loaders))]
        epochs = [begun[0] + one.place.epoch - begun[one.source] for one in places]
        there = [sample for sample in samples if sample is not None]
        return StepBatch(step, begun[0], there, weights if skipping else None, epochs)
