"""Parquet files that hold the videos themselves: a column of bytes, or of ``{bytes, path}`` as Hugging Face writes it.

Only the other columns are read; a clip's uri names column and row (`cinemo.media.members`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cinemo.data.manifest.formats import BATCH_ROWS
from cinemo.media.members import row_uris
from cinemo.media.video import EXTENSIONS

_FEW = 16  # videos in memory at a time


def is_binary(kind: pa.DataType) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view()) or bool(pa.types.is_fixed_size_binary(kind))


def holds_videos(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold files."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type)
    return is_binary(kind)


def video_column(schema: pa.Schema, wanted: str) -> str | None:
    """The column with the videos: the one that is wanted for the uris; where that is not there, the one that is called
    ``video`` or like a kind of video, or the only one of bytes.
    """
    if wanted in schema.names:
        return wanted if holds_videos(schema.field(wanted).type) else None
    column, dot, part = wanted.rpartition(".")
    if dot and part == "bytes" and column in schema.names and holds_videos(schema.field(column).type):
        return column
    able = [field.name for field in schema if holds_videos(field.type)]
    called = [name for name in able if name.lower() in ("video", *EXTENSIONS)]
    choices = called or able
    return choices[0] if wanted == "uri" and len(choices) == 1 else None


def embedded_batches(file: pq.ParquetFile, uri: str, column: str) -> Iterator[pa.RecordBatch]:
    """The rows of a file with uris in the place of its videos; other columns of bytes are left out."""
    kind = file.schema_arrow.field(column).type
    inner = pa.types.is_struct(kind)
    leaf = f"{column}.bytes" if inner else column
    paths = [f"{column}.path"] if inner and kind.get_field_index("path") >= 0 else []
    light = [field.name for field in file.schema_arrow if field.name != column and not holds_videos(field.type)]
    row = 0
    for group in range(file.metadata.num_row_groups):
        there = _there(file, group, leaf)
        done = 0
        for batch in file.iter_batches(BATCH_ROWS, [group], [*light, *paths] or [leaf]):
            count = len(batch)
            uris = row_uris(uri, leaf, pa.array(np.arange(row, row + count)))
            named = pa.nulls(count, pa.string())
            if paths:
                named = pc.struct_field(batch[column], "path").cast(pa.string())
            uris = pc.if_else(pa.array(there[done : done + count]), uris, named)
            arrays = [*(batch[name] for name in light), uris]
            yield pa.RecordBatch.from_arrays(arrays, names=[*light, column])
            row, done = row + count, done + count


def _there(file: pq.ParquetFile, group: int, leaf: str) -> np.ndarray:
    """Whether each row of a group has bytes. They are only read where the statistics do not say."""
    part = file.metadata.row_group(group)
    places = [k for k in range(part.num_columns) if part.column(k).path_in_schema == leaf]
    statistics = part.column(places[0]).statistics if places else None
    if statistics is not None and statistics.has_null_count and statistics.null_count in (0, part.num_rows):
        return np.full(part.num_rows, statistics.null_count == 0)
    column, _, inner = leaf.rpartition(".")
    found: list[np.ndarray] = []
    for batch in file.iter_batches(_FEW, [group], [leaf]):
        values = pc.struct_field(batch[column], inner) if inner and column in batch.schema.names else batch[leaf]
        found.append(values.is_valid().to_numpy(zero_copy_only=False))
    return np.concatenate(found) if found else np.empty(0, bool)
