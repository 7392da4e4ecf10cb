"""Pages of other origins: who may use the interface from a browser, and what it may see of an answer."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from cinemo.serving.http.refusals import refusal

_METHODS = ("GET", "HEAD", "POST", "DELETE")
_SEEN = (
    *("Location", "Retry-After", "X-Request-Id", "X-Video-Id", "openai-poll-after-ms"),
    *("Accept-Ranges", "Content-Disposition", "Content-Length", "Content-Range", "ETag"),
)


class Cors(CORSMiddleware):
    """Starlette's, without cookies (keys come in a header), and with refusals in this interface's shape."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=["*"],
            expose_headers=_SEEN,
            max_age=3600,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        message = "pages of this origin, or this method, are not let in; the server's setting cors_origins lists them"
        return refusal(400, "cors_refused", message, headers={"Vary": answer.headers.get("Vary", "Origin")})
