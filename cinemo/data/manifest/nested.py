"""Lists that tables hold as text: JSON, or what Python prints of them, as in Panda-70M's ``['a cat', 'a dog']``."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from cinemo.data.manifest.checks import is_list

_NO_VALUE = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|-?\b(?:nan|inf)\b""")


def lists(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """A column of texts -> a column of the lists they say, and the positions of texts that say none; null stays null.

    Arrow reads a whole column at once where it can, which are JSON and Python's lists of texts without quotes and
    backslashes in them; the others are read one by one.
    """
    texts = texts.cast(pa.string())
    fast = _read_json(texts)
    if fast is not None:
        return fast, np.empty(0, np.int64)
    # Without double quotes and backslashes every single quote begins or ends a text.
    plain = pc.invert(pc.match_substring_regex(texts, r'["\\]|\b(None|True|False|nan|inf)\b|[(){}]'))
    plain = pc.fill_null(plain, True)
    places = np.flatnonzero(~plain.to_numpy(zero_copy_only=False))
    part = _read_json(pc.replace_substring(texts.filter(plain), "'", '"')) if len(places) < len(texts) else None
    if part is not None:
        values, bad = _literals(texts, places)
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            others = pa.array(values, part.type)
            order = np.argsort(np.append(np.flatnonzero(plain.to_numpy(zero_copy_only=False)), places))
            return pa.concat_arrays([part, others]).take(pa.array(order)), bad
    values, bad = _literals(texts, np.arange(len(texts)))
    try:
        column = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):  # lists of values of several types
        return pa.nulls(len(texts), pa.list_(pa.string())), np.arange(len(texts))
    return (column if is_list(column.type) else column.cast(pa.list_(pa.string()))), bad


def _literals(texts: pa.Array, places: np.ndarray) -> tuple[list[list[Any] | None], np.ndarray]:
    """The lists at some places, one by one, and the places where there is none."""
    values: list[list[Any] | None] = []
    bad = []
    for place, text in zip(places.tolist(), texts.take(pa.array(places)).to_pylist(), strict=True):
        value = _literal(text)
        if text is not None and not isinstance(value, list):
            bad.append(place)
            value = None
        values.append(value)
    return values, np.array(bad, np.int64)


def _read_json(texts: pa.Array) -> pa.Array | None:
    """The values of JSON texts; None where not all are lists, or lists of one type."""
    lines = pc.binary_join_element_wise('{"v": ', pc.fill_null(texts, "null"), "}", "")
    block = b"\n".join(lines.cast(pa.binary()).to_pylist())
    if not block or block.count(b"\n") != len(lines) - 1:
        return None
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(block), pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
        )
    except pa.ArrowException:
        return None
    if table.column_names != ["v"] or len(table) != len(texts) or not is_list(table["v"].type):
        return None
    if "timestamp" in str(table["v"].type):  # Arrow takes a text that looks like a date for one
        return None
    column = table["v"].combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def _python(text: str) -> Any:
    """A literal as Python prints it; its ``nan`` and ``inf`` are no literals, and say that there is no value."""
    return ast.literal_eval(_NO_VALUE.sub(lambda match: match[1] or "None", text))


def _literal(text: str | None) -> Any:
    if text is None:
        return None
    for read in (json.loads, _python):
        try:
            value = read(text)
            json.dumps(value, ensure_ascii=False, default=str).encode()  # no column can hold half a surrogate pair
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return list(value) if isinstance(value, tuple) else value
    return None
