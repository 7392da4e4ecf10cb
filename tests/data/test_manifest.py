"""Manifests of every kind say the same; faulty ones are refused with the rows that are at fault."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from faulty_s3 import FaultyS3
from hypothesis import given
from hypothesis import strategies as st

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.manifest import checks as manifest_checks
from cinemo.data.manifest import formats as manifest_formats
from cinemo.data.manifest import manifest as manifest_schema
from cinemo.data.manifest.manifest import manifest_of, read_manifest
from cinemo.data.precompute import estimate, graph
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
    row = read_manifest(str(tmp_path / "m.csv")).read().to_pylist()[0]
    assert row.pop("extra") == '{"extra": 1}'
    assert row == {"clip_id": "a", "uri": f"{tmp_path}/a.mp4", "caption": "x", "start": None, "end": None}


@pytest.mark.s3
def test_manifest_on_s3(s3_endpoint: str) -> None:
    storage.write_bytes("s3://cinemo-test/lists/m.jsonl", json.dumps(ROWS[0]).encode())
    rows = read_manifest("s3://cinemo-test/lists/m.jsonl").read()
    assert rows["uri"].to_pylist() == ["s3://cinemo-test/lists/videos/a.mp4"]


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
            "row 1: caption is None, expected a string",
        ),
        ("m.jsonl", '{"clip_id": 5, "uri": "u", "caption": "c"}\n', "row 1: clip_id is 5, expected a string"),
        ("m.jsonl", '["a"]\n', "row 1: a JSON list"),
        ("m.json", '[{"clip_id": "a", "uri": "u", "caption": "c"}]\n[{}]', "row 2: more follows the end of the array"),
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


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_bad_line_that_is_no_utf8_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"clip_id,uri,caption\na,b.mp4,caf\xe9,x\n")
    with pytest.raises(InputError, match=r"m.csv: not readable as csv \(UnicodeDecodeError: "):
        read_manifest(str(tmp_path / "m.csv"))


def test_many_faults_are_counted(tmp_path: Path) -> None:
    rows = [{"clip_id": f"c{k}", "uri": "" if k % 2 else "u", "caption": "x"} for k in range(40)]
    with pytest.raises(InputError, match=r"row 2: uri is missing; row 4: .*row 10: uri is missing; and 15 more$"):
        read_manifest(str(write(tmp_path / "m.parquet", rows)))


@pytest.mark.parametrize(
    ("uri", "fault"),
    [
        ("ftp://host/b.mp4", "ftp://, expected a local path, s3://, https://, gs:// or az://"),
        ("S3://bucket/b.mp4", "S3://, expected s3://"),
        ("http://host/b.mp4", r"http://, expected https:// \(CINEMO_HTTP=1 allows http\)"),
        ("hdfs://host/b.tar::m::0+5", "hdfs://, expected a local path, s3://, https://, gs:// or az://"),
        ("gs://bucket/b.mp4", "gs://, needs `pip install gcsfs`"),
        ("abfs://container/b.mp4", "abfs://, needs `pip install adlfs`"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_schemes_of_no_source_are_refused_with_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, uri: str, fault: str
) -> None:
    monkeypatch.delenv("CINEMO_HTTP", raising=False)
    monkeypatch.setattr("cinemo.clouds.is_installed", lambda scheme: False)
    rows = [{"clip_id": str(k), "uri": f"https://host/{k}.mp4", "caption": "x"} for k in range(6)]
    rows[2]["uri"] = rows[4]["uri"] = uri
    path = write(tmp_path / f"m.{kind}", rows)
    with pytest.raises(InputError, match=f"row 3: uri begins with {fault}; row 5: uri begins with {fault}$"):
        read_manifest(str(path))
    if uri.startswith(("gs", "abfs", "http:")):
        monkeypatch.setattr("cinemo.clouds.is_installed", lambda scheme: True)
        monkeypatch.setenv("CINEMO_HTTP", "1")
        assert len(read_manifest(str(path))) == 6


def test_what_only_looks_like_a_scheme_is_a_path(tmp_path: Path) -> None:
    uris = [
        "file:///a.mp4",
        "/a://b.mp4",
        "s3://b/x://y.mp4",
        "https://h/r?to=ftp://x",
        "/t.tar::ftp://m::0+5",
        "a:b.mp4",
    ]
    rows = [{"clip_id": str(k), "uri": uri, "caption": "x"} for k, uri in enumerate(uris)]
    assert len(read_manifest(str(write(tmp_path / "m.jsonl", rows)))) == len(uris)


def test_what_is_not_there_is_said_before_what_is_expected(tmp_path: Path) -> None:
    for name in ("folder", "clip.mp4", "m.parquet", "folder/m.csv"):
        with pytest.raises(InputError, match=rf"{name}: no such file or directory$"):
            read_manifest(str(tmp_path / name))
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(InputError, match=r"clip.mp4: expected a .parquet"):
        read_manifest(str(tmp_path / "clip.mp4"))


@pytest.mark.s3
def test_buckets_of_uris_are_looked_at_once_before_a_run(
    s3_faults: FaultyS3, tmp_path: Path, small_recipe: Recipe
) -> None:
    uris = ["s3://cinemo-test/a.mp4", "v.mp4", "s3://cinemo-test/t.tar::m::0+5", *["s3://no-such-bucket/b.mp4"] * 3]
    rows = [{"clip_id": str(k), "uri": uri, "caption": "x"} for k, uri in enumerate(uris)]
    path = write(tmp_path / "m.jsonl", rows)
    s3_faults.meet()
    manifest = read_manifest(str(path))
    assert manifest.buckets == ("cinemo-test", "no-such-bucket")
    assert not s3_faults.seen
    with pytest.raises(InputError, match="s3://no-such-bucket: the bucket does not exist, but uris of the manifest"):
        manifest.check_buckets()
    assert s3_faults.operations == {"HeadBucket": 2}
    for ended in (graph.run, estimate.plan_only):
        with pytest.raises(InputError, match="s3://no-such-bucket: the bucket does not exist"):
            ended(small_recipe, str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "dataset.json").exists()
    s3_faults.meet({"403": 1.0})  # who may read objects need not be allowed to look at their bucket
    manifest.check_buckets()
    many = [{"clip_id": str(k), "uri": f"s3://b{k}/v.mp4", "caption": "x"} for k in range(99)]
    assert manifest_of(pa.Table.from_pylist(many)).buckets == tuple(f"b{k}" for k in range(16)), (
        "as many as are cheap to look at"
    )


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
    said = "3 of 4 captions are file names (b_dog-runs.MP4, sub/a b.webm, sub/a-b.webm)"
    with pytest.raises(InputError, match=re.escape(said) + ".*--file-names-as-captions"):
        read_manifest(str(tmp_path))
    manifest = read_manifest(str(tmp_path), names_as_captions=True)
    assert manifest.notes == (said,)
    rows = manifest.read().to_pylist()
    assert [row["caption"] for row in rows] == ["a red balloon", "b dog runs", "a b", "a b"]
    assert [row["clip_id"] for row in rows[:3]] == ["a", "b_dog-runs", "sub-a-b"]
    assert len({row["clip_id"] for row in rows}) == 4
    assert rows[0]["uri"] == str(tmp_path / "a.mov")


def test_folder_without_videos(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="no videos there"):
        read_manifest(str(tmp_path))


EXTRAS: list[dict[str, Any]] = [
    {"tags": ["x", "ü"], "score": 0.5, "rank": 3, "fps": 24.0, "seen": None, "code": "007", "deep": {"a": [1, None]}},
    {"tags": [], "score": -1e-3, "rank": None, "fps": 25.0, "seen": None, "code": "", "deep": {"a": None}},
]


def extras(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in read_manifest(str(path)).read()["extra"].to_pylist()]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_extra_columns_keep_their_types(tmp_path: Path, kind: str) -> None:
    rows = [row | extra for row, extra in zip(ROWS, EXTRAS, strict=False)]
    expected = [{**extra, "manifest_fps": extra["fps"]} for extra in EXTRAS]  # a sample has an fps of its own
    for row in expected:
        del row["fps"]
    assert extras(write(tmp_path / f"m.{kind}", rows)) == expected


def test_extra_columns_of_a_csv_are_numbers_where_all_values_are(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(
        "clip_id,uri,caption,n,x,code,word\na,u,c,1,2,007,1\nb,u,c,,-.5e1,2,b\nc,u,c,3,1.5,1,\n"
    )
    assert extras(tmp_path / "m.csv") == [
        {"n": 1, "x": "2", "code": "007", "word": "1"},
        {"n": None, "x": "-.5e1", "code": "2", "word": "b"},
        {"n": 3, "x": "1.5", "code": "1", "word": ""},
    ]
    (tmp_path / "m.csv").write_text("clip_id,uri,caption,x\na,u,c,2\nb,u,c,-0.5e1\n")
    assert extras(tmp_path / "m.csv") == [{"x": 2}, {"x": -5.0}]


def test_what_json_cannot_hold(tmp_path: Path) -> None:
    import datetime
    import decimal

    row = {**ROWS[0], "day": datetime.date(2024, 1, 2), "price": decimal.Decimal("1.50"), "gap": float("nan")}
    assert extras(write(tmp_path / "m.parquet", [row])) == [{"day": "2024-01-02", "price": "1.50", "gap": None}]
    with pytest.raises(InputError, match="column blob is binary"):
        read_manifest(str(write(tmp_path / "m.parquet", [{**ROWS[0], "blob": b"x"}])))
    with pytest.raises(InputError, match="column manifest_fps appears twice"):
        read_manifest(str(write(tmp_path / "m.parquet", [{**ROWS[0], "fps": 1, "manifest_fps": 2}])))


def test_digest_depends_on_values_not_on_files(tmp_path: Path) -> None:
    base = [{**row, "uri": f"/{k}.mp4", "caption": "c", "n": k} for k, row in enumerate(ROWS * 1)]
    digest = read_manifest(str(write(tmp_path / "m.parquet", base))).digest
    pq.write_table(pa.Table.from_pylist(base), tmp_path / "groups.parquet", row_group_size=1)
    assert read_manifest(str(tmp_path / "groups.parquet")).digest == digest
    coded = pa.Table.from_pylist(base)
    coded = coded.set_column(2, "caption", coded["caption"].dictionary_encode())
    pq.write_table(coded, tmp_path / "coded.parquet")
    assert read_manifest(str(tmp_path / "coded.parquet")).digest == digest
    digests = {digest}
    for change in (
        {"clip_id": "x"},
        {"uri": "/x"},
        {"caption": ""},
        {"start": 0.5},
        {"end": 99.0},
        {"n": 9},
        {"n": None},
    ):
        digests.add(read_manifest(str(write(tmp_path / "m.parquet", [*base[:-1], {**base[-1], **change}]))).digest)
    assert len(digests) == 8
    # Text that moves from one row, or one column, to the next is another manifest.
    pairs = [("ab", "c", "d"), ("a", "bc", "d"), ("a", "b", "cd")]
    assert len({manifest_of(table_of(pair)).digest for pair in pairs}) == 3


def table_of(captions: tuple[str, ...]) -> pa.Table:
    rows = [{"clip_id": f"{k}", "uri": "/u", "caption": caption} for k, caption in enumerate(captions)]
    return pa.Table.from_pylist(rows)


def test_rows_at_any_place_across_row_groups(tmp_path: Path) -> None:
    rows = [{"clip_id": f"c{k}", "uri": f"/{k}", "caption": "x" * k, "n": k} for k in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet", row_group_size=7)
    manifest = pickle.loads(pickle.dumps(read_manifest(str(tmp_path / "m.parquet"), limit=48)))
    for places in ([0], [6, 7], [3, 13, 14, 47], list(range(48))):
        got = manifest.take(np.array(places))
        assert got["clip_id"].to_pylist() == [f"c{k}" for k in places] == manifest.ids(np.array(places))
        assert [json.loads(text)["n"] for text in got["extra"].to_pylist()] == places
    assert len(manifest.read(40)) == 8


@given(st.lists(st.text(max_size=40), min_size=1, max_size=60), st.integers(0, 5))
def test_hashes_are_of_texts_alone(texts: list[str], start: int) -> None:
    whole = manifest_checks.hash_texts(pa.array(texts))
    alone = [int(manifest_checks.hash_texts(pa.array([text]))[0]) for text in texts]
    assert whole.tolist() == alone
    np.testing.assert_array_equal(manifest_checks.hash_texts(pa.array(texts).slice(start)), whole[start:])
    assert len(set(alone)) == len(set(texts))


def test_ids_of_equal_hash_are_compared() -> None:
    ids = ["a", "b", "b", "c", "a", "d", "b"]

    def at(rows: np.ndarray) -> list[str]:
        return [ids[row] for row in rows]

    same = np.zeros(7, np.uint64)
    for at_once in (1, 2, 100):
        faults, _ = manifest_checks.repeated(same, at, at_once)
        assert faults[0] == "row 3: clip_id 'b' is already in row 2"
    ids = ["a", "b", "c", "d", "e", "f", "g"]
    assert manifest_checks.repeated(same, at, 2) == ([], 0)


def test_a_large_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest_schema, "_SMALL", 0)
    path = write(tmp_path / "m.jsonl", ROWS)
    manifest = read_manifest(str(path))
    kept = sorted((tmp_path / "cache").rglob("*"), key=lambda path: path.suffix)
    assert [p.suffix for p in kept] == ["", ".json", ".parquet"]
    again = read_manifest(str(path))
    assert (again.digest, again.read()) == (manifest.digest, manifest.read())
    assert sorted((tmp_path / "cache").rglob("*"), key=lambda path: path.suffix) == kept


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest that counts as large, with a cache of its own."""
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest_schema, "_SMALL", 0)
    return write(tmp_path / "m.parquet", ROWS)


def verdicts(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "manifests").glob("*.json"))


def test_a_large_file_is_checked_once(large: Path, tmp_path: Path) -> None:
    first = read_manifest(str(large))
    (verdict,) = verdicts(tmp_path)
    assert json.loads(verdict.read_text()) == {
        "rows": 3, "digest": first.digest, "notes": list(first.notes), "buckets": ["bucket"],
    }  # fmt: skip
    verdict.write_text(
        json.dumps({"rows": 3, "digest": "0" * 64, "notes": [], "buckets": []})
    )  # no check finds this digest
    assert read_manifest(str(large)).digest == "0" * 64
    assert read_manifest(str(large), limit=2).digest != first.digest
    assert len(verdicts(tmp_path)) == 2


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{",
        "[]",
        "5",
        '{"rows": 3}',
        '{"rows": "3", "digest": "x"}',
        f'{{"rows": 4, "digest": "{"0" * 64}"}}',
        "\xff",
    ],
)
def test_a_broken_verdict_is_none(large: Path, tmp_path: Path, broken: str) -> None:
    first = read_manifest(str(large))
    (verdict,) = verdicts(tmp_path)
    verdict.write_text(broken, encoding="latin-1")
    assert read_manifest(str(large)) == first
    assert json.loads(verdict.read_text())["digest"] == first.digest


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_file_that_changed_is_checked_again(large: Path, tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"changing.{kind}", ROWS)
    first, before = read_manifest(str(path)), path.stat()
    write(path, [*ROWS[:2], {**ROWS[2], "end": 8.0}])
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = read_manifest(str(path))
    assert again.digest != first.digest
    assert again.read()["end"].to_pylist() == [4.0, None, 8.0]


def test_a_refused_file_leaves_no_verdict(large: Path, tmp_path: Path) -> None:
    write(large, [*ROWS, ROWS[0]])
    for _ in range(2):
        with pytest.raises(InputError, match="row 4: clip_id 'a' is already in row 1"):
            read_manifest(str(large))
    assert not verdicts(tmp_path)


def test_a_cache_that_cannot_be_written_costs_time_only(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path / "file"))
    assert len(read_manifest(str(large))) == 3


def test_bad_lines_of_a_csv_are_numbered_in_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_formats, "_BLOCK_BYTES", 1 << 12)
    lines = [f'c{k},/{k},"a\nb"\n' for k in range(2000)]
    lines[1500] = "c1500,/1500\n"
    (tmp_path / "m.csv").write_text("clip_id,uri,caption\n" + "".join(lines))
    with pytest.raises(InputError, match=r"row 1501: 2 fields, expected 3$"):
        read_manifest(str(tmp_path / "m.csv"))
