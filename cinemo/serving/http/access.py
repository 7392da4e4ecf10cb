"""Who asks: API keys, checked before a request's body is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from cinemo.serving.http.refusals import refusal
from cinemo.serving.store.keys import KeyStore, Quota
from cinemo.types import RunError

SCHEME = {"type": "http", "scheme": "bearer", "description": "an API key, sent as Authorization: Bearer cin_..."}


@dataclass(frozen=True)
class Client:
    """``id``: of the key, and of the jobs submitted with it; empty where no keys are needed."""

    id: str = ""
    quota: Quota | None = None


def _client(request: Request) -> Client:
    client: Client = request.state.client
    return client


Asking = Annotated[Client, Depends(_client)]
"""Who asks, as an endpoint's parameter."""


class KeyCheck:
    """Lets requests for ``/v1`` through where they carry a valid key; the `Client` is then in the request's state.

    Args:
        keys: None: nobody needs a key, and everybody is one client.
        also: more paths that need a key.
    """

    def __init__(self, app: ASGIApp, keys: KeyStore | None, also: tuple[str, ...] = ()) -> None:
        self.app, self.keys, self.also = app, keys, also

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client: Client | None = Client()
        if self.keys is not None and (scope["path"].startswith("/v1/") or scope["path"] in self.also):
            try:
                client = await self._client(self.keys, dict(scope["headers"]).get(b"authorization", b""))
            except RunError:
                answer = refusal(
                    503, "unavailable", "the server cannot check keys right now", headers={"Retry-After": "5"}
                )
                await answer(scope, receive, send)
                return
        if client is None:
            headers = {"WWW-Authenticate": 'Bearer realm="cinemo"'}
            message = "a valid API key is required, sent as Authorization: Bearer cin_..."
            await refusal(401, "invalid_api_key", message, headers=headers)(scope, receive, send)
            return
        scope.setdefault("state", {})["client"] = client
        await self.app(scope, receive, send)

    async def _client(self, keys: KeyStore, header: bytes) -> Client | None:
        kind, _, token = header.decode("latin-1").partition(" ")
        if kind.lower() != "bearer":
            return None
        key = await run_in_threadpool(keys.check, token.strip())
        return None if key is None else Client(key.id, key.quota)
