"""The two clients of `cinemo.client` under one set of names, so that a test runs with each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
from anyio.from_thread import start_blocking_portal

from cinemo.client import AsyncClient, Client

KINDS = ["sync", "async"]


class Awaited:
    """An `AsyncClient` whose methods are called without await, each on the event loop of another thread."""

    def __init__(self, client: AsyncClient, call: Callable[..., Any]) -> None:
        self._client, self._call = client, call

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        if name == "videos":
            return lambda **options: self._call(partial(_all, method(**options)))
        return lambda *given, **options: self._call(partial(method, *given, **options))


async def _all(values: AsyncIterator[Any]) -> list[Any]:
    return [value async for value in values]


@contextmanager
def opened(kind: str, base_url: str, transport: httpx.MockTransport | None = None, **options: Any) -> Iterator[Client]:
    """A client of this kind, closed afterwards."""
    if kind == "sync":
        with Client(base_url, transport=transport, **options) as client:
            yield client
        return
    with start_blocking_portal() as portal:
        made = portal.call(partial(AsyncClient, base_url, transport=transport, **options))
        yield Awaited(made, portal.call)  # type: ignore[misc]
        portal.call(made.close)
