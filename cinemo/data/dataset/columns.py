"""What is known of every sample, as one small table beside each shard: the numbers and texts of its ``KEY.json``.

::

    <output>/columns/shard-000000.parquet   a row for each sample, in the shard's order; then the refused clips

It repeats what tar and ledger say, with the clips' range of time. For a shard without one, as older versions wrote
them, it is made again from both where it is asked for, once, into the cache directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cinemo import cache, storage
from cinemo.data.dataset import shards
from cinemo.data.dataset.shards import Members, shard_name

DIRECTORY = "columns"
_SAMPLES = b"cinemo.samples"
_CLIP = ("clip_id", "uri", "caption", "start", "end")
_TYPES = {
    "clip_id": pa.string(), "uri": pa.string(), "caption": pa.string(), "start": pa.float64(), "end": pa.float64()
}  # fmt: skip
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """``samples``: a row for each sample of a shard. ``clips``: one for each sample and refused clip, with what a
    manifest says of it; ``start`` and ``end`` are absent and a refused clip's caption is null where that is not known.
    """

    samples: pa.Table
    clips: pa.Table


def columns_uri(dataset: str, shard: int) -> str:
    return storage.join(dataset, DIRECTORY, f"{shard_name(shard)}.parquet")


def write(dataset: str, shard: int, samples: Sequence[Row], refused: Sequence[Row]) -> None:
    """Write the table of a shard, before the record that makes the shard exist."""
    storage.write_bytes(columns_uri(dataset, shard), _encoded(samples, refused))


def read(dataset: str, shard: int, checksum: str) -> Columns:
    """The table of a committed shard, whose checksum the index gives.

    Raises:
        FileNotFoundError: no such shard.
    """
    key = f"{dataset}\n{shard}\n{checksum}"
    kept = cache.cache_directory() / DIRECTORY / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.parquet"
    remote = storage.is_remote(dataset)
    with contextlib.suppress(FileNotFoundError):
        if not remote:
            return _decoded(storage.read_bytes(columns_uri(dataset, shard)))
    with contextlib.suppress(OSError, pa.ArrowInvalid):  # a cache that cannot be read costs time
        return _decoded(kept.read_bytes())
    try:
        content = storage.read_bytes(columns_uri(dataset, shard))
    except FileNotFoundError:
        content = _made_again(dataset, shard)
    with contextlib.suppress(OSError):
        storage.write_bytes(str(kept), content)
    return _decoded(content)


def compared(dataset: str, shard: int, metadata: Sequence[Row]) -> bool:
    """Whether the table of a shard, if it has one, says what the shard's samples say of themselves."""
    try:
        there = _decoded(storage.read_bytes(columns_uri(dataset, shard))).samples
    except FileNotFoundError:
        return True
    expected = _table(metadata)
    return bool(there.drop_columns([name for name in ("start", "end") if name in there.column_names]) == expected)


def _made_again(dataset: str, shard: int) -> bytes:
    members = Members(**storage.read_json(shards.record_uri(dataset, shard))["members"])
    refused = [{"clip_id": r.clip_id, "uri": r.uri} for r in shards.read_ledger(dataset, shard)]
    return _encoded(shards.read_metadata(dataset, shard, members), refused)


def _encoded(samples: Sequence[Row], refused: Sequence[Row]) -> bytes:
    sink = io.BytesIO()
    table = _table([*samples, *refused]).replace_schema_metadata({_SAMPLES: str(len(samples)).encode()})
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    return sink.getvalue()


def _decoded(content: bytes) -> Columns:
    table = pq.read_table(pa.BufferReader(content))
    samples = int((table.schema.metadata or {})[_SAMPLES])
    table = table.replace_schema_metadata()
    return Columns(table.slice(0, samples), table.select([name for name in _CLIP if name in table.column_names]))


def _table(rows: Sequence[Row]) -> pa.Table:
    """A column for each name whose values are numbers or texts; null where a row has none."""
    names = dict.fromkeys([*_CLIP[:3], *sorted({name for row in rows for name in row})])
    made = {name: _column(name, [row.get(name) for row in rows]) for name in names}
    return pa.table({name: column for name, column in made.items() if column is not None})


def _column(name: str, values: Sequence[Any]) -> pa.Array | None:
    kinds = {type(value) for value in values if value is not None}
    if name in _TYPES and kinds <= {str, float, int}:
        return pa.array(values, _TYPES[name])
    if not kinds <= {bool, int, float, str}:
        return None
    if kinds in ({bool}, {str}, set()):
        return pa.array(values)
    with contextlib.suppress(OverflowError):
        if kinds == {int}:
            return pa.array(values, pa.int64())
        if kinds <= {int, float}:
            return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])
