"""A training whose dataset grows: the shards that were added are used from the beginning of the next epoch on.

Which shards which epochs use is decided with a checkpoint, by one rank for all, and stored in it, so that the order of
samples follows from the checkpoint and the index, whenever the dataset grew and whatever was killed since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cinemo import storage
from cinemo.config import TrainConfig
from cinemo.data.dataset import sidecars
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.training.report.progress import Grown, dataset_profile
from cinemo.training.run.dataset_check import dataset_digest, shards_of
from cinemo.types import InputError, RunError

Generations = list[tuple[int, int]]  # from which epoch on how many shards are used


def generations_of(index: DatasetIndex, state: Mapping[str, Any]) -> Generations:
    """What a checkpoint's state says of the shards that it was trained on.

    Raises:
        InputError: the dataset is not the one of the checkpoint, even without what was added since.
    """
    shards = shards_of(index, state["dataset"])
    if shards is None:
        raise InputError(f"dataset {index.uri}: changed while training ({state['dataset']} -> {dataset_digest(index)})")
    return [(epoch, count) for epoch, count in state.get("generations", ())] or [(0, shards)]


class GrowingData:
    """The loader of one rank, and the shards that it uses from which epoch on.

    Args:
        index: the dataset with at least the shards that ``generations`` name.
    """

    def __init__(
        self,
        index: DatasetIndex,
        generations: Generations,
        train: TrainConfig,
        rank: int,
        world: int,
        fields: Sequence[str],
    ) -> None:
        self.generations, self._fields, self._refused = list(generations[:1]), fields, 0
        self.loader = LatentLoader.of(index.first(generations[0][1]), train, rank, world, fields)
        for epoch, shards in generations[1:]:
            self._use(index.first(shards), epoch)

    def look(self) -> tuple[int, str | None] | None:
        """How many shards the dataset has by now, and what keeps them from being used; None where there is no news.

        Storage that does not answer is no news either: the next checkpoint looks again.
        """
        uri = self.loader.index.uri
        known = max(len(self.loader.index.shards), self._refused)
        try:
            if storage.read_json(storage.join(uri, "dataset.json")).get("shards", 0) <= known:
                return None
            index = DatasetIndex.load(uri)
        except (InputError, RunError, OSError, ValueError):
            return None
        shards = len(index.shards)
        if shards <= known:
            return None
        if shards_of(index, dataset_digest(self.loader.index)) is None:
            return shards, "its shards are others than before"
        try:
            for field in self._fields:
                sidecars.require(index, field)
        except (InputError, RunError, OSError) as error:
            return shards, str(error)
        return shards, None

    def follow(self, news: tuple[int, str | None], epoch: int) -> Grown:
        """Take up what another rank has found, from ``epoch`` on; returns what to say about it."""
        shards, fault = news
        before = self.loader.index
        text = f"{before.uri}: the dataset has grown from {len(before.shards)} to {shards} shards"
        if fault is not None:
            self._refused = shards
            return Grown(f"{text}, but this training goes on without the new ones: {fault}")
        index = DatasetIndex.load(before.uri).first(shards)
        samples = [int(one.samples_of_shards.sum()) for one in (before, index)]
        epoch = max(epoch, self.generations[-1][0])
        self._use(index, epoch)
        text = f"{text} ({samples[0]} to {samples[1]} samples); they are used from epoch {epoch} on"
        return Grown(text, dataset_digest(index), dataset_profile(index))

    def _use(self, index: DatasetIndex, epoch: int) -> None:
        self.loader.grow(index, epoch)
        self.generations = [one for one in self.generations if one[0] < epoch]
        self.generations.append((epoch, len(index.shards)))
