"""A file on storage that is read in ranges, for readers that ask for a place and a length."""

from __future__ import annotations

import io
from typing import Any

from cinemo import storage


class RangedFile(io.RawIOBase):
    """A remote file as a Python file. Every read is a request: readers of small pieces need a buffer before it."""

    def __init__(self, uri: str, size: int) -> None:
        self.uri, self.size, self.place = uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), max(0, self.size - self.place))
        if length:
            content = storage.read_bytes(self.uri, self.place, length)
            length = len(content)
            buffer[:length] = content
            self.place += length
        return length


def open_ranges(uri: str, size: int, at_once: int) -> Any:
    """A file that is read where it lies: a local one, or a remote one in ranges of at least ``at_once`` bytes."""
    if not storage.is_remote(uri):
        return storage.local_path(uri).open("rb")
    return io.BufferedReader(RangedFile(uri, size), at_once)
