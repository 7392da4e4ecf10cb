"""What is fetched is fetched once, checked, and takes no more disk than it may, whoever else uses the cache."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cinemo import storage
from cinemo.cache import Damaged, Download, FileCache, borrowed, keep, localize
from cinemo.types import InputError, RunError, keyed_seed

if TYPE_CHECKING:
    from faulty_s3 import FaultyS3

SIZE = 100_000


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3_endpoint")
    return f"s3://cinemo-test/{tmp_path.name}"


def content(number: int) -> bytes:
    return np.random.default_rng(keyed_seed(0, number)).bytes(SIZE)


class Files:
    """Some files on s3://, read through a cache for three of them; ``fetched`` counts what was asked for."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, limit: float = 3.5 * SIZE) -> None:
        self.directory, self.limit = directory / "copies", limit
        self.root = f"s3://cinemo-test/{directory.name}"
        for number in range(8):
            storage.write_bytes(f"{self.root}/{number}", content(number))
        self.fetched: list[str] = []
        real = storage.fetch

        def watch(uri: str, path: Path) -> None:
            self.fetched.append(uri[-1])
            real(uri, path)

        monkeypatch.setattr(storage, "fetch", watch)

    def map(self, number: int, **options: Any) -> memoryview:
        digest = hashlib.sha256(content(number)).hexdigest()
        return FileCache(self.limit, self.directory).map(f"{self.root}/{number}", digest, SIZE, **options)

    def copy(self, number: int) -> Path:
        return self.directory / hashlib.sha256(content(number)).hexdigest()

    def there(self) -> set[int]:
        return {number for number in range(8) if self.copy(number).exists()}

    def taken(self) -> int:
        return sum(path.stat().st_size for path in self.directory.iterdir())


@pytest.fixture
def files(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    return Files(tmp_path, monkeypatch)


def test_upload_then_localize_gives_the_directory_back(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "one.txt").write_text("1")
    (source / "deep" / "two.txt").write_text("2")
    target = storage.join(root, "copy")
    storage.upload(source, target)
    local = localize(target)
    assert {p.relative_to(local).as_posix(): p.read_text() for p in local.rglob("*.txt")} == {
        "one.txt": "1",
        "deep/two.txt": "2",
    }
    assert localize(storage.join(target, "one.txt")).read_text() == "1"


def test_a_replaced_object_is_fetched_again(root: str) -> None:
    uri = storage.join(root, "file.txt")
    storage.write_bytes(uri, b"old")
    assert localize(uri).read_bytes() == b"old"
    storage.write_bytes(uri, b"new")
    assert localize(uri).read_bytes() == b"new"


def test_what_is_not_there_is_bad_input(root: str) -> None:
    with pytest.raises(InputError, match=r"nothing there|no such"):
        localize(storage.join(root, "none"))


def test_a_local_file_is_mapped_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    right, wrong = (hashlib.sha256(text).hexdigest() for text in (b"abc", b"abd"))
    copies = FileCache(1e9, tmp_path / "copies")
    assert copies.map(str(path), right, 3) == b"abc"
    assert copies.map(str(path), wrong, 3, check=False) == b"abc"
    with pytest.raises(Damaged, match=r"file: has sha256 ba7816bf8f01\.\.\., its record says"):
        copies.map(str(path), wrong, 3)
    path.write_bytes(b"")
    with pytest.raises(Damaged):
        copies.map(str(path), right, 3)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        copies.map(str(path), right, 3)
    assert not copies.directory.exists()


@pytest.mark.s3
def test_a_file_is_fetched_once(files: Files) -> None:
    for _ in range(3):
        assert files.map(5) == content(5)
    assert files.fetched == ["5"]


@pytest.mark.s3
def test_the_least_recently_used_copies_give_way(files: Files) -> None:
    for number in (0, 1, 2, 0, 3):
        assert files.map(number) == content(number)
        assert files.taken() <= files.limit
    assert files.there() == {0, 2, 3}
    assert files.map(1) == content(1)
    assert files.fetched == ["0", "1", "2", "3", "1"]


@pytest.mark.s3
def test_a_copy_in_use_stays(files: Files) -> None:
    held = [files.map(number) for number in range(5)]
    assert files.there() == set(range(5))  # more than the limit, as more is in use
    del held[0]
    files.map(6)
    assert files.there() == {1, 2, 3, 4, 6}
    held.clear()
    files.map(7)
    assert files.taken() <= files.limit


@pytest.mark.s3
def test_a_removed_copy_can_still_be_read(files: Files) -> None:
    held = files.map(0)
    files.copy(0).unlink()
    assert held == content(0)
    assert files.map(0) == content(0)
    assert files.fetched == ["0", "0"]


@pytest.mark.s3
def test_a_damaged_copy_is_fetched_again(files: Files) -> None:
    files.map(0)
    files.copy(0).write_bytes(content(1))
    assert files.map(0) == content(0)
    assert files.fetched == ["0", "0"]
    files.copy(0).write_bytes(b"")
    assert files.map(0) == content(0)


@pytest.mark.s3
def test_a_damaged_object_is_tried_twice_and_leaves_nothing(files: Files) -> None:
    storage.write_bytes(f"{files.root}/0", content(1))
    with pytest.raises(Damaged, match=r"/0: has sha256"):
        files.map(0)
    assert files.fetched == ["0", "0"]
    assert not list(files.directory.iterdir())
    storage.remove_file(f"{files.root}/0")
    with pytest.raises(FileNotFoundError):
        files.map(0)
    assert not list(files.directory.iterdir())


@pytest.mark.s3
def test_what_a_killed_process_left_is_swept_and_what_a_living_one_fetches_counts(files: Files) -> None:
    files.directory.mkdir()
    (files.directory / f".{3 * SIZE}.dead.partial").write_bytes(content(0)[:100])
    files.map(0)
    assert {path.name for path in files.directory.iterdir()} == {files.copy(0).name}
    descriptor, partial = FileCache(files.limit, files.directory)._make_room(3 * SIZE)
    files.map(1)
    assert files.there() == {1}  # three of three and a half are spoken for
    os.close(descriptor)
    files.map(0)
    assert not partial.exists()


def _read_for_ever(root: str, directory: Path, seed: int, done: Any) -> None:
    rng = np.random.default_rng(seed)
    copies = FileCache(3.5 * SIZE, directory)
    while True:
        number = int(rng.integers(8))
        assert copies.map(f"{root}/{number}", hashlib.sha256(content(number)).hexdigest(), SIZE) == content(number)
        done.value += 1


@pytest.mark.s3
def test_several_processes_share_it(files: Files) -> None:
    context = multiprocessing.get_context("spawn")
    done = [context.Value("i", 0) for _ in range(2)]
    readers = [
        context.Process(target=_read_for_ever, args=(files.root, files.directory, seed, done[seed]), daemon=True)
        for seed in range(2)
    ]
    for reader in readers:
        reader.start()
    deadline, most = time.monotonic() + 90, 0
    while min(count.value for count in done) < 30:
        assert time.monotonic() < deadline
        assert all(reader.is_alive() for reader in readers)
        time.sleep(0.02)
        if files.directory.exists():
            with storage.locked_directory(files.directory):
                sizes = [entry.stat().st_size for entry in os.scandir(files.directory) if ".partial" not in entry.name]
                most = max(most, sum(sizes))
    for reader in readers:
        assert reader.pid is not None
        os.kill(reader.pid, signal.SIGKILL)
        reader.join()
    assert 2 * SIZE <= most <= files.limit
    files.map(0)
    assert files.taken() <= files.limit


@pytest.mark.s3
def test_a_key_may_be_longer_than_a_files_name(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path))
    uri = f"s3://cinemo-test/{'x' * 300}.csv"
    storage.write_bytes(uri, b"clip_id")
    assert localize(uri).read_bytes() == b"clip_id"
    assert localize(uri).suffix == ".csv"


FILES = {"a.bin": 3 * SIZE, "deep/b.bin": SIZE, "c.json": 10}


def _use(uri: str, borrow: bool, told: Any, leave: Any) -> None:
    """Another process of the node: says how many bytes it found, and stays until it may leave."""
    with ExitStack() as stack:
        path = stack.enter_context(borrowed(uri)) if borrow else localize(uri)
        told.put(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
        leave.wait()


class Node:
    """Processes that share a cache directory, and directories on s3:// with `FILES`."""

    def __init__(self, root: str, cache: Path) -> None:
        self.root, self.cache = root, cache
        self._context = multiprocessing.get_context("spawn")
        self.told, self.leave = self._context.Queue(), self._context.Event()
        self.processes: list[Any] = []

    def stored(self, name: str) -> str:
        for file, size in FILES.items():
            storage.write_bytes(f"{self.root}/{name}/{file}", content(len(file)) * (size // SIZE) or b"0123456789")
        return f"{self.root}/{name}"

    def start(self, uri: str, borrow: bool = False) -> Any:
        process = self._context.Process(target=_use, args=(uri, borrow, self.told, self.leave), daemon=True)
        process.start()
        self.processes.append(process)
        return process

    def end(self) -> None:
        self.leave.set()
        for process in self.processes:
            process.join(60)
        self.leave.clear()

    def files(self, *suffixes: str) -> list[str]:
        found = (path.relative_to(self.cache).as_posix() for path in self.cache.rglob("*") if path.is_file())
        return [name for name in found if name.endswith(suffixes or "")]


@pytest.fixture
def node(s3_faults: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path / "cache"))
    made = Node(f"s3://cinemo-test/{tmp_path.name}", tmp_path / "cache")
    yield made
    for process in made.processes:
        process.kill()


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize("borrow", [False, True])
def test_many_processes_fetch_once(node: Node, s3_faults: FaultyS3, borrow: bool) -> None:
    uri = node.stored("model")
    s3_faults.meet({"slow": 1.0}, delay=0.5, only="model/")  # so that all of them come before it is there
    for _ in range(4):
        node.start(uri, borrow)
    assert [node.told.get(timeout=60) for _ in range(4)] == [sum(FILES.values())] * 4
    assert s3_faults.operations["GetObject"] == len(FILES)
    assert len(node.files(".bin", ".json")) == len(FILES)
    node.end()
    assert len(node.files(".bin", ".json")) == (0 if borrow else len(FILES))
    if borrow:
        assert not node.files()


def test_those_that_all_find_nothing_do_not_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path))
    all_have_looked, first_look, fetches, real = threading.Barrier(4, timeout=60), threading.local(), [], Path.exists

    def look(path: Path) -> bool:
        found = real(path)
        if path.name == "model" and not hasattr(first_look, "over"):
            first_look.over = True
            all_have_looked.wait()
        return found

    def fetch(path: Path) -> None:
        fetches.append(path)
        path.write_bytes(b"weights")

    monkeypatch.setattr(Path, "exists", look)
    paths: list[Path] = []
    # Each of them keeps its lock to the end of the process, and is a thread that a failing test need not wait for.
    seekers = [
        threading.Thread(target=lambda: paths.append(keep(Download("model", "1", 7, fetch))), daemon=True)
        for _ in range(4)
    ]
    for seeker in seekers:
        seeker.start()
    for seeker in seekers:
        seeker.join(60)
    assert len(paths) == 4
    assert len(fetches) == 1
    assert paths[0].read_bytes() == b"weights"


@pytest.mark.s3
def test_one_killed_amid_a_download_is_followed(node: Node, s3_faults: FaultyS3) -> None:
    uri = node.stored("model")
    s3_faults.meet({"slow": 1.0}, delay=1.0, only="model/")
    first = node.start(uri, borrow=True)
    deadline = time.monotonic() + 60
    while not node.files("a.bin"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = node.start(uri, borrow=True)
    os.kill(first.pid, signal.SIGKILL)
    assert node.told.get(timeout=60) == sum(FILES.values())
    assert not [name for name in node.files(".bin", ".json") if ".partial" in name]
    os.kill(second.pid, signal.SIGKILL)  # a reader: its whole copy stays, until something else is borrowed
    second.join()
    assert len(node.files("a.bin")) == 1
    s3_faults.meet()
    with borrowed(uri) as path:
        assert (path / "deep/b.bin").read_bytes() == content(len("deep/b.bin"))
    assert s3_faults.operations["GetObject"] == 0
    assert not node.files()


@pytest.mark.s3
def test_what_a_killed_process_borrowed_goes_with_the_next_download(node: Node) -> None:
    first = node.start(node.stored("first"), borrow=True)
    node.told.get(timeout=60)
    with borrowed(node.stored("second")):
        assert len(node.files("a.bin")) == 2, "the first one is in use"
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with borrowed(node.stored("third")):
        assert len(node.files("a.bin")) == 1
    assert not node.files()


@pytest.mark.s3
def test_kept_downloads_have_a_limit(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CINEMO_CACHE_GB", str(9 * SIZE / 1e9))  # two directories
    holder = node.start(node.stored("0"))
    node.told.get(timeout=60)
    for number in (1, 2):
        node.start(node.stored(str(number)))
        node.told.get(timeout=60)
    assert {name.split("/")[2] for name in node.files("a.bin")} == {"0", "1", "2"}, "what is in use stays"
    for process in node.processes[1:]:
        process.kill()
        process.join()
    localize(node.stored("3"))
    assert {name.split("/")[2] for name in node.files("a.bin")} == {"0", "3"}
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    localize(node.stored("4"))
    assert {name.split("/")[2] for name in node.files("a.bin")} == {"3", "4"}
    monkeypatch.setenv("CINEMO_CACHE_GB", "many")
    with pytest.raises(InputError, match=r"CINEMO_CACHE_GB is 'many', expected GB"):
        localize(f"{node.root}/4")


@pytest.mark.s3
def test_a_copy_that_a_person_removed_is_fetched_again(node: Node) -> None:
    uri = node.stored("model")
    shutil.rmtree(localize(uri))
    assert (localize(uri) / "c.json").read_bytes() == b"0123456789"
    shutil.rmtree(node.cache)
    assert (localize(uri) / "c.json").read_bytes() == b"0123456789"


@pytest.mark.s3
def test_a_download_that_fails_leaves_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = node.stored("model")

    def cut(uri: str, path: Path) -> None:
        path.write_bytes(b"half")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "fetch", cut)
        with pytest.raises(RunError, match=r"gave 4 bytes, its listing says"):
            localize(uri)
    assert not node.files()
    assert (localize(uri) / "c.json").read_bytes() == b"0123456789"
