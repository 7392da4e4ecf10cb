"""What a training reads: one dataset or several in shares, all of it or what a filter leaves, and longer ones as they
grow: the shards that were added are used from the beginning of the next epoch on.

Which shards which epochs use is decided with a checkpoint, by one rank for all, and stored in it, so that the order of
samples follows from the checkpoint and the indexes, whenever a dataset grew and whatever was killed since. So is with
which global batch and lanes which steps were read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cinemo import storage
from cinemo.config import TrainConfig
from cinemo.data.dataset import sidecars
from cinemo.data.dataset.filters import select
from cinemo.data.dataset.shards import DatasetIndex, pixels
from cinemo.data.loading.loader import LatentLoader, first_held_out
from cinemo.data.loading.mix import MixedLoader
from cinemo.data.loading.shapes import ShapesLoader
from cinemo.data.loading.source import Source
from cinemo.training.report.progress import Grown, dataset_profile
from cinemo.training.run.dataset_check import dataset_digest, shards_of
from cinemo.types import InputError, RunError

Generations = list[tuple[int, int]]  # from which epoch on how many shards are used
Batches = tuple[int, int, int]  # from which step on, of how many samples a global batch is, of how many lanes
News = list[tuple[int, int, str | None]]  # number of the source, its shards now, and what keeps them from being used


def digest_of(indexes: Sequence[DatasetIndex]) -> str:
    """Identifies the content of all datasets of a training, in their order."""
    return "+".join(map(dataset_digest, indexes))


def generations_of(
    indexes: Sequence[DatasetIndex], sources: Sequence[Source], made: Mapping[str, Any]
) -> list[Generations]:
    """By source, what a checkpoint says of the shards that it was trained on.

    Args:
        made: ``dataset`` and ``sources`` of the checkpoint; older ones have only the former.

    Raises:
        InputError: it was trained on other datasets, even without what was added since, or in other shares.
    """
    digests = made["dataset"].split("+")
    shards = [shards_of(index, digest) for index, digest in zip(indexes, digests, strict=False)]
    if len(digests) != len(indexes) or None in shards:
        raise InputError(f"was trained on dataset {made['dataset']}, but --data is {digest_of(indexes)}")
    stored = made.get("sources") or [describe(Source(""), [(0, shards[0] or 0)])]
    for source, there in zip(sources, stored, strict=True):
        here = describe(source, [])
        changed = [f"{name} {there[name]} -> {here[name]}" for name in ("weight", "still") if there[name] != here[name]]
        if changed and (len(sources) > 1 or source.still != there["still"]):
            raise InputError(f"was trained with another {' and '.join(changed)} of {source.uri}")
    return [[(epoch, count) for epoch, count in there["generations"]] for there in stored]


def batches_of(made: Mapping[str, Any], made_with: Mapping[str, Any], train: TrainConfig) -> list[Batches]:
    """How a training goes on that takes up a checkpoint: as it was, or from its step on as ``train`` says.

    Args:
        made: ``step`` and ``batches`` of the checkpoint; older ones lack the latter: nothing had changed.
        made_with: the ``train`` part of the recipe in it.
    """
    stored = made["batches"] if "batches" in made else [(0, made_with["global_batch"], made_with["lanes"])]
    batches = [(step, size, lanes) for step, size, lanes in stored]
    wanted = train.global_batch, train.reading_lanes
    return batches if batches[-1][1:] == wanted else [*batches, (made["step"], *wanted)]


def describe(source: Source, generations: Generations) -> dict[str, Any]:
    """What a checkpoint remembers of a source."""
    return {"weight": str(source.weight), "still": source.still, "generations": [list(one) for one in generations]}


class TrainingData:
    """The loader of one rank, and which shards of which source it uses from which epoch on.

    Args:
        indexes: the datasets with at least the shards that ``generations`` name.
        batches: with which global batch and lanes steps are read. The first entry's step is the first one that reads
            these datasets. None: as ``train`` says from step 0 on.
        once: calls a function on one rank, and returns on every rank what it returned.

    Raises:
        InputError: a filter that cannot be computed or leaves nothing, or what a loader refuses.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        indexes: Sequence[DatasetIndex],
        generations: Sequence[Generations],
        train: TrainConfig,
        rank: int = 0,
        world: int = 1,
        fields: Sequence[str] = (),
        once: Callable[[Callable[[], Any]], Any] = lambda call: call(),
        batches: Sequence[Batches] | None = None,
    ) -> None:
        self.batches = list(batches or [(0, train.global_batch, train.reading_lanes)])
        first_step, size, lanes = self.batches[0]
        train = train.model_copy(update={"global_batch": size, "lanes": lanes})
        self._sources, self._train, self._fields, self._once = sources, train, fields, once
        self._refused = [0] * len(sources)
        self.generations = [list(one[:1]) for one in generations]
        self.indexes = [index.first(one[0][1]) for index, one in zip(indexes, generations, strict=True)]
        make = functools.partial(LatentLoader.of, rank=rank, world=world, fields=fields)
        shapes = list(dict.fromkeys(shape for index in self.indexes for shape in index.latent_shapes))
        self._several = len(shapes) > 1
        if self._several:
            self.loader: MixedLoader = ShapesLoader(self._by_shape(make), first_step)
        else:
            self.loader = MixedLoader(
                [
                    make(index, train, kept=self._kept(index), still=source.still)
                    for source, index in zip(sources, self.indexes, strict=True)
                ],
                [source.weight for source in sources],
                first_step,
            )
            for number, (index, later) in enumerate(zip(indexes, generations, strict=True)):
                for epoch, shards in later[1:]:
                    self._use(number, index.first(shards), epoch)
        # What was added since a batch changed was so from an epoch on of which nothing had been read by then.
        for step, size, lanes in self.batches[1:]:
            self.loader = self.loader.changed(step, size, lanes)

    def _by_shape(self, make: Callable[..., LatentLoader]) -> list[LatentLoader]:
        """A loader for each shape of the only dataset that is seen at all."""
        if len(self._sources) > 1:
            raise InputError(
                "--data: the samples of these datasets have several shapes, which a mix cannot have; train on one of "
                "them, or precompute all clips into one dataset"
            )
        (index,), train = self.indexes, self._train.model_copy(update={"held_out_shards": 0})
        seen = index.first(first_held_out(index, self._train.held_out_shards))
        kept = self._kept(index)
        loaders = []
        for shape in seen.latent_shapes:
            own = seen.of_shape(shape)
            mine = None
            if kept is not None:
                mine = kept[: int(seen.samples_of_shards.sum())][
                    np.repeat(np.isin(seen.shards, own.shards), seen.samples_of_shards)
                ]
                if not mine.any():
                    continue
            loaders.append(make(own, train, kept=mine, still=self._sources[0].still))
        if not loaders:
            raise InputError("the dataset has no samples to train on")
        return loaders

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of its data."""
        made = [describe(*one) for one in zip(self._sources, self.generations, strict=True)]
        batches = [list(one) for one in self.batches]
        return {"dataset": digest_of(self.indexes), "sources": made, "batches": batches}

    def lines(self) -> Iterator[str]:
        """What is worth saying about the data before the training."""
        loaders, where = self.loader.loaders, self._train.where
        if self._several:
            yield from self._lines_by_shape()
            return
        for source, loader in zip(self._sources, loaders, strict=True):
            held_out = min(self._train.held_out_shards, len(loader.index.shards))
            everything = (
                int(loader.index.samples_of_shards[: len(loader.index.shards) - held_out].sum()) // loader.order.views
            )
            if len(loaders) > 1 or source.still:
                share = float(source.weight / sum(one.weight for one in self._sources))
                yield f"{share:.1%} of samples: {source.uri}{' as stills' if source.still else ''}"
            if where:
                yield f"{source.uri}: {loader.order.samples} of {everything} clips are seen, where {where}"
            if loader.note and len(loaders) == 1:
                yield f"{source.uri}: {loader.note}"

    def _lines_by_shape(self) -> Iterator[str]:
        loaders = self.loader.loaders
        total = sum(loader.order.samples for loader in loaders)
        if self._train.where:
            yield f"{self._sources[0].uri}: {total} clips are seen, where {self._train.where}"
        for loader in loaders:
            frames, height, width = pixels(loader.index.latent_shapes[0])
            yield (
                f"{loader.order.samples / total:.1%} of steps: {loader.order.samples} samples of {frames} frames, "
                f"{width}x{height}" + (f"; {loader.note}" if loader.note else "")
            )

    def follow(self, step: int, ahead: int) -> list[Grown]:
        """Take up what the datasets have gained, from the next epoch on of which nothing was read; the same on all
        ranks. Returns what to say about it.

        Args:
            ahead: batches that may have been made beyond ``step``.
        """
        return [self._take_up(step + ahead, *one) for one in self._once(self._look)]

    def _look(self) -> News:
        return [
            (number, *found) for number in range(len(self._sources)) if (found := self._look_at(number)) is not None
        ]

    def _look_at(self, number: int) -> tuple[int, str | None] | None:
        """How many shards a dataset has by now, and what keeps them from being used; None where there is no news.

        Storage that does not answer is no news either: the next checkpoint looks again.
        """
        before = self.indexes[number]
        known = max(len(before.shards), self._refused[number])
        try:
            if storage.read_json(storage.join(before.uri, "dataset.json")).get("shards", 0) <= known:
                return None
            index = DatasetIndex.load(before.uri)
            shards = len(index.shards)
            if shards <= known:
                return None
            if shards_of(index, dataset_digest(before)) is None:
                return shards, "its shards are others than before"
        except (InputError, RunError, OSError, ValueError):
            return None
        if self._several or len(index.latent_shapes) > 1:
            return shards, "samples of several shapes are dealt out when a training begins"
        try:
            for field in self._fields:
                sidecars.require(index, field)
        except (InputError, RunError, OSError) as error:
            return shards, str(error)
        return shards, None

    def _take_up(self, step: int, number: int, shards: int, fault: str | None) -> Grown:
        before = self.indexes[number]
        text = f"{before.uri}: the dataset has grown from {len(before.shards)} to {shards} shards"
        if fault is not None:
            self._refused[number] = shards
            return Grown(f"{text}, but this training goes on without the new ones: {fault}")
        index = DatasetIndex.load(before.uri).first(shards)
        samples = [int(one.samples_of_shards.sum()) for one in (before, index)]
        unread = self.loader.loaders[number].order.epoch_after(self.loader.read_before(step, number))
        epoch = max(unread, self.generations[number][-1][0])
        self._use(number, index, epoch)
        text = f"{text} ({samples[0]} to {samples[1]} samples); they are used from epoch {epoch} on"
        return Grown(text, digest_of(self.indexes), dataset_profile(index))

    def _use(self, number: int, index: DatasetIndex, epoch: int) -> None:
        self.loader.loaders[number].grow(index, epoch, self._kept(index))
        self.indexes[number] = index
        earlier = [one for one in self.generations[number] if one[0] < epoch]
        self.generations[number] = [*earlier, (epoch, len(index.shards))]

    def _kept(self, index: DatasetIndex) -> np.ndarray | None:
        where = self._train.where
        return None if where is None else self._once(lambda: select(index, where))


def opened(sources: Sequence[Source]) -> list[DatasetIndex]:
    """The datasets of a training as they are now."""
    return [DatasetIndex.load(storage.absolute(source.uri)) for source in sources]
