"""The bytes of a video as an HTTP answer: whole or a range, from a directory or s3://, with a validator for caches."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from cinemo.serving.http.refusals import Refused
from cinemo.serving.store.jobs import Job
from cinemo.serving.store.media import MediaStore

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def video_answer(media: MediaStore, job: Job, asked: Headers, body: bool = True) -> Response:
    """The video of a completed job. It never changes, so its job and attempt name its content (the ETag).

    Args:
        asked: headers of the request: ``If-None-Match``, ``Range`` (one range; several are answered with the whole,
            as RFC 9110 allows), ``If-Range``.
        body: without, the headers alone (HEAD).

    Raises:
        Refused: 416 the range lies behind the end.
        FileNotFoundError: the file is gone.
    """
    name = str(job.media_name)
    size = media.size(name)
    etag = f'"{job.id}-{job.attempts}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": f'attachment; filename="{job.id}.mp4"',
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
        return Response(status_code=status, headers=headers, media_type="video/mp4")
    return StreamingResponse(media.pieces(name, start, length), status, headers, media_type="video/mp4")


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
        message = f"the video has {size} bytes, none of them in the requested range"
        raise Refused(416, "range_not_satisfiable", message, headers={"Content-Range": f"bytes */{size}"})
    return start, end - start
