"""JSONL as a stream of Arrow batches.

Two readers say the same, value by value. Arrow's takes a block whose lines are plain objects, twenty times as fast;
Python's takes every other block, and knows what is wrong with which row.
"""

from __future__ import annotations

import io
import json
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from cinemo.data.manifest.checks import refuse

REQUIRED = ("clip_id", "uri", "caption")
OPTIONAL = ("start", "end")
# All other keys of a row, as JSON text: rows need not have the same keys, nor values of one type.
JSON_COLUMN = "\x1fjson"
_SCHEMA = pa.schema(
    [*((name, pa.string()) for name in REQUIRED), *((name, pa.float64()) for name in OPTIONAL), (JSON_COLUMN, "string")]
)
_KINDS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
_BLOCK_BYTES = 1 << 24
_LOOKED_AT = 64  # rows of a block that tell the types of its extra keys
_WHOLE = float(1 << 53)  # up to here every integer is a float64
_to_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode  # `json.dumps` would make one for each row


def jsonl_batches(path: Path, uri: str) -> Iterator[pa.RecordBatch]:
    """Rows with the five columns of a manifest and `JSON_COLUMN`; blank lines are no rows.

    Raises:
        InputError: rows that are no JSON objects, or lack a column, or have one of another type.
    """
    rows = 0
    with path.open("rb") as file, ThreadPoolExecutor(2) as pool:  # Arrow lets other threads run
        ahead: deque[tuple[bytes, Future[pa.RecordBatch | None]]] = deque()
        more = True
        while more or ahead:
            while more and len(ahead) < 3:
                block = file.read(_BLOCK_BYTES) + file.readline()
                more = bool(block)
                if more:
                    ahead.append((block, pool.submit(plain_rows, block)))
            if ahead:
                block, parsed = ahead.popleft()
                batch = parsed.result()
                if batch is None:
                    batch = any_rows(block, rows, uri)
                rows += len(batch)
                yield batch


def any_rows(block: bytes, first: int, uri: str) -> pa.RecordBatch:
    """Whole lines -> their rows, one by one; ``first`` rows were before them."""
    faults: list[str] = []
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    lines = (line for line in io.TextIOWrapper(io.BytesIO(block), encoding="utf-8") if line.strip())
    for number, line in enumerate(lines, first + 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
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
    refuse(uri, faults)
    try:
        arrays = [pa.array(values, field.type) for values, field in zip(columns.values(), _SCHEMA, strict=True)]
    except UnicodeEncodeError:
        refuse(uri, [fault for name, values in columns.items() for fault in _halves(name, values, first)])
        raise
    return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _halves(name: str, values: list[Any], first: int) -> Iterator[str]:
    """JSON can escape half a character, which no file can hold."""
    for number, value in enumerate(values, first + 1):
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            yield f"row {number}: {'another key' if name == JSON_COLUMN else name} has half a surrogate pair"


def plain_rows(block: bytes) -> pa.RecordBatch | None:
    """What `any_rows` gives, bit for bit; or None where only that can tell: faults, or anything unusual.

    Unusual is: lines that do not begin with ``{``, nested values, extra keys of more than one type, keys that only
    some rows have, numbers that float64 or int64 cannot hold.
    """
    characters = np.frombuffer(block, np.uint8)
    begins = np.append(0, np.flatnonzero(characters == ord("\n")) + 1)
    begins = begins[begins < len(block)]
    # A line that begins with a brace begins a row: no string holds a line end, and values that nest are refused below.
    if (characters[begins] != ord("{")).any() or (b"\r" in block and block.count(b"\r") != block.count(b"\r\n")):
        return None
    extra = _extra_kinds(block)
    if extra is None:
        return None
    schema = pa.schema([*list(_SCHEMA)[:-1], *extra.items()])
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(block),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
        )
        table.validate(full=True)  # that all text is UTF-8
    except (pa.ArrowException, OverflowError):
        return None
    if len(table) != len(begins) or any(table[name].null_count for name in REQUIRED):
        return None
    rows = table.combine_chunks().to_batches()[0]
    if any(_differs(rows[name]) for name in OPTIONAL):
        return None
    texts = _json_of(rows, sorted(extra), block)
    return texts and pa.RecordBatch.from_arrays(
        [*(rows[name] for name in (*REQUIRED, *OPTIONAL)), texts], schema=_SCHEMA
    )


def _extra_kinds(block: bytes) -> dict[str, pa.DataType] | None:
    """The extra keys of a block by its first rows, and their types; None where they are not plain."""
    kinds: dict[str, pa.DataType] = {}
    for line in io.BytesIO(block).readlines(min(len(block), 1 << 16))[:_LOOKED_AT]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        for name in row.keys() - {*REQUIRED, *OPTIONAL}:
            known, value = kinds.get(name), row[name]
            kind = pa.null() if value is None else _KINDS.get(type(value))
            if kind is None or re.search(r'[\x00-\x1f"\\]', name):
                return None
            if known is None or known == pa.null():
                kinds[name] = kind
            elif kind not in (known, pa.null()):
                return None
    return kinds


def _differs(seconds: pa.Array) -> bool:
    """Whether Python may read one of these numbers as another: ``-0`` and large integers, or what is no number."""
    values = pc.drop_null(seconds).to_numpy()
    return bool((np.signbit(values) | ~(values < _WHOLE)).any())


def _json_of(rows: pa.RecordBatch, names: list[str], block: bytes) -> pa.Array | None:
    """The extra keys of every row as JSON text; None where a key may be absent, or a number of two types."""
    parts: list[Any] = []
    for name in names:
        column = rows[name]
        # In rows of plain values a name with quotes and a colon is a key. Where it is there once a row, null is null.
        key = f"{_to_json(name)}:".encode()
        doubtful = pa.types.is_floating(column.type)
        if (doubtful or column.null_count) and block.count(key) != len(rows):
            return None
        if doubtful and _integers(column, key, block):
            return None
        parts += [("{" if not parts else ", ") + _to_json(name) + ": ", _texts(column)]
    if not parts:
        return pa.nulls(len(rows), pa.string())
    return pc.binary_join_element_wise(*parts, "}", "")


def _integers(column: pa.Array, key: bytes, block: bytes) -> bool:
    """Whether a column of floats has numbers that are written as integers, or are none."""
    values = pc.drop_null(column).to_numpy()
    if not np.isfinite(values).all():
        return True
    return bool((values == np.trunc(values)).any() and re.search(re.escape(key) + rb"\s*-?[0-9]+[\s,}]", block))


def _texts(column: pa.Array) -> pa.Array:
    if pa.types.is_string(column.type):
        texts = pc.binary_join_element_wise('"', column, '"', "")
        special = pc.fill_null(pc.match_substring_regex(column, r'[\x00-\x1f"\\]'), False)
        if special.true_count:
            texts = pc.replace_with_mask(texts, special, pa.array(map(_to_json, column.filter(special).to_pylist())))
    elif pa.types.is_floating(column.type):
        texts = pa.array([None if value is None else repr(value) for value in column.to_pylist()], pa.string())
    else:
        texts = pc.cast(column, pa.string())
    return pc.fill_null(texts, "null")
