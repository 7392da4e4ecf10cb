"""Local files and a real S3 protocol server behave alike: atomic writes, ranges, patience."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from faulty_s3 import FAULTS, FaultyS3

from cinemo import s3, storage
from cinemo.config import DataConfig
from cinemo.media.sources import fetched
from cinemo.media.video import decode_clip
from cinemo.types import Clip, ClipError, InputError, RunError


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3_endpoint")
    return f"s3://cinemo-test/{tmp_path.name}"


def test_bytes_ranges_and_names(root: str) -> None:
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, bytes(range(100)))
    assert storage.exists(uri)
    assert storage.size(uri) == 100
    assert storage.read_bytes(uri) == bytes(range(100))
    assert storage.read_bytes(uri, 10, 5) == bytes(range(10, 15))
    assert storage.read_bytes(uri, 90) == bytes(range(90, 100))
    storage.write_json(storage.join(root, "a", "c.json"), {"z": 1, "a": [2]})
    assert storage.read_json(storage.join(root, "a", "c.json")) == {"a": [2], "z": 1}
    assert storage.names(storage.join(root, "a")) == ["b.bin", "c.json"]
    assert storage.names(storage.join(root, "nothing")) == []
    storage.remove(storage.join(root, "a"))
    assert storage.names(storage.join(root, "a")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)


def test_an_unknown_scheme_is_bad_input() -> None:
    with pytest.raises(InputError, match="s3://bucket"):
        storage.read_bytes("gopher://x/y")


def test_an_unwritable_output_is_bad_input(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("a file where a directory should be")
    with pytest.raises(InputError, match="cannot write there"):
        storage.check_writable(str(blocker / "output"))


def _write_for_ever(path: str) -> None:
    size = 4_000_000
    while True:
        storage.write_bytes(path, b"a" * size)
        storage.write_bytes(path, b"b" * size)


def test_a_killed_writer_never_leaves_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "shard.tar"
    for delay in (0.31, 0.37, 0.43):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(str(target),))
        writer.start()
        deadline = time.monotonic() + 20
        while not target.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        content = target.read_bytes()
        assert len(content) == 4_000_000
        assert len(set(content)) == 1


def test_pieces_are_written_as_one_file(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)  # S3's smallest part: 11 MB are a multipart upload
    rng = np.random.default_rng(0)
    pieces = [rng.bytes(int(size)) for size in [0, 1, *rng.integers(0, 9000, 2500)]]
    uri = storage.join(root, "pieces.bin")
    storage.write_bytes(uri, pieces)
    assert len(b"".join(pieces)) > 11e6
    assert storage.read_bytes(uri) == b"".join(pieces)
    storage.write_bytes(uri, [])
    assert storage.read_bytes(uri) == b""


def _uploads() -> list[Any]:
    return boto3.client("s3").list_multipart_uploads(Bucket="cinemo-test").get("Uploads") or []


@pytest.mark.slow
@pytest.mark.s3
def test_faults_on_the_way_lose_nothing(s3_faults: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)
    s3_faults.meet(dict.fromkeys(FAULTS, 0.06), seed=1, delay=0.05)
    root = "s3://cinemo-test/faults"
    large = np.random.default_rng(1).bytes(16 << 20)
    for number in range(20):
        uri = storage.join(root, "small", f"{number}.json")
        storage.write_json(uri, number)
        assert storage.read_json(uri) == number
        with fetched(uri) as path:
            assert path.read_bytes() == f"{number}\n".encode()
    for number in range(3):
        storage.write_bytes(storage.join(root, f"{number}.bin"), [large[:7], large[7 + number :]])
        assert storage.read_bytes(storage.join(root, f"{number}.bin")) == large[:7] + large[7 + number :]
    assert storage.names(storage.join(root, "small")) == sorted(f"{number}.json" for number in range(20))
    assert len(storage.names(root)) == 4
    assert set(s3_faults.injected) == set(FAULTS), s3_faults.injected
    storage.abort_uploads(root)
    s3_faults.meet()
    assert not _uploads()


@pytest.mark.s3
def test_unfinished_uploads_are_removed_and_others_left(s3_endpoint: str) -> None:
    client = boto3.client("s3")
    for key in ("mine/shards/a.tar", "mine/b", "mine-not/c"):
        client.create_multipart_upload(Bucket="cinemo-test", Key=key)
    try:
        assert storage.abort_uploads("s3://cinemo-test/mine") == 2
        assert [upload["Key"] for upload in _uploads()] == ["mine-not/c"]
    finally:
        storage.abort_uploads("s3://cinemo-test/mine-not")
    assert storage.abort_uploads("s3://cinemo-test/mine") == 0


@pytest.mark.slow
@pytest.mark.s3
def test_an_outage_ends_in_one_line_in_bounded_time(s3_faults: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_faults.meet({"503": 1.0})
    monkeypatch.setenv(s3.PATIENCE, "0.1")
    begun = time.monotonic()
    with pytest.raises(
        RunError, match=r"s3://cinemo-test/x: storage has been failing for .* run the same command again"
    ):
        storage.write_bytes("s3://cinemo-test/x", b"x")
    assert time.monotonic() - begun < 60


@pytest.mark.s3
def test_what_waiting_does_not_mend_is_bad_input(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"nowhere/out.*bucket does not exist"):
        storage.check_writable("s3://nowhere/out")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("s3://nowhere/x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3.client.cache_clear()
    with pytest.raises(InputError, match="NoCredentials"):
        storage.write_bytes("s3://cinemo-test/x", b"")
    s3.client.cache_clear()


@pytest.mark.s3
def test_a_clip_that_is_denied_is_the_clips_fault(s3_faults: FaultyS3) -> None:
    s3_faults.meet({"403": 1.0})
    with pytest.raises(s3.AccessDenied, match=r"s3://cinemo-test/x: access denied"):
        storage.read_bytes("s3://cinemo-test/x")
    with pytest.raises(ClipError) as refused:
        decode_clip(Clip("x", "s3://cinemo-test/x.mp4", ""), DataConfig())
    assert (refused.value.stage, refused.value.reason) == ("open", "denied")


@pytest.mark.s3
def test_what_the_server_does_not_know_is_final(s3_faults: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(s3.PATIENCE, "1000")
    s3_faults.meet({"501": 1.0})
    with pytest.raises(s3.NotSupported, match=r"s3://cinemo-test/x: .*does not know this PutObject request \(501\)"):
        storage.write_bytes("s3://cinemo-test/x", b"x")
    assert sum(s3_faults.seen.values()) == 1


@pytest.mark.s3
def test_a_fault_of_the_local_disk_is_no_outage(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(s3.PATIENCE, "1000")
    storage.write_bytes("s3://cinemo-test/local/x", b"x")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / ("long" * 100), tmp_path / "file" / "x"):
        with pytest.raises(InputError, match="cannot write there"):
            storage.fetch("s3://cinemo-test/local/x", path)
    if Path("/dev/full").exists():
        with pytest.raises(
            RunError, match=r"/dev/full: cannot write there \(No space left on device\); free some space there"
        ):
            storage.fetch("s3://cinemo-test/local/x", Path("/dev/full"))


def test_local_writes_fail_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("long" * 100, "file/x"):
        with pytest.raises(InputError, match=r"cannot write there \((File name too long|.*exists|Not a directory)\)"):
            storage.write_bytes(str(tmp_path / name), b"")
        assert not storage.exists(str(tmp_path / name))
        assert storage.names(str(tmp_path / name)) == []
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(str(tmp_path / name))
