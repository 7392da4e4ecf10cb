"""What is wrong with the rows of a manifest, which clip ids occur twice, and the digest of it all; batch by batch.

Vectorised over Arrow buffers: tens of millions of rows go through in a minute, at eight bytes of memory a row.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cinemo import s3
from cinemo.data.manifest.timestamps import seconds
from cinemo.media.sources import refused_scheme
from cinemo.storage import SCHEME
from cinemo.types import InputError

_SHOWN = 8
_SAID = 5
_BUCKETS = 16


def refuse(uri: str, faults: list[str], count: int | None = None) -> None:
    """Raise an `InputError` that names the first faults and counts all of them; nothing where there is none."""
    if faults:
        more = (len(faults) if count is None else count) - _SAID
        raise InputError(f"manifest {uri}: " + "; ".join(faults[:_SAID]) + (f"; and {more} more" if more > 0 else ""))


def unique(names: Sequence[str], uri: str) -> None:
    """Raise `InputError` where two columns have one name."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"manifest {uri}: column {', '.join(twice)} appears twice; rename one")


class Faults:
    """Faults with row numbers, counted from 1: the first few in words, all of them in number."""

    def __init__(self, unit: str = "row") -> None:
        self.shown: list[str] = []
        self.count = 0
        self.unit = unit

    def add(self, rows: np.ndarray, fault: str) -> None:
        self.count += len(rows)
        self.shown += [f"{self.unit} {row + 1}: {fault}" for row in rows[: max(0, _SHOWN - len(self.shown))]]


def cast_columns(batch: pa.RecordBatch, schema: pa.Schema, first: int, faults: Faults) -> pa.RecordBatch:
    """The columns of ``schema`` with its types (null where the batch has none), and behind them all others.

    A text is read as `timestamps.seconds` where a number is due; NaN, which pandas writes for what is missing, is no
    text.
    """
    columns = []
    for field in schema:
        if field.name not in batch.schema.names:
            columns.append(pa.nulls(batch.num_rows, field.type))
            continue
        column = simple(batch[field.name])
        expected = "a string" if field.type == pa.string() else "seconds"
        try:
            if field.type == pa.string():
                values, bad = as_text(column), np.empty(0, np.int64)
            else:
                values, bad = seconds(column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            values, bad = pa.nulls(batch.num_rows, field.type), _uncastable(column, field.type)
        columns.append(values)
        if len(bad):
            faults.add(first + bad, f"{field.name} is not {expected}")
    others = [name for name in batch.schema.names if name not in schema.names]
    fields = [*schema, *(batch.schema.field(name) for name in others)]
    return pa.RecordBatch.from_arrays([*columns, *(batch[name] for name in others)], schema=pa.schema(fields))


def as_text(column: pa.Array) -> pa.Array:
    """A column of one plain type as text. Raises Arrow's errors for those that are none, such as lists."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return column.cast(pa.string())


def simple(column: pa.Array) -> pa.Array:
    """The same values in an older type where there is one, which all of Arrow's functions take: what is stored once
    for many rows is repeated, views and lists of fixed size become lists, a map becomes a list of pairs.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string_view(kind):
        return column.cast(pa.string())
    if pa.types.is_map(kind):
        pair = pa.struct([pa.field("key", kind.key_type, False), pa.field("value", kind.item_type)])
        return column.cast(pa.list_(pair))
    if is_list(kind) and not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        # Not by a cast: that of Arrow 25 loses the last list of a view.
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.append(0, np.cumsum(lengths, dtype=np.int64)))
        return pa.LargeListArray.from_arrays(offsets, column.flatten(), mask=column.is_null())
    return column


def is_list(kind: pa.DataType) -> bool:
    return any(
        of_kind(kind)
        for of_kind in (
            pa.types.is_list,
            pa.types.is_large_list,
            pa.types.is_fixed_size_list,
            pa.types.is_list_view,
            pa.types.is_large_list_view,
        )
    )


def check_rows(batch: pa.RecordBatch, first: int, faults: Faults) -> None:
    """Note missing ids, uris and captions, uris of no source, and ranges of time that are none."""

    def note(bad: pa.Array, fault: str) -> None:
        if bad.true_count:
            faults.add(first + pc.indices_nonzero(bad).to_numpy(), fault)

    for name in ("clip_id", "uri", "caption"):
        bad = pc.is_null(batch[name])
        if name != "caption":
            text = pc.fill_null(batch[name], "")
            bad = pc.or_(pc.equal(pc.binary_length(text), 0), pc.utf8_is_space(text))
        note(bad, f"{name} is missing")
    _check_schemes(batch["uri"], first, faults)
    start, end = pc.fill_null(batch["start"], 0.0), pc.fill_null(batch["end"], np.inf)
    unreal = pc.or_(pc.is_nan(start), pc.or_(pc.is_nan(end), pc.is_inf(start)))
    negative = pc.or_(pc.less(start, 0.0), pc.less(end, 0.0))
    note(unreal, "start or end is not a number")
    note(negative, "start or end is negative")
    note(pc.and_not(pc.less_equal(end, start), pc.or_(negative, unreal)), "end is not after start")


def empty_captions(captions: pa.Array) -> int:
    """How many captions say nothing: no text, or what programs write for a missing one."""
    short = captions.filter(pc.less_equal(pc.binary_length(captions), 4))
    nothing = pc.is_in(pc.utf8_trim_whitespace(short), pa.array(["", "nan", "NaN", "None", "null", "NULL", "<NA>"]))
    return int(nothing.true_count)


def _check_schemes(uris: pa.Array, first: int, faults: Faults) -> None:
    """Note uris that begin with a scheme of which no clip can be read."""
    usual = functools.reduce(pc.or_, (pc.starts_with(uris, start) for start in ("/", "s3://", "https://")))
    rows = pc.indices_nonzero(pc.and_not(pc.match_substring(uris, "://"), usual))
    if len(rows):
        schemes = pc.extract_regex(uris.take(rows), rf"^(?P<scheme>{SCHEME})://").field("scheme")
        for scheme in pc.unique(schemes).drop_null().to_pylist():
            if why := refused_scheme(scheme):
                places = rows.filter(pc.fill_null(pc.equal(schemes, scheme), False))
                faults.add(first + places.to_numpy(), f"uri begins with {scheme}://, {why}")


def note_buckets(uris: pa.Array, buckets: dict[str, None]) -> None:
    """Add the buckets of uris on s3://, in order, until there are `_BUCKETS`."""
    rest = uris.filter(pc.starts_with(uris, "s3://"))
    for bucket in buckets:
        rest = rest.filter(pc.invert(pc.starts_with(rest, f"s3://{bucket}/")))
    while len(rest) and len(buckets) < _BUCKETS:
        bucket = s3.split(rest[0].as_py())[0]
        buckets[bucket] = None
        rest = rest.filter(pc.invert(pc.or_(pc.starts_with(rest, f"s3://{bucket}/"), pc.equal(rest, rest[0]))))


def _uncastable(column: pa.Array, kind: pa.DataType) -> np.ndarray:
    bad = []
    for number, value in enumerate(column):
        try:
            value.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            bad.append(number)
    return np.array(bad, np.int64)


class Digest:
    """SHA-256 of columns that come in batches; where a batch ends makes no difference."""

    def __init__(self) -> None:
        self._streams: dict[str, Any] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            self._column(name, column)

    def hexdigest(self) -> str:
        total = hashlib.sha256()
        for name in sorted(self._streams):
            total.update(name.encode() + b"\0" + self._streams[name].digest())
        return total.hexdigest()

    def _add(self, name: str, data: Any) -> None:
        self._streams.setdefault(name, hashlib.sha256()).update(data)

    def _column(self, name: str, column: pa.Array) -> None:
        column = simple(column)
        kind = column.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            # Lengths as well as values, so that no row can pretend to be two; -1 is null.
            self._add(name, _numbers(pc.fill_null(pc.list_value_length(column), -1), "<i8"))
            self._column(name + "[]", column.flatten())
        elif pa.types.is_struct(kind):
            self._add(name, _numbers(column.is_valid(), "u1"))
            for field, part in zip(kind, column.flatten(), strict=True):
                self._column(f"{name}.{field.name}", part)
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            self._add(name, _numbers(pc.fill_null(pc.binary_length(column), -1), "<i4"))
            self._add(name + "=", text_bytes(column)[0])
        elif pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            self._add(f"{name}:{kind}", _numbers(pc.fill_null(column, False if kind == pa.bool_() else 0), None))
            self._add(name, _numbers(column.is_valid(), "u1"))
        else:
            try:
                texts = pc.cast(column, pa.string())
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # intervals, unions, UUIDs
                texts = pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
            self._column(name, texts)


def _numbers(column: pa.Array, kind: str | None) -> np.ndarray:
    return np.ascontiguousarray(column.to_numpy(zero_copy_only=False), kind)


def text_bytes(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """``(bytes, offsets)`` of a string column without what a slice or null hides; one offset more than rows, int64."""
    if column.null_count:
        column = pc.fill_null(column, "")
    wide = "<i8" if pa.types.is_large_string(column.type) else "<i4"
    _, place, data = column.buffers()
    offsets = np.frombuffer(place, wide, len(column) + 1, column.offset * np.dtype(wide).itemsize).astype(np.int64)
    content = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
    return content[offsets[0] : offsets[-1]], offsets - offsets[0]


def hash_texts(column: pa.Array) -> np.ndarray:
    """A 64-bit hash of each string, eight bytes at a step for all rows at once."""
    content, offsets = text_bytes(column)
    padded = np.concatenate([content, np.zeros(8, np.uint8)])
    words = np.ndarray((len(padded) - 7,), "<u8", padded.data, strides=(1,))  # one at every byte
    place, length = offsets[:-1], np.diff(offsets)
    hashes = _mix(length.astype(np.uint64))
    rows: Any = slice(None)
    while len(place):
        word = words[place]
        short = length < 8
        if short.any():
            # Shifts by 64 mean nothing, so an empty rest is masked on its own.
            bits = ((8 - np.clip(length, 1, 8)) * 8).astype(np.uint64)
            word = np.where(length > 0, (word << bits) >> bits, np.uint64(0))
        hashes[rows] = _mix(hashes[rows] ^ word)
        left = np.flatnonzero(length > 8)
        rows = left if isinstance(rows, slice) else rows[left]
        place, length = place[left] + 8, length[left] - 8
    return hashes


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, a bijection."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def repeated(
    hashes: np.ndarray, ids: Callable[[np.ndarray], list[str]], at_once: int = 1000, unit: str = "row"
) -> tuple[list[str], int]:
    """Faults of clip ids that occur again, and about how many there are.

    Args:
        hashes: of all ids, in the order of rows.
        ids: the ids at some ascending rows; asked only where hashes agree, since different ids may share one.
    """
    in_order = np.sort(hashes)
    twice = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    del in_order
    if not len(twice):
        return [], 0
    rows = np.flatnonzero(np.isin(hashes, twice))
    _, firsts, places = np.unique(hashes[rows], return_index=True, return_inverse=True)
    again = rows[firsts[places] != np.arange(len(rows))]
    for start in range(0, len(again), at_once):
        part = again[start : start + at_once]
        needed = rows[(rows <= part[-1]) & np.isin(hashes[rows], hashes[part])]
        faults, seen = [], dict[str, int]()
        for row, clip_id in zip(needed.tolist(), ids(needed), strict=True):
            first = seen.setdefault(clip_id, row)
            if first != row:
                faults.append(f"{unit} {row + 1}: clip_id {clip_id!r} is already in {unit} {first + 1}")
        if faults:
            return faults, len(again)
    return [], 0
