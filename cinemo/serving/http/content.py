"""A job's files as HTTP answers: whole or a range, from a directory or s3://, with a validator for caches."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from cinemo.media.variants import PREVIEWS
from cinemo.serving.http.refusals import Refused
from cinemo.serving.store.jobs import Job
from cinemo.serving.store.media import MediaStore, preview_name

_STEM_LETTERS = 60  # of a prompt in the name of its download
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@dataclass(frozen=True)
class File:
    """A file that never changes. ``name``: in the media store; ``tag`` names its content; ``shown``: as a download."""

    name: str
    tag: str
    shown: str
    media_type: str


def video_file(job: Job) -> File:
    """The video of a completed job."""
    return File(str(job.media_name), f"{job.id}-{job.attempts}", f"{_stem(job)}.mp4", "video/mp4")


def input_file(job: Job, name: str) -> File:
    """A picture that a job came with, as it is kept: a PNG of every pixel."""
    label = "input" if name == "image" else f"input-{name}"
    return File(job.files[name], f"{job.id}-{label}", f"{_stem(job)}-{label}.png", "image/png")


def preview_file(media: MediaStore, job: Job, variant: str) -> File:
    """A thumbnail or sprite sheet of a completed job's video, made where it is not kept yet.

    Raises:
        FileNotFoundError: the video is gone.
    """
    ending, media_type, make = PREVIEWS[variant]
    name = preview_name(job.id, job.attempts, ending)
    file = File(name, f"{job.id}-{job.attempts}-{variant}", f"{_stem(job)}-{ending}", media_type)
    try:
        media.size(name)
    except FileNotFoundError:
        with tempfile.TemporaryDirectory(prefix="cinemo-") as scratch:
            path = media.local_path(str(job.media_name))
            if path is None or not path.is_file():
                path = Path(scratch) / "video.mp4"
                path.write_bytes(media.read(str(job.media_name)))
            media.write(name, make(path))
    return file


def file_answer(media: MediaStore, file: File, asked: Headers, body: bool = True) -> Response:
    """A file, or what was asked of it.

    Args:
        asked: headers of the request: ``If-None-Match``, ``Range`` (one range; several are answered with the whole,
            as RFC 9110 allows), ``If-Range``.
        body: without, the headers alone (HEAD).

    Raises:
        Refused: 416 the range lies behind the end.
        FileNotFoundError: the file is gone.
    """
    size = media.size(file.name)
    etag = f'"{file.tag}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": _attachment(file.shown),
    }
    known = [tag.strip().removeprefix("W/") for tag in asked.get("if-none-match", "").split(",")]
    if etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    status, start, length = 200, 0, size
    if asked.get("if-range", etag) == etag and (part := _part(asked.get("range", ""), size)) is not None:
        status, (start, length) = 206, part
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    headers["Content-Length"] = str(length)
    if not body:
        return Response(status_code=status, headers=headers, media_type=file.media_type)
    return StreamingResponse(media.pieces(file.name, start, length), status, headers, media_type=file.media_type)


def _stem(job: Job) -> str:
    """What a download of a job is called, before its ending: ``a-fox-in-snow-seed7``."""
    words = re.findall(r"\w+", unicodedata.normalize("NFC", str(job.request.get("prompt", ""))).lower())
    name = "-".join(words)
    if len(name) > _STEM_LETTERS:  # whole words, where the first is not longer by itself
        name = name[: _STEM_LETTERS + 1].rpartition("-")[0] or name[:_STEM_LETTERS]
    seed = job.request.get("seed")
    return f"{name or 'video'}-seed{seed}" if seed is not None else name or job.id


def _attachment(name: str) -> str:
    """The header that names a download: plain letters for old clients, all of them for the others (RFC 6266)."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^\w.]+", "-", plain).strip("-")
    simple = f'attachment; filename="{plain}"'
    return simple if plain == name else f"{simple}; filename*=UTF-8''{quote(name)}"


def _part(asked: str, size: int) -> tuple[int, int] | None:
    """Start and length of the range asked for; None: none, or one that is to be ignored."""
    match = _RANGE.fullmatch(asked.replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= end:
        message = f"the file has {size} bytes, none of them in the requested range"
        raise Refused(416, "range_not_satisfiable", message, headers={"Content-Range": f"bytes */{size}"})
    return start, end - start
