"""How the columns of other people's tables become those of a manifest: ``--columns``, and the field's data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cinemo.data.manifest.captions import drawn_column, is_texts
from cinemo.data.manifest.checks import Faults, as_text, is_list, simple
from cinemo.data.manifest.json_lines import listed_name
from cinemo.data.manifest.nested import lists
from cinemo.data.manifest.presets import OPTIONAL, PRESETS, REQUIRED, TARGETS
from cinemo.data.manifest.timestamps import seconds
from cinemo.types import InputError

_FIELD = re.compile(r"\{([^{}]+)\}")
_COUNTERS = ("file", "row", "index")
_NO_ENTRY = 1 << 40  # no list is so long


@dataclass(frozen=True)
class Columns:
    """What each column of a manifest is made of.

    Args:
        templates: of ``clip_id``, ``uri``, ``caption``, ``start`` and ``end``: the name of a column, the first that is
            there of several (``caption|text``), or a text with names in braces. ``NAME.PART`` is a field of a struct
            or, where ``PART`` is a number, an entry of a list; ``NAME[]`` one of several captions that are written as
            a list in a text. ``{row}`` is the row's number from 0, ``{file}`` the file's name without its ending,
            ``{index}`` the number of the clip in a row of several. What is not named is the column of the same name.
        each: columns of lists; every entry is a clip of its own. A name that ends in ``?`` may be absent.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    each: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: Sequence[str]) -> Columns:
        """Names of `PRESETS` and ``NAME=TEMPLATE``; what comes later counts."""
        chosen: dict[str, str] = {}
        for word in words:
            name, equals, template = word.partition("=")
            if not equals:
                if word.lower() not in PRESETS:
                    raise InputError(f"--columns {word}: expected NAME=COLUMN, or one of {', '.join(PRESETS)}")
                chosen |= PRESETS[word.lower()]
            elif name in (*TARGETS, "each"):
                chosen[name] = template
            else:
                raise InputError(
                    f"--columns {word}: no such column of a manifest; expected {', '.join(TARGETS)} or each"
                )
        each = tuple(name.strip() for name in chosen.pop("each", "").split(",") if name.strip())
        return cls(chosen, each)

    def key(self) -> list[Any]:
        return [sorted(self.templates.items()), list(self.each)]


@dataclass(frozen=True)
class Path:
    """A column, and the way to a value in it."""

    column: str
    steps: tuple[str, ...] = ()
    listed: bool = False  # written as a list in a text


@dataclass(frozen=True)
class Mapped:
    """`Columns` for the columns of one file.

    ``parts`` has for each column of a manifest the texts and `Path`s that it is joined from; one path alone keeps its
    type, and its column does not travel under its own name as well.
    """

    parts: Mapping[str, tuple[str | Path, ...]]
    each: tuple[str, ...]
    file: str

    @classmethod
    def of(cls, columns: Columns, names: Sequence[str], uri: str, file: str) -> Mapped:
        """Raises `InputError` where a column that is named is not there; ``file`` is what ``{file}`` stands for."""
        each = tuple(name for name in columns.each if name.rstrip("?") in names or not name.endswith("?"))
        each = tuple(name.rstrip("?") for name in each)
        parts: dict[str, tuple[str | Path, ...]] = {}
        for target in TARGETS:
            template = columns.templates.get(target)
            if template is None:
                if target in names:
                    parts[target] = (Path(target),)
            elif template == "" or (_FIELD.search(template) and template not in names):
                pieces = _FIELD.split(template)  # text, field, text, field, ..., text
                parts[target] = tuple(
                    _path(piece, names, f"{target}={template}", uri) if k % 2 else piece
                    for k, piece in enumerate(pieces)
                    if k % 2 or piece or template == ""
                )
            else:
                choices = [template] if template in names else template.split("|")
                there = next((name for name in choices if _found(name, names)), choices[0])
                parts[target] = (_path(there, names, f"{target}={template}", uri),)
        for name in each:
            if name not in names:
                raise InputError(_unknown(name, names, f"each={name}", uri))
        missing = [target for target in REQUIRED if target not in parts]
        if missing and not columns.templates:
            raise InputError(absent(uri, f"column {', '.join(missing)} is missing", names))
        if missing:
            ways = [f"{name}=COLUMN" for name in missing] + ["caption= for empty ones"] * ("caption" in missing)
            raise InputError(
                f"manifest {uri}: --columns: nothing says what is the {', '.join(missing)}; it has {', '.join(names)}; "
                f"add {', '.join(ways)}"
            )
        return cls(parts, each, file)

    @property
    def needed(self) -> set[str]:
        """The columns that every file must have."""
        paths = [part for target in REQUIRED for part in self.parts[target] if isinstance(part, Path)]
        return {*self.each, *(path.column for path in paths)} - {*_COUNTERS}

    @property
    def used(self) -> list[str]:
        """The columns that are read, in the order of their names."""
        paths = [part for parts in self.parts.values() for part in parts if isinstance(part, Path)]
        return sorted({*self.each, *(path.column for path in paths if path.column not in _COUNTERS)})

    @property
    def drawn(self) -> list[str]:
        """The column whose rows may have several captions, of which one is taken."""
        match self.parts["caption"]:
            case (Path(column, (), False),) if column not in (*_COUNTERS, *self.each):
                return [column]
        return []

    def apply(self, batch: pa.RecordBatch, first: int, faults: Faults, seed: int) -> pa.RecordBatch:
        """Rows of the file, of which ``first`` were before, -> clips with the columns of a manifest and all others."""
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        named = {part.column for parts in self.parts.values() for part in parts if isinstance(part, Path)}
        rows = np.arange(first, first + len(batch))
        entries = np.zeros(len(batch), np.int64)
        if self.each:
            columns, places, entries = _exploded(columns, self.each, named, rows, faults)
            rows = rows[places]
        counters = {"file": pa.array([self.file] * len(rows)), "row": pa.array(rows), "index": pa.array(entries)}
        values = {name: counter for name, counter in counters.items() if name not in columns} | columns
        made: dict[str, pa.Array] = {}
        for target, parts in self.parts.items():
            where = _Where(target, rows, faults)
            if len(parts) == 1 and isinstance(parts[0], Path):
                made[target] = where.whole(parts[0], values, made.get("clip_id"), seed)
            else:
                texts = [part if isinstance(part, str) else where.text(_value(part, values, where)) for part in parts]
                made[target] = (
                    pc.binary_join_element_wise(*texts, "")
                    if any(isinstance(part, Path) for part in parts)
                    else pa.array(["".join(map(str, parts))] * len(rows))
                )
        whole = {parts[0] for parts in self.parts.values() if len(parts) == 1}
        doubled = {listed_name(name) for name in self.drawn}
        for name, column in columns.items():
            if not (name in doubled or Path(name) in whole or (name in self.each and name in named)):
                made[f"manifest_{name}" if name in TARGETS else name] = column
        return pa.RecordBatch.from_arrays(list(made.values()), names=list(made))


@dataclass(frozen=True)
class _Where:
    """Which column is being made for which rows of the file; and what goes wrong with it."""

    target: str
    rows: np.ndarray
    faults: Faults

    def note(self, places: Any, fault: str) -> None:
        if len(places):
            self.faults.add(self.rows[places], fault)

    def whole(self, path: Path, values: Mapping[str, pa.Array], clip_ids: pa.Array | None, seed: int) -> pa.Array:
        column = _value(path, values, self)
        if self.target in OPTIONAL:
            try:
                times, bad = seconds(column)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                times, bad = pa.nulls(len(column), pa.float64()), np.arange(len(column))
            self.note(bad, f"{self.target} is not seconds ({path.column})")
            return times
        if self.target == "caption" and is_texts(column.type) and clip_ids is not None:
            return drawn_column(column, clip_ids, seed)
        texts, several = self.text(column), values.get(listed_name(path.column))
        if self.target == "caption" and several is not None and several.null_count < len(several):
            return pc.if_else(several.is_valid(), drawn_column(several, clip_ids, seed), texts)
        return texts

    def text(self, column: pa.Array) -> pa.Array:
        try:
            return as_text(column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            self.note(np.arange(len(column)), f"{self.target} would be made of {column.type}, expected a text")
            return pa.nulls(len(column), pa.string())


def _path(name: str, names: Sequence[str], said: str, uri: str) -> Path:
    found = _found(name, names)
    if found is None:
        raise InputError(_unknown(name, names, said, uri))
    return found


def _unknown(name: str, names: Sequence[str], said: str, uri: str) -> str:
    return f"manifest {uri}: --columns {said}: there is no column {name}; it has {', '.join(names) or 'none'}"


def _found(name: str, names: Sequence[str]) -> Path | None:
    if name in (*names, *_COUNTERS):
        return Path(name)
    if name.endswith("[]"):
        inner = _found(name[:-2], names)
        return inner and Path(inner.column, inner.steps, True)
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:count]) in names:
            return Path(".".join(parts[:count]), tuple(parts[count:]))
    return None


def absent(uri: str, fault: str, names: Sequence[str]) -> str:
    """The sentence for columns that are not there, with the presets that would fit."""
    preset = fitting(names)
    advice = f"; the columns are those of {preset}: try --columns {preset}" if preset else ""
    return (
        f"manifest {uri}: {fault}; it has {', '.join(names) or 'none'}, "
        f"expected {', '.join(REQUIRED)} and optionally start, end (--columns NAME=COLUMN maps others){advice}"
    )


def fitting(names: Sequence[str]) -> str | None:
    """The preset for a table with such columns, if there is one."""
    return next((preset for preset, templates in PRESETS.items() if _fits(templates, names)), None)


def _fits(templates: Mapping[str, str], names: Sequence[str]) -> bool:
    needed = [name for name in templates.get("each", "").split(",") if name and not name.endswith("?")]
    choices = [[name] for name in needed]
    for target, template in templates.items():
        if target != "each":
            choices += [[name] for name in _FIELD.findall(template)] or [template.split("|")]
    return all(any(_found(name, names) for name in choice) for choice in choices)


def _value(path: Path, values: Mapping[str, pa.Array], where: _Where) -> pa.Array:
    """The values at a path; null where a list is too short."""
    column = simple(values[path.column])
    for step in path.steps:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column, bad = lists(column)
            where.note(bad, f"{path.column} is not a list")
        if is_list(column.type) and step.isdecimal():
            entry = int(step) if len(step) <= 10 else _NO_ENTRY
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            short = lengths <= entry
            where.note(np.flatnonzero(short), f"{path.column} has no entry {step}")
            padded = pc.if_else(pa.array(short), None, column)
            starts = np.cumsum(np.where(short, 0, lengths)) - np.where(short, 0, lengths)
            column = pc.list_flatten(padded).take(pa.array(starts + entry, mask=short))
        elif pa.types.is_struct(column.type) and column.type.get_field_index(step) >= 0:
            column = pc.struct_field(column, step)
        else:
            where.note(np.arange(len(column)), f"{path.column} has no {step} (it holds {column.type})")
            return pa.nulls(len(column), pa.string())
        column = simple(column)
    if path.listed and pa.types.is_string(column.type):
        column, bad = lists(column)
        where.note(bad, f"{path.column} is not a list")
    return column


def _exploded(
    columns: Mapping[str, pa.Array], each: Sequence[str], named: Collection[str], rows: np.ndarray, faults: Faults
) -> tuple[dict[str, pa.Array], np.ndarray, np.ndarray]:
    """Columns with a row for every entry of the lists; the row that it comes from, and its number there."""
    parsed: dict[str, pa.Array] = {}
    written, lengths = set(), np.zeros(len(rows), np.int64)
    good = np.ones(len(rows), bool)
    for name in each:
        column = simple(columns[name])
        if not is_list(column.type):
            written.add(name)
            try:
                column, bad = lists(column)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                bad = np.arange(len(rows))
                column = pa.nulls(len(rows), pa.list_(pa.string()))
            good[bad] = False
            if len(bad):
                faults.add(rows[bad], f"{name} is not a list")
        counts = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
        missing = good & (counts < 0)
        if missing.any():
            faults.add(rows[missing], f"{name} is missing")
        good &= ~missing
        if parsed:
            uneven = np.flatnonzero(good & (counts != lengths))
            for row in uneven[:1]:
                faults.add(rows[uneven], f"{name} has {counts[row]} entries where {each[0]} has {lengths[row]}")
            good[uneven] = False
        else:
            lengths = counts.astype(np.int64)
        parsed[name] = column
    keep = pa.array(good)
    lengths = np.where(good, lengths, 0)
    places = np.repeat(np.arange(len(rows)), lengths)
    entries = np.arange(len(places)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    result = {}
    for name, column in columns.items():
        if name in parsed:
            flat = pc.list_flatten(parsed[name].filter(keep))
            result[name] = _plain_text(flat) if name in written and name not in named else flat
        else:
            result[name] = column.take(pa.array(places))
    return result, places, entries


def _plain_text(entries: pa.Array) -> pa.Array:
    """Entries of written lists as texts: in another block their type may be another."""
    if is_list(entries.type) or pa.types.is_struct(entries.type):
        return pa.array([None if entry is None else json.dumps(entry) for entry in entries.to_pylist()], pa.string())
    return as_text(entries)
