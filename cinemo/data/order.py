"""The canonical order in which a training run sees its samples: a function of shard sizes, seed and epoch alone.

In every epoch the shards are permuted, the samples inside each shard are permuted, and all are laid end to end as
``S[0..N)``. ``lanes`` equal slices of length ``n = N // lanes`` are read side by side: global batch ``k`` is made of
``S[l * n + k * m : l * n + (k + 1) * m]`` for each lane ``l``, with ``m = global_batch / lanes``. A rank owns whole
lanes. So the global batch is the same for every number of ranks, any step can be found without reading what lies before
it, and a rank has only a few shards open at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cinemo.types import InputError, keyed_seed


@dataclass(frozen=True)
class Place:
    """Sample ``index`` of the ``shard``-th shard (both counted from 0 in the order of the index)."""

    shard: int
    index: int


class SampleOrder:
    """Where the samples of a step lie.

    Args:
        samples_of_shards: how many samples each shard holds.
        global_batch: samples of one optimizer step over all ranks; a multiple of ``lanes``.
        lanes: reading lanes; a multiple of the number of ranks.

    Where there are fewer samples than one global batch, the epoch is one step that repeats them in order.
    """

    def __init__(self, samples_of_shards: np.ndarray, *, global_batch: int, lanes: int, seed: int) -> None:
        self.sizes = np.asarray(samples_of_shards, np.int64)
        self.samples = int(self.sizes.sum())
        if not self.samples:
            raise InputError("the dataset has no samples")
        if global_batch % lanes:
            raise InputError(f"global_batch is {global_batch}, expected a multiple of lanes ({lanes})")
        self.lanes, self.seed = lanes, seed
        self.per_lane = global_batch // lanes
        self.repeats = self.samples < global_batch
        self.lane_length = max(self.samples, global_batch) // lanes
        self.steps_per_epoch = self.lane_length // self.per_lane
        self._epoch = functools.lru_cache(2)(self._permute_shards)
        self._inside = functools.lru_cache(4 * lanes)(self._permute_samples)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> list[Place]:
        """The samples of one rank in global step ``step`` (counted over all epochs), lane by lane."""
        if self.lanes % world:
            raise InputError(f"there are {world} ranks, expected a number that divides lanes ({self.lanes})")
        epoch, k = divmod(step, self.steps_per_epoch)
        mine = range(rank * self.lanes // world, (rank + 1) * self.lanes // world)
        starts = np.array([lane * self.lane_length + k * self.per_lane for lane in mine])
        positions = (starts[:, None] + np.arange(self.per_lane)).ravel() % self.samples
        return self._find(epoch, positions)

    def _find(self, epoch: int, positions: np.ndarray) -> list[Place]:
        shards, ends = self._epoch(epoch)
        slots = np.searchsorted(ends, positions, side="right")
        places = []
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            shard = int(shards[slot])
            offset = position - (int(ends[slot]) - int(self.sizes[shard]))
            places.append(Place(shard, int(self._inside(epoch, shard)[offset])))
        return places

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = _permutation(len(self.sizes), self.seed, "shards", epoch)
        return shards, np.cumsum(self.sizes[shards])

    def _permute_samples(self, epoch: int, shard: int) -> np.ndarray:
        return _permutation(int(self.sizes[shard]), self.seed, "samples", epoch, shard)


def _permutation(count: int, seed: int, *key: str | int) -> np.ndarray:
    """A permutation that stays the same across numpy versions: raw bits are promised to, ``permutation()`` is not."""
    bits = np.random.PCG64(keyed_seed(seed, "order", *key)).random_raw(count)
    return np.argsort(bits, kind="stable")
