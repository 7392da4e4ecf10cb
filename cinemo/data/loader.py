"""Training batches from a finished dataset, in the canonical order, from any step on."""

from __future__ import annotations

import hashlib
import mmap
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cinemo import storage
from cinemo.data import shards, sidecars
from cinemo.data.order import SampleOrder
from cinemo.data.shards import DatasetIndex, Members
from cinemo.data.sidecars import Sidecar
from cinemo.types import LatentSample, RunError


@dataclass(frozen=True)
class StepBatch:
    """One rank's samples of global step ``step``; ``epoch`` counts passes over the dataset."""

    step: int
    epoch: int
    samples: list[LatentSample]


class LatentLoader:
    """Reads one rank's share of every global batch.

    Args:
        fields: what samples carry beside their latents (`cinemo.data.fields`); read from the sidecars.

    Shards on s3:// are fetched whole, once, into the cache; a local file is mapped. The content is checked against the
    commit record when a shard is opened for the first time.

    Raises:
        InputError: a field was not made for this dataset.
        RunError: a shard or sidecar is missing, or its bytes are not those of its record.
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
    ) -> None:
        self.index, self.rank, self.world = index, rank, world
        self.order = SampleOrder(index.samples_of_shards, global_batch=global_batch, lanes=lanes, seed=seed)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.note: str | None = None  # worth telling whoever watches the run
        if self.order.repeats:
            self.note = f"{self.order.samples} samples are fewer than a global batch of {global_batch}: they repeat"
        self._names = index.shards
        for field in fields:
            sidecars.require(index, field)
        self.fields = tuple(fields)
        self._open: OrderedDict[int, tuple[memoryview, Members, list[Sidecar]]] = OrderedDict()
        # A lane reads one shard and may end in the next.
        self._limit = 2 * (lanes // world) + 1
        self._verified: set[int] = set()

    def batches(self, start_step: int = 0) -> Iterator[StepBatch]:
        """Batches from global step ``start_step`` on, without end; epochs follow each other."""
        step = start_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> StepBatch:
        places = self.order.batch(step, self.rank, self.world)
        samples = [self.sample(place.shard, place.index) for place in places]
        return StepBatch(step, step // self.steps_per_epoch, samples)

    def sample(self, position: int, index: int) -> LatentSample:
        """Sample ``index`` of the shard at ``position`` in the dataset's index."""
        tar, members, beside = self._shard(position)
        sample = shards.read_sample(tar, members, index)
        values = {sidecar.field: sidecar.read(sample.key) for sidecar in beside}
        return replace(sample, fields={field: value for field, value in values.items() if value is not None})

    def _shard(self, position: int) -> tuple[memoryview, Members, list[Sidecar]]:
        if position in self._open:
            self._open.move_to_end(position)
            return self._open[position]
        number = self._names[position]
        uri = shards.tar_uri(self.index.uri, number)
        try:
            record: dict[str, Any] = storage.read_json(shards.record_uri(self.index.uri, number))
            with storage.localize(uri).open("rb") as file:
                tar = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (FileNotFoundError, ValueError) as error:
            raise RunError(
                f"{uri}: the shard or its record cannot be read ({error}); run precompute.py again"
            ) from None
        fresh = position not in self._verified
        if fresh:
            digest = hashlib.sha256(tar).hexdigest()
            if digest != record["sha256"]:
                raise RunError(
                    f"{uri}: sha256 is {digest[:12]}..., its record says {record['sha256'][:12]}...; "
                    f"remove {shards.record_uri(self.index.uri, number)} and run precompute.py again"
                )
        beside = [Sidecar.open(self.index.uri, field, number, record["sha256"], fresh) for field in self.fields]
        self._verified.add(position)
        if len(self._open) >= self._limit:
            self._open.popitem(last=False)
        self._open[position] = tar, Members(**record["members"]), beside
        return self._open[position]
