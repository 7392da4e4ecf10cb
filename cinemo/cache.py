"""Local copies of what lies on s3://: whole directories by their ETags, and a dataset's files by their checksums.

Everything is under ``$CINEMO_CACHE``, or ``~/.cache/cinemo``, and is fetched once on a node, whatever number of
processes ask for it:

- ``downloads/``: weights, encoders, bundles and manifests (`localize`, `keep`). They stay for the next process, up to
  ``$CINEMO_CACHE_GB`` (50) in all; then the least recently used ones give way.
- ``borrowed/``: checkpoints (`borrowed`). They go when the last process on the node has read them.
- ``shards/``: files of datasets, which may be larger than a disk, in a bounded part of it (`FileCache`).

Processes hold locks (flock) on what they use, which the kernel ends with them. So whoever fetches is waited for, a dead
one is followed, and nothing that is in use is removed. What was not fetched whole never bears its final name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cinemo import checksums, storage
from cinemo.types import InputError, RunError, local_faults

LIMIT, _LIMIT_GB = "CINEMO_CACHE_GB", 50.0
_LONGEST_NAME = 200  # bytes of a local file's; keys may be longer
_LOCK, _FETCHING, _REMOVED = ".lock", ".fetching", ".removed."
_MOST_HELD = 256  # locks that a process keeps: each is an open file
_held: OrderedDict[Path, int] = OrderedDict()
_holding = threading.Lock()


class Damaged(RunError):
    """A file of a dataset is missing, or its bytes are not those that were written."""


@dataclass(frozen=True)
class Download:
    """What can be fetched.

    ``name`` of the local file or directory. ``stamp`` is another text where the content is another. ``size``: bytes,
    or 0 where that is not known. ``fetch`` makes the file or directory.
    """

    name: str
    stamp: str
    size: int
    fetch: Callable[[Path], None]


def cache_directory() -> Path:
    """Where fetched files are kept: ``$CINEMO_CACHE``, or ``~/.cache/cinemo``."""
    return Path(os.environ.get("CINEMO_CACHE") or Path.home() / ".cache" / "cinemo")


def localize(uri: str) -> Path:
    """A local path with the content of ``uri`` (a file or a directory); s3:// is fetched and kept, see `keep`.

    An object that was replaced is fetched again: sizes and ETags tell.
    Raises `InputError` where nothing is there.
    """
    return keep(_remote(uri)) if storage.is_remote(uri) else _local(uri)


@contextlib.contextmanager
def borrowed(uri: str) -> Iterator[Path]:
    """As `localize`, within a block; a copy is removed where no other process on this node is in such a block.

    A copy that killed processes left goes with the next download that is borrowed.
    """
    if not storage.is_remote(uri):
        yield _local(uri)
        return
    descriptor, path = _obtain(cache_directory() / "borrowed", _remote(uri), 0)
    try:
        yield path
    finally:
        os.close(descriptor)
        _remove_unused(path.parent)


def keep(download: Download) -> Path:
    """The local copy of a download, which is fetched where it is not there.

    It is not removed while this process lives, unless the process has asked for some hundred others since.

    Raises:
        InputError: ``$CINEMO_CACHE_GB`` is no number.
    """
    text = os.environ.get(LIMIT) or str(_LIMIT_GB)
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        raise InputError(
            f"{LIMIT} is {text!r}, expected GB of disk for fetched weights, such as {_LIMIT_GB:g}"
        ) from None
    descriptor, path = _obtain(cache_directory() / "downloads", download, limit)
    with _holding:
        closed = [_held.pop(path)] if path in _held else []
        _held[path] = descriptor
        if len(_held) > _MOST_HELD:
            closed.append(_held.popitem(last=False)[1])
    for old in closed:
        os.close(old)
    return path


def _local(uri: str) -> Path:
    path = storage.local_path(uri)
    if not path.exists():
        raise InputError(f"{uri}: no such file or directory")
    return path


def _remote(uri: str) -> Download:
    root = uri.removeprefix("s3://").rstrip("/")
    listing = storage.listing(uri)
    if not listing:
        raise InputError(f"{uri}: nothing there (bucket, key or credentials wrong?)")
    stamp = json.dumps([uri, *((key, *listing[key]) for key in sorted(listing))])
    name = root.rsplit("/", 1)[-1]
    if len(name.encode()) > _LONGEST_NAME:
        name = "object" + os.path.splitext(name)[1][:16]

    def fetch(target: Path) -> None:
        for key, (size, _) in listing.items():
            path = target / key.removeprefix(root).lstrip("/") if key != root else target
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.fetch(f"s3://{key}", path)
            if path.stat().st_size != size:
                got = path.stat().st_size
                raise RunError(f"s3://{key}: gave {got} bytes, its listing says {size}; it was replaced, try again")

    return Download(name, stamp, sum(size for size, _ in listing.values()), fetch)


def _obtain(root: Path, download: Download, limit: int) -> tuple[int, Path]:
    """A descriptor whose shared lock keeps the copy of a download from being removed, and the copy's path.

    Whoever fetches has another lock besides. The shared one never becomes an exclusive one: of several processes that
    wait for that at once, the first would then keep the others waiting for as long as it uses the copy.
    """
    entry = root / hashlib.sha256(download.stamp.encode()).hexdigest()[:32]
    target = entry / download.name
    with local_faults(entry):
        while True:
            entry.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(entry / _LOCK, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # it was removed since
                continue
            try:
                _lock(descriptor, fcntl.LOCK_SH)
                if not target.exists() and _is_open(entry / _LOCK, descriptor):
                    with (entry / _FETCHING).open("ab") as fetching:
                        alone = _lock(fetching.fileno(), fcntl.LOCK_EX)  # waits for whoever fetches it
                        if not target.exists():
                            _fetch(download, target, limit, alone)
                if _is_open(entry / _LOCK, descriptor) and target.exists():
                    os.utime(descriptor)
                    return descriptor, target
            except BaseException:
                os.close(descriptor)
                _remove_unused(entry, abandoned=True)
                raise
            os.close(descriptor)


def _fetch(download: Download, target: Path, limit: int, alone: bool) -> None:
    """Fetch into a temporary directory beside the target, whose name says how many bytes it will have."""
    entry = target.parent
    _make_room(entry, download.size, limit)
    for left in entry.iterdir() if alone else ():
        if left.name not in (_LOCK, _FETCHING):  # of a process that was killed
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f".{download.size}.", suffix=".partial", dir=entry) as scratch:
        staged = Path(scratch) / target.name
        download.fetch(staged)
        try:
            os.replace(staged, target)
        except OSError:
            if not target.exists():  # where locks are not known, another process may have fetched it meanwhile
                raise


def _make_room(entry: Path, size: int, limit: int) -> None:
    """Remove what killed processes left, and the least recently used copies until there is room for ``size`` bytes."""
    with storage.locked_directory(entry.parent):
        taken, copies = size, []
        for other in entry.parent.iterdir():
            if other.name.startswith(_REMOVED):
                shutil.rmtree(other, ignore_errors=True)
            if other == entry or _remove_unused(other, abandoned=True):
                continue
            with contextlib.suppress(FileNotFoundError):
                copies.append(((other / _LOCK).stat().st_mtime_ns, _bytes_of(other), other))
                taken += copies[-1][1]
        for _, bytes_, other in sorted(copies):
            if taken <= limit:
                break
            if _remove_unused(other):
                taken -= bytes_


def _bytes_of(entry: Path) -> int:
    """What a copy takes, or will take."""
    partial = [int(path.name.split(".")[1]) for path in entry.glob(".*.partial")]
    found = 0
    for path in entry.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found += path.stat().st_size if path.is_file() else 0
    return max(found, *partial, 0)


def _remove_unused(entry: Path, abandoned: bool = False) -> bool:
    """Remove a copy that no process has locked; whether it is gone. Nothing goes where locks are not known.

    Args:
        abandoned: only where there is no whole copy in it.
    """
    try:
        descriptor = os.open(entry / _LOCK, os.O_RDWR)
    except OSError:
        return not entry.exists()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if abandoned and any(not path.name.startswith(".") for path in entry.iterdir()):
            return False
        # Out of the way first: what is left of a removal that is killed must not pass for a copy.
        removed = tempfile.mkdtemp(prefix=_REMOVED, dir=entry.parent)
        os.rename(entry, Path(removed) / entry.name)
        shutil.rmtree(removed, ignore_errors=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_open(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


class FileCache:
    """Files of a dataset, mapped: a local one where it lies, one on s3:// from a copy in a bounded directory.

    Args:
        limit: bytes that copies may take on this node. The least recently used ones give way; one that some process
            has mapped stays, so that more is taken only where more is in use at once.

    A copy is named by its checksum. Whoever has it mapped holds a shared lock on it, whoever fetches it an exclusive
    one: both go with the process, however it ends.
    """

    def __init__(self, limit: float, directory: Path | None = None) -> None:
        self.limit, self.directory = int(limit), directory or cache_directory() / "shards"

    def map(self, uri: str, checksum: str, size: int, check: bool = True) -> memoryview:
        """The content of a file.

        Args:
            check: whether to read all of it for its checksum. What was just fetched is always checked. A damaged copy
                is fetched again, once.

        Raises:
            FileNotFoundError: there is no such file.
            Damaged: its bytes are others.
        """
        if not storage.is_remote(uri):
            with storage.local_path(uri).open("rb") as file:
                return self._checked(uri, _mapped(file.fileno()), checksum if check else None)
        path = self.directory / checksum
        with contextlib.suppress(FileNotFoundError, Damaged):
            return self._copy(uri, path, checksum if check else None)
        with contextlib.suppress(Damaged):
            return self._fetch(uri, path, checksum, size)
        return self._fetch(uri, path, checksum, size)

    def _copy(self, uri: str, path: Path, checksum: str | None) -> memoryview:
        with path.open("rb") as file:
            _lock(file.fileno(), fcntl.LOCK_SH)
            os.utime(file.fileno())
            return self._checked(uri, _mapped(file.fileno()), checksum)

    def _fetch(self, uri: str, path: Path, checksum: str, size: int) -> memoryview:
        descriptor, partial = self._make_room(size)
        try:
            storage.fetch(uri, partial)
            content = self._checked(uri, _mapped(descriptor), checksum)
            _lock(descriptor, fcntl.LOCK_SH)
            os.replace(partial, path)
            return content
        finally:
            partial.unlink(missing_ok=True)
            os.close(descriptor)

    def _make_room(self, size: int) -> tuple[int, Path]:
        """An empty file to fetch ``size`` bytes into, which its name says, so that they count from now on."""
        with storage.locked_directory(self.directory):
            taken, copies = size, []
            for entry in os.scandir(self.directory):
                with contextlib.suppress(FileNotFoundError):
                    if not entry.name.endswith(".partial"):
                        stat = entry.stat()
                        copies.append((stat.st_mtime_ns, stat.st_size, Path(entry.path)))
                        taken += stat.st_size
                    elif not _unlink_unused(Path(entry.path)):  # else of a process that was killed
                        taken += int(entry.name.split(".")[1])
            for _, bytes_, path in sorted(copies):
                if taken <= self.limit:
                    break
                if _unlink_unused(path):
                    taken -= bytes_
            descriptor, name = tempfile.mkstemp(prefix=f".{size}.", suffix=".partial", dir=self.directory)
            _lock(descriptor, fcntl.LOCK_EX)
            return descriptor, Path(name)

    @staticmethod
    def _checked(uri: str, content: memoryview, checksum: str | None) -> memoryview:
        if checksum and (found := checksums.checksum([content], checksums.algorithm_of(checksum))) != checksum:
            raise Damaged(f"{uri}: has {checksums.brief(found)}, its record says {checksums.brief(checksum)}")
        return content


def _mapped(descriptor: int) -> memoryview:
    """A file's content. The map has a descriptor of its own: a lock on the file lasts as long as the map."""
    if not os.fstat(descriptor).st_size:
        return memoryview(b"")
    content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    content.madvise(mmap.MADV_WILLNEED)
    return memoryview(content)


def _lock(descriptor: int, kind: int) -> bool:
    """Whether the file is locked: some network file systems know no such lock; a mapped file outlives its name."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, kind)
        return True
    return False


def _unlink_unused(path: Path) -> bool:
    """Remove a file that no process has locked; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    finally:
        os.close(descriptor)
    path.unlink(missing_ok=True)
    return True
