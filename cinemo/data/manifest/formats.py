"""Parquet, CSV and JSON as a stream of Arrow batches: what a manifest is read from, never whole in memory."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from cinemo.data.manifest.checks import refuse, unique
from cinemo.data.manifest.json_lines import MANIFEST, Layout, array_batches, jsonl_batches
from cinemo.types import InputError

BATCH_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 24
_LOOKED_AT = 64
# Text files by the end of their names; `COMPRESSED` may follow.
TEXTS = {"csv": "csv", "tsv": "csv", "jsonl": "json", "ndjson": "json", "json": "json"}
COMPRESSED = ("gz", "zst", "zstd", "bz2")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}


def open_parquet(source: Any) -> pq.ParquetFile:
    """Pages are read as they are needed; a whole column chunk in memory would be gigabytes in a careless file."""
    return pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)


def compression(path: Path) -> str | None:
    """What a file is compressed with, by its first bytes: names do not always say."""
    with path.open("rb") as file:
        head = file.read(4)
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def csv_names(path: Path, uri: str) -> list[str]:
    """The columns of a CSV file."""
    return list(_CsvFile(path, uri).names)


def csv_batches(path: Path, uri: str) -> Iterator[pa.RecordBatch]:
    """Every column as text; bad lines are refused by their numbers. Tabs separate where the name ends in .tsv."""
    file = _CsvFile(path, uri)
    try:
        yield from file.opened(threads=True)
    except pa.ArrowInvalid:  # only a single reading thread knows the numbers of bad rows
        for _ in file.opened():
            refuse(uri, file.faults)
        refuse(uri, file.faults)
        raise


class _CsvFile:
    def __init__(self, path: Path, uri: str) -> None:
        self.path, self.faults, self.compression = path, list[str](), compression(path)
        if not path.stat().st_size:
            raise InputError(f"manifest {uri}: the file is empty")
        self.delimiter = "\t" if ".tsv" in Path(uri).suffixes else ","
        self.names: list[str] = []
        self.names = self.opened().schema.names
        self.faults.clear()
        unique(self.names, uri)

    def opened(self, threads: bool = False) -> pyarrow.csv.CSVStreamingReader:
        types = dict.fromkeys(self.names, pa.string())
        stream = pa.input_stream(str(self.path), self.compression)
        if not threads:  # checked here: Arrow cannot hand on a bad row that is no UTF-8
            stream = pa.transcoding_input_stream(stream, "utf-8-sig", "utf-8")
        return pyarrow.csv.open_csv(
            stream,
            read_options=pyarrow.csv.ReadOptions(use_threads=threads, block_size=_BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=self.delimiter,
                newlines_in_values=True,
                invalid_row_handler=None if threads else self._note,
            ),
            convert_options=pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )

    def _note(self, row: pyarrow.csv.InvalidRow) -> str:
        place = f"row {row.number - 1}: " if row.number else ""
        self.faults.append(f"{place}{row.actual_columns} fields, expected {row.expected_columns}")
        return "skip"


def json_batches(path: Path, uri: str, layout: Layout = MANIFEST) -> Iterator[pa.RecordBatch]:
    """Objects, one in a line; or in a .json file all in one array."""
    read = array_batches if _is_array(path, uri) else jsonl_batches
    with _opened(path) as file:
        yield from read(file, uri, layout)


def json_names(path: Path, uri: str) -> list[str]:
    """The keys of the first objects, in order; what is no JSON is left for `json_batches` to refuse."""
    with _opened(path) as file:
        begin = file.read(1 << 20).decode("utf-8-sig", errors="replace")
    if _is_array(path, uri):
        begin = begin.lstrip()[1:]
    decoder, place, names = json.JSONDecoder(), 0, dict[str, None]()
    with contextlib.suppress(ValueError, RecursionError):
        for _ in range(_LOOKED_AT):
            row, place = decoder.raw_decode(begin, len(begin) - len(begin[place:].lstrip(" \t\r\n,")))
            names |= dict.fromkeys(row if isinstance(row, dict) else ())
    return list(names)


def _is_array(path: Path, uri: str) -> bool:
    with _opened(path) as file:
        begin = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    return begin.startswith(b"[") and ".json" in Path(uri).suffixes


def _opened(path: Path) -> BinaryIO:
    kind = compression(path)
    if kind is None:
        return path.open("rb")
    return io.BufferedReader(pa.input_stream(str(path), kind))
