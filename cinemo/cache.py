"""Local copies of what lies on s3://: whole directories by their ETags, and a dataset's files by their checksums.

Everything is under ``$CINEMO_CACHE``, or ``~/.cache/cinemo``. Files of datasets, which may be larger than a disk, share
a bounded part of it (`FileCache`) among all processes of a node; weights and manifests are kept for good (`localize`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import tempfile
from pathlib import Path

from cinemo import checksums, storage
from cinemo.types import InputError, RunError

_LONGEST_NAME = 200  # bytes of a local file's; keys may be longer


class Damaged(RunError):
    """A file of a dataset is missing, or its bytes are not those that were written."""


def cache_directory() -> Path:
    """Where fetched files are kept: ``$CINEMO_CACHE``, or ``~/.cache/cinemo``."""
    return Path(os.environ.get("CINEMO_CACHE") or Path.home() / ".cache" / "cinemo")


def localize(uri: str) -> Path:
    """A local path with the content of ``uri`` (a file or a directory); s3:// is fetched once and kept.

    The cache key holds sizes and ETags, so that an object that was replaced is fetched again.
    Raises `InputError` where nothing is there.
    """
    if not storage.is_remote(uri):
        path = storage.local_path(uri)
        if not path.exists():
            raise InputError(f"{uri}: no such file or directory")
        return path
    root = uri.removeprefix("s3://").rstrip("/")
    listing = storage.listing(uri)
    if not listing:
        raise InputError(f"{uri}: nothing there (bucket, key or credentials wrong?)")
    stamp = json.dumps([(key, *listing[key]) for key in sorted(listing)])
    name = root.rsplit("/", 1)[-1]
    if len(name.encode()) > _LONGEST_NAME:
        name = "object" + os.path.splitext(name)[1][:16]
    target = cache_directory() / hashlib.sha256((uri + stamp).encode()).hexdigest()[:32] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        staged = Path(scratch) / target.name
        for key in listing:
            path = staged / key.removeprefix(root).lstrip("/") if key != root else staged
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.fetch(f"s3://{key}", path)
        try:
            os.replace(staged, target)
        except OSError:
            if not target.exists():  # another process may have fetched it meanwhile, which is as good
                raise
    return target


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


def _lock(descriptor: int, kind: int) -> None:
    with contextlib.suppress(OSError):  # some network file systems know no such lock; a mapped file outlives its name
        fcntl.flock(descriptor, kind)


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
