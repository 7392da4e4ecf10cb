"""Downloads to a file: whole or not at all, and continued where they broke off, also by a later process."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from functools import partial
from pathlib import Path
from typing import BinaryIO

import httpx

from cinemo.client.errors import APIError, ConnectionFailed, UnexpectedAnswer
from cinemo.client.flows import path_of
from cinemo.client.requests import Ask, Do, Flow, NextPiece, Pause, answered, connection_failed, pause_after
from cinemo.client.types import Video

_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


def downloaded(video: Video | str, target: Path, variant: str, max_retries: int) -> Flow[Path]:
    """The file ``target``, which appears when all of it has arrived.

    Until then what came lies beside it, in a hidden file that is named after the content (its ETag), so that a later
    download of the same continues it.

    Raises:
        ConnectionFailed, APIError, UnexpectedAnswer: it ended with another size than it should.
        OSError: it cannot be written.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such directory; make it first")
    name = path_of(video, "content")
    query = {"variant": variant} if variant != "video" else {}
    part, tag, failures = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.part"), "", 0
    try:
        while True:
            have: int = (yield Do(partial(_size, part))) if tag else 0
            ranged = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
            ask = Ask("GET", name, query, {"Accept-Encoding": "identity", **ranged}, stream=True)
            try:
                response = yield from answered(ask, max_retries)
            except APIError as fault:
                if fault.status != 416 or not have:
                    raise
                yield Do(part.unlink)  # it holds more than the content has
                continue
            if not tag and (tag := _strong(response.headers.get("etag", ""))):
                digest = hashlib.sha256(f"{name} {variant} {tag}".encode()).hexdigest()[:12]
                part = target.with_name(f".{target.name}.{digest}.part")
                if (yield Do(part.exists)):
                    continue  # an earlier download of the same broke off: only the rest is asked for
            start, size = _extent(response)
            if start not in (0, have):
                raise UnexpectedAnswer(f"GET {name} was answered from byte {start} on, expected {have}")
            broken = yield from _written(part, start, size)
            if broken is None:
                yield Do(partial(os.replace, part, target))
                return target
            failures += 1
            if failures > max_retries:
                raise broken
            yield Pause(pause_after(ConnectionFailed(), failures - 1))
    finally:
        if not tag:  # nothing says that a later answer is the same content
            part.unlink(missing_ok=True)


def _written(part: Path, start: int, size: int | None) -> Flow[ConnectionFailed | UnexpectedAnswer | None]:
    """Write a body from ``start`` on; what is wrong with it, or None. Another process may be writing the same bytes to
    the same places."""
    file: BinaryIO = yield Do(partial(part.open, "r+b" if part.exists() else "wb"))
    try:
        file.seek(start)
        while (piece := (yield NextPiece())) is not None:
            yield Do(partial(file.write, piece))
        file.truncate()
        end = file.tell()
    except httpx.RequestError as error:
        return connection_failed(error)
    finally:
        file.close()
    if size is not None and end != size:
        return UnexpectedAnswer(f"{part.name}: the answers had {end} bytes, expected {size}")
    return None


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _extent(response: httpx.Response) -> tuple[int, int | None]:
    """Where an answer's body begins in the content, and the content's size where it is told."""
    part = _RANGE.fullmatch(response.headers.get("content-range", "")) if response.status_code == 206 else None
    if part:
        return int(part[1]), int(part[2])
    length = response.headers.get("content-length", "")
    return 0, int(length) if length.isdecimal() else None


def _strong(tag: str) -> str:
    return "" if tag.startswith("W/") else tag
