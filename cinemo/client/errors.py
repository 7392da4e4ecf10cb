"""What can go wrong, as exceptions. All derive from `VideoServerError`."""

from __future__ import annotations

import httpx
from pydantic import ValidationError

from cinemo.client.types import ErrorBody, Fault, Video


class VideoServerError(Exception):
    """Anything that this client raises about a server. ``retries``: made of the request before it."""

    retries = 0


class ConnectionFailed(VideoServerError):
    """No answer, or one that broke off, after all retries."""


class UnexpectedAnswer(VideoServerError):
    """An answer of success that is not what the interface says; often the address is of something else."""


class VideoFailed(VideoServerError):
    """A video that was waited for failed or was cancelled. ``video``: its last state; ``code``: why, for programs."""

    def __init__(self, video: Video) -> None:
        why = f": {video.error.message} ({video.error.code})" if video.error else ""
        super().__init__(f"video {video.id} was not made: it is {video.status}{why}")
        self.video, self.code = video, video.error.code if video.error else str(video.status)


class WaitTimeout(VideoServerError, TimeoutError):
    """A video was not finished in time; it goes on at the server. ``video``: its last known state, if any."""

    def __init__(self, video_id: str, seconds: float, video: Video | None) -> None:
        state = f"{video.status}, {video.progress} %" if video else "unknown"
        super().__init__(f"video {video_id} was not finished after {seconds:g} s ({state})")
        self.video = video


class WebhookInvalid(VideoServerError):
    """A webhook that did not come from the server, was changed on its way, or is too old."""


class APIError(VideoServerError):
    """An answer that is not a success.

    Attributes:
        status: the HTTP status. ``code``: a stable slug for programs. ``message``: one line for a person.
        param: the field it is about. ``type``: the coarse class.
        request_id: of the answer, which the server's log has too. ``retry_after``: seconds until a retry makes sense.
        described: whether the server itself said this, and not something in between.
        video_id: of the video that was made for the request and failed, where there is one.
    """

    def __init__(self, response: httpx.Response) -> None:
        try:
            fault, self.described = ErrorBody.model_validate_json(response.content).error, True
        except ValidationError:
            text = response.text.strip() if response.headers.get("content-type", "").startswith("text/plain") else ""
            fault = Fault(code=f"http_{response.status_code}", message=text[:200] or response.reason_phrase, type="")
            self.described = False
        self.status = response.status_code
        self.code, self.message, self.param, self.type = fault.code, fault.message, fault.param, fault.type
        self.request_id: str | None = response.headers.get("x-request-id")
        self.video_id: str | None = response.headers.get("x-video-id")
        after = response.headers.get("retry-after", "")
        self.retry_after = float(after) if after.isdecimal() else None
        request = f" (request {self.request_id})" if self.request_id else ""
        super().__init__(f"{self.status} {self.code}: {self.message}{request}")


class Invalid(APIError):
    """400, 413, 415, 422: the request cannot be met as it is."""


class Forbidden(APIError):
    """401, 403: no valid API key."""


class NotFound(APIError):
    """404: unknown, expired, or another key's."""


class Conflict(APIError):
    """409: the video is not in the state that this needs."""


class TooMany(APIError):
    """429: the queue is full or a quota used up; ``retry_after`` says for how long."""


class ServerFault(APIError):
    """5xx, after all retries."""


_KINDS: dict[int, type[APIError]] = {
    **dict.fromkeys((400, 413, 415, 422), Invalid),
    **dict.fromkeys((401, 403), Forbidden),
    404: NotFound,
    409: Conflict,
    429: TooMany,
}


def api_error(response: httpx.Response) -> APIError:
    """The exception of an answer that is not a success."""
    kind = ServerFault if response.status_code >= 500 else _KINDS.get(response.status_code, APIError)
    return kind(response)
