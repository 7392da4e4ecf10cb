"""Local files and a real S3 protocol server behave alike: atomic writes, ranges, fetching once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from cinemo import storage
from cinemo.types import InputError


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


def test_upload_then_localize_gives_the_directory_back(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "one.txt").write_text("1")
    (source / "deep" / "two.txt").write_text("2")
    target = storage.join(root, "copy")
    storage.upload(source, target)
    local = storage.localize(target)
    assert {p.relative_to(local).as_posix(): p.read_text() for p in local.rglob("*.txt")} == {
        "one.txt": "1",
        "deep/two.txt": "2",
    }
    assert storage.localize(storage.join(target, "one.txt")).read_text() == "1"


def test_a_replaced_object_is_fetched_again(root: str) -> None:
    uri = storage.join(root, "file.txt")
    storage.write_bytes(uri, b"old")
    assert storage.localize(uri).read_bytes() == b"old"
    storage.write_bytes(uri, b"new")
    assert storage.localize(uri).read_bytes() == b"new"


def test_what_is_not_there_is_bad_input(root: str) -> None:
    with pytest.raises(InputError, match=r"nothing there|no such"):
        storage.localize(storage.join(root, "none"))


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
