"""The canonical order in which a training run sees its samples: a function of shard sizes, seed and epoch alone.

In every epoch the shards are permuted, the clips inside each shard are permuted, and all are laid end to end as
``S[0..N)``. Each of ``L = lanes`` lanes reads a slice of it that is as long as the others to within one sample, and
goes on with its slice of the next epoch: a stream without end. Global batch ``k`` takes positions ``[k m, (k + 1) m)``
of every lane's stream, with ``m = global_batch / lanes``. Ranks take equal parts of it, one after the other: each reads
some lanes, or a part of one. So the global batch is the same for every number of ranks that divides it, any step can be
found without reading what lies before it, and a rank has only a few shards open at a time.

In epoch ``e`` lane ``l`` reads ``floor(((e + 1) N + l) / L) - floor((e N + l) / L)`` samples. Over the lanes these add
up to ``N`` (Hermite's identity), and over the epochs no lane gets ahead of another by more than a sample: no sample is
dropped or repeated to make ends meet. A batch may therefore hold the end of one epoch and the beginning of the next,
and, where a global batch is larger than an epoch, a sample of each.

A dataset that grew is taken up at the beginning of an epoch (`SampleOrder.grown`): ``e N`` is then the sum of the
epochs before, whatever their sizes, and what was read until then stays as it was.

With another global batch or number of lanes (`SampleOrder.changed`) the same epochs go on: what the lanes have not read
of those that they have begun is laid end to end and dealt out anew, and whole epochs follow.

A clip that was precomputed with ``views`` views is seen once an epoch, with one of them. They take turns, beginning
with one drawn for the clip: any ``views`` epochs in a row see each view of each clip once.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cinemo.types import InputError, keyed_seed


@dataclass(frozen=True)
class Place:
    """Sample ``index`` of the ``shard``-th shard (both counted from 0 in the order of the index), in an epoch."""

    shard: int
    index: int
    epoch: int


@dataclass(frozen=True)
class _Generation:
    """Clips in each shard as epochs from ``epoch`` on see them; ``before``: samples of all epochs before.

    ``kept``: of each shard's samples, clip by clip, those that a filter lets pass; None: all. ``left``: the parts of S
    (begin, end) that are left of this one epoch, in their order, as (parts, 2); None: all of it.
    """

    epoch: int
    before: int
    sizes: np.ndarray
    kept: list[np.ndarray] | None
    left: np.ndarray | None = None

    @functools.cached_property
    def samples(self) -> int:
        return int(self.sizes.sum() if self.left is None else np.diff(self.left).sum())

    def places(self, begin: int, end: int) -> np.ndarray:
        """Where in S the samples ``begin``, ``begin + 1``, ... before ``end`` of what an epoch reads lie, ascending."""
        if self.left is None:
            return np.arange(begin, end)
        return np.concatenate([np.arange(*part) for part in self.parts(begin, end)] or [np.arange(0)])

    def parts(self, begin: int, end: int) -> np.ndarray:
        """The same as parts of S (begin, end)."""
        left = np.array([[0, end]]) if self.left is None else self.left
        stops = np.cumsum(np.diff(left))
        starts = stops - np.diff(left)[:, 0]
        inside = np.stack([np.maximum(starts, begin), np.minimum(stops, end)], 1)
        return np.asarray((inside + (left[:, 0] - starts)[:, None])[inside[:, 0] < inside[:, 1]])


def _check(global_batch: int, lanes: int) -> None:
    if global_batch % lanes:
        raise InputError(f"global_batch is {global_batch}, expected a multiple of lanes ({lanes})")


class SampleOrder:
    """Where the samples of a step lie.

    Args:
        samples_of_shards: how many samples each shard holds; those of one clip lie side by side.
        global_batch: samples of one optimizer step over all ranks; a multiple of ``lanes``.
        lanes: reading lanes. Each has a shard half read, of which a rank opens those of its own lanes.
        views: samples of each clip, of which an epoch sees one.
        kept: whether each sample is seen at all, in the order of shards; None: all are.

    ``samples``: how many an epoch sees (of a dataset that grew: from the last time on).

    Raises:
        InputError: no samples, a batch that lanes do not divide, or a shard whose samples are no multiple of ``views``.
    """

    def __init__(
        self,
        samples_of_shards: np.ndarray,
        *,
        global_batch: int,
        lanes: int,
        seed: int,
        views: int = 1,
        kept: np.ndarray | None = None,
    ) -> None:
        _check(global_batch, lanes)
        self.global_batch, self.lanes, self.seed, self.views = global_batch, lanes, seed, views
        self.per_lane = global_batch // lanes
        self._untouched = 0  # the first epoch of which nothing is read before this order begins
        self._use([_Generation(0, 0, *self._clips(samples_of_shards, kept))])

    def grown(self, epoch: int, samples_of_shards: np.ndarray, kept: np.ndarray | None = None) -> SampleOrder:
        """The same order up to ``epoch``, from which on the shards are those given: the old ones and more behind them.

        Args:
            epoch: not before that of the last growth, whose place this one takes where they are the same.
        """
        earlier = [generation for generation in self._generations if generation.epoch < epoch]
        made = SampleOrder.__new__(SampleOrder)
        made.__dict__.update(self.__dict__)
        made._use([*earlier, _Generation(epoch, self._before(epoch), *self._clips(samples_of_shards, kept))])
        return made

    def changed(self, read: Sequence[int], global_batch: int, lanes: int) -> SampleOrder:
        """The order in which it goes on with another global batch and number of lanes, whose steps count from 0 again.

        Args:
            read: how many samples each lane has read of this order so far.

        Raises:
            InputError: as for a new order.
        """
        made = SampleOrder.__new__(SampleOrder)
        made.__dict__.update(self.__dict__)
        _check(global_batch, lanes)
        made.global_batch, made.lanes, made.per_lane = global_batch, lanes, global_batch // lanes
        begun, made._untouched = self.epoch_before(read), self.epoch_after(read)
        generations, before = list[_Generation](), 0
        for epoch in range(begun, made._untouched):
            there = self._generation(epoch)
            generations.append(_Generation(epoch, before, there.sizes, there.kept, self._left(epoch, read)))
            before += generations[-1].samples
        later = [generation for generation in self._generations if generation.epoch > made._untouched]
        for generation in (self._generation(made._untouched), *later):
            if generations and generations[-1].left is None:
                before += (generation.epoch - generations[-1].epoch) * generations[-1].samples
            epoch = max(generation.epoch, made._untouched)
            generations.append(_Generation(epoch, before, generation.sizes, generation.kept))
        made._use(generations)
        return made

    def _left(self, epoch: int, read: Sequence[int]) -> np.ndarray:
        """The parts of an epoch's S that are left where each lane has read so many samples."""
        parts = [np.empty((0, 2), np.int64)]
        for lane, (start, count) in enumerate(zip(self._starts(epoch), read, strict=True)):
            begin, end = self._bounds(epoch, lane)
            seen = min(max(count - begin, 0), end - begin)
            parts.append(self._generation(epoch).parts(start + seen, start + end - begin))
        return np.concatenate(parts)

    def _clips(
        self, samples_of_shards: np.ndarray, kept: np.ndarray | None
    ) -> tuple[np.ndarray, list[np.ndarray] | None]:
        """How many clips of each shard are seen, and which of its samples."""
        counts = np.asarray(samples_of_shards, np.int64)
        uneven = np.flatnonzero(counts % self.views)
        if len(uneven):
            raise InputError(
                f"shard {uneven[0]} of the index has {counts[uneven[0]]} samples, expected a multiple of the dataset's "
                f"{self.views} views of a clip; precompute it again"
            )
        parts = None
        sizes = counts // self.views
        if kept is not None:
            parts = [part.reshape(-1, self.views) for part in np.split(kept, np.cumsum(counts)[:-1])]
            sizes = np.array([part.any(1).sum() for part in parts], np.int64)
        if not sizes.any():
            raise InputError("the dataset has no samples to train on")
        return sizes, parts

    def _use(self, generations: list[_Generation]) -> None:
        self._generations = generations
        self.samples = generations[-1].samples
        self._shards = functools.lru_cache(2)(self._permute_shards)
        self._inside = functools.lru_cache(4 * self.lanes)(self._permute_clips)
        self._starts = functools.lru_cache(4)(self._slice)

    @property
    def steps_per_epoch(self) -> float:
        return self.samples / self.global_batch

    def epoch(self, step: int) -> int:
        """The epoch in which global step ``step`` begins: how often its predecessors saw everything."""
        return self.epoch_at(step * self.global_batch)

    def epoch_after(self, read: Sequence[int]) -> int:
        """The first epoch of which nothing is read where each lane has read so many samples."""
        touched = (self._locate(lane, count - 1)[0] for lane, count in enumerate(read) if count)
        return max(self._untouched, *(1 + epoch for epoch in touched), 0)

    def epoch_before(self, read: Sequence[int]) -> int:
        """How many epochs are read to their end where each lane has read so many samples."""
        return min(self._locate(lane, count)[0] for lane, count in enumerate(read))

    def _generation(self, epoch: int) -> _Generation:
        return self._generations[bisect_right(self._generations, epoch, key=lambda one: one.epoch) - 1]

    def _before(self, epoch: int) -> int:
        """Samples of all epochs before ``epoch``."""
        generation = self._generation(epoch)
        return generation.before + (epoch - generation.epoch) * generation.samples

    def epoch_at(self, sample: int) -> int:
        """The last epoch before which there are at most so many samples."""
        generation = self._generations[bisect_right(self._generations, sample, key=lambda one: one.before) - 1]
        return generation.epoch + (sample - generation.before) // generation.samples

    def share_of(self, rank: int, world: int) -> range:
        """Which samples of a global batch, counted lane by lane, are a rank's."""
        if self.global_batch % world:
            raise InputError(
                f"there are {world} ranks, expected a number that divides the global batch ({self.global_batch})"
            )
        return range(rank * self.global_batch // world, (rank + 1) * self.global_batch // world)

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes that a rank reads; of the first and the last one perhaps not all."""
        share = self.share_of(rank, world)
        return range(share.start // self.per_lane, -(-share.stop // self.per_lane))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> list[Place]:
        """The samples of one rank in global step ``step`` (counted over all epochs), lane by lane."""
        share, found = self.share_of(rank, world), list[Place]()
        for lane in self.lanes_of(rank, world):
            first = lane * self.per_lane
            begin, end = max(share.start - first, 0), min(share.stop - first, self.per_lane)
            found += self.read(lane, step * self.per_lane + begin, end - begin)
        return found

    def next_shard(self, step: int, lane: int) -> int:
        """The shard that a lane reads after the one in which its samples of global step ``step`` end."""
        return self.shard_after(lane, (step + 1) * self.per_lane - 1)

    def shard_after(self, lane: int, position: int) -> int:
        """The shard that a lane reads after the one that holds a position of its stream."""
        epoch, place, left = self._locate(lane, position)
        shards, ends = self._shards(epoch)
        (first,) = self._generation(epoch).places(place, place + 1).tolist()
        slot = np.searchsorted(ends, first, side="right")
        size = int(self._generation(epoch).sizes[shards[slot]])
        following = self._generation(epoch).places(place, place + min(left, size))
        left = int(np.searchsorted(following, ends[slot]))
        epoch, place, _ = self._locate(lane, position + left)
        shards, ends = self._shards(epoch)
        (place,) = self._generation(epoch).places(place, place + 1).tolist()
        return int(shards[np.searchsorted(ends, place, side="right")])

    def read(self, lane: int, position: int, count: int) -> list[Place]:
        """``count`` samples of a lane's stream, from a position on."""
        found: list[Place] = []
        while count:
            epoch, place, left = self._locate(lane, position)
            some = min(count, left)
            found += self._find(epoch, self._generation(epoch).places(place, place + some))
            position, count = position + some, count - some
        return found

    def _locate(self, lane: int, position: int) -> tuple[int, int, int]:
        """A position of a lane's stream: its epoch, its place in what that reads, and samples left of the slice."""
        epoch = self.epoch_at(self.lanes * (position + 1) - 1 - lane)  # the last one that begins there or before
        begin, end = self._bounds(epoch, lane)
        return epoch, self._starts(epoch)[lane] + position - begin, end - position

    def _bounds(self, epoch: int, lane: int) -> tuple[int, int]:
        """Where a lane's slice of an epoch begins and ends in its stream."""
        begin, end = ((self._before(number) + lane) // self.lanes for number in (epoch, epoch + 1))
        return begin, end

    def _slice(self, epoch: int) -> list[int]:
        """Where the slice of each lane begins in what an epoch reads."""
        starts, place = [], 0
        for lane in range(self.lanes):
            starts.append(place)
            begin, end = self._bounds(epoch, lane)
            place += end - begin
        return starts

    def _find(self, epoch: int, places: np.ndarray) -> list[Place]:
        shards, ends = self._shards(epoch)
        found: list[Place] = []
        while len(places):
            slot = int(np.searchsorted(ends, places[0], side="right"))
            shard, end = int(shards[slot]), int(ends[slot])
            some = places[: np.searchsorted(places, end)]
            inside = self._inside(epoch, shard)[some - (end - int(self._generation(epoch).sizes[shard]))]
            found += [Place(shard, index, epoch) for index in inside.tolist()]
            places = places[len(some) :]
        return found

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in an epoch's order, and where each ends in S."""
        sizes = self._generation(epoch).sizes
        shards = np.argsort(self._bits(len(sizes), "shards", epoch), kind="stable")
        return shards, np.cumsum(sizes[shards])

    def _permute_clips(self, epoch: int, shard: int) -> np.ndarray:
        """The samples of a shard that an epoch sees, in its order."""
        generation = self._generation(epoch)
        clips = np.argsort(self._bits(int(generation.sizes[shard]), "samples", epoch, shard), kind="stable")
        kept = None if generation.kept is None else generation.kept[shard]
        if kept is not None:
            clips = np.flatnonzero(kept.any(1))[clips]
        if self.views == 1:
            return clips
        count = len(clips) if kept is None else len(kept)
        first = (self._bits(count, "view", shard) % np.uint64(self.views)).astype(np.int64)[clips] + epoch
        if kept is None:
            return clips * self.views + first % self.views
        passing = np.argsort(~kept[clips], 1, kind="stable")  # of each clip, the views that are seen come first
        return np.asarray(clips * self.views + passing[np.arange(len(clips)), first % kept[clips].sum(1)])

    def _bits(self, count: int, *key: str | int) -> np.ndarray:
        """Raw bits stay the same across numpy versions: that is promised of them, not of ``permutation()``."""
        return np.random.PCG64(keyed_seed(self.seed, "order", *key)).random_raw(count)
