"""What is committed, so that a run that was stopped knows in seconds, without listing or reading all shards.

The driver writes the index rows of each `SEGMENT` consecutive shards to ``<output>/.progress/`` once all of them are
committed. The commit records stay the authority: a lost journal costs time, and a finished dataset has none.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cinemo import storage
from cinemo.data.dataset.shards import INDEX_SCHEMA, index_table

SEGMENT = 1000
DIRECTORY = ".progress"
_AT_ONCE = 16
_STAMP = b"cinemo.dataset"


class Journal:
    """Index rows of committed shards: those of whole segments as Arrow tables, newer ones as dictionaries.

    Args:
        stamp: what the shards are made from; segments of another stamp are not read.
        planned: the shards that segments are written of, from the first one on.
    """

    def __init__(self, dataset: str, stamp: str, planned: range) -> None:
        self.dataset, self.stamp, self.planned = dataset, stamp, planned
        self.written = 0  # segments on storage
        self._tables: list[pa.Table] = []
        self._rows: dict[int, dict[str, Any]] = {}

    def read(self) -> pa.Table:
        """Take over the segments on storage, up to the first one that is missing; returns their rows."""
        segments = list(self._segments())
        self.written = len(segments)
        self._tables += segments
        return pa.concat_tables([INDEX_SCHEMA.empty_table(), *segments])

    def adopt(self, table: pa.Table) -> None:
        """Start from the index of a finished dataset."""
        self._tables.append(table)

    def drop(self, lost: set[int]) -> None:
        """Forget shards that are not there any more."""
        gone = pa.array(sorted(lost), pa.int32())
        self._tables = [table.filter(pc.invert(pc.is_in(table["shard"], gone))) for table in self._tables]

    def add(self, row: Mapping[str, Any]) -> None:
        """A shard was committed, or found to be."""
        self._rows[row["shard"]] = dict(row)
        while (self.written + 1) * SEGMENT <= len(self.planned):
            numbers = self.planned[self.written * SEGMENT : (self.written + 1) * SEGMENT]
            if not all(number in self._rows for number in numbers):
                return
            table = pa.Table.from_pylist([self._rows.pop(number) for number in numbers], INDEX_SCHEMA)
            storage.write_bytes(self._uri(self.written), _encoded(table, self.stamp))
            self._tables.append(table)
            self.written += 1

    def table(self) -> pa.Table:
        """All rows, ordered by shard."""
        rows = pa.Table.from_pylist(list(self._rows.values()), INDEX_SCHEMA)
        table = pa.concat_tables([*self._tables, rows])
        return table if (np.diff(table["shard"]) > 0).all() else table.sort_by("shard")

    def remove(self) -> None:
        """Remove it from storage, the last segment first: what is left of it is always a beginning."""
        there = 0
        while storage.exists(self._uri(there)):
            there += 1
        for number in reversed(range(there)):
            storage.remove_file(self._uri(number))
        directory = storage.join(self.dataset, DIRECTORY)
        if not storage.is_remote(directory):
            storage.remove(directory)
        self.written = 0

    def _segments(self) -> Iterator[pa.Table]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for first in count(0, _AT_ONCE):
                for table in pool.map(self._segment, range(first, first + _AT_ONCE)):
                    if table is None:
                        return
                    yield table

    def _segment(self, number: int) -> pa.Table | None:
        try:
            table = index_table(storage.read_bytes(self._uri(number)))
        except (FileNotFoundError, pa.ArrowInvalid):
            return None
        metadata = table.schema.metadata or {}
        return table.replace_schema_metadata() if metadata.get(_STAMP) == self.stamp.encode() else None

    def _uri(self, number: int) -> str:
        return storage.join(self.dataset, DIRECTORY, f"segment-{number:06d}.parquet")


def _encoded(table: pa.Table, stamp: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_STAMP: stamp.encode()}), sink, compression="zstd")
    return sink.getvalue()


def probe(
    numbers: Iterator[int], read: Callable[[int], Mapping[str, Any] | None], window: int
) -> Iterator[Mapping[str, Any]]:
    """What ``read`` finds at ascending numbers, until a whole window of them has nothing."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while part := list(islice(numbers, window)):
            found = [row for row in pool.map(read, part) if row is not None]
            yield from found
            if not found:
                return
