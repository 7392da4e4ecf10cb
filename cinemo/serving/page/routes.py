"""The page for people at ``/``: a few static files that speak the public API and nothing else.

The page holds no state on the server, so any replica serves it to anybody, and it names no other origin, so it works
offline. Every answer carries a content security policy that enforces that.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Pictures that were chosen and videos that were fetched with a key are shown from blob: addresses.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    # Always asked for again, and mostly answered by 304: after an update nobody mixes old files with new ones for long.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_page(api: FastAPI) -> None:
    """Serve ``index.html`` at ``/`` and the other files of ``cinemo/serving/page/static`` below ``/page/``.

    The files are read once, here. Each has its sha256 as ETag: an equal ``If-None-Match`` is answered by 304 and no
    body. They are not part of the OpenAPI document.
    """
    for file in resources.files("cinemo.serving.page").joinpath("static").iterdir():
        suffix = f".{file.name.rpartition('.')[2]}"
        if suffix in _TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            endpoint = _File(file.read_bytes(), _TYPES[suffix])
            api.add_route(path, endpoint.answer, methods=["GET", "HEAD"], include_in_schema=False)


class _File:
    def __init__(self, content: bytes, media_type: str) -> None:
        self._content, self._media_type = content, media_type
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def answer(self, request: Request) -> Response:
        headers = _HEADERS | {"ETag": self._tag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self._content, media_type=self._media_type, headers=headers)
