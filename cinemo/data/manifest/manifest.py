"""The list of clips a dataset is made from: a Parquet, CSV or JSONL file, or simply a folder of videos.

It stays on disk, tens of millions of rows long: one pass checks it, and rows are read where they are needed. Faults are
reported with row numbers, counted from 1 without the header.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import hashlib
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cinemo import cache, storage
from cinemo.data.dataset.shards import SAMPLE_FIELDS
from cinemo.data.manifest.checks import Digest, Faults, cast_columns, check_rows, hash_texts, refuse, repeated
from cinemo.data.manifest.formats import BATCH_ROWS, FORMATS, open_parquet
from cinemo.data.manifest.json_lines import JSON_COLUMN, REQUIRED
from cinemo.media.video import EXTENSIONS
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
_INTEGER, _NUMBER = r"^(-?(0|[1-9][0-9]{0,17}))?$", r"^(-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?)?$"
_NUMERIC = b"cinemo.numeric"
_SMALL = 64 << 20  # bytes of a file whose converted rows may stay in memory, and which is checked each time
_CHECK = 1  # counted up where a check refuses other rows, or the digest is another
_GROUP_ROWS = 1 << 17
_GROUP_BYTES = 512 << 20


@dataclass
class Manifest:
    """A checked manifest. It can be sent to another process, which opens the file itself.

    ``source`` is a Parquet file (a path, or its bytes where it is small), ``parent`` is what relative uris count from,
    ``digest`` depends on every value of the first ``rows`` rows and on the types of extra columns.
    """

    source: Path | bytes
    parent: str
    rows: int
    digest: str
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
        numeric = json.loads((file.metadata.metadata or {}).get(_NUMERIC, b"[]"))
        parts = [
            _presented(group.take(places), self.parent, numeric).select(ROWS.names)
            for group, places in self._groups(positions)
        ]
        return pa.concat_tables([ROWS.empty_table(), *parts]).combine_chunks()

    def ids(self, positions: np.ndarray) -> list[str]:
        return [
            clip_id
            for group, places in self._groups(positions, ["clip_id"])
            for clip_id in group["clip_id"].take(places).to_pylist()
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

    @property
    def _file(self) -> pq.ParquetFile:
        if "file" not in self._open:
            self._open["file"] = open_parquet(
                pa.BufferReader(self.source) if isinstance(self.source, bytes) else self.source
            )
        return self._open["file"]


def read_manifest(uri: str, limit: int | None = None) -> Manifest:
    """Check a manifest, or list a folder of videos (`manifest_from_folder`).

    A Parquet file is used where it lies; other kinds are converted once, and a large one is kept in the cache
    directory, up to as large as it was. So is what the check of a large file found: a file that did not change is not
    read again. Needs about 16 bytes of memory a row.

    Args:
        uri: ``.parquet``, ``.csv`` or ``.jsonl`` (local or s3://), or a local directory. Columns ``clip_id``, ``uri``
            and ``caption``; ``start`` and ``end`` (seconds) are optional; all others travel with the clip. A relative
            uri counts from the manifest's directory. A CSV column is one of numbers where every value is one.
        limit: keep the first rows only.

    Raises:
        InputError: no such file, no rows, columns missing, bad rows, or a clip id that occurs twice.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")
    if not storage.is_remote(uri) and storage.local_path(uri).is_dir():
        table = manifest_from_folder(uri)
        return manifest_of(table if limit is None else table.slice(0, limit))
    kind = uri.rsplit(".", 1)[-1].lower()
    if kind not in FORMATS:
        raise InputError(f"manifest {uri}: expected a .parquet, .csv or .jsonl file, or a directory of videos")
    parent = uri.rsplit("/", 1)[0] if storage.is_remote(uri) else str(Path(storage.absolute(uri)).parent)
    path = cache.localize(uri).resolve()
    try:
        source = path if kind == "parquet" and _is_handy(path) else _converted(path, uri, kind)
        return _known(source, uri, parent, limit)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise InputError(f"manifest {uri}: not readable as {kind} ({str(error).splitlines()[0]})") from None


def manifest_of(table: pa.Table) -> Manifest:
    """A small manifest out of memory, checked as a file's would be."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return _checked(sink.getvalue(), "(table)", "", None)


def _known(source: Path | bytes, uri: str, parent: str, limit: int | None) -> Manifest:
    """`_checked`, or what it found the last time where the file is large and the same."""
    if isinstance(source, bytes) or source.stat().st_size <= _SMALL:
        return _checked(source, uri, parent, limit)
    facts = _facts(source)
    verdict = _cached([_CHECK, facts, parent, limit], "json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a broken verdict is none
        found = json.loads(verdict.read_bytes())
        manifest = Manifest(source, parent, found["rows"], found["digest"])
        count = manifest._file.metadata.num_rows
        if manifest.rows == (count if limit is None else min(limit, count)) and re.fullmatch(
            "[0-9a-f]{64}", manifest.digest
        ):
            return manifest
    manifest = _checked(source, uri, parent, limit)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time
        if _facts(source) == facts:
            storage.write_json(str(verdict), {"rows": manifest.rows, "digest": manifest.digest})
    return manifest


def _facts(path: Path) -> list[Any]:
    """What changes with a file's content; its ctime cannot be set back."""
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _cached(key: Any, suffix: str) -> Path:
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    return cache.cache_directory() / "manifests" / f"{name}.{suffix}"


def _checked(source: Path | bytes, uri: str, parent: str, limit: int | None) -> Manifest:
    """One pass over all rows: types, bad rows, hashes of clip ids, and the digest."""
    manifest = Manifest(source, parent, 0, "")
    file = manifest._file
    _check_columns(file.schema_arrow, uri)
    count = file.metadata.num_rows if limit is None else min(limit, file.metadata.num_rows)
    if not count:
        raise InputError(f"manifest {uri}: it has no rows")
    faults, digest, hashes = Faults(), Digest(), np.empty(count, np.uint64)
    with ThreadPoolExecutor(1) as beside:  # SHA-256 lets other threads run
        digested: Future[None] | None = None
        for batch in file.iter_batches(BATCH_ROWS):
            clean = cast_columns(batch.slice(0, count - manifest.rows), SCHEMA, manifest.rows, faults)
            check_rows(clean, manifest.rows, faults)
            if not faults.count:
                hashes[manifest.rows : manifest.rows + len(clean)] = hash_texts(clean["clip_id"])
                if digested:
                    digested.result()
                digested = beside.submit(digest.update, _resolved(clean, parent))
            manifest.rows += len(clean)
            if manifest.rows == count:
                break
        if digested:
            digested.result()
    refuse(uri, faults.shown, faults.count)
    refuse(uri, *repeated(hashes, manifest.ids))
    manifest.digest = digest.hexdigest()
    return manifest


def _check_columns(schema: pa.Schema, uri: str) -> None:
    names = [name for name in schema.names if name != JSON_COLUMN]
    absent = [name for name in REQUIRED if name not in names]
    if absent:
        raise InputError(
            f"manifest {uri}: column {', '.join(absent)} is missing; it has {', '.join(names) or 'none'}, "
            f"expected {', '.join(REQUIRED)} and optionally start, end"
        )
    stored = [_stored_name(name) if name not in SCHEMA.names else name for name in names]
    twice = sorted({name for name in stored if stored.count(name) > 1})
    if twice:
        raise InputError(f"manifest {uri}: column {', '.join(twice)} appears twice; rename one")
    binary = [f.name for f in schema if f.name not in SCHEMA.names and "binary" in str(f.type)]
    if binary:
        raise InputError(f"manifest {uri}: column {', '.join(binary)} is binary, which JSON cannot hold; drop it")


def _stored_name(name: str) -> str:
    """The name of an extra column in a sample's JSON: its own, unless a sample has such a field itself."""
    return f"manifest_{name}" if name in SAMPLE_FIELDS else name


def _is_handy(path: Path) -> bool:
    """Whether single row groups fit into memory."""
    meta = open_parquet(path).metadata
    return all(meta.row_group(k).total_byte_size <= _GROUP_BYTES for k in range(meta.num_row_groups))


def _group_starts(file: pq.ParquetFile) -> np.ndarray:
    meta = file.metadata
    return np.cumsum([0, *(meta.row_group(k).num_rows for k in range(meta.num_row_groups - 1))])


def _converted(path: Path, uri: str, kind: str) -> Path | bytes:
    """The file as Parquet of small row groups: bytes, or a file in the cache directory for the next run."""
    if path.stat().st_size <= _SMALL:
        sink = io.BytesIO()
        _convert(path, uri, kind, sink)
        return sink.getvalue()
    target = _cached([2, _facts(path)], "parquet")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _convert(path, uri, kind, Path(scratch) / "rows.parquet")
            os.replace(Path(scratch) / "rows.parquet", target)
    return target


def _convert(path: Path, uri: str, kind: str, sink: Any) -> None:
    writer: pq.ParquetWriter | None = None
    numeric: dict[str, str] = {}
    for batch in FORMATS[kind](path, uri):
        if writer is None:
            writer = pq.ParquetWriter(
                sink, batch.schema, compression="lz4", use_dictionary=False, write_statistics=False
            )
            if kind == "csv":
                numeric = {name: _INTEGER for name in batch.schema.names if name not in SCHEMA.names}
        writer.write_batch(batch, row_group_size=_GROUP_ROWS)
        for name in list(numeric):
            while name in numeric and not pc.all(pc.match_substring_regex(batch[name], numeric[name])).as_py():
                if numeric[name] == _INTEGER:
                    numeric[name] = _NUMBER
                else:
                    del numeric[name]
    if writer is None:
        raise InputError(f"manifest {uri}: it has no rows")
    writer.add_key_value_metadata({_NUMERIC.decode(): json.dumps(sorted(numeric))})
    writer.close()


def _resolved(batch: pa.RecordBatch, parent: str) -> pa.RecordBatch:
    """With absolute uris."""
    uris = batch["uri"]
    relative = pc.invert(pc.or_(pc.starts_with(uris, "/"), pc.match_substring(uris, "://")))
    if not relative.true_count:
        return batch
    absolute = pc.if_else(relative, pc.binary_join_element_wise(parent, uris, "/"), uris)
    return batch.set_column(batch.schema.get_field_index("uri"), "uri", absolute)


def _presented(rows: pa.Table, parent: str, numeric: list[str]) -> pa.Table:
    """Rows of the file -> rows with the columns of `ROWS`."""
    batches = [_resolved(cast_columns(batch, SCHEMA, 0, Faults()), parent) for batch in rows.to_batches()]
    table = pa.Table.from_batches(batches) if batches else ROWS.empty_table()
    others = [name for name in table.column_names if name not in SCHEMA.names]
    extra = [_extra(row, numeric) for row in table.select(others).to_pylist()] if others else [None] * len(table)
    return table.select(SCHEMA.names).append_column(ROWS.field("extra"), pa.array(extra, pa.string()))


def _extra(row: dict[str, Any], numeric: list[str]) -> str | None:
    loose = json.loads(row.pop(JSON_COLUMN, None) or "{}")
    for name in numeric:
        row[name] = json.loads(row[name]) if row[name] else None
    named = {_stored_name(name): _plain(value) for name, value in (row | loose).items()}
    return json.dumps(named, sort_keys=True, ensure_ascii=False) if named else None


def _plain(value: Any) -> Any:
    """What JSON can hold: dates and decimals as text, what is no number as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal | datetime.timedelta) else value


def manifest_from_folder(directory: str | Path) -> pa.Table:
    """A manifest of all videos under a local directory, sorted by path.

    The clip id is made of the relative path; the caption is the text file beside the video (``a.mp4``, ``a.txt``), or
    else the words of its file name. Broken videos stay in: they end in the quarantine ledger.
    """
    root = Path(storage.absolute(str(directory)))
    if not root.is_dir():
        raise InputError(f"{directory}: no such directory")
    videos = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower().lstrip(".") in EXTENSIONS and path.is_file() and not path.name.startswith(".")
    )
    if not videos:
        raise InputError(f"{directory}: no videos there (looked for {', '.join(sorted(EXTENSIONS))})")
    rows, taken = [], set()
    for path in videos:
        relative = path.relative_to(root)
        clip_id = re.sub(r"[^\w-]+", "-", str(relative.with_suffix(""))).strip("-") or "clip"
        if clip_id in taken:
            clip_id = re.sub(r"[^\w-]+", "-", str(relative)).strip("-")
        while clip_id in taken:
            clip_id += "-again"
        taken.add(clip_id)
        rows.append({"clip_id": clip_id, "uri": str(path), "caption": _caption(path), "start": None, "end": None})
    return pa.Table.from_pylist(rows, SCHEMA)


def _caption(video: Path) -> str:
    sidecar = video.with_suffix(".txt")
    if sidecar.is_file():
        return " ".join(sidecar.read_text(encoding="utf-8", errors="replace").split())
    return " ".join(re.sub(r"[\W_]+", " ", video.stem).split())
