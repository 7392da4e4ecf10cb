"""The tables of the field's data sets are read as they are published, in Arrow as in any other way."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo.data.manifest import json_lines, nested
from cinemo.data.manifest.columns import Columns
from cinemo.data.manifest.manifest import read_manifest
from cinemo.types import InputError, keyed_seed

WEBVID = [
    {"videoid": 21179416, "contentUrl": "https://x", "duration": "PT00H00M11S", "page_dir": "006001_006050"},
    {"videoid": 21179417, "contentUrl": "https://y", "duration": "PT00H01M11S", "page_dir": "000001_000050"},
]
WEBVID = [row | {"name": name} for row, name in zip(WEBVID, ["A", 'B "'], strict=True)]
OPENVID = [
    {"video": "a_1_0to140.mp4", "caption": "A cat", "aesthetic score": 5.5, "motion score": 3.25, "fps": 25.0},
    {"video": "b_2_0to98.mp4", "caption": "A dog", "aesthetic score": 4.5, "motion score": 1.5, "fps": 30.0},
]
INTERNVID = [
    {"YoutubeID": "bF", "Start_timestamp": "00:00:20.353", "End_timestamp": "00:00:23.856", "Caption": "a woman's hat"},
    {"YoutubeID": "bF", "Start_timestamp": "00:01:00.000", "End_timestamp": "01:00:00.500", "Caption": "a \\ and é"},
]
HD_VILA = [
    {"video_id": "QM", "url": "u", "clip": [
        {"clip_id": "QM.1.mp4", "span": ["00:00:17.759", "00:00:23.279"]},
        {"clip_id": "QM.16.mp4", "span": ["00:04:52.140", "00:05:03.350"]},
    ]},
    {"video_id": "QN", "url": "v", "clip": [{"clip_id": "QN.0.mp4", "span": ["00:00:01", "00:00:02"]}]},
]  # fmt: skip
SPANS = [[["0:00:08.942", "0:00:13.246"], ["0:00:14.000", "0:00:19.100"]], [["0:00:00.500", "0:01:00.000"]]]
CAPTIONS = [["a cat", 'a man\'s "hat"'], ["a\\b"]]
SCORES = [[0.43, 0.5], [1.0]]


def panda(listed: Any) -> list[dict[str, Any]]:
    rows = zip(["x", "y"], SPANS, CAPTIONS, SCORES, strict=True)
    return [
        {"videoID": name, "timestamp": listed(spans), "caption": listed(captions), "matching_score": listed(scores)}
        for name, spans, captions, scores in rows
    ]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def clips(path: Path, *words: str, seed: int = 0) -> list[dict[str, Any]]:
    columns = Columns.parse(words) if words else None
    rows = read_manifest(str(path), columns=columns, seed=seed).read().to_pylist()
    for row in rows:
        row["uri"] = row["uri"].removeprefix(f"{path.parent}/")
        row["extra"] = json.loads(row["extra"]) if row["extra"] else {}
    return rows


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "json", "ndjson"])
def test_webvid(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"results.{kind}", WEBVID)
    extra = {"contentUrl": "https://x", "duration": "PT00H00M11S", "page_dir": "006001_006050"}
    first = {"clip_id": "21179416", "uri": "videos/006001_006050/21179416.mp4", "caption": "A"}
    rows = clips(path, "webvid")
    assert rows[0] == first | {"start": None, "end": None, "extra": extra}
    assert (rows[1]["clip_id"], rows[1]["caption"]) == ("21179417", 'B "')
    assert rows == clips(path, "clip_id=videoid", "uri=videos/{page_dir}/{videoid}.mp4", "caption=name")
    assert clips(path, "webvid", "uri={videoid}.mp4")[0]["uri"] == "21179416.mp4"
    assert clips(path, "webvid", "end=duration")[1]["end"] == 71.0


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_openvid(tmp_path: Path, kind: str) -> None:
    row = clips(write(tmp_path / f"m.{kind}", OPENVID), "openvid-1m")[0]
    extra = {"aesthetic score": 5.5, "motion score": 3.25, "manifest_fps": 25.0}  # a sample has an fps of its own
    assert row == {
        "clip_id": "a_1_0to140.mp4", "uri": "videos/a_1_0to140.mp4", "caption": "A cat", "start": None, "end": None,
        "extra": extra,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_internvid(tmp_path: Path, kind: str) -> None:
    first, second = clips(write(tmp_path / f"m.{kind}", INTERNVID), "internvid")
    assert first == {
        "clip_id": "bF_00:00:20.353_00:00:23.856", "uri": "videos/bF.mp4", "caption": "a woman's hat",
        "start": 20.353, "end": 23.856, "extra": {"YoutubeID": "bF"},
    }  # fmt: skip
    assert (second["start"], second["end"], second["caption"]) == (60.0, 3600.5, "a \\ and é")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hd_vila_has_clips_in_a_row_and_no_captions(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"m.{kind}", HD_VILA)
    with pytest.raises(InputError, match=r"nothing says what is the caption; it has video_id, url, clip; add caption="):
        clips(path, "hd-vila-100m")
    manifest = read_manifest(str(path), columns=Columns.parse(["hd-vila-100m", "caption="]))
    assert manifest.notes == ("3 of 3 captions are empty",)
    rows = clips(path, "hd-vila-100m", "caption={url} {index}")
    assert [row["clip_id"] for row in rows] == ["QM.1.mp4", "QM.16.mp4", "QN.0.mp4"]
    assert [row["uri"] for row in rows] == ["videos/QM.mp4", "videos/QM.mp4", "videos/QN.mp4"]
    assert [(row["start"], row["end"]) for row in rows] == [(17.759, 23.279), (292.14, 303.35), (1.0, 2.0)]
    assert [row["caption"] for row in rows] == ["u 0", "u 1", "v 0"]
    assert rows[0]["extra"] == {"url": "u", "video_id": "QM"}


@pytest.mark.parametrize(("kind", "listed"), [("csv", repr), ("parquet", list), ("parquet", repr), ("jsonl", list)])
def test_panda_70m(tmp_path: Path, kind: str, listed: Any) -> None:
    rows = clips(write(tmp_path / f"m.{kind}", panda(listed)), "panda-70m")
    assert [row["clip_id"] for row in rows] == ["x_0", "x_1", "y_0"]
    assert [row["caption"] for row in rows] == ["a cat", 'a man\'s "hat"', "a\\b"]
    assert [(row["start"], row["end"]) for row in rows] == [(8.942, 13.246), (14.0, 19.1), (0.5, 60.0)]
    assert [float(row["extra"]["matching_score"]) for row in rows] == [0.43, 0.5, 1.0]
    assert rows[0]["uri"] == "videos/x.mp4"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"caption": "['only one']"}, "row 1: caption has 1 entries where timestamp has 2"),
        ({"timestamp": "soon"}, "row 1: timestamp is not a list"),
        ({"caption": r"['\ud800', 'half a surrogate pair']"}, "row 1: caption is not a list"),
        ({"timestamp": "[['0:00:01'], ['0:00:02', '0:00:03']]"}, "row 1: timestamp has no entry 1"),
        ({"timestamp": "[['0:00:01', 'x'], ['0:00:02', '0:00:03']]"}, r"row 1: end is not seconds \(timestamp\)"),
    ],
)
def test_faults_of_lists_name_the_row_of_the_file(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    rows = panda(repr)
    with pytest.raises(InputError, match=fault):
        clips(write(tmp_path / "m.csv", [rows[0] | change, rows[1]]), "panda-70m")


@pytest.mark.parametrize(
    ("rows", "preset"),
    [(WEBVID, "webvid"), (OPENVID, "openvid-1m"), (INTERNVID, "internvid"), (panda(repr), "panda-70m")],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_that_is_known_is_named(tmp_path: Path, rows: Any, preset: str, kind: str) -> None:
    with pytest.raises(InputError, match=rf"is missing; it has .*try --columns {preset}$"):
        clips(write(tmp_path / f"m.{kind}", rows))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["webvidd"], "--columns webvidd: expected NAME=COLUMN, or one of webvid"),
        (["captions=name"], "--columns captions=name: no such column of a manifest; expected clip_id"),
        (["webvid", "caption=nam"], "--columns caption=nam: there is no column nam; it has videoid, contentUrl"),
        (["webvid", "uri={dir}/x"], "--columns uri={dir}/x: there is no column dir"),
        (["webvid", "each=clips"], "--columns each=clips: there is no column clips"),
        (["caption=name"], "nothing says what is the clip_id, uri"),
        (["webvid", f"caption=name.{'9' * 20}"], f"row 1: name has no entry {'9' * 20}"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, words: list[str], fault: str) -> None:
    with pytest.raises(InputError) as caught:
        clips(write(tmp_path / "m.csv", WEBVID), *words)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_that_gives_way_keeps_its_values(tmp_path: Path) -> None:
    rows = [{"clip_id": "a", "uri": "u", "caption": "short", "long": "a long one", "meta": {"start": "1:00", "n": 2}}]
    row = clips(write(tmp_path / "m.parquet", rows), "caption=long", "start=meta.start")[0]
    assert (row["caption"], row["start"]) == ("a long one", 60.0)
    assert row["extra"] == {"manifest_caption": "short", "meta": {"start": "1:00", "n": 2}}


def test_both_readers_of_json_map_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"id": k, "part": "ü" if k % 2 else None, "text": f"c{k}", "score": k + 0.5, "flag": True, "n": k}
        for k in range(9)
    ]
    path = write(tmp_path / "m.jsonl", rows)
    words = ["clip_id=id", "uri={n}/{score}-{flag}.mp4", "caption=text"]
    fast = read_manifest(str(path), columns=Columns.parse(words))
    monkeypatch.setattr(json_lines, "plain_rows", lambda block, layout: None)
    slow = read_manifest(str(path), columns=Columns.parse(words))
    assert fast.read() == slow.read()
    assert fast.digest == slow.digest
    assert clips(path, *words)[3]["uri"] == "3/3.5-true.mp4"


CHOICES = ["one", "two", "three", "four", " ", ""]


@pytest.mark.parametrize(("kind", "words"), [
    ("parquet", []), ("jsonl", []), ("csv", ["caption=caption[]"]),
    *((kind, ["caption=caption"]) for kind in ("parquet", "jsonl", "json")),
])  # fmt: skip
def test_one_of_several_captions_is_drawn_by_clip_and_seed(tmp_path: Path, kind: str, words: list[str]) -> None:
    rows = [{"clip_id": f"c{k}", "uri": "u", "caption": CHOICES[k % 3 :] if k else ["alone"]} for k in range(40)]
    path = write(tmp_path / f"m.{kind}", rows)
    for seed in (0, 7):
        for row, read in zip(rows, clips(path, *words, seed=seed), strict=True):
            texts = [text for text in row["caption"] if text.strip()]
            assert read["caption"] == texts[keyed_seed(seed, "caption", row["clip_id"]) % len(texts)]
    none = write(tmp_path / f"none.{kind}", [*rows, {"clip_id": "x", "uri": "u", "caption": [""]}])
    with pytest.raises(InputError, match=r"row 41: caption is"):
        clips(none, *words)


def test_captions_of_mixed_kinds_in_json(tmp_path: Path) -> None:
    rows = [{"clip_id": "a", "uri": "u", "caption": "text"}, {"clip_id": "b", "uri": "u", "caption": ["a", "a"]}]
    rows += [{"clip_id": "c", "uri": "u", "caption": '["not a list"]'}, {"clip_id": "d", "uri": "u", "caption": ""}]
    path = write(tmp_path / "m.jsonl", rows)
    for words in ([], ["caption=caption"], ["caption=caption|text"]):
        assert [row["caption"] for row in clips(path, *words)] == ["text", "a", '["not a list"]', ""]
    assert clips(path, "caption=one of {caption}")[1]["caption"] == 'one of ["a", "a"]'
    assert [row["caption"] for row in clips(write(path, rows[1:2]), "each=caption", "clip_id={index}")] == ["a", "a"]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LISTS = st.lists(TEXTS | st.sampled_from(["2020-01-01", "None", "it's", 'a "b"', "[", "\\"]), max_size=4)


@given(st.lists(st.none() | LISTS, min_size=1, max_size=6), st.sampled_from([repr, json.dumps]))
def test_lists_in_texts_are_what_was_written(rows: list[list[str] | None], written: Any) -> None:
    texts = pa.array([None if row is None else written(row) for row in rows], pa.string())
    column, bad = nested.lists(texts)
    assert (column.to_pylist(), len(bad)) == (rows, 0)


def test_compressed_and_misnamed_texts(tmp_path: Path) -> None:
    rows = [{"clip_id": "a", "uri": "u", "caption": "x"}]
    plain = {kind: write(tmp_path / f"m.{kind}", rows).read_bytes() for kind in ("csv", "jsonl", "json")}
    expected = clips(tmp_path / "m.csv")
    for kind, content in plain.items():
        (tmp_path / f"z.{kind}.gz").write_bytes(gzip.compress(content))
        (tmp_path / f"misnamed.{kind}").write_bytes(gzip.compress(content))
        for ending, codec in (("zst", "zstd"), ("bz2", "bz2")):
            with pa.output_stream(str(tmp_path / f"z.{kind}.{ending}"), compression=codec) as file:
                file.write(content)
        (tmp_path / f"bom.{kind}").write_bytes(b"\xef\xbb\xbf" + content)
        names = [f"z.{kind}.gz", f"z.{kind}.zst", f"z.{kind}.bz2", f"misnamed.{kind}", f"bom.{kind}"]
        assert all(clips(tmp_path / name) == expected for name in names)
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(plain["csv"] * 100)[:-20])
    with pytest.raises(InputError, match="not readable as csv"):
        clips(tmp_path / "cut.csv.gz")


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_an_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", size)
    monkeypatch.setattr(json_lines, "_ARRAY_ROWS", 3)
    rows = [{"clip_id": f"é{k}", "uri": "u", "caption": "]},{[" * (k % 3), "n": [k]} for k in range(10)]
    assert [row["extra"]["n"] for row in clips(write(tmp_path / "m.json", rows))] == [[k] for k in range(10)]
    for text, fault in [('[{"clip_id": "a"', "row 1: not JSON"), ("[5]", "row 1: a JSON int"), ("[]", "no rows")]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=fault):
            clips(tmp_path / "bad.json")


def test_parts_are_one_table(tmp_path: Path) -> None:
    rows = [{"clip_id": f"c{k}", "uri": "v.mp4", "caption": "x", "n": k} for k in range(6)]
    whole = read_manifest(str(write(tmp_path / "all.parquet", rows)))
    directory = tmp_path / "clips.parquet"  # as Spark, Ray and dask write one
    (directory / "split=a").mkdir(parents=True)
    write(directory / "part-0.parquet", rows[:2])
    write(directory / "part-1.parquet", [dict(reversed(row.items())) for row in rows[2:4]])
    write(directory / "split=a" / "part-0.parquet", rows[4:])
    for name in ("_SUCCESS", ".part-0.parquet.crc", "_metadata"):
        (directory / name).write_bytes(b"")
    for uri in (directory, directory / "**" / "*.parquet", f"{directory}/{{part-0,part-1,split=a/part-0}}.parquet"):
        assert read_manifest(str(uri)).read() == whole.read()
        assert read_manifest(str(uri)).digest == whole.digest
    for kind in ("csv", "jsonl"):
        write(tmp_path / f"{kind}-1.{kind}", rows[:3])
        write(tmp_path / f"{kind}-2.{kind}", rows[3:])
        parts, single = tmp_path / f"{kind}-?.{kind}", write(tmp_path / f"all.{kind}", rows)
        assert read_manifest(str(parts)).digest == read_manifest(str(single)).digest
    write(directory / "part-2.parquet", [{"clip_id": "x", "uri": "u"}])
    with pytest.raises(InputError, match=r"part-2.parquet: column caption is missing"):
        read_manifest(str(directory))
    write(directory / "part-2.parquet", [rows[0]])
    with pytest.raises(InputError, match="clip 5: clip_id 'c0' is already in clip 1"):
        read_manifest(str(directory))
    with pytest.raises(InputError, match="files of several kinds"):
        read_manifest(str(tmp_path / "all.*"))
    with pytest.raises(InputError, match="nothing there matches"):
        read_manifest(str(tmp_path / "*.tar"))


def test_a_large_mapped_table_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cinemo.data.manifest import manifest as reading

    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "_SMALL", 0)
    path = write(tmp_path / "m.csv", WEBVID)
    first = read_manifest(str(path), columns=Columns.parse(["webvid"]))
    other = read_manifest(str(path), columns=Columns.parse(["webvid", "caption=page_dir"]))
    again = read_manifest(str(path), columns=Columns.parse(["webvid"]))
    assert first.source == again.source != other.source
    assert first.digest == again.digest != other.digest


def test_scores_that_are_nan_in_a_written_list_are_null(tmp_path: Path) -> None:
    rows = panda(repr)
    rows[0] |= {"caption": "['a nan', 'b']", "matching_score": "[nan, -inf]"}
    found = clips(write(tmp_path / "m.csv", rows), "panda-70m")
    assert [row["caption"] for row in found[:2]] == ["a nan", "b"]
    assert [row["extra"]["matching_score"] for row in found[:2]] == [None, None]
