"""The list of clips a dataset is made from: tables of many kinds, tars, or simply a folder of videos.

It stays on disk, tens of millions of rows long: one pass checks it, and rows are read where they are needed. Faults are
reported with row numbers, counted from 1 without the header.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cinemo import cache, s3, storage
from cinemo.data.manifest.checks import (
    Digest,
    Faults,
    as_text,
    cast_columns,
    check_rows,
    empty_captions,
    hash_texts,
    note_buckets,
    refuse,
    repeated,
    simple,
    unique,
)
from cinemo.data.manifest.columns import Columns, absent
from cinemo.data.manifest.convert import NUMERIC, Reading, convert, parquet_file, reading_of, resolved
from cinemo.data.manifest.extras import json_objects, stored_name
from cinemo.data.manifest.files import File, Found, find
from cinemo.data.manifest.folders import NAMED, table_of_folder
from cinemo.data.manifest.formats import BATCH_ROWS, COMPRESSED, open_parquet
from cinemo.data.manifest.json_lines import JSON_COLUMN
from cinemo.data.manifest.presets import REQUIRED
from cinemo.data.manifest.timestamps import seconds
from cinemo.types import InputError

SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("uri", pa.string()),
        ("caption", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
    ]
)
# What `Manifest.read` gives: all other columns as one JSON object a row, null where there are none.
ROWS = SCHEMA.append(pa.field("extra", pa.string()))
_SMALL = 64 << 20  # bytes of a file whose converted rows may stay in memory, and which is checked each time
_CHECK = 4  # counted up where a check refuses other rows, or the digest is another
_GROUP_BYTES = 512 << 20


@dataclass
class Manifest:
    """A checked manifest. It can be sent to another process, which opens the file itself.

    ``source`` is a Parquet file (a path, or its bytes where it is small), ``parent`` is what relative uris count from,
    ``digest`` depends on every value of the first ``rows`` rows and on the types of extra columns, ``notes`` are what a
    person should be told, ``buckets`` those of s3:// that its uris name: the first few.
    """

    source: Path | bytes
    parent: str
    rows: int
    digest: str
    notes: tuple[str, ...] = ()
    buckets: tuple[str, ...] = ()
    _open: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, start: int = 0, stop: int | None = None) -> pa.Table:
        """Rows ``start`` up to ``stop`` with the columns of `ROWS`; uris are absolute."""
        return self.take(np.arange(start, min(self.rows if stop is None else stop, self.rows)))

    def take(self, positions: np.ndarray) -> pa.Table:
        """The rows at some ascending positions, with the columns of `ROWS`."""
        file = self._file
        numeric = json.loads((file.metadata.metadata or {}).get(NUMERIC, b"[]"))
        parts = [
            _presented(_taken(group, places), self.parent, numeric).select(ROWS.names)
            for group, places in self._groups(positions)
        ]
        return pa.concat_tables([ROWS.empty_table(), *parts]).combine_chunks()

    def clips(self, start: int, stop: int) -> pa.Table:
        """Rows ``start`` up to ``stop`` without their extra columns, which are slow to read; uris are absolute."""
        return self.clips_at(np.arange(start, min(stop, self.rows)))

    def clips_at(self, positions: np.ndarray) -> pa.Table:
        """`clips` at some ascending positions."""
        names = [name for name in SCHEMA.names if name in self._file.schema_arrow.names]
        parts = [
            _presented(_taken(group, places), self.parent, []).select(SCHEMA.names)
            for group, places in self._groups(positions, names)
        ]
        return pa.concat_tables([SCHEMA.empty_table(), *parts])

    def numbers(self, positions: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The numbers or times in some columns, those that there are, at some ascending positions: float64 (N,), nan
        where there is none."""
        there = [name for name in (*names, JSON_COLUMN) if name in self._file.schema_arrow.names]
        found: dict[str, list[np.ndarray]] = {}
        for group, places in self._groups(positions, there) if there else ():
            rows = _taken(group, places)
            columns = {name: rows[name] for name in there if name != JSON_COLUMN}
            if JSON_COLUMN in there and (loose := [name for name in names if name not in columns]):
                columns |= _loose(rows[JSON_COLUMN], loose)
            for name, column in columns.items():
                found.setdefault(name, []).append(_seconds(column))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def ids(self, positions: np.ndarray) -> list[str]:
        return [
            clip_id
            for group, places in self._groups(positions, ["clip_id"])
            for chunk in _taken(group, places)["clip_id"].chunks
            for clip_id in as_text(simple(chunk)).to_pylist()
        ]

    def _groups(self, positions: np.ndarray, columns: list[str] | None = None) -> Iterator[tuple[pa.Table, pa.Array]]:
        """The row groups that hold some positions, each with the places in it."""
        starts = self._open.setdefault("starts", _group_starts(self._file))
        groups = np.searchsorted(starts, positions, "right") - 1
        for group in np.unique(groups).tolist():
            name = f"{group} {columns}"
            if self._open.get("group", ("",))[0] != name:  # the last one is kept: rows are asked for in order
                self._open["group"] = name, self._file.read_row_group(group, columns)
            yield self._open["group"][1], pa.array(positions[groups == group] - starts[group])

    def check_buckets(self) -> None:
        """Raise `InputError` where a bucket does not exist: each of its clips would be refused on its own."""
        missing = [bucket for bucket in self.buckets if not s3.has_bucket(bucket)]
        if missing:
            raise InputError(
                f"s3://{missing[0]}: the bucket does not exist, but uris of the manifest name it; correct them, or "
                "AWS_ENDPOINT_URL"
            )

    @property
    def _file(self) -> pq.ParquetFile:
        if "file" not in self._open:
            self._open["file"] = open_parquet(
                pa.BufferReader(self.source) if isinstance(self.source, bytes) else self.source
            )
        return self._open["file"]


def read_manifest(
    uri: str,
    limit: int | None = None,
    columns: Columns | None = None,
    seed: int = 0,
    names_as_captions: bool = False,
) -> Manifest:
    """Check a manifest.

    A Parquet file is used where it lies; other kinds are converted once, and a large one is kept in the cache
    directory, up to as large as it was. So is what the check of a large file found: a file that did not change is not
    read again. Needs about 16 bytes of memory a row.

    Args:
        uri: what `files.find` finds, local or on s3://: a table (``.parquet``, ``.csv``, ``.jsonl`` and their like), a
            glob or a directory of such, WebDataset tars, or a folder of videos. A table has columns ``clip_id``,
            ``uri`` and ``caption``; ``start`` and ``end`` (see `timestamps.seconds`) are optional; all others travel
            with the clip. A relative uri counts from the manifest's directory. A CSV column is one of numbers where
            every value is one. Of several captions one is drawn.
        limit: keep the first clips only.
        columns: what the columns of another table mean.
        seed: of drawn captions.
        names_as_captions: whether to go on where the only captions of some videos are the names of their files.

    Raises:
        InputError: no such file, no rows, columns missing, bad rows, captions missing, or a clip id that occurs twice.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")
    found = find(uri)
    table = found.kind in ("parquet", "csv", "json")
    if columns is not None and not table:
        raise InputError(f"manifest {uri}: --columns is about tables; this is a manifest of {found.kind}")
    try:
        reading = reading_of(found.files, columns, seed) if table else Reading(None, None, seed)
        plain = table and len(found.files) == 1 and reading.columns is None
        unit = "row" if plain or (len(found.files) == 1 and not (columns and columns.each)) else "clip"
        path = found.files[0].local() if plain and found.kind == "parquet" else None
        source = path if path and _is_handy(path) else _converted(found, reading, limit)
        parent = found.files[0].parent if found.files else found.root
        manifest = _known(source, uri, parent, limit, unit)
    except (pa.ArrowException, UnicodeError, OSError) as error:
        if isinstance(error, InputError) or getattr(error, "errno", None):
            raise
        where = _unreadable(found.files[0]) if found.kind == "parquet" else ""
        raise InputError(f"manifest {uri}: {where}not readable as {found.kind} ({s3.brief(error)})") from None
    return _with_captions(manifest, uri, names_as_captions)


def _unreadable(file: File) -> str:
    """The column of a Parquet file that Arrow cannot read, for a message."""
    with contextlib.suppress(pa.ArrowException, OSError):
        opened = parquet_file(file)
        for field_ in opened.schema_arrow:
            try:
                for _ in opened.iter_batches(BATCH_ROWS, columns=[field_.name]):
                    pass
            except pa.ArrowException:
                return f"column {field_.name} ({field_.type}) is "
    return ""


def _with_captions(manifest: Manifest, uri: str, names_as_captions: bool) -> Manifest:
    """With what is to be said of captions; raises where they are no captions, unless that is wanted."""
    stored = (manifest._file.metadata.metadata or {}).get(NAMED, b"[0, 0, []]")
    unnamed, count, examples = json.loads(stored)
    if unnamed:
        fault = f"{unnamed} of {count} captions are file names ({', '.join(examples)}{', ...' * (unnamed > 3)})"
        if not names_as_captions:
            raise InputError(
                f"manifest {uri}: {fault}: none in a .txt or .json beside them, in metadata.jsonl, metadata.csv or "
                "prompts.txt; add captions, give the table that has them as --manifest, or go on with "
                "--file-names-as-captions"
            )
        manifest.notes = (*manifest.notes, fault)
    return manifest


def manifest_of(table: pa.Table) -> Manifest:
    """A small manifest out of memory, checked as a file's would be."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return _checked(sink.getvalue(), "(table)", "", None)


def _known(source: Path | bytes, uri: str, parent: str, limit: int | None, unit: str) -> Manifest:
    """`_checked`, or what it found the last time where the file is large and the same."""
    if isinstance(source, bytes) or source.stat().st_size <= _SMALL:
        return _checked(source, uri, parent, limit, unit)
    facts = _facts(source)
    verdict = _cached([_CHECK, facts, parent, limit], "json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a broken verdict is none
        found = json.loads(verdict.read_bytes())
        notes, buckets = tuple(found["notes"]), tuple(found["buckets"])
        manifest = Manifest(source, parent, found["rows"], found["digest"], notes, buckets)
        count = manifest._file.metadata.num_rows
        if manifest.rows == (count if limit is None else min(limit, count)) and re.fullmatch(
            "[0-9a-f]{64}", manifest.digest
        ):
            return manifest
    manifest = _checked(source, uri, parent, limit, unit)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time
        if _facts(source) == facts:
            names = ("rows", "digest", "notes", "buckets")
            storage.write_json(str(verdict), {name: getattr(manifest, name) for name in names})
    return manifest


def _facts(path: Path) -> list[Any]:
    """What changes with a file's content; its ctime cannot be set back."""
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _cached(key: Any, suffix: str) -> Path:
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    return cache.cache_directory() / "manifests" / f"{name}.{suffix}"


def _checked(source: Path | bytes, uri: str, parent: str, limit: int | None, unit: str = "row") -> Manifest:
    """One pass over all rows: types, bad rows, hashes of clip ids, and the digest."""
    manifest = Manifest(source, parent, 0, "")
    file, empty, buckets = manifest._file, 0, dict[str, None]()
    _check_columns(file.schema_arrow, uri)
    count = file.metadata.num_rows if limit is None else min(limit, file.metadata.num_rows)
    if not count:
        raise InputError(f"manifest {uri}: it has no rows")
    faults, digest, hashes = Faults(unit), Digest(), np.empty(count, np.uint64)
    with ThreadPoolExecutor(1) as beside:  # SHA-256 lets other threads run
        digested: Future[None] | None = None
        for batch in file.iter_batches(BATCH_ROWS):
            clean = cast_columns(batch.slice(0, count - manifest.rows), SCHEMA, manifest.rows, faults)
            check_rows(clean, manifest.rows, faults)
            if not faults.count:
                empty += empty_captions(clean["caption"])
                note_buckets(clean["uri"], buckets)
                hashes[manifest.rows : manifest.rows + len(clean)] = hash_texts(clean["clip_id"])
                if digested:
                    digested.result()
                digested = beside.submit(digest.update, resolved(clean, parent))
            manifest.rows += len(clean)
            if manifest.rows == count:
                break
        if digested:
            digested.result()
    refuse(uri, faults.shown, faults.count)
    refuse(uri, *repeated(hashes, manifest.ids, unit=unit))
    manifest.digest, manifest.buckets = digest.hexdigest(), tuple(buckets)
    if empty:
        manifest.notes = (f"{empty} of {count} captions are empty",)
    return manifest


def _check_columns(schema: pa.Schema, uri: str) -> None:
    names = [name for name in schema.names if name != JSON_COLUMN]
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise InputError(absent(uri, f"column {', '.join(missing)} is missing", names))
    stored = [stored_name(name) if name not in SCHEMA.names else name for name in names]
    unique(stored, uri)
    binary = [f.name for f in schema if f.name not in SCHEMA.names and "binary" in str(f.type)]
    if binary:
        raise InputError(f"manifest {uri}: column {', '.join(binary)} is binary, which JSON cannot hold; drop it")


def _is_handy(path: Path) -> bool:
    """Whether single row groups fit into memory."""
    meta = open_parquet(path).metadata
    return all(meta.row_group(k).total_byte_size <= _GROUP_BYTES for k in range(meta.num_row_groups))


def _group_starts(file: pq.ParquetFile) -> np.ndarray:
    meta = file.metadata
    return np.cumsum([0, *(meta.row_group(k).num_rows for k in range(meta.num_row_groups - 1))])


def _converted(found: Found, reading: Reading, limit: int | None) -> Path | bytes:
    """The files as one Parquet file of small row groups: bytes, or a file in the cache directory for the next run."""

    def write(sink: Any) -> None:
        if found.kind == "videos":
            table = table_of_folder(found.root, [name for name, _, _ in found.names], reading.seed, limit)
            pq.write_table(table, sink)
        else:
            convert(found.files, reading, limit, sink)

    if _is_small(found):
        held = io.BytesIO()
        write(held)
        return held.getvalue()
    listed = [[file.uri, file.stamp, file.parent] for file in found.files] + [found.root, found.names]
    asked: list[Any] = [reading.columns.key(), reading.videos] if reading.columns else []
    if asked or found.kind not in ("parquet", "csv"):
        asked.append(reading.seed)
    if found.kind in ("tar", "videos"):
        asked.append(limit)
    target = _cached([4, found.kind, listed, asked], "parquet")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            write(Path(scratch) / "rows.parquet")
            os.replace(Path(scratch) / "rows.parquet", target)
    return target


def _is_small(found: Found) -> bool:
    """Whether converting is quick and its result fits in memory."""
    if found.kind == "videos":
        return not storage.is_remote(found.root)
    expanded = sum(file.size * (8 if file.uri.endswith(COMPRESSED) else 1) for file in found.files)
    return expanded <= _SMALL


def _taken(group: pa.Table, places: pa.Array) -> pa.Table:
    """Some rows, at ascending places. Arrow cannot take views, but it can slice them."""
    try:
        return group.take(places)
    except pa.ArrowNotImplementedError:
        runs = np.split(places.to_numpy(), np.flatnonzero(np.diff(places.to_numpy()) != 1) + 1)
        return pa.concat_tables([group.slice(run[0], len(run)) for run in runs])


def _loose(texts: pa.ChunkedArray, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Numbers and texts of JSON objects by name; null where an object has none."""
    objects = [json.loads(text or "{}") for text in texts.to_pylist()]
    values = {name: [each.get(name) for each in objects] for name in names}
    return {
        name: pa.chunked_array([[str(v) if isinstance(v, int | float | str) else None for v in column]], pa.string())
        for name, column in values.items()
    }


def _seconds(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers, or times as `timestamps.seconds` reads them; nan for what is neither."""
    whole = simple(pa.concat_arrays([pa.array([], column.type), *column.chunks]))
    try:
        if pa.types.is_large_string(whole.type):
            whole = whole.cast(pa.string())
        elif pa.types.is_integer(whole.type):
            whole = pc.cast(whole, pa.float64(), safe=False)
        values, _ = seconds(whole)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return np.full(len(whole), np.nan)
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)


def _presented(rows: pa.Table, parent: str, numeric: list[str]) -> pa.Table:
    """Rows of the file -> rows with the columns of `ROWS`."""
    batches = [resolved(cast_columns(batch, SCHEMA, 0, Faults()), parent) for batch in rows.to_batches()]
    table = pa.Table.from_batches(batches) if batches else ROWS.empty_table()
    others = [name for name in table.column_names if name not in SCHEMA.names]
    extra = json_objects(table.select(others), numeric)
    return table.select(SCHEMA.names).append_column(ROWS.field("extra"), pa.array(extra, pa.string()))
