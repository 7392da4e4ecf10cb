"""Whatever a manifest is written in -> one Parquet file of small row groups, in one pass over all of its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cinemo import storage
from cinemo.data.manifest.captions import CAPTION_KEYS, is_texts
from cinemo.data.manifest.checks import Faults, refuse, unique
from cinemo.data.manifest.columns import Columns, Mapped, absent, fitting
from cinemo.data.manifest.embedded import embedded_batches, holds_videos, video_column
from cinemo.data.manifest.files import File
from cinemo.data.manifest.folders import NAMED
from cinemo.data.manifest.formats import (
    BATCH_ROWS,
    csv_batches,
    csv_names,
    json_batches,
    json_names,
    open_parquet,
)
from cinemo.data.manifest.json_lines import JSON_COLUMN, Layout
from cinemo.data.manifest.presets import REQUIRED, TARGETS
from cinemo.data.manifest.tars import tar_batches
from cinemo.ranges import open_ranges
from cinemo.types import InputError

NUMERIC = b"cinemo.numeric"  # metadata of a file: columns of text of which every value is a number
_INTEGER, _NUMBER = r"^(-?(0|[1-9][0-9]{0,17}))?$", r"^(-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?)?$"
_GROUP_ROWS = 1 << 17
_AT_ONCE = 1 << 20
_READERS = 16


@dataclass(frozen=True)
class Reading:
    """How files are read: the columns that make the clips, None for those of a manifest; which column has videos."""

    columns: Columns | None = None
    videos: str | None = None
    seed: int = 0


def reading_of(files: Sequence[File], columns: Columns | None, seed: int) -> Reading:
    """How to read the files: what was asked for, and what their columns say."""
    kind = files[0].kind
    if kind == "parquet":
        schema = parquet_file(files[0]).schema_arrow
        unique(schema.names, files[0].uri)
        videos = video_column(schema, columns.templates.get("uri", "uri") if columns else "uri")
        if videos is not None:
            return Reading(_of_embedded(schema.names, videos, columns), videos, seed)
        if columns is None and "caption" in schema.names and is_texts(schema.field("caption").type):
            columns = Columns()
    if columns is None and len(files) > 1 and kind in ("parquet", "csv"):
        columns = Columns()
    return Reading(columns, None, seed)


def _of_embedded(names: Sequence[str], videos: str, columns: Columns | None) -> Columns:
    chosen = dict(columns.templates) if columns else {}
    if "caption" not in chosen and "caption" not in names:
        chosen["caption"] = "|".join(CAPTION_KEYS)
    if "clip_id" not in chosen and "clip_id" not in names:
        chosen["clip_id"] = "{file}/{row}"
    return Columns(chosen | {"uri": videos}, columns.each if columns else ())


def parquet_file(file: File) -> pq.ParquetFile:
    """A Parquet file where it lies: its other columns may be all that is needed of it."""
    return open_parquet(open_ranges(file.uri, file.size, _AT_ONCE))


def convert(files: Sequence[File], reading: Reading, limit: int | None, sink: Any) -> None:
    """Write the clips of all files, with absolute uris where there are several.

    Args:
        limit: clips of tars, of which no more are looked at; everything else is converted whole.

    Raises:
        InputError: no rows, columns missing, rows that cannot be read.
    """
    output = _Output(sink, files[0].kind == "csv" or (files[0].kind == "json" and reading.columns is not None))
    if files[0].kind == "tar":
        unnamed, total = list[str](), 0
        for batch, names in _tars(files, reading.seed):
            unnamed, total = (unnamed + names)[:3], total + len(names)
            output.write(batch)
            if limit is not None and output.rows >= limit:
                break
        output.close(files[0].uri, {NAMED: json.dumps([total, output.rows, unnamed]).encode()})
        return
    paths = [None] * len(files) if reading.videos else _fetched(files)
    schema = _common(files, paths, reading)
    for file, path in zip(files, paths, strict=True):
        for batch in _clips(file, path, schema, reading):
            output.write(resolved(batch, file.parent) if len(files) > 1 else batch)
    output.close(files[0].uri, {})


def _fetched(files: Sequence[File]) -> list[Path | None]:
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(File.local, files))


def _tars(files: Sequence[File], seed: int) -> Iterator[tuple[pa.RecordBatch, list[str]]]:
    """The clips of tars in order; of remote ones several are read at a time, since every sample is a request."""
    at_once = _READERS if storage.is_remote(files[0].uri) else 1
    with ThreadPoolExecutor(at_once) as pool:
        for start in range(0, len(files), at_once):
            some = files[start : start + at_once]
            for batches in pool.map(lambda file: list(tar_batches(file.uri, file.size, file.name, seed)), some):
                yield from batches


def resolved(batch: pa.RecordBatch, parent: str) -> pa.RecordBatch:
    """With absolute uris."""
    uris = batch["uri"]
    relative = pc.invert(pc.or_(pc.starts_with(uris, "/"), pc.match_substring(uris, "://")))
    if not relative.true_count:
        return batch
    absolute = pc.if_else(relative, pc.binary_join_element_wise(parent, uris, "/"), uris)
    return batch.set_column(batch.schema.get_field_index("uri"), "uri", absolute)


def _clips(file: File, path: Path | None, schema: pa.Schema, reading: Reading) -> Iterator[pa.RecordBatch]:
    """The clips of one file; ``schema`` is that of all files."""
    if reading.columns is None:
        yield from _rows(file, path, schema, reading, None)
        return
    mapped, faults, first = Mapped.of(reading.columns, schema.names, file.uri, file.name), Faults(), 0
    for batch in _rows(file, path, schema, reading, mapped):
        clips = mapped.apply(batch, first, faults, reading.seed)
        first += len(batch)
        if not faults.count:
            yield clips
    refuse(file.uri, faults.shown, faults.count)


def _rows(
    file: File, path: Path | None, schema: pa.Schema, reading: Reading, mapped: Mapped | None
) -> Iterator[pa.RecordBatch]:
    if path is None:
        batches = embedded_batches(parquet_file(file), file.uri, str(reading.videos))
    elif file.kind == "json":
        layout = Layout((), (), tuple(mapped.used), tuple(mapped.drawn)) if mapped else Layout(seed=reading.seed)
        missing = [name for name in layout.texts if name not in schema.names]
        if missing and schema.names and (fitting(schema.names) or missing == list(REQUIRED)):
            raise InputError(absent(file.uri, f"column {', '.join(missing)} is missing", schema.names))
        yield from json_batches(path, file.uri, layout)
        return
    elif file.kind == "csv":
        batches = csv_batches(path, file.uri)
    else:
        batches = open_parquet(path).iter_batches(BATCH_ROWS)
    for batch in batches:
        missing = sorted(mapped.needed.difference(batch.schema.names)) if mapped else []
        if missing:
            raise InputError(absent(file.uri, f"column {', '.join(missing)} is missing", batch.schema.names))
        same = batch.schema.names == schema.names and batch.schema.types == schema.types
        yield batch if same else _filled(batch, schema)


def _filled(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of ``schema``, null where the batch has none."""
    arrays = [
        batch[field.name].cast(field.type) if field.name in batch.schema.names else pa.nulls(len(batch), field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, names=schema.names)


def _common(files: Sequence[File], paths: Sequence[Path | None], reading: Reading) -> pa.Schema:
    """All columns of all files."""
    if files[0].kind == "parquet":
        opened = (open_parquet(path) if path else parquet_file(file) for file, path in zip(files, paths, strict=True))
        schemas = [_light(file.schema_arrow.remove_metadata(), reading.videos) for file in opened]
        try:
            return pa.unify_schemas(schemas, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(
                f"manifest {files[0].uri} and others: columns of different types ({str(error).splitlines()[0]})"
            ) from None
    names: dict[str, None] = {}
    read = csv_names if files[0].kind == "csv" else json_names
    for file, path in zip(files, paths, strict=True):
        names |= dict.fromkeys(read(path or file.local(), file.uri))
    return pa.schema([(name, pa.string()) for name in names])


def _light(schema: pa.Schema, videos: str | None) -> pa.Schema:
    """Without columns of bytes where one of them has the videos, in whose place are uris."""
    if videos is None:
        return schema
    light = [field for field in schema if field.name != videos and not holds_videos(field.type)]
    return pa.schema([*light, pa.field(videos, pa.string())])


class _Output:
    """Parquet of small row groups."""

    def __init__(self, sink: Any, written: bool) -> None:
        self.sink, self.written = sink, written
        self.writer: pq.ParquetWriter | None = None
        self.schema = pa.schema([])
        self.numeric: dict[str, str] = {}
        self.rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        if self.writer is None:
            self.schema = batch.schema
            self.writer = pq.ParquetWriter(
                self.sink, self.schema, compression="lz4", use_dictionary=False, write_statistics=False
            )
            if self.written:
                others = [field for field in self.schema if field.name not in (*TARGETS, JSON_COLUMN)]
                self.numeric = {field.name: _INTEGER for field in others if pa.types.is_string(field.type)}
        self.writer.write_batch(batch, row_group_size=_GROUP_ROWS)
        self.rows += len(batch)
        for name in list(self.numeric):
            while (
                name in self.numeric
                and not pc.all(pc.match_substring_regex(batch[name], self.numeric[name]), min_count=0).as_py()
            ):
                if self.numeric[name] == _INTEGER:
                    self.numeric[name] = _NUMBER
                else:
                    del self.numeric[name]

    def close(self, uri: str, metadata: dict[bytes, bytes]) -> None:
        if self.writer is None or not self.rows:
            raise InputError(f"manifest {uri}: it has no rows")
        numeric = {NUMERIC: json.dumps(sorted(self.numeric)).encode()}
        self.writer.add_key_value_metadata(
            {name.decode(): text.decode() for name, text in (numeric | metadata).items()}
        )
        self.writer.close()
