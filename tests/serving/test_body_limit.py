"""A body may be slow, if it is steady."""

from __future__ import annotations

import anyio
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message

from cinemo.serving.http.refusals import BodyLimit


def arrives(pieces: int, size: int, pause: float) -> int:
    """The status for so many pieces, one every ``pause`` seconds, where 0.2 s are free, then 10 kB/s asked."""

    async def run() -> int:
        async def read(scope: object, receive: object, send: object) -> None:
            await Request(scope, receive).body()  # type: ignore[arg-type]
            await PlainTextResponse("ok")(scope, receive, send)  # type: ignore[arg-type]

        left, statuses = pieces, []

        async def receive() -> Message:
            nonlocal left
            await anyio.sleep(pause)
            left -= 1
            return {"type": "http.request", "body": bytes(size), "more_body": left > 0}

        async def send(message: Message) -> None:
            statuses.append(message.get("status"))

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "app": Starlette()}
        try:
            await BodyLimit(read, limit=1 << 20, seconds=0.2, rate=10_000)(scope, receive, send)
        except HTTPException as error:
            return error.status_code
        return int(statuses[0] or 0)

    return anyio.run(run)


@pytest.mark.parametrize(
    ("pieces", "size", "pause", "status"),
    [
        pytest.param(10, 3_000, 0.1, 200, id="steady"),
        pytest.param(10, 100, 0.1, 408, id="trickling"),
        pytest.param(1, 100, 0.1, 200, id="short"),
        pytest.param(2, 5_000, 0.6, 408, id="stops"),
    ],
)
def test_a_body_must_keep_its_rate(pieces: int, size: int, pause: float, status: int) -> None:
    assert arrives(pieces, size, pause) == status
