"""What a client can do, as flows of steps (see `cinemo.client.requests`)."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from cinemo.client.errors import (
    APIError,
    ConnectionFailed,
    NotFound,
    UnexpectedAnswer,
    VideoFailed,
    WaitTimeout,
)
from cinemo.client.requests import (
    Ask,
    Flow,
    NextPiece,
    Pause,
    Tell,
    answered,
    form_of,
    is_passing,
    parsed,
    pause_after,
    read_answer,
)
from cinemo.client.types import (
    FINAL,
    CancelledVideo,
    ControlValue,
    DeletedVideo,
    Model,
    ModelList,
    Picture,
    Preview,
    RenderedVideo,
    Video,
    VideoList,
)

SYNC_SECONDS = 1800.0  # a server that bounds the wait answers long before
_SILENCE_SECONDS = 45.0  # a stream of events says something every 15 s


def path_of(video: Video | str, *rest: str) -> str:
    name = video.id if isinstance(video, Video) else video
    if not name:
        raise ValueError("the id of a video is empty")
    return "/".join(("/v1/videos", quote(name, safe=""), *rest))


def create(
    path: str,
    picture: Picture,
    pictures: Mapping[str, Picture],
    fields: Mapping[str, ControlValue],
    idempotency_key: str | None,
    timeout: float | None = None,
) -> Flow[Ask]:
    """The request of a creation. Its key makes it safe to send again: the server makes one video of all."""
    form = yield from form_of(picture, pictures, fields)
    return Ask("POST", path, headers=_once(idempotency_key), form=form, timeout=timeout)


def created(ask: Flow[Ask], max_retries: int) -> Flow[Video]:
    return (yield from parsed(Video, (yield from ask), max_retries))


def rendered(ask: Flow[Ask], max_retries: int) -> Flow[RenderedVideo]:
    request = yield from ask
    try:
        response = yield from answered(request, max_retries)
    except APIError as fault:
        if fault.video_id is None:
            raise
        raise VideoFailed((yield from retrieved(fault.video_id, max_retries))) from None
    if response.status_code != 202:
        return RenderedVideo(response.headers.get("x-video-id"), response.content)
    video = read_answer(Video, response.content, request)  # it takes longer than the server lets a request wait
    yield from wait(video, None, 1.0, 300.0)
    return RenderedVideo(video.id, (yield from content(video, "video", max_retries)))


def remixed(
    video: Video | str, fields: Mapping[str, ControlValue], idempotency_key: str | None, max_retries: int
) -> Flow[Video]:
    body = {name: value for name, value in fields.items() if value is not None}
    ask = Ask("POST", path_of(video, "remix"), headers=_once(idempotency_key), body=body)
    return (yield from parsed(Video, ask, max_retries))


def _once(key: str | None) -> dict[str, str]:
    return {"Idempotency-Key": key or uuid.uuid4().hex}


def retrieved(video: Video | str, max_retries: int, timeout: float | None = None) -> Flow[Video]:
    return (yield from parsed(Video, Ask("GET", path_of(video), timeout=timeout), max_retries))


def page(after: str | None, limit: int, order: str, max_retries: int) -> Flow[VideoList]:
    query: dict[str, str | int] = {"limit": limit, "order": order}
    if after is not None:
        query["after"] = after
    answer = yield from parsed(VideoList, Ask("GET", "/v1/videos", query), max_retries)
    if answer.has_more and after is not None and after in (answer.last_id, *(video.id for video in answer.data[-1:])):
        raise UnexpectedAnswer(f"the page of videos after {after} ends with it, and says that there are more")
    return answer


def cancelled(video: Video | str, max_retries: int) -> Flow[Video]:
    return (yield from parsed(Video, Ask("POST", path_of(video, "cancel")), max_retries))


def deleted(video: Video | str, max_retries: int) -> Flow[CancelledVideo | DeletedVideo]:
    ask = Ask("DELETE", path_of(video))
    try:
        response = yield from answered(ask, max_retries)
    except NotFound as gone:
        if not (gone.retries and gone.described):
            raise
        return DeletedVideo(id=video.id if isinstance(video, Video) else video)  # by a request whose answer was lost
    answer = read_answer(DeletedVideo, response.content, ask)
    return answer if answer.deleted else read_answer(CancelledVideo, response.content, ask)


def content(video: Video | str, variant: str, max_retries: int) -> Flow[bytes]:
    query = {"variant": variant} if variant != "video" else {}  # some servers know no other and refuse the word
    return (yield from answered(Ask("GET", path_of(video, "content"), query), max_retries)).content


def picture(video: Video | str, name: str | None, max_retries: int) -> Flow[bytes]:
    query = {"name": name} if name else {}
    return (yield from answered(Ask("GET", path_of(video, "input"), query), max_retries)).content


def models(max_retries: int) -> Flow[list[Model]]:
    return (yield from parsed(ModelList, Ask("GET", "/v1/models"), max_retries)).data


def model(name: str, max_retries: int) -> Flow[Model]:
    return (yield from parsed(Model, Ask("GET", f"/v1/models/{quote(name, safe='')}"), max_retries))


def wait(
    video: Video | str,
    timeout: float | None,
    interval: float,
    outage: float,
    progress: Callable[[Video], Any] | None = None,
    preview: Callable[[Preview], Any] | None = None,
) -> Flow[Video]:
    """The completed video: its stream of events is read where there is one, and it is asked for otherwise.

    A server that is away or restarts is asked again for ``outage`` seconds.
    """
    began = time.monotonic()
    name, last = (video.id, video) if isinstance(video, Video) else (video, None)
    told: Video | None = None
    streams, failures, failing_since = True, 0, 0.0
    while True:
        left = _left(name, began, timeout, last)
        try:
            latest = yield from retrieved(name, 0, _at_most(_SILENCE_SECONDS, left))
        except (ConnectionFailed, APIError) as fault:
            now = time.monotonic()
            failing_since = failing_since if failures else now
            if not _may_pass(fault, last is not None) or now - failing_since > outage:
                raise
            yield Pause(_at_most(pause_after(fault, failures), _left(name, began, timeout, last)))
            failures += 1
            continue
        failures = 0
        if progress and latest != told:
            yield Tell(progress, latest)
        told = last = latest
        if not last.finished and streams:
            streams, last = yield from _followed(last, began, timeout, progress, preview)
            told = last
        if last.status == "completed":
            return last
        if last.finished:
            raise VideoFailed(last)
        yield Pause(_at_most(interval, _left(name, began, timeout, last)))


def _may_pass(fault: ConnectionFailed | APIError, is_known: bool) -> bool:
    """Also a 404 about a video that was there before, if it is not the server's own: a proxy's, in a restart."""
    return is_passing(fault) or (is_known and isinstance(fault, NotFound) and not fault.described)


def _left(name: str, began: float, timeout: float | None, last: Video | None) -> float | None:
    """Seconds left of a wait. Raises `WaitTimeout` where there are none."""
    if timeout is None:
        return None
    left = began + timeout - time.monotonic()
    if left <= 0:
        raise WaitTimeout(name, timeout, last)
    return left


def _at_most(seconds: float, left: float | None) -> float:
    return seconds if left is None else min(seconds, left)


def _followed(
    video: Video,
    began: float,
    timeout: float | None,
    progress: Callable[[Video], Any] | None,
    preview: Callable[[Preview], Any] | None,
) -> Flow[tuple[bool, Video]]:
    """Whether the server has streams of events to come back to, and the last state that one told."""
    left = _left(video.id, began, timeout, video)
    ask = Ask(
        "GET",
        path_of(video, "events"),
        headers={"Accept": "text/event-stream"},
        timeout=_at_most(_SILENCE_SECONDS, left),
        stream=True,
    )
    last = video
    try:
        response: httpx.Response = yield ask
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            return False, last
        events = Events()
        while (piece := (yield NextPiece())) is not None:
            for name, data in events.feed(piece):
                if name in ("progress", *FINAL):
                    told = read_answer(Video, data, ask)
                    if progress and told != last:
                        yield Tell(progress, told)
                    last = told
                elif name == "preview" and preview:
                    yield Tell(preview, read_answer(Preview, data, ask))
            if last.finished:
                break
            _left(video.id, began, timeout, last)
    except httpx.RequestError:
        pass  # it broke off; whoever asks next finds out why
    return True, last


class Events:
    """Server-sent events out of the bytes of a stream."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[tuple[str, str]]:
        """The events, as (name, data), that are whole with ``piece``."""
        whole, end, self._rest = (self._rest + piece).replace(b"\r\n", b"\n").rpartition(b"\n\n")
        found = []
        for block in whole.decode("utf-8", "replace").split("\n\n") if end else ():
            lines = [line.partition(":")[::2] for line in block.split("\n")]
            data = [value.removeprefix(" ") for name, value in lines if name == "data"]
            names = [value.removeprefix(" ") for name, value in lines if name == "event"]
            if data:
                found.append((names[-1] if names else "message", "\n".join(data)))
        return found
