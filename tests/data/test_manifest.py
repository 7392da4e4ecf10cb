"""Manifests of every kind say the same; faulty ones are refused with the rows that are at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from cinemo import storage
from cinemo.data.manifest import SCHEMA, manifest_from_folder, read_manifest
from cinemo.types import InputError

ROWS: list[dict[str, Any]] = [
    {"clip_id": "a", "uri": "videos/a.mp4", "caption": 'rain, "heavy"\non a road', "start": 1.5, "end": 4.0},
    {"clip_id": "b", "uri": "/abs/b.mp4", "caption": "", "start": None, "end": None},
    {"clip_id": "7", "uri": "s3://bucket/c.mp4", "caption": "Straße", "start": None, "end": 9.0},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), path)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_all_kinds_read_alike(tmp_path: Path, kind: str) -> None:
    manifest = read_manifest(str(write(tmp_path / f"m.{kind}", ROWS)))
    table = manifest.read()
    assert table.schema == manifest_schema.ROWS
    expected = [{**ROWS[0], "uri": f"{tmp_path}/videos/a.mp4"}, *ROWS[1:]]
    assert table.to_pylist() == [{**row, "extra": None} for row in expected]
    assert read_manifest(str(tmp_path / f"m.{kind}"), limit=2).ids(np.arange(2)) == ["a", "b"]


def test_optional_columns_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("caption,clip_id,uri,extra\nx,a,a.mp4,1\n")
    row = read_manifest(str(tmp_path / "m.csv")).to_pylist()[0]
    assert row == {"clip_id": "a", "uri": f"{tmp_path}/a.mp4", "caption": "x", "start": None, "end": None}


@pytest.mark.s3
def test_manifest_on_s3(s3_endpoint: str) -> None:
    storage.write_bytes("s3://cinemo-test/lists/m.jsonl", json.dumps(ROWS[0]).encode())
    assert read_manifest("s3://cinemo-test/lists/m.jsonl")["uri"].to_pylist() == ["s3://cinemo-test/lists/videos/a.mp4"]


GOOD = "a,a.mp4,x,,\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "", "the file is empty"),
        ("m.csv", "clip_id,uri,caption\n", "it has no rows"),
        ("m.csv", "clip_id,url,caption\na,b,c\n", "column uri is missing; it has clip_id, url, caption"),
        ("m.csv", f"clip_id,uri,caption,start,end\n{GOOD},b.mp4,x,,\n", "row 2: clip_id is missing"),
        ("m.csv", f"clip_id,uri,caption,start,end\n{GOOD}b, ,x,,\n", "row 2: uri is missing"),
        ("m.csv", f"clip_id,uri,caption,start,end\n{GOOD}b,b.mp4,x,soon,\n", "row 2: start is not seconds"),
        ("m.csv", f"clip_id,uri,caption,start,end\n{GOOD}b,b.mp4,x,-1,\n", "row 2: start or end is negative"),
        ("m.csv", f"clip_id,uri,caption,start,end\n{GOOD}b,b.mp4,x,3,3\n", "row 2: end is not after start"),
        ("m.csv", f"clip_id,uri,caption,start,end\n{GOOD}b,b.mp4\n", "row 2: 2 fields, expected 5"),
        (
            "m.csv",
            f"clip_id,uri,caption,start,end\n{GOOD}b,b.mp4,x,,\n{GOOD}",
            "row 3: clip_id 'a' is already in row 1",
        ),
        ("m.jsonl", '{"clip_id": "a", "uri": "u", "caption": "c"}\n{"clip_id"\n', "row 2: not JSON"),
        (
            "m.jsonl",
            '{"clip_id": "a", "uri": "u"}\n{"clip_id": "b", "uri": "u", "caption": "c"}\n',
            "row 1: caption is",
        ),
        ("m.jsonl", '{"clip_id": 5, "uri": "u", "caption": "c"}\n', "row 1: clip_id is 5, expected a string"),
        ("m.jsonl", '["a"]\n', "row 1: a JSON list"),
        ("m.parquet", "PAR1 no parquet", "not readable as parquet"),
        ("m.txt", "a", "expected a .parquet, .csv or .jsonl file"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        read_manifest(str(tmp_path / name))
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    rows = [{"clip_id": f"c{k}", "uri": "" if k % 2 else "u", "caption": "x"} for k in range(40)]
    with pytest.raises(InputError, match=r"row 2: uri is missing; row 4: .*row 10: uri is missing; and 15 more$"):
        read_manifest(str(write(tmp_path / "m.parquet", rows)))


def test_missing_file_and_bad_limit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_manifest(str(tmp_path / "m.csv"))
    with pytest.raises(InputError, match="limit is 0"):
        read_manifest(str(write(tmp_path / "m.csv", ROWS)), limit=0)


def test_folder_of_videos(tmp_path: Path) -> None:
    for name in ["b_dog-runs.MP4", "a.mov", "sub/a b.webm", "sub/a-b.webm", "notes.pdf", ".hidden.mp4"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("  a red\nballoon ")
    rows = read_manifest(str(tmp_path)).to_pylist()
    assert rows == manifest_from_folder(tmp_path).to_pylist()
    assert [row["caption"] for row in rows] == ["a red balloon", "b dog runs", "a b", "a b"]
    assert [row["clip_id"] for row in rows[:3]] == ["a", "b_dog-runs", "sub-a-b"]
    assert len({row["clip_id"] for row in rows}) == 4
    assert rows[0]["uri"] == str(tmp_path / "a.mov")


def test_folder_without_videos(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="no videos there"):
        read_manifest(str(tmp_path))
