"""The list of clips a dataset is made from: a Parquet, CSV or JSONL file, or simply a folder of videos.

As an Arrow table with the columns of `SCHEMA`, in the order of the file. Faults are reported with row numbers, counted
from 1 without the header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cinemo import storage
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
_REQUIRED = ("clip_id", "uri", "caption")
_SHOWN = 5


def read_manifest(uri: str, limit: int | None = None) -> pa.Table:
    """Read and check a manifest, or list a folder of videos (`manifest_from_folder`).

    Args:
        uri: ``.parquet``, ``.csv`` or ``.jsonl`` (local or s3://), or a local directory. Columns ``clip_id``, ``uri``
            and ``caption``; ``start`` and ``end`` (seconds) are optional. A relative uri counts from the manifest's
            directory.
        limit: keep the first rows only.

    Raises:
        InputError: no such file, no rows, columns missing, bad rows, or a clip id that occurs twice.
    """
    if not storage.is_remote(uri) and storage.local_path(uri).is_dir():
        table = manifest_from_folder(uri)
    else:
        table = _resolve(_checked(_read(uri), uri), uri)
    if limit is not None:
        if limit < 1:
            raise InputError(f"limit is {limit}, expected at least 1")
        table = table.slice(0, limit)
    return table


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


def _read(uri: str) -> pa.Table:
    kind = uri.rsplit(".", 1)[-1].lower()
    readers = {"parquet": _read_parquet, "csv": _read_csv, "jsonl": _read_jsonl}
    if kind not in readers:
        raise InputError(f"manifest {uri}: expected a .parquet, .csv or .jsonl file, or a directory of videos")
    path = storage.localize(uri)
    try:
        table = readers[kind](path, uri)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise InputError(f"manifest {uri}: not readable as {kind} ({str(error).splitlines()[0]})") from None
    if not table.num_rows:
        raise InputError(f"manifest {uri}: it has no rows")
    return table


def _read_parquet(path: Path, uri: str) -> pa.Table:
    present = pq.read_schema(path).names
    return pq.read_table(path, columns=[name for name in SCHEMA.names if name in present])


def _read_csv(path: Path, uri: str) -> pa.Table:
    with path.open("rb") as file:
        if not file.read(1):
            raise InputError(f"manifest {uri}: the file is empty")
    faults: list[str] = []

    def refuse(row: pyarrow.csv.InvalidRow) -> str:
        place = f"row {row.number - 1}: " if row.number else ""
        faults.append(f"{place}{row.actual_columns} fields, expected {row.expected_columns}")
        return "skip"

    table = pyarrow.csv.read_csv(
        path,
        # Only a single reading thread knows the numbers of bad rows.
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in _REQUIRED}, strings_can_be_null=False
        ),
    )
    _raise(uri, faults)
    return table


def _read_jsonl(path: Path, uri: str) -> pa.Table:
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    present: set[str] = set()
    faults: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate((line for line in lines if line.strip()), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                faults.append(f"row {number}: not JSON ({error})")
                continue
            if not isinstance(row, dict):
                faults.append(f"row {number}: a JSON {type(row).__name__}, expected an object")
                continue
            wrong = [name for name in _REQUIRED if name in row and not isinstance(row[name], str)]
            if wrong:
                faults.append(f"row {number}: {wrong[0]} is {row[wrong[0]]!r}, expected a string")
            present.update(row)
            for name in SCHEMA.names:
                columns[name].append(row.get(name))
    _raise(uri, faults)
    kept = {name: values for name, values in columns.items() if name in present}
    return pa.table(
        {name: pa.array(values, None if name in ("start", "end") else pa.string()) for name, values in kept.items()}
    )


def _checked(table: pa.Table, uri: str) -> pa.Table:
    """The table with the columns and types of `SCHEMA`, or an `InputError` that names the rows."""
    absent = [name for name in _REQUIRED if name not in table.column_names]
    if absent:
        raise InputError(
            f"manifest {uri}: column {', '.join(absent)} is missing; it has {', '.join(table.column_names) or 'none'}, "
            f"expected {', '.join(_REQUIRED)} and optionally start, end"
        )
    faults: list[str] = []
    columns = []
    for field in SCHEMA:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table[field.name]
        if field.type == pa.float64() and column.type == pa.string():
            column = pc.if_else(pc.equal(column, ""), None, column)
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            columns.append(pa.nulls(table.num_rows, field.type))
            expected = "a string" if field.type == pa.string() else "seconds"
            faults += _rows(_uncastable(column, field.type), f"{field.name} is not {expected}")
    clean = pa.table(columns, SCHEMA)
    for name in _REQUIRED:
        empty = pc.is_null(clean[name])
        if name != "caption":
            empty = pc.or_(empty, pc.equal(pc.utf8_trim_whitespace(pc.fill_null(clean[name], "")), ""))
        faults += _rows(pc.indices_nonzero(empty).to_pylist(), f"{name} is missing")
    negative = pc.or_(pc.less(pc.fill_null(clean["start"], 0.0), 0.0), pc.less(pc.fill_null(clean["end"], 0.0), 0.0))
    faults += _rows(pc.indices_nonzero(negative).to_pylist(), "start or end is negative")
    backward = pc.fill_null(pc.less_equal(clean["end"], pc.fill_null(clean["start"], 0.0)), False)
    faults += _rows(pc.indices_nonzero(pc.and_not(backward, negative)).to_pylist(), "end is not after start")
    _raise(uri, faults)
    _refuse_duplicates(clean, uri)
    return clean


def _uncastable(column: pa.ChunkedArray, kind: pa.DataType) -> list[int]:
    bad = []
    for number, value in enumerate(column):
        try:
            value.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            bad.append(number)
    return bad


def _rows(indices: Iterable[int], fault: str) -> list[str]:
    return [f"row {index + 1}: {fault}" for index in indices]


def _refuse_duplicates(table: pa.Table, uri: str) -> None:
    ids = table["clip_id"]
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    seen: dict[str, int] = {}
    faults = []
    for number, clip_id in enumerate(ids.to_pylist(), 1):
        first = seen.setdefault(clip_id, number)
        if first != number:
            faults.append(f"row {number}: clip_id {clip_id!r} is already in row {first}")
    _raise(uri, faults)


def _resolve(table: pa.Table, uri: str) -> pa.Table:
    """Make relative uris absolute."""
    parent = uri.rsplit("/", 1)[0] if storage.is_remote(uri) else str(Path(storage.absolute(uri)).parent)
    uris = table["uri"]
    relative = pc.invert(pc.or_(pc.starts_with(uris, "/"), pc.match_substring(uris, "://")))
    resolved = pc.if_else(relative, pc.binary_join_element_wise(parent, uris, "/"), uris)
    return table.set_column(1, SCHEMA.field("uri"), resolved)


def _raise(uri: str, faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise InputError(f"manifest {uri}: " + "; ".join(faults[:_SHOWN]) + more)
