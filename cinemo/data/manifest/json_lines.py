"""JSONL as a stream of Arrow batches.

Two readers say the same, value by value. Arrow's takes a block whose lines are plain objects, twenty times as fast;
Python's takes every other block, and knows what is wrong with which row.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from cinemo.data.manifest.captions import drawn
from cinemo.data.manifest.checks import refuse
from cinemo.data.manifest.presets import OPTIONAL, REQUIRED
from cinemo.data.manifest.timestamps import seconds

# All other keys of a row, as JSON text: rows need not have the same keys, nor values of one type.
JSON_COLUMN = "\x1fjson"


@dataclass(frozen=True)
class Layout:
    """Which keys of a row become columns; all others go into `JSON_COLUMN`.

    ``texts`` must be there, ``seconds`` may, and of ``raw`` the text of any value is taken, JSON where it is no string.
    Those of ``listed`` come a second time, as `listed_name`: the texts of a list, null where the value is none.
    One of several captions is drawn with ``seed``.
    """

    texts: tuple[str, ...] = REQUIRED
    seconds: tuple[str, ...] = OPTIONAL
    raw: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    seed: int = 0

    @property
    def schema(self) -> pa.Schema:
        texts = [(name, pa.string()) for name in (*self.texts, *self.raw, JSON_COLUMN)]
        place = len(self.texts)
        lists = [(listed_name(name), pa.list_(pa.string())) for name in self.listed]
        return pa.schema([*texts[:place], *((name, pa.float64()) for name in self.seconds), *texts[place:], *lists])


def listed_name(name: str) -> str:
    """The column of the lists among a key's values."""
    return f"\x1flist {name}"


MANIFEST = Layout()
_KINDS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
_BLOCK_BYTES = 1 << 24
_ARRAY_ROWS = 1 << 14
_LONGEST = 1 << 26  # characters of an entry of an array
_BETWEEN = re.compile(r"[\s,]*")
_LOOKED_AT = 64  # rows of a block that tell the types of its extra keys
_WHOLE = float(1 << 53)  # up to here every integer is a float64
_to_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode  # `json.dumps` would make one for each row


def jsonl_batches(file: BinaryIO, uri: str, layout: Layout = MANIFEST) -> Iterator[pa.RecordBatch]:
    """Rows with the columns of ``layout``; blank lines are no rows.

    Raises:
        InputError: rows that are no JSON objects, or lack a column, or have one of another type.
    """
    rows = 0
    with ThreadPoolExecutor(2) as pool:  # Arrow lets other threads run
        ahead: deque[tuple[bytes, Future[pa.RecordBatch | None]]] = deque()
        first = more = True
        while more or ahead:
            while more and len(ahead) < 3:
                block = file.read(_BLOCK_BYTES) + file.readline()
                more = bool(block)
                if more:
                    block, first = block.removeprefix(codecs.BOM_UTF8) if first else block, False
                    ahead.append((block, pool.submit(plain_rows, block, layout)))
            if ahead:
                block, parsed = ahead.popleft()
                batch = parsed.result()
                if batch is None:
                    batch = any_rows(block, rows, uri, layout)
                rows += len(batch)
                yield batch


def array_batches(file: BinaryIO, uri: str, layout: Layout = MANIFEST) -> Iterator[pa.RecordBatch]:
    """`jsonl_batches` for one JSON array of objects, read piece by piece."""
    text, decoder, rows = io.TextIOWrapper(file, encoding="utf-8-sig"), json.JSONDecoder(), 0
    rest, place, more = "", 0, True
    while not rest:
        rest = text.read(_BLOCK_BYTES).lstrip()
    rest = rest[1:]
    found: list[Any] = []

    def batch() -> pa.RecordBatch:
        return _batch(list(enumerate(found, rows + 1)), uri, layout)

    while True:
        place = _BETWEEN.match(rest, place).end()  # type: ignore[union-attr]
        if rest[place : place + 1] == "]":
            if (rest[place + 1 :] + text.read(_BLOCK_BYTES)).strip():
                refuse(uri, [f"row {rows + len(found) + 1}: more follows the end of the array; expected one array"])
            break
        try:
            value, end = decoder.raw_decode(rest, place)
            if end == len(rest) and more:  # a number may go on
                raise ValueError("cut")
        except (ValueError, RecursionError) as error:
            piece = text.read(_BLOCK_BYTES)
            more = bool(piece)
            if not more or len(rest) - place > _LONGEST:
                refuse(uri, [f"row {rows + len(found) + 1}: not JSON ({error})"])
            rest, place = rest[place:] + piece, 0
            continue
        found.append(value)
        place = end
        if len(found) == _ARRAY_ROWS:
            yield batch()
            rows, found = rows + len(found), []
    if found:
        yield batch()


def any_rows(block: bytes, first: int, uri: str, layout: Layout = MANIFEST) -> pa.RecordBatch:
    """Whole lines -> their rows, one by one; ``first`` rows were before them."""
    faults: list[str] = []
    rows = []
    lines = (line for line in io.TextIOWrapper(io.BytesIO(block), encoding="utf-8") if line.strip())
    for number, line in enumerate(lines, first + 1):
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            faults.append(f"row {number}: not JSON ({error})")
    return _batch(rows, uri, layout, faults)


def _batch(rows: list[tuple[int, Any]], uri: str, layout: Layout, faults: Sequence[str] = ()) -> pa.RecordBatch:
    """Numbered rows -> columns; ``faults`` are those of other rows."""
    schema, faults = layout.schema, list(faults)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    numbers = []
    for number, row in rows:
        if not isinstance(row, dict):
            faults.append(f"row {number}: a JSON {type(row).__name__}, expected an object")
            continue
        numbers.append(number)
        for name in layout.texts:
            value = row.pop(name, None)
            if name == "caption" and isinstance(value, list):
                value = drawn(value, columns["clip_id"][-1], layout.seed)
            if not isinstance(value, str):
                faults.append(f"row {number}: {name} is {value!r}, expected a string")
            columns[name].append(value)
        for name in layout.seconds:
            value = row.pop(name, None)
            if isinstance(value, bool) or not isinstance(value, int | float | str | None):
                faults.append(f"row {number}: {name} is {value!r}, expected seconds")
            columns[name].append(value)
        for name in layout.raw:
            value = row.pop(name, None)
            columns[name].append(value if isinstance(value, str | None) else _to_json(value))
            if name in layout.listed:
                texts = [text for text in value if isinstance(text, str)] if isinstance(value, list) else None
                columns[listed_name(name)].append(texts)
        columns[JSON_COLUMN].append(_to_json(row) if row else None)
    try:
        for name in layout.seconds:
            columns[name] = _all_seconds(columns[name], name, numbers, faults)
        refuse(uri, faults)
        arrays = [pa.array(values, field.type) for values, field in zip(columns.values(), schema, strict=True)]
    except UnicodeEncodeError:
        refuse(uri, [fault for name, values in columns.items() for fault in _halves(name, values, numbers)])
        raise
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _all_seconds(values: list[Any], name: str, numbers: list[int], faults: list[str]) -> list[Any]:
    """With numbers in place of what is written as text."""
    written = [row for row, value in enumerate(values) if isinstance(value, str)]
    if not written:
        return values
    parsed, bad = seconds(pa.array([values[row] for row in written], pa.string()))
    faults += [f"row {numbers[written[k]]}: {name} is {values[written[k]]!r}, expected seconds" for k in bad.tolist()]
    for row, number in zip(written, parsed.to_pylist(), strict=True):
        values[row] = number
    return values


def _halves(name: str, values: list[Any], numbers: list[int]) -> Iterator[str]:
    """JSON can escape half a character, which no file can hold."""
    for number, value in zip(numbers, values, strict=True):
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            yield f"row {number}: {'another key' if name == JSON_COLUMN else name} has half a surrogate pair"


def plain_rows(block: bytes, layout: Layout = MANIFEST) -> pa.RecordBatch | None:
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
    kinds = _kinds(block, layout)
    if kinds is None or any(name not in kinds for name in layout.raw):
        return None
    schema = pa.schema([*((name, pa.string()) for name in layout.texts), *kinds.items()])
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(block),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
        )
        table.validate(full=True)  # that all text is UTF-8
    except (pa.ArrowException, OverflowError):
        return None
    if len(table) != len(begins) or any(table[name].null_count for name in layout.texts):
        return None
    rows = table.combine_chunks().to_batches()[0]
    columns = {name: rows[name] for name in layout.texts}
    for name in layout.seconds:
        columns[name] = rows[name] if name in kinds else pa.nulls(len(rows), pa.float64())
        if pa.types.is_string(columns[name].type):
            columns[name], bad = seconds(columns[name])
            if len(bad):
                return None
        elif _differs(columns[name]):
            return None
    others = sorted(kinds.keys() - {*layout.seconds})
    if any(_doubtful(rows[name], name, block) for name in others):
        return None
    columns |= {name: _texts(rows[name], quoted=False) for name in layout.raw}
    columns[JSON_COLUMN] = _json_of(rows, [name for name in others if name not in layout.raw])
    columns |= {listed_name(name): pa.nulls(len(rows), pa.list_(pa.string())) for name in layout.listed}
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=layout.schema)


def _kinds(block: bytes, layout: Layout) -> dict[str, pa.DataType] | None:
    """The types of a block's keys, ``texts`` apart, by its first rows; None where they are not plain."""
    kinds: dict[str, pa.DataType] = dict.fromkeys(layout.seconds, pa.null())
    for line in io.BytesIO(block).readlines(min(len(block), 1 << 16))[:_LOOKED_AT]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        for name in row.keys() - {*layout.texts}:
            known, value = kinds.get(name), row[name]
            kind = pa.null() if value is None else _KINDS.get(type(value))
            if name in layout.seconds:
                kind = {pa.int64(): pa.float64(), pa.bool_(): None}.get(kind, kind)
            if kind is None or re.search(r'[\x00-\x1f"\\]', name):
                return None
            if known is None or known == pa.null():
                kinds[name] = kind
            elif kind not in (known, pa.null()):
                return None
    return {
        name: pa.float64() if name in layout.seconds and kind == pa.null() else kind for name, kind in kinds.items()
    }


def _differs(seconds: pa.Array) -> bool:
    """Whether Python may read one of these numbers as another: ``-0`` and large integers, or what is no number."""
    values = pc.drop_null(seconds).to_numpy()
    return bool((np.signbit(values) | ~(values < _WHOLE)).any())


def _json_of(rows: pa.RecordBatch, names: list[str]) -> pa.Array:
    """The extra keys of every row as JSON text, null where there are none."""
    parts: list[Any] = []
    for name in names:
        parts += [("{" if not parts else ", ") + _to_json(name) + ": ", pc.fill_null(_texts(rows[name]), "null")]
    if not parts:
        return pa.nulls(len(rows), pa.string())
    return pc.binary_join_element_wise(*parts, "}", "")


def _doubtful(column: pa.Array, name: str, block: bytes) -> bool:
    """Whether a key may be absent, or its numbers are of two types."""
    # In rows of plain values a name with quotes and a colon is a key. Where it is there once a row, null is null.
    key, floating = f"{_to_json(name)}:".encode(), pa.types.is_floating(column.type)
    if (floating or column.null_count) and block.count(key) != len(column):
        return True
    return floating and _integers(column, key, block)


def _integers(column: pa.Array, key: bytes, block: bytes) -> bool:
    """Whether a column of floats has numbers that are written as integers, or are none."""
    values = pc.drop_null(column).to_numpy()
    if not np.isfinite(values).all():
        return True
    return bool((values == np.trunc(values)).any() and re.search(re.escape(key) + rb"\s*-?[0-9]+[\s,}]", block))


def _texts(column: pa.Array, quoted: bool = True) -> pa.Array:
    """Values as JSON, with null where there is none; strings as they are where not ``quoted``."""
    if pa.types.is_string(column.type):
        if not quoted:
            return column
        texts = pc.binary_join_element_wise('"', column, '"', "")
        special = pc.fill_null(pc.match_substring_regex(column, r'[\x00-\x1f"\\]'), False)
        if special.true_count:
            texts = pc.replace_with_mask(texts, special, pa.array(map(_to_json, column.filter(special).to_pylist())))
    elif pa.types.is_floating(column.type):
        texts = pa.array([None if value is None else repr(value) for value in column.to_pylist()], pa.string())
    else:
        texts = pc.cast(column, pa.string())
    return texts
