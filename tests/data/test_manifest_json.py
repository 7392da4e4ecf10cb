"""Arrow's reader of JSONL says what Python's says, bit for bit, or leaves the block to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cinemo.data.manifest import json_lines as manifest_json
from cinemo.data.manifest.checks import Digest
from cinemo.data.manifest.json_lines import JSON_COLUMN, any_rows, jsonl_batches, plain_rows
from cinemo.types import InputError

ROW: dict[str, Any] = {"clip_id": "a", "uri": "u", "caption": "c"}


def lines(*rows: dict[str, Any], **options: Any) -> bytes:
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


def same(first: pa.RecordBatch, second: pa.RecordBatch) -> bool:
    digests = []
    for batch in (first, second):
        digests.append(Digest())
        digests[-1].update(batch)  # which tells -0.0 from 0.0, as equality does not
    return first.equals(second, check_metadata=True) and digests[0].hexdigest() == digests[1].hexdigest()


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"start": 1.5, "end": 7},
        {"start": None, "end": 1e5},
        {"n": -3, "word": "Straße", "yes": True, "score": 0.1, "none": None},
        {"fps": 24.0, "tiny": -1e-7, "large": 1e22, "minus": -0.0, "word": 'a "b" \\ \n \x7f \u2028 😀 \x00'},
        {"ключ": 1, "a b": "x", "Z": 1, "aa": 2},
    ],
)
@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_plain_rows_are_read_fast(extra: dict[str, Any], options: dict[str, Any]) -> None:
    rows = [ROW | extra, ROW | {"clip_id": "Ω"} | dict(reversed(extra.items()))]
    block = lines(*rows, **options)
    fast = plain_rows(block)
    assert fast is not None
    assert same(fast, any_rows(block, 0, "m"))
    assert plain_rows(block[:-1]) == fast == plain_rows(block.replace(b"\n", b"\r\n"))


def test_nulls_among_values_are_read_fast() -> None:
    rows = [ROW | {"n": n, "x": x, "t": t} for n, x, t in [(None, None, "a"), (2, 0.5, None), (None, 3.0, None)]]
    fast = plain_rows(lines(*rows))
    assert fast is not None
    assert same(fast, any_rows(lines(*rows), 0, "m"))


def _tail(text: str) -> str:
    return json.dumps(ROW)[:-1] + text + "}"


@pytest.mark.parametrize(
    "text",
    [
        # What Python's reader takes otherwise than Arrow's would.
        _tail(', "start": -0'),
        _tail(', "start": 9007199254740992'),
        _tail(', "x": 24, "y": 1.0') + "\n" + _tail(', "x": 24.0, "y": 1.0'),
        _tail(', "x": 24.5') + "\n" + _tail(', "x": 24'),
        _tail(', "x": 24.5') + "\n" + _tail(', "x" : 24'),
        _tail(', "x": 24.5') + "\n" + _tail(', "\\u0078": 24'),
        _tail(', "x": 0.5') + "\n" + _tail(', "x":\t-0\t'),
        _tail(', "x": 1') + "\n" + _tail(""),
        _tail("") + "\n" + _tail(', "x": 1'),
        _tail(', "x": null') + "\n" + _tail(""),
        _tail(', "x": NaN'),
        _tail(', "x": 1') + "\n" + _tail(', "x": 9223372036854775808'),
        _tail(', "x": 1, "x": 2'),
        _tail(', "x": [1]'),
        _tail(', "x": {"y": 1}'),
        _tail(', "x": 1') + "\n" + _tail(', "x": "1"'),
        _tail(', "x": 1') + "\n" + _tail(', "x": true'),
        "\n" + _tail(""),
        " " + _tail(""),
        _tail("") + "\r" + _tail(""),
        _tail(', "caption": "again"'),
        _tail(', "a\\"x": null, "x": 1') + "\n" + _tail(', "a\\"x": 1'),
    ],
)
def test_what_is_unusual_is_left_to_python(text: str) -> None:
    assert plain_rows(text.encode()) is None
    assert len(any_rows(text.encode(), 0, "m")) == len([line for line in text.splitlines() if line.strip()])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (_tail("") + " " + _tail("") + "\n", "row 11: not JSON (Extra data"),
        (_tail("") + "\n\n" + _tail("") + _tail(""), "row 12: not JSON (Extra data"),
        (_tail(', "x": {') + "\n{}}", "row 11: not JSON"),
        (_tail("") + "\n" + _tail(', "start": "soon"'), "row 12: start is 'soon', expected seconds"),
        (_tail("") + "\n" + _tail(', "end": true'), "row 12: end is True, expected seconds"),
        (_tail("") + "\n" + '{"clip_id": "a", "uri": null, "caption": "c"}', "row 12: uri is None, expected a string"),
        ("\ufeff" + _tail(""), "row 11: not JSON (Unexpected UTF-8 BOM"),
        (_tail("") + "\x00" + _tail(""), "row 11: not JSON"),
        (_tail(', "x": ' + "9" * 5000), "row 11: not JSON"),
        (_tail(', "x": ' + "[" * 100_000), "row 11: not JSON"),
        (_tail(', "caption": "\\ud800"'), "row 11: caption has half a surrogate pair"),
    ],
)
def test_faults_are_left_to_python(text: str, fault: str) -> None:
    assert plain_rows(text.encode()) is None
    with pytest.raises(InputError) as caught:
        any_rows(text.encode(), 10, "m")
    assert fault in str(caught.value)


def test_text_that_is_not_utf8_is_refused() -> None:
    block = b'{"clip_id": "a", "uri": "u", "caption": "\xff"}\n'
    assert plain_rows(block) is None
    with pytest.raises(UnicodeDecodeError):
        any_rows(block, 0, "m")


NAMES = st.sampled_from(["x", "y", "a b", "start", "end", 'q"', "caption"])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"]))
VALUES = PLAIN | st.lists(PLAIN, max_size=2) | st.dictionaries(NAMES, PLAIN, max_size=2)
WRITTEN = st.fixed_dictionaries(
    {"ensure_ascii": st.booleans(), "separators": st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " : ")])}
)


@settings(max_examples=300)
@given(st.lists(st.dictionaries(NAMES, VALUES), min_size=1, max_size=5), WRITTEN, st.sampled_from(["\n", "\r\n"]))
@example([{"x": 1.0}, {"x": 2.0}], {}, "\n")
@example([{"x": 1.0}, {"x": 2}], {}, "\n")
@example([{"x": "a"}, {"x": '": ,'}], {}, "\n")
def test_both_readers_agree(rows: list[dict[str, Any]], options: dict[str, Any], end: str) -> None:
    block = "".join(json.dumps(ROW | row, **options) + end for row in rows).encode()
    fast = plain_rows(block)
    if fast is not None:
        slow = any_rows(block, 0, "m")
        assert same(fast, slow)
        expected = [{key: row[key] for key in row.keys() - {"start", "end", *ROW}} for row in rows]
        assert [json.loads(text) if text else {} for text in fast[JSON_COLUMN].to_pylist()] == expected


@pytest.mark.parametrize("size", [1, 100, 1000, 1 << 20])
def test_rows_are_numbered_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(manifest_json, "_BLOCK_BYTES", size)
    parts = [json.dumps(ROW | {"clip_id": f"c{k}"} | ({"tags": [k]} if k % 7 == 0 else {})) for k in range(100)]
    text = "\n".join(parts[:50]) + "\n\n  \n" + "\n".join(parts[50:])
    (tmp_path / "m.jsonl").write_text(text)
    table = pa.Table.from_batches(jsonl_batches((tmp_path / "m.jsonl").open("rb"), "m"))
    assert table["clip_id"].to_pylist() == [f"c{k}" for k in range(100)]
    assert [k for k, extra in enumerate(table[JSON_COLUMN].to_pylist()) if extra] == list(range(0, 100, 7))
    (tmp_path / "m.jsonl").write_text(text + "\n{}\n")
    with pytest.raises(InputError, match="row 101: clip_id is None, expected a string"):
        list(jsonl_batches((tmp_path / "m.jsonl").open("rb"), "m"))
