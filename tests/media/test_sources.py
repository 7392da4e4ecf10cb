"""What a clip's uri may name: files, objects with any key, members of tars, bytes in Parquet; fetched once, whole."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.small_data import film
from faulty_s3 import FaultyS3

from cinemo import s3, storage
from cinemo.config import DataConfig
from cinemo.media import sources
from cinemo.media.mp4 import write_video
from cinemo.media.sources import Sources, fetched
from cinemo.media.video import decode_clip
from cinemo.types import Clip, ClipError, InputError, RunError

DATA = DataConfig(size=(32, 48), frames=6, frame_interval=(1, 3))
BUCKET = "s3://cinemo-test"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    path = tmp_path_factory.mktemp("videos") / "film.mp4"
    contents = []
    for number in range(5):
        write_video(path, film(f"source {number}", 20 + number), 25)
        contents.append(path.read_bytes())
    return contents


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3_endpoint")
    return f"{BUCKET}/sources"


def content(uri: str) -> bytes:
    with fetched(uri) as path:
        return path.read_bytes()


def refusal(uri: str) -> tuple[str, str]:
    with pytest.raises(ClipError) as refused:
        content(uri)
    assert uri in refused.value.detail
    return refused.value.stage, refused.value.reason


def asked_for(proxy: FaultyS3, name: str) -> dict[str, int]:
    """How often a key was asked for since the last `meet`, by method."""
    found: dict[str, int] = {}
    for request, count in proxy.seen.items():
        if name in request:
            method = request.partition(" ")[0]
            found[method] = found.get(method, 0) + count
    return found


def tar_of(members: dict[str, bytes]) -> tuple[bytes, dict[str, str]]:
    """A tar, and what is behind its name in the uri of each member."""
    with io.BytesIO() as sink:
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, value in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
        stored = sink.getvalue()
    with tarfile.open(fileobj=io.BytesIO(stored)) as tar:
        return stored, {info.name: f"::{info.name}::{info.offset_data}+{info.size}" for info in tar}


def test_members_of_tars(root: str, videos: list[bytes]) -> None:
    names = ["a/000.mp4", "b c::d.mp4", "日本/" + "x" * 150 + ".webm", "no suffix"]
    stored, places = tar_of(dict(zip(names, videos, strict=False)))
    storage.write_bytes(f"{root}/00000.tar", stored)
    for name, video in zip(names, videos, strict=False):
        uri = f"{root}/00000.tar{places[name]}"
        assert content(uri) == video
        views = decode_clip(Clip("x", uri, ""), DATA)
        assert views[0].frames_FHWC.shape == (6, 32, 48, 3)
    with fetched(f"{root}/00000.tar{places['a/000.mp4']}") as path:
        assert path.suffix == ".mp4"
    assert refusal(f"{root}/00001.tar{places['a/000.mp4']}") == ("open", "missing")
    assert refusal(f"{root}/00000.tar::a::{len(stored) - 5}+10") == ("open", "truncated")
    assert refusal(f"{root}/00000.tar::a::{len(stored) + 5}+10") == ("open", "truncated")


def test_a_tars_member_is_one_request_of_its_range(s3_faults: FaultyS3, videos: list[bytes]) -> None:
    stored, places = tar_of({"a.mp4": videos[0], "b.mp4": videos[1]})
    storage.write_bytes(f"{BUCKET}/one-request.tar", stored)
    s3_faults.meet()
    assert content(f"{BUCKET}/one-request.tar{places['b.mp4']}") == videos[1]
    assert asked_for(s3_faults, "one-request") == {"GET": 1}


def parquet_of(column: pa.Array, group: int) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"id": pa.array(range(len(column))), "video": column, "x.y": column})
    pq.write_table(table, sink, row_group_size=group)
    return sink.getvalue()


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        pa.struct([("path", pa.string()), ("bytes", pa.large_binary())]),
    ],
    ids=str,
)
def test_bytes_in_parquet(root: str, videos: list[bytes], kind: pa.DataType) -> None:
    nested = pa.types.is_struct(kind)
    values: list[Any] = [{"bytes": video, "path": "x.mp4"} if nested else video for video in videos] + [None]
    storage.write_bytes(f"{root}/rows.parquet", parquet_of(pa.array(values, kind), 2))
    columns = ["video", "x.y", *(["video.bytes"] if nested else [])]
    for column in columns:
        for row in (0, 1, 2, 4, 3, 0):
            assert content(f"{root}/rows.parquet::{column}::{row}") == videos[row]
        assert refusal(f"{root}/rows.parquet::{column}::5") == ("open", "missing")
        assert refusal(f"{root}/rows.parquet::{column}::6") == ("open", "missing")
    assert refusal(f"{root}/rows.parquet::id::0") == ("open", "unreadable")
    assert refusal(f"{root}/rows.parquet::nothing::0") == ("open", "missing")
    assert refusal(f"{root}/other.parquet::video::0") == ("open", "missing")
    storage.write_bytes(f"{root}/rows.parquet", b"no Parquet at all")
    assert refusal(f"{root}/rows.parquet::video::0") == ("open", "unreadable")


def test_a_file_that_was_replaced_is_read_anew(root: str, videos: list[bytes]) -> None:
    for video in videos[:2]:
        storage.write_bytes(f"{root}/again.parquet", parquet_of(pa.array([video, video]), 2))
        assert content(f"{root}/again.parquet::video::0") == video


def test_rows_of_a_row_group_are_one_request(s3_faults: FaultyS3, videos: list[bytes]) -> None:
    many = [videos[row % 5] + bytes(row) for row in range(60)]
    storage.write_bytes(f"{BUCKET}/groups.parquet", parquet_of(pa.array(many), 20))
    s3_faults.meet()
    for block in (range(20, 28), range(28, 40)):  # two blocks of a manifest
        with Sources() as block_sources:
            for row in block:
                with block_sources.file(f"{BUCKET}/groups.parquet::video::{row}") as path:
                    assert path.read_bytes() == many[row]
    # The footer, and the column's part of the row group; is it the same file, at the beginning of each block.
    assert asked_for(s3_faults, "groups") == {"GET": 2, "HEAD": 3}


def test_an_outage_amid_parquet_is_no_clips_fault(
    s3_faults: FaultyS3, videos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{BUCKET}/outage.parquet", parquet_of(pa.array(videos), 5))
    monkeypatch.setattr(s3, "call", failing_reads(s3.call))
    with pytest.raises(RunError, match="storage has been failing"):
        content(f"{BUCKET}/outage.parquet::video::0")
    monkeypatch.undo()
    assert content(f"{BUCKET}/outage.parquet::video::0") == videos[0]


def failing_reads(call: Any) -> Any:
    def failing(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "cat_file":
            raise RunError(f"{uri}: storage has been failing")
        return call(uri, method, *arguments, **options)

    return failing


KEYS = [
    "v.mp4?versionId=abc",
    "?versionId=x",
    "a#b%20c%.mp4",
    "日本/ü.mp4",
    "日" * 128 + ".mp4",
    "x" * 300,
    "y" * 300 + ".mp4",
    "deep/" * 100 + "v.mp4",
    "q?x=1&y=2",
    "[a]*{b}.mp4",
    "a//b.mp4",
    "a b+c.mp4",
    "a\\b.mp4",
    ".",
    "x.tar::y",
    "x.parquet::y",
    "v." + "e" * 80,
]


@pytest.mark.s3
@pytest.mark.parametrize("key", KEYS, ids=lambda key: key[:12])
def test_any_key_is_a_key(s3_faults: FaultyS3, videos: list[bytes], key: str) -> None:
    boto3.client("s3").put_object(Bucket="cinemo-test", Key=f"keys/{key}", Body=videos[0])
    uri = f"{BUCKET}/keys/{key}"
    s3_faults.meet()
    assert content(uri) == videos[0]
    assert s3_faults.seen.total() == 1
    assert storage.read_bytes(uri, 3, 5) == videos[0][3:8]
    assert storage.size(uri) == len(videos[0])
    assert len(decode_clip(Clip("x", uri, ""), DATA)) == 1


@pytest.mark.s3
def test_names_that_no_object_can_have_are_the_clips_fault(s3_endpoint: str) -> None:
    for uri in ("s3://", f"{BUCKET}", f"{BUCKET}/", "s3:///x.mp4", "s3://No bucket!/x.mp4"):
        assert refusal(uri) == ("open", "invalid_uri"), uri
    assert refusal(f"{BUCKET}/nowhere.mp4") == ("open", "missing")


def test_local_names_that_no_file_can_have_are_the_clips_fault(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / ("x" * 300))) == ("open", "unreadable")
    assert refusal(f"{tmp_path}/a\0b.mp4") == ("open", "unreadable")
    (tmp_path / "file").touch()
    for missing in (f"{tmp_path}/nowhere.mp4", f"{tmp_path}/file/x.mp4"):
        with pytest.raises(ClipError, match="open: missing"):
            decode_clip(Clip("x", missing, ""), DATA)


def test_a_local_path_may_hold_what_looks_like_a_scheme(tmp_path: Path, videos: list[bytes]) -> None:
    path = tmp_path / "a:" / "b.mp4"
    path.parent.mkdir()
    path.write_bytes(videos[0])
    assert content(f"{tmp_path}/a://b.mp4") == videos[0]


@pytest.mark.s3
def test_a_directory_for_copies_that_cannot_be_used_ends_the_run_at_once(
    s3_faults: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.tempfile, "tempdir", str(tmp_path / "gone"))
    s3_faults.meet()
    with pytest.raises(InputError, match=r"gone.*: cannot write there \(.*set TMPDIR"):
        content(f"{BUCKET}/x.mp4")
    assert not s3_faults.seen


@pytest.mark.s3
def test_a_full_disk_is_no_outage(s3_faults: FaultyS3, videos: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    stored, places = tar_of({"a.mp4": videos[0]})
    for name, value in (("a.mp4", videos[0]), ("a.tar", stored), ("a.parquet", parquet_of(pa.array(videos), 5))):
        storage.write_bytes(f"{BUCKET}/full/{name}", value)
    monkeypatch.setattr(Sources, "_new_path", lambda self, name: Path("/dev/full"))
    for uri in ("a.mp4", f"a.tar{places['a.mp4']}", "a.parquet::video::0"):
        s3_faults.meet()
        with pytest.raises(RunError, match=r"/dev/full: cannot write there \(.*; free some space there"):
            content(f"{BUCKET}/full/{uri}")
        assert s3_faults.seen.total() <= 5


@pytest.mark.s3
def test_copies_are_shared_and_few(s3_faults: FaultyS3, videos: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [f"{BUCKET}/turns/{number}.mp4" for number in range(6)]
    for number, uri in enumerate(uris):
        storage.write_bytes(uri, videos[number % 5])
    s3_faults.meet()
    with Sources() as few:
        for number in (0, 1, 0, 1, 2, 3, 0, 4, 5, 1):  # 1 was dropped for 4: it had not been used for longest
            with few.file(uris[number]) as path:
                assert path.read_bytes() == videos[number % 5]
                assert len(list(path.parent.iterdir())) <= 4
        directory = path.parent
    assert not directory.exists()
    assert asked_for(s3_faults, "turns") == {"GET": 7}
    monkeypatch.setattr(sources, "_KEPT_BYTES", len(videos[0]) + 10)
    with Sources() as few:
        for uri in uris:
            with few.file(uri) as path:
                assert len(list(path.parent.iterdir())) <= 2


def test_what_is_copied_is_named_by_its_source(root: str) -> None:
    storage.write_bytes(f"{root}/empty.mp4", b"no video")
    with pytest.raises(ClipError) as refused, fetched(f"{root}/empty.mp4") as path:
        raise ClipError("open", "unreadable", f"{path}: no video")
    assert refused.value.detail == f"{root}/empty.mp4: no video"


def test_a_copy_changes_nothing(tmp_path: Path, s3_endpoint: str, videos: list[bytes]) -> None:
    (tmp_path / "v.mp4").write_bytes(videos[2])
    storage.write_bytes(f"{BUCKET}/same.mp4", videos[2])
    stored, places = tar_of({"v.mp4": videos[2]})
    (tmp_path / "v.tar").write_bytes(stored)
    uris = [str(tmp_path / "v.mp4"), f"{BUCKET}/same.mp4", f"{tmp_path}/v.tar{places['v.mp4']}"]
    frames = [decode_clip(Clip("same", uri, ""), DATA)[0].frames_FHWC for uri in uris]
    for other in frames[1:]:
        np.testing.assert_array_equal(other, frames[0])


def test_rows_of_parquet_behind_https_are_the_clips_fault() -> None:
    assert refusal("https://host/x.parquet::video::3") == ("open", "invalid_uri")
