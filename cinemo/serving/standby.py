"""HTTP from the process that was started, at a socket of its own: the proxy asks it while no HTTP replica answers.

So clients are answered while the replicas are still being started, while the only one is being replaced, and while the
server drains: then status, videos and events go on, and new jobs are refused.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvicorn
from starlette.types import Receive, Scope, Send

from cinemo.serving.http.refusals import refusal
from cinemo.serving.ingress import Ingress
from cinemo.serving.settings import ServeSettings

_STOP_SECONDS = 2
_RETRY_SECONDS = 10  # a restart takes about as long


class Standby:
    """A context: serves at ``socket`` in a thread until its end.

    Raises:
        InputError: the settings' bundle, state or database cannot be used.
    """

    def __init__(self, settings: ServeSettings, socket: Path) -> None:
        self.socket = socket
        self._ingress = Ingress(None, settings, say=lambda _: None)  # the process says it itself
        self._api = self._ingress.__serve_build_asgi_app__()
        self._draining = False
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            uds=str(socket),
            log_level="error",
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="cinemo-standby", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(_STOP_SECONDS + 1)

    def attach(self, animator: Any) -> None:
        """The animators are there: know from them what is served."""
        self._ingress.attach(animator)

    def detach(self) -> None:
        """Ray is about to end."""
        self._ingress.detach()

    def drain(self) -> None:
        """Refuse new jobs from now on."""
        self._draining = True
        self._ingress.drain()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._draining and scope["type"] == "http" and scope["method"] == "POST" and not _cancels(scope["path"]):
            headers = {"Retry-After": str(_RETRY_SECONDS), "Connection": "close"}
            message = "the server is being stopped and takes no new jobs; try again once it is back"
            await refusal(503, "draining", message, headers=headers)(scope, receive, send)
            return
        await self._api(scope, receive, send)


def _cancels(path: str) -> bool:
    return path.endswith("/cancel")
