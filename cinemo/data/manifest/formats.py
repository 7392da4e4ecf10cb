"""Parquet, CSV and JSONL as a stream of Arrow batches: what a manifest is read from, never whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from cinemo.data.manifest.checks import refuse
from cinemo.data.manifest.json_lines import jsonl_batches
from cinemo.types import InputError

BATCH_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 24


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

    def opened(types: dict[str, pa.DataType], threads: bool = False) -> pyarrow.csv.CSVStreamingReader:
        return pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(use_threads=threads, block_size=_BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )

    texts = dict.fromkeys(opened({}).schema.names, pa.string())
    faults.clear()
    try:
        for batch in opened(texts, threads=True):
            if faults:
                break
            yield batch
        good = not faults
    except pa.ArrowInvalid:
        good = False
    if not good:  # only a single reading thread knows the numbers of bad rows
        faults.clear()
        for _ in opened(texts):
            refuse(uri, faults)
        refuse(uri, faults)
        raise InputError(f"manifest {uri}: not readable as csv")


FORMATS = {"parquet": parquet_batches, "csv": csv_batches, "jsonl": jsonl_batches}
