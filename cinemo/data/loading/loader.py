"""Training batches from a finished dataset, in the canonical order, from any step on; and those of a validation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from cinemo.cache import Damaged, FileCache
from cinemo.config import TrainConfig
from cinemo.data.dataset import sidecars
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.order import Place, SampleOrder
from cinemo.data.loading.reader import ShardReader
from cinemo.media.stills import frame_of, jpeg_strip
from cinemo.types import InputError, LatentSample, RunError


@dataclass(frozen=True)
class StepBatch:
    """One rank's samples of global step ``step``, which begins in ``epoch`` (passes over the dataset).

    ``weights``: for each sample 1, or 0 where another sample stands in for one that cannot be read or is none: every
    rank makes as many forward passes as ever, and a mean over the samples that are really there is
    ``sum(weight * loss) / sum(weight)`` with both sums over all ranks. None: every sample counts.
    ``epochs``: of each sample; a step may hold the end of one and the beginning of the next. None: all in ``epoch``.
    """

    step: int
    epoch: int
    samples: list[LatentSample]
    weights: list[float] | None = None
    epochs: list[int] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The ids of the samples that are there."""
        weights = self.weights or [1.0] * len(self.samples)
        return tuple(sample.key for sample, weight in zip(self.samples, weights, strict=True) if weight)


@dataclass(frozen=True)
class Skipped:
    """Damaged shards that were met, and samples that were left out of batches for them, on this rank."""

    shards: int
    samples: int


class NothingLeft(RunError):
    """Every shard that could be read from is damaged or missing."""


class LatentLoader:
    """Reads one rank's share of every global batch.

    Args:
        fields: what samples carry beside their latents (`cinemo.data.dataset.fields`); read from the sidecars.
        held_out_shards: the last shards of the index, which are not read (see `HeldOut`).
        kept: whether each sample of the index is seen (`cinemo.data.dataset.filters.select`); None: all are.
        still: show of each clip its first frame alone, as a clip without motion (`as_still`).
        on_damaged: with ``skip`` a shard that is missing or damaged costs its samples; the place of everything else
            stays as it is.
        cache_gb: disk that copies of shards on s3:// may take on this node.

    A local shard is mapped, one on s3:// is mapped from a bounded cache. Its content is compared with the index when it
    is opened for the first time. The next shard of each lane is opened ahead, in the background.

    Raises:
        InputError: a field was not made for this dataset, or no shard is left to train on.
        Damaged: a shard or sidecar is missing, or its bytes are not those of its record.
    """

    def __init__(
        self,
        index: DatasetIndex,
        *,
        global_batch: int,
        lanes: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        fields: Sequence[str] = (),
        held_out_shards: int = 0,
        on_damaged: str = "stop",
        cache_gb: float = 20.0,
        kept: np.ndarray | None = None,
        still: bool = False,
    ) -> None:
        self.index, self.rank, self.world, self._still = index, rank, world, still
        self._held_out = range(first_held_out(index, held_out_shards), len(index.shards))
        sizes = index.samples_of_shards[: self._held_out.start]
        kept = None if kept is None else kept[: sizes.sum()]
        self.order = SampleOrder(sizes, global_batch=global_batch, lanes=lanes, seed=seed, views=index.views, kept=kept)
        self.note: str | None = None  # worth telling whoever watches the run
        if self.order.samples < global_batch:
            self.note = (
                f"{self.order.samples} samples are fewer than a global batch of {global_batch}, so a batch repeats some"
            )
        self._reader = ShardReader(index, fields, FileCache(cache_gb * 1e9), keep=2 * -(-lanes // world))
        self._samples = _Samples(self._reader, on_damaged == "skip")

    @classmethod
    def of(
        cls,
        index: DatasetIndex,
        train: TrainConfig,
        rank: int = 0,
        world: int = 1,
        fields: Sequence[str] = (),
        kept: np.ndarray | None = None,
        still: bool = False,
    ) -> LatentLoader:
        """The loader that a recipe asks for."""
        return cls(
            index,
            rank=rank,
            world=world,
            fields=fields,
            kept=kept,
            still=still,
            lanes=train.reading_lanes,
            **{name: getattr(train, name) for name in ("global_batch", "seed")},
            **{name: getattr(train, name) for name in ("held_out_shards", "on_damaged", "cache_gb")},
        )

    def changed(self, read: Sequence[int], global_batch: int, lanes: int) -> LatentLoader:
        """The loader that goes on where each lane has read so many samples, as `SampleOrder.changed` has it.

        It shares this one's open shards, and takes its place.
        """
        made = copy.copy(self)
        made.order = self.order.changed(read, global_batch, lanes)
        made._reader.keep = 2 * -(-lanes // self.world)
        return made

    @property
    def skipped(self) -> Skipped:
        """What damaged shards have cost so far in the batches that were made."""
        return self._samples.skipped

    def grow(self, index: DatasetIndex, epoch: int, kept: np.ndarray | None = None) -> None:
        """From the beginning of ``epoch`` on, of which no batch was made yet, use a dataset that has become longer.

        What was held out stays so. Another thread may be making batches. ``kept``: as for a new loader.

        Raises:
            InputError: a field was not made for the new shards.
        """
        for field in self._reader.fields:
            sidecars.require(index, field)
        sizes = index.samples_of_shards.copy()
        held_out = slice(self._held_out.start, self._held_out.stop)
        if kept is None:
            sizes[held_out] = 0
        else:
            kept = kept & ~np.repeat(np.isin(np.arange(len(sizes)), self._held_out), sizes)
        self._reader.extend(index)
        self.index, self.order = index, self.order.grown(epoch, sizes, kept)

    def batches(self, start_step: int = 0) -> Iterator[StepBatch]:
        """Batches from global step ``start_step`` on, without end; epochs follow each other."""
        return map(self.batch, count(start_step))

    def batch(self, step: int) -> StepBatch:
        order = self.order
        places = order.batch(step, self.rank, self.world)
        lanes = order.lanes_of(self.rank, self.world)
        samples, weights = self.read(places, [order.next_shard(step, lane) for lane in lanes])
        return StepBatch(step, order.epoch(step), samples, weights, [place.epoch for place in places])

    def read(self, places: Sequence[Place], following: Sequence[int]) -> tuple[list[LatentSample], list[float] | None]:
        """The samples at some places, with weights as `StepBatch` has them; ``following`` shards are opened ahead."""
        self._reader.want([*(place.shard for place in places), *following])
        samples, weights = self._samples.read([(place.shard, place.index) for place in places])
        return [as_still(sample) for sample in samples] if self._still else samples, weights

    def sample(self, position: int, index: int) -> LatentSample:
        """Sample ``index`` of the shard at ``position`` in the dataset's index."""
        return self._reader.get(position).sample(index)


class HeldOut:
    """The samples that no training sees: those of the last ``shards`` shards of the index, in its order.

    Of a clip with several views the first one. ``len()`` counts them.

    Raises:
        InputError: no shard would be left to train on, or a field was not made for this dataset.
    """

    def __init__(
        self,
        index: DatasetIndex,
        shards: int,
        *,
        fields: Sequence[str] = (),
        on_damaged: str = "stop",
        cache_gb: float = 20.0,
    ) -> None:
        first = first_held_out(index, shards)
        sizes = index.samples_of_shards[first:].tolist()
        self._places = [
            (first + shard, place) for shard, size in enumerate(sizes) for place in range(0, size, index.views)
        ]
        self._reader = ShardReader(index, fields, FileCache(cache_gb * 1e9), keep=1)
        self._skip = on_damaged == "skip"

    @classmethod
    def of(cls, index: DatasetIndex, train: TrainConfig, fields: Sequence[str] = ()) -> HeldOut:
        """The held-out samples of a training."""
        return cls(index, train.held_out_shards, fields=fields, on_damaged=train.on_damaged, cache_gb=train.cache_gb)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, numbers: Sequence[int]) -> tuple[list[LatentSample], list[float] | None]:
        """Some of the samples, counted from 0, and their weights as `StepBatch` has it."""
        return _Samples(self._reader, self._skip).read([self._places[number] for number in numbers])

    def batches(self, size: int, rank: int = 0, world: int = 1) -> Iterator[StepBatch]:
        """Every sample once over all ranks, ``size`` a batch. Each rank gets the same number of batches of ``size``.

        What does not fill the last batches is filled up with samples of weight 0.
        """
        samples = _Samples(self._reader, self._skip)
        whole = size * world
        for step, start in enumerate(range(0, len(self._places), whole)):
            mine = self._places[start + rank * size : start + (rank + 1) * size]
            found, weights = samples.read([*mine, *[None] * (size - len(mine))])
            yield StepBatch(step, 0, found, weights)


def as_still(sample: LatentSample) -> LatentSample:
    """A clip that shows a sample's first frame all the time, with the score of what does not move."""

    def repeated(array: np.ndarray) -> np.ndarray:
        # Without a copy, as `np.broadcast_to` would, in a fifth of its time.
        return np.ndarray(array.shape, array.dtype, array, strides=(0, *array.strides[1:]))

    fields = dict(sample.fields)
    if "flow" in fields:
        fields["flow"] = np.zeros_like(fields["flow"])
    if "frame_tokens" in fields:
        fields["frame_tokens"] = repeated(fields["frame_tokens"])
    if "frames" in fields:
        count = len(sample.latents_FCHW)
        fields["frames"] = jpeg_strip(np.stack([frame_of(fields["frames"], count)] * count))
    return sample.changed(latents_FCHW=repeated(sample.latents_FCHW), ssim=1.0, fields=fields)


def first_held_out(index: DatasetIndex, held_out_shards: int) -> int:
    """The position in the index of the first shard that training does not see.

    Raises:
        InputError: that leaves no shard to train on.
    """
    shards = len(index.shards)
    if held_out_shards >= shards:
        raise InputError(
            f"train.held_out_shards is {held_out_shards}, but {index.uri} has {shards} shards; "
            f"expected at most {shards - 1}, so that one is left to train on"
        )
    return shards - held_out_shards


class _Samples:
    """Samples of an open reader, with others in the place of those that cannot be read.

    Args:
        skip: whether a damaged shard is passed over, instead of raised.
    """

    def __init__(self, reader: ShardReader, skip: bool) -> None:
        self._reader, self._skip = reader, skip
        self._lost: set[int] = set()
        self._left_out = 0
        self._any: LatentSample | None = None

    @property
    def skipped(self) -> Skipped:
        return Skipped(len(self._lost), self._left_out)

    def read(self, places: Sequence[tuple[int, int] | None]) -> tuple[list[LatentSample], list[float] | None]:
        """The samples at (position of the shard, index), None for nothing; and their weights, as `StepBatch` has it."""
        found = [self._one(*place) if place else None for place in places]
        there = [sample for sample in found if sample is not None]
        if len(there) == len(found):
            self._any = there[-1] if there else self._any
            return there, None
        if there:
            self._any = there[-1]
        stand_in = self._any or self._find()
        return [sample or stand_in for sample in found], [float(sample is not None) for sample in found]

    def _one(self, position: int, index: int) -> LatentSample | None:
        try:
            return self._reader.get(position).sample(index)
        except Damaged as error:
            if not self._skip:
                raise
            self._left_out += 1
            if position not in self._lost:
                self._lost.add(position)
                logging.getLogger(__name__).warning("shard is left out: %s", error)
            return None

    def _find(self) -> LatentSample:
        """Some sample, where a whole batch is missing and nothing was read before."""
        for position in np.flatnonzero(self._reader.index.samples_of_shards).tolist():
            try:
                self._any = self._reader.get(position).sample(0)
            except Damaged:
                continue
            return self._any
        raise NothingLeft(f"{self._reader.index.uri}: every shard is damaged or missing; run precompute.py again")
