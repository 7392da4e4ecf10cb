"""The files of jobs: the picture a job came with and the videos its attempts made, in a directory or on s3://."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cinemo import storage

_JOB_ID = re.compile(r"video_[0-9a-f]{24}")
_PIECE_BYTES = 4 << 20


def is_job_id(text: str) -> bool:
    """Whether this can be the id of a job at all; only such text becomes part of a path or of a query."""
    return _JOB_ID.fullmatch(text) is not None


def image_name(job_id: str) -> str:
    """The picture a job came with, as its bytes were sent."""
    return f"{job_id}/image"


def input_name(job_id: str, name: str) -> str:
    """What a job came with beside it, by the name that its model has for it."""
    return f"{job_id}/input-{name}"


def video_name(job_id: str, attempt: int) -> str:
    """The video of one attempt: two workers that both believe a job to be theirs write different files."""
    return f"{job_id}/video-{attempt}.mp4"


def preview_name(job_id: str, attempt: int, name: str) -> str:
    """A picture made of that video, such as ``thumbnail.webp``; it can be made again."""
    return f"{job_id}/video-{attempt}-{name}"


class MediaStore:
    """Files by name (`image_name`, `video_name`), each written whole or not at all. Safe for threads and processes.

    Args:
        uri: a directory, which is made where it is missing, or ``s3://bucket/prefix``.
    """

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri).rstrip("/")
        self.is_remote = storage.is_remote(self.uri)
        if not self.is_remote:
            storage.local_path(self.uri).mkdir(parents=True, exist_ok=True)

    def write(self, name: str, data: bytes) -> None:
        storage.write_bytes(self._uri(name), data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write a file to; it is stored under ``name`` where the block ends without an error."""
        with tempfile.TemporaryDirectory(prefix="cinemo-") as scratch:
            path = Path(scratch) / name.rsplit("/", 1)[-1]
            yield path
            self.write(name, path.read_bytes())

    def copy(self, name: str, other: str) -> None:
        """Store a file under another name as well, without its bytes where they lie in a directory: what becomes of
        one name leaves the other alone. Raises `FileNotFoundError`."""
        source, target = self.local_path(name), self.local_path(other)
        if source is None or target is None:
            self.write(other, self.read(name))
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
            os.utime(target)  # or it would look like an old file of no job
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            self.write(other, self.read(name))

    def read(self, name: str) -> bytes:
        """Raises `FileNotFoundError`."""
        return storage.read_bytes(self._uri(name))

    def size(self, name: str) -> int:
        """Bytes of a file. Raises `FileNotFoundError`."""
        return storage.size(self._uri(name))

    def local_path(self, name: str) -> Path | None:
        """Where a file lies, if this is a directory; None on s3://."""
        return None if self.is_remote else storage.local_path(self._uri(name))

    def pieces(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """``length`` bytes of a file from ``start`` (all that follow where None), piece by piece.

        Raises:
            FileNotFoundError: at once, not at the first piece.
        """
        end = self.size(name)
        return self._pieces(name, start, end if length is None else min(end, start + length))

    def remove(self, job_id: str) -> None:
        """Remove all files of a job; no error where there are none."""
        storage.remove(self._uri(job_id))

    def remove_file(self, name: str) -> None:
        """Remove one file; no error where there is none. A job's directory goes with its last file."""
        storage.remove_file(self._uri(name))
        if (path := self.local_path(name)) is not None:
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    def old(self, seconds: float) -> dict[str, list[str]]:
        """Names of the files that were last written at least ``seconds`` ago, by job id; half-written ones included."""
        found: dict[str, list[str]] = {}
        for name, age in storage.ages(self.uri).items():
            job_id, _, rest = name.partition("/")
            if age >= seconds and rest and is_job_id(job_id):
                found.setdefault(job_id, []).append(name)
        return found

    def _pieces(self, name: str, start: int, end: int) -> Iterator[bytes]:
        while start < end and (piece := storage.read_bytes(self._uri(name), start, min(_PIECE_BYTES, end - start))):
            yield piece
            start += len(piece)

    def _uri(self, name: str) -> str:
        job_id, _, rest = name.partition("/")
        if not is_job_id(job_id) or "/" in rest or rest in (".", ".."):
            raise ValueError(f"{name!r} is not the name of a job's file")
        return storage.join(self.uri, name)
