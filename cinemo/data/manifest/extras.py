"""Columns that are not ours travel with a clip as one JSON object, each under its own name."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from cinemo.data.dataset.shards import SAMPLE_FIELDS
from cinemo.data.manifest.json_lines import JSON_COLUMN


def json_objects(table: pa.Table, numeric: Sequence[str]) -> list[str | None]:
    """One object a row, None where it is empty.

    Args:
        numeric: columns of text of which every value is a number, or empty.
    """
    return [_extra(row, numeric) for row in _objects(table)] if table.num_columns else [None] * len(table)


def stored_name(name: str) -> str:
    """The name of an extra column in a sample's JSON: its own, unless a sample has such a field itself."""
    return f"manifest_{name}" if name in SAMPLE_FIELDS else name


def _objects(table: pa.Table) -> list[dict[str, Any]]:
    """Rows; a map is an object, or a list of pairs where it has a key twice."""
    try:
        return list(table.to_pylist(maps_as_pydicts="strict"))
    except KeyError:  # every row by itself: what else is read must make no difference to it
        if len(table) == 1:
            return list(table.to_pylist())
        return [row for place in range(len(table)) for row in _objects(table.slice(place, 1))]


def _extra(row: dict[str, Any], numeric: Sequence[str]) -> str | None:
    loose = json.loads(row.pop(JSON_COLUMN, None) or "{}")
    for name in numeric:
        row[name] = json.loads(row[name]) if row[name] else None
    named = {stored_name(name): _plain(value) for name, value in (row | loose).items()}
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
    return value if isinstance(value, str | int | None) else str(value)
