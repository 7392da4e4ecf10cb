"""Points in time as people write them, as seconds; a column at a time."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_NUMBER = (
    r"(?i)^[+-]?(?:[0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+(?:e[+-]?[0-9]+)?|nan|inf|infinity)$"  # as Arrow casts
)
# Each with the groups d, h, m and s, of which some may be absent.
_SPELLINGS = (
    # 10.5s, and numbers between blanks
    r"^\s*(?P<d>)(?P<h>)(?P<m>)(?P<s>[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?) ?(?:s|sec|seconds)?\s*$",
    # 02:03, 1:02:03.5, 00:00:10,500 (of subtitles), 1 day, 0:00:10 and 0 days 00:00:10.5 (Python, pandas)
    r"^\s*(?:(?P<d>[0-9]+) days?,? )?(?:(?P<h>[0-9]+):(?P<m>[0-5]?[0-9])|(?P<only>[0-9]+))"
    r":(?P<s>[0-5]?[0-9](?:[.,][0-9]+)?)\s*$",
    # ISO 8601: PT00H00M11S, PT1M0.5S, P1DT2H
    r"^\s*P(?:(?P<d>[0-9]+)D)?T?(?:(?P<h>N)H)?(?:(?P<m>N)M)?(?:(?P<s>N)S)?\s*$".replace("N", r"[0-9]+(?:[.,][0-9]+)?"),
)


def seconds(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """A column of times -> float64 seconds, and the positions of values that are none.

    Numbers are seconds. A text is a number, ``[HH:]MM:SS[.fff]``, an ISO 8601 duration, or what Python or pandas print
    of a ``timedelta``; an empty one is null. Durations and times of day are taken as they are.
    """
    kind = column.type
    if pa.types.is_duration(kind) or pa.types.is_time(kind):
        whole = column.cast(pa.int64() if pa.types.is_duration(kind) or kind.bit_width == 64 else pa.int32())
        return pc.divide(pc.cast(whole, pa.float64()), float(_UNITS[kind.unit])), np.empty(0, np.int64)
    if not pa.types.is_string(kind):
        values = column.cast(pa.float64())
        return values, np.empty(0, np.int64)
    column = pc.if_else(pc.equal(column, ""), None, column)
    try:
        return column.cast(pa.float64()), np.empty(0, np.int64)
    except pa.ArrowInvalid:
        return _spelled(column)


def _spelled(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    result = pc.if_else(pc.match_substring_regex(texts, _NUMBER), texts, None).cast(pa.float64())
    for spelling in _SPELLINGS:
        parts = pc.extract_regex(texts, spelling)
        if parts.null_count < len(parts):
            total = pc.add(_number(parts, "s"), pc.multiply(_number(parts, "m", "only"), 60.0))
            total = pc.add(total, pc.multiply(_number(parts, "h"), 3600.0))
            total = pc.add(total, pc.multiply(_number(parts, "d"), 86400.0))
            result = pc.coalesce(result, pc.if_else(parts.is_valid(), total, None))
    bare = pc.match_substring_regex(texts, r"^\s*PT?\s*$")  # no duration, although all of its parts may be absent
    result = pc.if_else(pc.fill_null(bare, False), None, result)
    return result, np.flatnonzero(texts.is_valid().to_numpy(False) & result.is_null().to_numpy(False))


def _number(parts: pa.Array, *names: str) -> pa.Array:
    """The number of whichever group is there, else 0."""
    result: pa.Array | None = None
    for name in names:
        if parts.type.get_field_index(name) < 0:
            continue
        texts = pc.replace_substring(pc.struct_field(parts, name), ",", ".")
        value = pc.if_else(pc.equal(texts, ""), None, texts).cast(pa.float64())
        result = value if result is None else pc.coalesce(result, value)
    return pc.fill_null(result, 0.0)
