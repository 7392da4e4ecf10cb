"""WebDataset tars as manifests: members ``KEY.mp4`` with captions in ``KEY.txt`` or ``KEY.json``.

Only headers and captions are read; a clip's uri says where its bytes lie (`cinemo.media.members`).
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from cinemo.data.manifest.captions import caption_of
from cinemo.data.manifest.folders import check_name, is_video, read_object, words
from cinemo.data.manifest.json_lines import JSON_COLUMN
from cinemo.media.members import tar_uri
from cinemo.ranges import open_ranges
from cinemo.types import InputError

_BATCH = 1 << 14
_AT_ONCE = 1 << 16  # headers, captions and metadata of a sample lie together, videos are passed over
_SCHEMA = pa.schema([(name, pa.string()) for name in ("clip_id", "uri", "caption", "start", "end", JSON_COLUMN)])


def tar_batches(uri: str, size: int, prefix: str, seed: int) -> Iterator[tuple[pa.RecordBatch, list[str]]]:
    """Clips of one tar in the order of its members, and the names of videos without a caption.

    Args:
        prefix: goes before a member's key: clip ids are ``PREFIX/KEY``.

    Raises:
        InputError: no uncompressed tar, or cut off, between members too; a name that a uri cannot hold.
    """
    rows: list[dict[str, Any]] = []
    unnamed: list[str] = []
    for key, videos, beside in _samples(uri, size):
        for video, (offset, length) in videos.items():
            clip_id = f"{prefix}/{key}" if len(videos) == 1 else f"{prefix}/{video}"
            caption, others = caption_of(beside, clip_id, seed)
            if caption is None:
                unnamed.append(video)
            rows.append(
                {
                    "clip_id": clip_id,
                    "uri": _uri_of(uri, video, offset, length),
                    "caption": words(video) if caption is None else caption,
                    JSON_COLUMN: json.dumps(others, sort_keys=True, ensure_ascii=False) if others else None,
                }
            )
        if len(rows) >= _BATCH:
            yield pa.RecordBatch.from_pylist(rows, _SCHEMA), unnamed
            rows, unnamed = [], []
    yield pa.RecordBatch.from_pylist(rows, _SCHEMA), unnamed


def _uri_of(tar: str, member: str, offset: int, size: int) -> str:
    try:
        return tar_uri(tar, member, offset, size)
    except ValueError as error:
        raise InputError(f"manifest {tar}: {error}") from None


def _samples(uri: str, size: int) -> Iterator[tuple[str, dict[str, tuple[int, int]], dict[str, Any]]]:
    """Of each sample its key, the places of its videos, and what is written beside them."""
    current: str | None = None
    videos: dict[str, tuple[int, int]] = {}
    beside: dict[str, Any] = {}
    for member, content in _members(uri, size):
        directory, slash, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        key = f"{directory}{slash}{stem}".removeprefix("./")
        if key != current:
            if current is not None:
                yield current, videos, beside
            current, videos, beside = key, {}, {}
        if is_video(name):
            check_name(member.name, uri)
            videos[member.name] = member.offset_data, member.size
        elif ending == "json":
            beside = read_object(content or b"", f"{uri}::{member.name}") | beside
        elif ending == "txt":  # before what the JSON says, as in a folder
            beside["caption"] = " ".join((content or b"").decode("utf-8", errors="replace").split())
    if current is not None:
        yield current, videos, beside


def _members(uri: str, size: int) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Files of a tar, with the content of those that are no videos."""
    count = 0
    try:
        with open_ranges(uri, size, _AT_ONCE) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                count += 1
                if member.isreg() and not member.issparse():
                    wanted = member.name.endswith((".json", ".txt"))
                    stream = tar.extractfile(member) if wanted else None
                    yield member, stream.read() if stream else None
            file.seek(tar.offset)
            block = file.read(tarfile.BLOCKSIZE)
            if any(block):  # where tarfile meets what is no header, it takes it for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
            # All usual writers end a tar with blocks of zeros (some with one instead of two). One without was cut, or
            # its writer killed, and the samples behind that place would be missed by nobody.
            if len(block) < tarfile.BLOCKSIZE:
                raise InputError(
                    f"manifest {uri}: tar cut: no end-of-archive marker after {count} members; fetch or write it "
                    "again, or if these are all, end it (truncate -s +1024 FILE)"
                )
    except tarfile.TarError as error:
        raise InputError(f"manifest {uri}: no uncompressed tar, or cut off ({error})") from None
