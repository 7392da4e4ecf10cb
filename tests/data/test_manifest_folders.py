"""Folders, tars and Parquet files with videos in them: their captions are found, or it is said that there are none."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cinemo import storage
from cinemo.data.manifest.columns import Columns
from cinemo.data.manifest.folders import table_of_folder
from cinemo.data.manifest.manifest import manifest_of, read_manifest
from cinemo.types import InputError, keyed_seed


def fill(directory: Path, files: Mapping[str, Any]) -> Path:
    """Write files; what is no text or bytes is JSON."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(content))
    return directory


def encoded(content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def captions(uri: str | Path, **options: Any) -> dict[str, Any]:
    return {row["clip_id"]: row["caption"] for row in read_manifest(str(uri), **options).read().to_pylist()}


def test_json_beside_videos_as_video2dataset_writes(tmp_path: Path) -> None:
    parts = {f"00000/{k}": {"caption": f"caption {k}", "url": "u", "clips": [[0, k]]} for k in range(3)}
    fill(tmp_path, {f"{name}.mp4": b"" for name in parts} | {f"{name}.json": value for name, value in parts.items()})
    fill(tmp_path, {"00000.parquet": b"", "00000_stats.json": {}})
    rows = read_manifest(str(tmp_path)).read().to_pylist()
    assert [row["caption"] for row in rows] == ["caption 0", "caption 1", "caption 2"]
    assert json.loads(rows[2]["extra"]) == {"url": "u", "clips": [[0, 2]]}
    fill(tmp_path, {"00000/1.txt": "from the text"})
    assert captions(tmp_path)["00000-1"] == "from the text"
    fill(tmp_path, {"00000/2.json": {"captions": ["a", "b", ""]}})
    assert captions(tmp_path, seed=3)["00000-2"] == ["a", "b"][keyed_seed(3, "caption", "00000-2") % 2]
    fill(tmp_path, {"00000/2.json": "{"})
    with pytest.raises(InputError, match=r"00000/2.json: not JSON"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_of_hugging_faces_folders(tmp_path: Path, name: str) -> None:
    lines = [{"file_name": f"{k}.mp4", "text": f"text, {k}", "start": "00:01", "score": k} for k in range(3)]
    fill(tmp_path, {f"train/{k}.mp4": b"" for k in range(2)})  # one is not there: its own refusal, not everybody's
    if name.endswith("jsonl"):
        text = "\n".join(map(json.dumps, lines))
    else:
        text = "file_name,text,start,score\n" + "".join(f'{k}.mp4,"text, {k}",00:01,{k}\n' for k in range(3))
    fill(tmp_path, {f"train/{name}": "\ufeff" + text})
    rows = read_manifest(str(tmp_path)).read().to_pylist()
    assert [(row["caption"], row["start"]) for row in rows] == [(f"text, {k}", 1.0) for k in range(3)]
    assert [float(json.loads(row["extra"])["score"]) for row in rows] == [0, 1, 2]
    assert rows[0]["uri"] == str(tmp_path / "train/0.mp4")
    direct = read_manifest(str(tmp_path / "train" / name), columns=Columns.parse(["videofolder"])).read()
    assert direct["uri"].to_pylist() == [row["uri"] for row in rows]
    fill(tmp_path, {f"train/{name}": text + "\n" + text.splitlines()[-1]})
    with pytest.raises(InputError, match=r"row 4: train/2.mp4 is listed twice; give the list itself as --manifest"):
        read_manifest(str(tmp_path))


def test_lists_of_videos_and_prompts(tmp_path: Path) -> None:
    fill(tmp_path, {"videos/0.mp4": b"", "videos/1.mp4": b"", "videos.txt": "videos/1.mp4\nvideos/0.mp4\n"})
    fill(tmp_path, {"prompts.txt": "one\u2028line\r\n zero"})
    assert captions(tmp_path) == {"videos-0": " zero", "videos-1": "one\u2028line"}
    fill(tmp_path, {"prompts.txt": "one"})
    with pytest.raises(InputError, match=r"2 videos, but 1 captions in prompts.txt"):
        read_manifest(str(tmp_path))


def test_captions_that_are_file_names_are_said(tmp_path: Path) -> None:
    fill(tmp_path, {f"001/{k}.mp4": b"" for k in range(5)} | {"001/0.txt": "a caption", "list.csv": "video,name\n"})
    said = "4 of 5 captions are file names (001/1.mp4, 001/2.mp4, 001/3.mp4, ...)"
    with pytest.raises(InputError, match=re.escape(said)):
        read_manifest(str(tmp_path))
    manifest = read_manifest(str(tmp_path), names_as_captions=True)
    assert manifest.notes == (said,)
    assert manifest.read()["caption"].to_pylist() == ["a caption", "1", "2", "3", "4"]
    assert captions(tmp_path, limit=1) == {"001-0": "a caption"}


def test_the_digest_of_a_folder_with_texts_is_that_of_its_rows(tmp_path: Path) -> None:
    fill(tmp_path, {"a.mp4": b"", "a.txt": "A", "a.json": {"n": 1}, "b.mp4": b"", "b.txt": "", "metadata.jsonl": "{}"})
    rows = [{"clip_id": k, "uri": str(tmp_path / f"{k}.mp4"), "caption": c} for k, c in (("a", "A"), ("b", ""))]
    manifest = read_manifest(str(tmp_path))
    assert manifest.digest == manifest_of(pa.Table.from_pylist(rows)).digest
    assert manifest.notes == ("1 of 2 captions are empty",)


def write_tar(path: Path, files: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(encoded(content))
            tar.addfile(member, io.BytesIO(encoded(content)))
    return path


def member_bytes(uri: str) -> bytes:
    container, _, place = uri.split("::")
    offset, size = map(int, place.split("+"))
    return storage.read_bytes(container, offset, size)


def samples(shard: int, count: int = 3) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for k in range(count):
        name = f"{shard}{k}" + "-long" * 30 * (k == 2)  # a name of its own kind of header
        files |= {f"{name}.json": {"caption": f"cap {k}", "k": k}, f"{name}.mp4": f"video {shard} {k}" * 1000}
    return files


def test_webdataset_tars(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / "set" / f"{shard:05d}.tar", samples(shard))
    fill(tmp_path, {"set/00000.parquet": b"", "set/00000_stats.json": {}})
    rows = read_manifest(str(tmp_path / "set")).read().to_pylist()
    assert [row["caption"] for row in rows] == ["cap 0", "cap 1", "cap 2"] * 2
    assert [row["clip_id"] for row in rows[:2]] == ["00000/00", "00000/01"]
    assert [json.loads(row["extra"]) for row in rows[:2]] == [{"k": 0}, {"k": 1}]
    assert rows[4]["uri"].startswith(f"{tmp_path}/set/00001.tar::11.mp4::")
    contents = [content for shard in range(2) for name, content in samples(shard).items() if name.endswith("mp4")]
    assert [member_bytes(row["uri"]) for row in rows] == [content.encode() for content in contents]
    for uri in ("set/*.tar", "set/{00000..00001}.tar"):
        assert read_manifest(str(tmp_path / uri)).read().to_pylist() == rows
    assert len(read_manifest(str(tmp_path / "set"), limit=2)) == 2


def test_tars_with_texts_or_without_captions(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"x/1.txt": " a\ntext ", "x/1.webm": b"v", "x/2.mp4": b"w", "x/3.jpg": b"no"})
    with pytest.raises(InputError, match=r"1 of 2 captions are file names \(x/2.mp4\)"):
        read_manifest(str(path))
    assert captions(path, names_as_captions=True) == {"a/x/1": "a text", "a/x/2": "2"}
    with pytest.raises(InputError, match="--columns is about tables; this is a manifest of tar"):
        read_manifest(str(path), columns=Columns())
    path.write_bytes(path.read_bytes()[:1300])
    with pytest.raises(InputError, match=r"no uncompressed tar, or cut off"):
        read_manifest(str(path))
    path.write_bytes(b"\x1f\x8b" + bytes(3000))
    with pytest.raises(InputError, match=r"no uncompressed tar, or cut off"):
        read_manifest(str(path))
    with pytest.raises(InputError, match="'::' in a name"):
        read_manifest(str(write_tar(path, {"a::b.mp4": b"v", "a::b.txt": "x"})))


def test_a_tar_that_was_cut_between_members_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(0))
    whole, ids = path.read_bytes(), read_manifest(str(path)).ids(np.arange(3))
    with tarfile.open(path) as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar]
    for count, end in enumerate(ends, 1):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=rf"a.tar: tar cut: no end-of-archive marker after {count} members"):
            read_manifest(str(path))
    path.write_bytes(whole[: ends[-1] + 512])  # some writers end with one block of zeros instead of two
    assert read_manifest(str(path)).ids(np.arange(3)) == ids
    path.write_bytes(whole[: ends[-1]])
    os.truncate(path, ends[-1] + 1024)  # what the message says
    assert read_manifest(str(path)).ids(np.arange(3)) == ids


def test_parquet_with_videos_in_it(tmp_path: Path) -> None:
    videos = [{"bytes": b"abc", "path": "a.mp4"}, {"bytes": None, "path": "beside.mp4"}, {"bytes": b"de", "path": None}]
    table = pa.table({"video": videos, "caption": ["x", "y", "z"], "n": [1, 2, 3], "thumbnail": [b"j"] * 3})
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=2)
    path = tmp_path / "train-0.parquet"
    rows = read_manifest(str(path)).read().to_pylist()
    assert [row["uri"] for row in rows] == [
        f"{path}::video.bytes::0", f"{tmp_path}/beside.mp4", f"{path}::video.bytes::2",
    ]  # fmt: skip
    assert [row["clip_id"] for row in rows] == ["train-0/0", "train-0/1", "train-0/2"]
    assert [row["extra"] for row in rows] == ['{"n": 1}', '{"n": 2}', '{"n": 3}']
    pq.write_table(pa.table({"mp4": [b"abc"], "text": ["t"], "id": [5]}), tmp_path / "raw.parquet")
    for words in (["clip_id=id"], ["clip_id=id", "uri=mp4", "caption=text"]):
        manifest = read_manifest(str(tmp_path / "raw.parquet"), columns=Columns.parse(words))
        row = manifest.read().to_pylist()[0]
        assert (row["clip_id"], row["uri"]) == ("5", f"{tmp_path}/raw.parquet::mp4::0")
        assert row["caption"] == "t"


def test_only_the_light_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).bytes(1 << 20)
    for part in range(2):
        pq.write_table(pa.table({"video": [content] * 4, "caption": ["x"] * 4}), tmp_path / f"{part}.parquet")
    asked: list[Any] = []
    real = pq.ParquetFile.iter_batches

    def watched(file: Any, size: int, groups: Any = None, columns: Any = None) -> Any:
        asked.append(columns)
        return real(file, size, groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    rows = read_manifest(str(tmp_path)).read()
    assert rows["clip_id"].to_pylist() == [f"{part}/{row}" for part in range(2) for row in range(4)]
    assert asked[:2] == [["caption"]] * 2


@pytest.mark.s3
def test_everything_on_s3(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path / "cache"))
    root = "s3://cinemo-test/people"

    def put(name: str, content: Any) -> str:
        storage.write_bytes(f"{root}/{name}", encoded(content))
        return f"{root}/{name}"

    for k in range(3):
        put(f"v2d/{k}.mp4", b"v")
        put(f"v2d/{k}.json", {"caption": f"c{k}"})
    assert captions(f"{root}/v2d") == {str(k): f"c{k}" for k in range(3)} == captions(f"{root}/v2d/")
    assert read_manifest(f"{root}/v2d").read()["uri"][0].as_py() == f"{root}/v2d/0.mp4"
    put("v2d/1.json", {"caption": "new"})
    assert captions(f"{root}/v2d")["1"] == "new"

    put("wds/0.tar", write_tar(tmp_path / "0.tar", samples(0)).read_bytes())
    put("wds/1.tar", write_tar(tmp_path / "1.tar", samples(1) | {"x.mp4": bytes(1 << 20)} | samples(2)).read_bytes())
    for uri in (f"{root}/wds", f"{root}/wds/*.tar", f"{root}/wds/{{0..1}}.tar"):
        rows = read_manifest(uri, names_as_captions=True).read().to_pylist()
        assert [member_bytes(row["uri"])[:9].decode() for row in rows[:4]] == [
            f"video {k}" for k in ("0 0", "0 1", "0 2", "1 0")
        ]
        assert len(rows) == 10

    rows_of = [{"clip_id": f"c{k}", "uri": "v.mp4", "caption": "x"} for k in range(4)]
    for part in range(2):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows_of[2 * part : 2 * part + 2]), buffer)
        put(f"table.parquet/part-{part}.parquet", buffer.getvalue())
        buffer = io.BytesIO()
        pq.write_table(pa.table({"video": [{"bytes": b"v" * 9, "path": "p"}], "caption": ["x"]}), buffer)
        put(f"hf/{part}.parquet", buffer.getvalue())
    for uri in (f"{root}/table.parquet", f"{root}/table.parquet/*.parquet", f"{root}/**/part-*.parquet"):
        assert read_manifest(uri).ids(np.arange(4)) == ["c0", "c1", "c2", "c3"]
        assert read_manifest(uri).read()["uri"][0].as_py() == f"{root}/v.mp4"
    assert read_manifest(f"{root}/hf").read()["uri"].to_pylist() == [
        f"{root}/hf/{k}.parquet::video.bytes::0" for k in (0, 1)
    ]
    with pytest.raises(InputError, match="nothing there"):
        read_manifest(f"{root}/none")


@pytest.mark.parametrize("name", ["a.json", "metadata.jsonl"])
def test_half_a_surrogate_pair_is_named(tmp_path: Path, name: str) -> None:
    half = r'{"file_name": "a.mp4", "caption": "\ud800"}'
    fill(tmp_path / "folder", {"a.mp4": b"v", name: half})
    with pytest.raises(InputError, match=rf"{name}(: row 1)?: has half a surrogate pair"):
        read_manifest(str(tmp_path / "folder"))


def test_names_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "m.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("caf\udce9.mp4"))
    with pytest.raises(InputError, match=r"m.tar: the name 'caf\\udce9.mp4' is not UTF-8; rename it"):
        read_manifest(str(tmp_path / "m.tar"))
    with pytest.raises(InputError, match="is not UTF-8; rename it"):
        table_of_folder(str(tmp_path), ["caf\udce9.mp4"])
