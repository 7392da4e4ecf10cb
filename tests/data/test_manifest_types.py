"""Every type that Arrow stores is read, or refused by the name of its column; what was read always is the same."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from cinemo.data.manifest.checks import Digest
from cinemo.data.manifest.manifest import read_manifest
from cinemo.types import InputError

PAIRS = [[("a", "x")], None, [("b", "y"), ("c", None)]]
MAP, MAPS = pa.map_(pa.string(), pa.string()), [{"a": "x"}, None, {"b": "y", "c": None}]
STORED = {  # a column, and its values as JSON
    "string_view": (pa.array(["a", None, "c"], pa.string_view()), ["a", None, "c"]),
    "list<string_view>": (pa.array([["a"], None, []], pa.list_(pa.string_view())), [["a"], None, []]),
    "list_view": (pa.array([["a"], None, ["b", "c"]], pa.list_view(pa.string())), [["a"], None, ["b", "c"]]),
    "large_list_view": (pa.array([[1], None, [2]], pa.large_list_view(pa.int8())), [[1], None, [2]]),
    "fixed_size_list": (pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2)), [[1, 2], [3, 4], [5, 6]]),
    "map": (pa.array(PAIRS, MAP), MAPS),
    "map of views": (pa.array(PAIRS, pa.map_(pa.string_view(), pa.string_view())), MAPS),
    "map, key twice": (pa.array([[], [("a", "1"), ("a", "2")], None], MAP), [{}, [["a", "1"], ["a", "2"]], None]),
    "struct": (pa.array([{"m": PAIRS[0]}] * 3, pa.struct([("m", MAP)])), [{"m": {"a": "x"}}] * 3),
    "dictionary": (pa.array(["a", "b", None]).dictionary_encode(), ["a", "b", None]),
    "float16": (pa.array([1.5, None, float("inf")], pa.float16()), [1.5, None, None]),
    "uint64": (pa.array([2**64 - 1, None, 0], pa.uint64()), [2**64 - 1, None, 0]),
    "decimal256": (pa.array([decimal.Decimal("1.50")] * 3, pa.decimal256(50, 2)), ["1.50"] * 3),
    "duration": (pa.array([datetime.timedelta(seconds=1)] * 3), ["0:00:01"] * 3),
    "time": (pa.array([datetime.time(1, 2, 3)] * 3), ["01:02:03"] * 3),
    "null": (pa.nulls(3), [None] * 3),
    "uuid": (pa.array([b"0123456789abcdef"] * 3, pa.uuid()), ["30313233-3435-3637-3839-616263646566"] * 3),
    "json": (pa.array(["{}"] * 3, pa.json_()), ["{}"] * 3),
    "bool8": (pa.array([1, 0, None], pa.bool8()), [True, False, None]),
}  # fmt: skip


def table(**columns: Any) -> pa.Table:
    return pa.table({"clip_id": ["a", "b", "c"], "uri": ["u"] * 3, "caption": ["x"] * 3} | columns)


@pytest.mark.parametrize("name", STORED)
def test_every_type_travels_as_json(tmp_path: Path, name: str) -> None:
    column, expected = STORED[name]
    pq.write_table(table(x=column), tmp_path / "m.parquet")
    manifest = read_manifest(str(tmp_path / "m.parquet"))
    assert [json.loads(text)["x"] for text in manifest.read()["extra"].to_pylist()] == expected
    assert [json.loads(text)["x"] for text in manifest.read(1, 3)["extra"].to_pylist()] == expected[1:]
    single = Digest()
    for row in range(3):
        single.update(pa.RecordBatch.from_arrays([column.slice(row, 1)], names=["x"]))
    whole = Digest()
    whole.update(pa.RecordBatch.from_arrays([column], names=["x"]))
    assert single.hexdigest() == whole.hexdigest()


@pytest.mark.parametrize(
    "column", [pc.run_end_encode(pa.array(["a", "a", "b"])), pa.array([pa.MonthDayNano([1, 2, 3])] * 3)]
)
def test_what_only_memory_holds_has_a_digest_too(column: pa.Array) -> None:
    digests = set()
    for part in (column, column.slice(1)):
        digest = Digest()
        digest.update(pa.RecordBatch.from_arrays([part], names=["x"]))
        digests.add(digest.hexdigest())
    assert len(digests) == 2


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_texts_of_every_type_are_one_manifest(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(table(), tmp_path / "plain.parquet")
    pq.write_table(pa.table({name: table()[name].cast(kind) for name in table().column_names}), tmp_path / "m.parquet")
    plain, manifest = (read_manifest(str(tmp_path / f"{name}.parquet")) for name in ("plain", "m"))
    assert (manifest.read(), manifest.digest) == (plain.read(), plain.digest)
    assert manifest.ids(np.array([2])) == ["c"]


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"x": [b"b"] * 3, "y": [b"b"] * 3}, "column x, y is binary, which JSON cannot hold; drop it"),
        ({"caption": [float("nan")] * 3}, "row 1: caption is missing"),
        ({"caption": [{"a": 1}] * 3}, "row 1: caption is not a string"),
        ({"caption": [[1]] * 3}, "row 1: caption is not a string"),
        ({"uri": pa.array([float("nan")] * 3)}, "row 1: uri is missing"),
        ({"start": [[1]] * 3}, "row 1: start is not seconds"),
        ({"start": pa.array([datetime.datetime(2024, 1, 1)] * 3)}, "row 1: start is not seconds"),
        # Arrow writes such a file and cannot read it.
        (
            {"x": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2))},
            r"column x \(fixed_size_list.*is not readable",
        ),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, columns: dict[str, Any], fault: str) -> None:
    pq.write_table(table(**columns), tmp_path / "m.parquet")
    with pytest.raises(InputError, match=fault) as caught:
        read_manifest(str(tmp_path / "m.parquet"))
    assert "\n" not in str(caught.value)


def test_a_column_of_a_csv_that_comes_twice(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("clip_id,uri,caption,tag,tag\na,u,c,1,2\n")
    with pytest.raises(InputError, match="column tag appears twice; rename one"):
        read_manifest(str(tmp_path / "m.csv"))


@pytest.mark.parametrize("name", ["caption", "uri", "tag"])
def test_a_column_of_parquet_that_comes_twice(tmp_path: Path, name: str) -> None:
    names = ["clip_id", "uri", "caption", name, name]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 5, names), tmp_path / "m.parquet")
    with pytest.raises(InputError, match=f"column {name} appears twice; rename one"):
        read_manifest(str(tmp_path / "m.parquet"))


def test_captions_that_say_nothing_are_counted(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("clip_id,uri,caption\na,u,\nb,u,nan\nc,u, \nd,u,a nan\ne,u,None\n")
    assert read_manifest(str(tmp_path / "m.csv")).notes == ("4 of 5 captions are empty",)


def test_digests_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Datasets are known by them: another digest is another dataset, which no run continues."""
    rows: list[dict[str, Any]] = [
        {
            "clip_id": f"c{k}", "uri": f"/v/{k}.mp4", "caption": ["a cat", "", 'Straße "x"'][k % 3],
            "start": None if k % 2 else k / 4, "end": 9.5 + k, "n": k, "tags": ["x"] * k, "deep": {"a": [k, None]},
            "score": k / 3, "word": f"{k:03d}",
        }
        for k in range(7)
    ]  # fmt: skip
    flat = [{name: value for name, value in row.items() if name not in ("tags", "deep")} for row in rows]
    columns = {
        "day": pa.array([datetime.date(2024, 1, k + 1) for k in range(7)]),
        "price": pa.array([decimal.Decimal(k) for k in range(7)]),
        "code": pa.array(list("abcabca")).dictionary_encode(),
        "wide": pa.array(list("abcabca"), pa.large_string()),
        "when": pa.array(range(7), pa.timestamp("us", "UTC")),
        "half": pa.array(range(7), pa.float16()),
        "nothing": pa.nulls(7),
    }
    typed = pa.Table.from_pylist(rows)
    for name, column in columns.items():
        typed = typed.append_column(name, column)
    pq.write_table(typed, tmp_path / "m.parquet")
    pyarrow.csv.write_csv(pa.Table.from_pylist(flat), tmp_path / "m.csv")
    for name, written in (("m", rows), ("flat", flat)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    assert {name: read_manifest(str(tmp_path / name)).digest for name in EARLIER} == EARLIER


EARLIER = {
    "m.parquet": "4cc95b6da21b32fc5536fc9f5b3dd996476f1cb9b6e6caa69481f72ebf4cd3fe",
    "m.csv": "14b823329a879a4b2d21e65600322f20188873a8c9dd09af99585ad51ae813e0",
    "m.jsonl": "047f6a933750b3219080706ba5de4ffb5e4f7d3fce1ead0a0a0e29b294a69d2b",
    "flat.jsonl": "ffe41c8d968aa53c337d1af2f412ed8b573568df4de67df3d6b27128d25d865a",
}
