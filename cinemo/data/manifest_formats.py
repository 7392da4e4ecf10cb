"""Parquet, CSV and JSONL as a stream of Arrow batches: what a manifest is read from, never whole in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from cinemo.types import InputError

REQUIRED = ("clip_id", "uri", "caption")
OPTIONAL = ("start", "end")
BATCH_ROWS = 1 << 16
# All other keys of a JSONL row, as JSON text: rows need not have the same keys, nor values of one type.
JSON_COLUMN = "\x1fjson"
_BLOCK_BYTES = 1 << 24
_to_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode  # `json.dumps` would make one for each row
_SHOWN = 5


def refuse(uri: str, faults: list[str], count: int | None = None) -> None:
    """Raise an `InputError` that names the first faults and counts all of them; nothing where there is none."""
    if faults:
        more = (len(faults) if count is None else count) - _SHOWN
        raise InputError(f"manifest {uri}: " + "; ".join(faults[:_SHOWN]) + (f"; and {more} more" if more > 0 else ""))


def open_parquet(source: Any) -> pq.ParquetFile:
    """Pages are read as they are needed; a whole column chunk in memory would be gigabytes in a careless file."""
    return pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)


def parquet_batches(path: Path, uri: str) -> Iterator[pa.RecordBatch]:
    yield from open_parquet(path).iter_batches(BATCH_ROWS)


def csv_batches(path: Path, uri: str) -> Iterator[pa.RecordBatch]:
    """Every column as text; bad lines are refused by their numbers."""
    with path.open("rb") as file:
        if not file.read(1):
            raise InputError(f"manifest {uri}: the file is empty")
    faults: list[str] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        place = f"row {row.number - 1}: " if row.number else ""
        faults.append(f"{place}{row.actual_columns} fields, expected {row.expected_columns}")
        return "skip"

    def opened(types: dict[str, pa.DataType]) -> pyarrow.csv.CSVStreamingReader:
        return pyarrow.csv.open_csv(
            path,
            # Only a single reading thread knows the numbers of bad rows.
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )

    names = opened({}).schema.names
    faults.clear()
    for batch in opened(dict.fromkeys(names, pa.string())):
        refuse(uri, faults)
        yield batch
    refuse(uri, faults)


def jsonl_batches(path: Path, uri: str) -> Iterator[pa.RecordBatch]:
    faults: list[str] = []
    columns: dict[str, list[Any]] = {name: [] for name in (*REQUIRED, *OPTIONAL, JSON_COLUMN)}
    types = [pa.string()] * 3 + [pa.float64()] * 2 + [pa.string()]

    def batch() -> pa.RecordBatch:
        refuse(uri, faults)
        arrays = [pa.array(values, kind) for values, kind in zip(columns.values(), types, strict=True)]
        for values in columns.values():
            values.clear()
        return pa.RecordBatch.from_arrays(arrays, list(columns))

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
            for name in REQUIRED:
                value = row.pop(name, None)
                if not isinstance(value, str):
                    faults.append(f"row {number}: {name} is {value!r}, expected a string")
                columns[name].append(value)
            for name in OPTIONAL:
                value = row.pop(name, None)
                if isinstance(value, bool) or not isinstance(value, int | float | None):
                    faults.append(f"row {number}: {name} is {value!r}, expected seconds")
                columns[name].append(value)
            columns[JSON_COLUMN].append(_to_json(row) if row else None)
            if len(columns["uri"]) == BATCH_ROWS:
                yield batch()
    yield batch()


FORMATS = {"parquet": parquet_batches, "csv": csv_batches, "jsonl": jsonl_batches}
