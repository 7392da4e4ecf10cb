"""Shards of a finished dataset, open for reading: mapped, checked on first use, opened ahead by threads."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from cinemo import checksums, storage
from cinemo.cache import Damaged, FileCache
from cinemo.data.dataset import shards, sidecars
from cinemo.data.dataset.shards import DatasetIndex, Members
from cinemo.data.dataset.sidecars import Sidecar
from cinemo.types import LatentSample

_AT_ONCE = 8


@dataclass(frozen=True)
class OpenShard:
    """A shard with its sidecars. Samples are views of its map and keep it alive."""

    tar: memoryview
    members: Members
    beside: list[Sidecar]

    def sample(self, index: int) -> LatentSample:
        sample = shards.read_sample(self.tar, self.members, index)
        if not self.beside:
            return sample
        values = {sidecar.field: sidecar.read(sample.key) for sidecar in self.beside}
        return replace(sample, fields={field: value for field, value in values.items() if value is not None})


class ShardReader:
    """Opens shards by their position in the index.

    Args:
        fields: what samples carry beside their latents (`cinemo.data.dataset.fields`); read from the sidecars.
        keep: shards that stay open beside those that are wanted.

    ``damaged``: what is wrong with the shards that could not be opened, by position; they are not tried again.

    Raises:
        InputError: a field was not made for this dataset.
    """

    def __init__(self, index: DatasetIndex, fields: Sequence[str], cache: FileCache, keep: int) -> None:
        for field in fields:
            sidecars.require(index, field)
        self.fields, self.cache = tuple(fields), cache
        self.damaged: dict[int, str] = {}
        self.extend(index)
        self.keep = keep
        self._open: OrderedDict[int, Future[OpenShard]] = OrderedDict()
        self._checked: set[int] = set()
        # Threads of their own and no pool: Python waits for a pool's threads at its end, and S3 may be out.
        self._turn = threading.Semaphore(_AT_ONCE)

    def extend(self, index: DatasetIndex) -> None:
        """Read from the same dataset with more shards behind those that it had."""
        self._numbers, self._checksums = index.shards, index.table["checksum"].to_pylist()
        self._sizes = index.table["bytes"].to_pylist()
        self.index = index

    def want(self, positions: Iterable[int]) -> None:
        """Open shards in the background, the first ones first, and let go of what was not wanted for long."""
        wanted = list(dict.fromkeys(positions))
        for position in reversed(wanted):
            if position in self._open:
                self._open.move_to_end(position)
        for position in wanted:
            if position not in self._open and position not in self.damaged:
                future: Future[OpenShard] = Future()
                self._open[position] = future
                threading.Thread(target=self._run, args=(position, future), name="shard", daemon=True).start()
        while len(self._open) > self.keep + len(wanted):
            self._open.popitem(last=False)

    def get(self, position: int) -> OpenShard:
        """An open shard; waits for it where it was not wanted early enough.

        Raises:
            Damaged: a file of it is missing, or its bytes are not those of its record.
            RunError, InputError: storage does not answer, or forbids it.
        """
        if position not in self._open:
            self.want([position])
        if position in self.damaged:
            raise Damaged(self.damaged[position])
        try:
            return self._open[position].result()
        except BaseException as error:
            del self._open[position]
            if isinstance(error, Damaged):
                self.damaged[position] = str(error)
            raise

    def _run(self, position: int, future: Future[OpenShard]) -> None:
        with self._turn:
            try:
                future.set_result(self._load(position))
            except BaseException as error:
                future.set_exception(error)

    def _load(self, position: int) -> OpenShard:
        number, checksum = self._numbers[position], self._checksums[position]
        uri, place = shards.tar_uri(self.index.uri, number), shards.record_uri(self.index.uri, number)
        fresh = position not in self._checked
        try:
            record = storage.read_json(place)
            if (written := checksums.recorded(record)) != checksum:
                shown = checksums.brief(written), checksums.brief(checksum)
                raise Damaged(f"{uri}: its record says {shown[0]}, the index says {shown[1]}")
            tar = self.cache.map(uri, checksum, self._sizes[position], fresh)
            members = Members(**record["members"])
        except Damaged as error:
            raise Damaged(f"{error}; remove {place} and run precompute.py again") from None
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise Damaged(f"{uri}: the shard or its record cannot be read ({error}); run precompute.py again") from None
        beside = [Sidecar.open(self.index.uri, field, number, checksum, fresh, self.cache) for field in self.fields]
        self._checked.add(position)
        return OpenShard(tar, members, beside)
