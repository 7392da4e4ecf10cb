"""`Client` and `AsyncClient`: how the steps of a flow are carried out, and the methods that a person calls."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import anyio
import httpx

import cinemo
from cinemo.client import flows
from cinemo.client.downloads import downloaded
from cinemo.client.requests import Ask, Do, Flow, NextPiece, Pause, Tell
from cinemo.client.types import (
    CancelledVideo,
    ControlValue,
    DeletedVideo,
    Model,
    Picture,
    Preview,
    RenderedVideo,
    Variant,
    Video,
)

T = TypeVar("T")


class _Connection:
    """What both clients are told."""

    def __init__(self, base_url: str, api_key: str | None, timeout: float, max_retries: int) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url is {base_url!r}, expected http://HOST:PORT or https://HOST")
        if max_retries < 0:
            raise ValueError(f"max_retries is {max_retries}, expected 0 or more")
        self.max_retries, self._timeout = max_retries, timeout
        key = os.environ.get("CINEMO_API_KEY") if api_key is None else api_key
        self._options: dict[str, Any] = {
            "base_url": base_url.rstrip("/").removesuffix("/v1"),  # as the official client is given it
            "headers": {"User-Agent": f"cinemo/{cinemo.__version__}"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            "timeout": timeout,
            "follow_redirects": True,
        }

    def _arguments(self, ask: Ask) -> dict[str, Any]:
        """Of ``build_request``."""
        read = self._timeout if ask.timeout is None else ask.timeout
        return {
            "method": ask.method,
            "url": ask.path,
            "params": dict(ask.query),
            "headers": dict(ask.headers),
            "files": ask.form,
            "json": ask.body,
            "timeout": httpx.Timeout(self._timeout, read=read),
        }


class Client(_Connection):
    """Asks a server, and waits for its answers. Threads may share one.

    Args:
        base_url: of the server, with or without ``/v1``.
        api_key: None: the environment's ``CINEMO_API_KEY``, if any.
        timeout: seconds until a connection stands, and between two pieces of an answer.
        max_retries: of a request that met a fault that passes: a broken connection, 408, 429, 500, 502-504, 507. A
            creation carries a key, so that it makes one video however often it is sent.
        transport: of httpx, for proxies and tests.

    Every method raises what derives from `VideoServerError`: `ConnectionFailed`, `APIError` by its status (`Invalid`,
    `Forbidden`, `NotFound`, `Conflict`, `TooMany`, `ServerFault`) and `UnexpectedAnswer`.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        max_retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, timeout, max_retries)
        self._http = httpx.Client(transport=transport, **self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def create(
        self,
        picture: Picture,
        prompt: str,
        *,
        model: str | None = None,
        size: str | None = None,
        seconds: str | None = None,
        timeout: float | None = None,
        webhook_url: str | None = None,
        previews: bool | None = None,
        reuse: bool | None = None,
        lora: str | None = None,
        pictures: Mapping[str, Picture] | None = None,
        idempotency_key: str | None = None,
        **controls: ControlValue,
    ) -> Video:
        """Ask for a video of a picture; it is queued.

        Args:
            picture: a PNG, JPEG or WebP: its path, ``https://`` or ``data:`` address, bytes, or an open file.
            prompt: what happens.
            model: its name; None: the server's.
            size: WIDTHxHEIGHT; None: the model's.
            seconds: the length; None: the model's.
            timeout: seconds from now after which the video fails if it is not finished.
            webhook_url: told when it is completed or failed; `cinemo.client.webhooks` reads what it is told.
            previews: whether `wait` can tell previews. ``reuse``: whether a finished video of the same request will do.
            lora: an adapter of the server (`Model.adapters`), as ``NAME`` or ``NAME:SCALE``.
            pictures: more pictures that the model takes, by name (`Model.pictures`).
            idempotency_key: two creations with the same one make one video; None: a fresh one.
            controls: of the model (`Model.controls`), such as ``seed=7``.
        """
        fields = {"prompt": prompt, "model": model, "size": size, "seconds": seconds, "timeout": timeout}
        others = {"webhook_url": webhook_url, "previews": previews, "reuse": reuse, "lora": lora, **controls}
        ask = flows.create("/v1/videos", picture, pictures or {}, {**fields, **others}, idempotency_key)
        return self._run(flows.created(ask, self.max_retries))

    def create_sync(
        self,
        picture: Picture,
        prompt: str,
        *,
        model: str | None = None,
        size: str | None = None,
        seconds: str | None = None,
        timeout: float | None = None,
        webhook_url: str | None = None,
        previews: bool | None = None,
        reuse: bool | None = None,
        lora: str | None = None,
        pictures: Mapping[str, Picture] | None = None,
        idempotency_key: str | None = None,
        **controls: ControlValue,
    ) -> RenderedVideo:
        """As `create`, and returns when the video is made. Raises `VideoFailed` beside the others."""
        fields = {"prompt": prompt, "model": model, "size": size, "seconds": seconds, "timeout": timeout}
        others = {"webhook_url": webhook_url, "previews": previews, "reuse": reuse, "lora": lora, **controls}
        ask = flows.create(
            "/v1/videos/sync",
            picture,
            pictures or {},
            {**fields, **others},
            idempotency_key,
            flows.SYNC_SECONDS,
        )
        return self._run(flows.rendered(ask, self.max_retries))

    def remix(
        self, video: Video | str, prompt: str, *, idempotency_key: str | None = None, **controls: ControlValue
    ) -> Video:
        """Ask for another video of the same picture with another prompt. What else `create` takes, but pictures, may
        be given by name; the rest is as it was."""
        fields = {"prompt": prompt, **controls}
        return self._run(flows.remixed(video, fields, idempotency_key, self.max_retries))

    def retrieve(self, video: Video | str) -> Video:
        """The video as it is now."""
        return self._run(flows.retrieved(video, self.max_retries))

    def wait(
        self,
        video: Video | str,
        *,
        timeout: float | None = None,
        progress: Callable[[Video], object] | None = None,
        preview: Callable[[Preview], object] | None = None,
        interval: float = 1.0,
        outage: float = 300.0,
    ) -> Video:
        """The video once it is completed.

        Args:
            timeout: seconds to wait at most; None: as long as it takes.
            progress: called with the video at every change that the server tells.
            preview: called with what the video looks like so far, where it was created with ``previews=True``.
            interval: seconds between two questions where the server has no stream of events.
            outage: seconds for which a server that is away is asked again.

        Raises:
            VideoFailed: it failed or was cancelled.
            WaitTimeout: it was not finished in time, and goes on.
        """
        return self._run(flows.wait(video, timeout, interval, outage, progress, preview))

    def download(self, video: Video | str, path: str | os.PathLike[str], *, variant: Variant = "video") -> Path:
        """Write a completed video, or one of its variants, to a file, which appears when all of it has arrived.

        What breaks off is continued, also by a later call for the same path.
        """
        return self._run(downloaded(video, Path(path), variant, self.max_retries))

    def content(self, video: Video | str, *, variant: Variant = "video") -> bytes:
        """A completed video, or one of its variants, in memory."""
        return self._run(flows.content(video, variant, self.max_retries))

    def picture(self, video: Video | str, name: str | None = None) -> bytes:
        """The picture that a video was asked for with, as PNG without loss; or another of its pictures, by name."""
        return self._run(flows.picture(video, name, self.max_retries))

    def videos(self, *, order: Literal["asc", "desc"] = "desc", page_size: int = 100) -> Iterator[Video]:
        """All videos, newest first, asked for page by page."""
        after: str | None = None
        while True:
            page = self._run(flows.page(after, page_size, order, self.max_retries))
            yield from page.data
            if not page.has_more or not page.data:
                return
            after = page.last_id or page.data[-1].id

    def cancel(self, video: Video | str) -> Video:
        """Cancel a video that is not finished. Raises `Conflict` where it is."""
        return self._run(flows.cancelled(video, self.max_retries))

    def delete(self, video: Video | str) -> DeletedVideo | CancelledVideo:
        """Remove a finished video; one that is not is cancelled, and stays."""
        return self._run(flows.deleted(video, self.max_retries))

    def models(self) -> list[Model]:
        """What the server serves."""
        return self._run(flows.models(self.max_retries))

    def model(self, name: str) -> Model:
        """One model, with its controls."""
        return self._run(flows.model(name, self.max_retries))

    def _run(self, flow: Flow[T]) -> T:
        stream: httpx.Response | None = None
        pieces: Iterator[bytes] = iter(())
        result: Any = None
        fault: Exception | None = None
        try:
            while True:
                step = flow.send(result) if fault is None else flow.throw(fault)
                result = fault = None
                try:
                    match step:
                        case Ask():
                            if stream is not None:
                                stream.close()
                            result = self._http.send(
                                self._http.build_request(**self._arguments(step)), stream=step.stream
                            )
                            if step.stream and result.is_success:
                                stream, pieces = result, result.iter_bytes()
                            else:
                                result.read()
                        case NextPiece():
                            result = next(pieces, None)
                        case Pause():
                            time.sleep(step.seconds)
                        case Do():
                            result = step.call()
                        case Tell():
                            step.listener(step.value)
                except Exception as error:
                    fault = error
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            flow.close()
            if stream is not None:
                stream.close()


class AsyncClient(_Connection):
    """`Client` with methods to await, under asyncio or trio. What ``wait`` calls may be a coroutine function."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        max_retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(base_url, api_key, timeout, max_retries)
        self._http = httpx.AsyncClient(transport=transport, **self._options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def create(
        self,
        picture: Picture,
        prompt: str,
        *,
        model: str | None = None,
        size: str | None = None,
        seconds: str | None = None,
        timeout: float | None = None,
        webhook_url: str | None = None,
        previews: bool | None = None,
        reuse: bool | None = None,
        lora: str | None = None,
        pictures: Mapping[str, Picture] | None = None,
        idempotency_key: str | None = None,
        **controls: ControlValue,
    ) -> Video:
        """As `Client.create`."""
        fields = {"prompt": prompt, "model": model, "size": size, "seconds": seconds, "timeout": timeout}
        others = {"webhook_url": webhook_url, "previews": previews, "reuse": reuse, "lora": lora, **controls}
        ask = flows.create("/v1/videos", picture, pictures or {}, {**fields, **others}, idempotency_key)
        return await self._run(flows.created(ask, self.max_retries))

    async def create_sync(
        self,
        picture: Picture,
        prompt: str,
        *,
        model: str | None = None,
        size: str | None = None,
        seconds: str | None = None,
        timeout: float | None = None,
        webhook_url: str | None = None,
        previews: bool | None = None,
        reuse: bool | None = None,
        lora: str | None = None,
        pictures: Mapping[str, Picture] | None = None,
        idempotency_key: str | None = None,
        **controls: ControlValue,
    ) -> RenderedVideo:
        """As `Client.create_sync`."""
        fields = {"prompt": prompt, "model": model, "size": size, "seconds": seconds, "timeout": timeout}
        others = {"webhook_url": webhook_url, "previews": previews, "reuse": reuse, "lora": lora, **controls}
        ask = flows.create(
            "/v1/videos/sync",
            picture,
            pictures or {},
            {**fields, **others},
            idempotency_key,
            flows.SYNC_SECONDS,
        )
        return await self._run(flows.rendered(ask, self.max_retries))

    async def remix(
        self, video: Video | str, prompt: str, *, idempotency_key: str | None = None, **controls: ControlValue
    ) -> Video:
        """As `Client.remix`."""
        fields = {"prompt": prompt, **controls}
        return await self._run(flows.remixed(video, fields, idempotency_key, self.max_retries))

    async def retrieve(self, video: Video | str) -> Video:
        """As `Client.retrieve`."""
        return await self._run(flows.retrieved(video, self.max_retries))

    async def wait(
        self,
        video: Video | str,
        *,
        timeout: float | None = None,
        progress: Callable[[Video], object | Awaitable[object]] | None = None,
        preview: Callable[[Preview], object | Awaitable[object]] | None = None,
        interval: float = 1.0,
        outage: float = 300.0,
    ) -> Video:
        """As `Client.wait`."""
        return await self._run(flows.wait(video, timeout, interval, outage, progress, preview))

    async def download(self, video: Video | str, path: str | os.PathLike[str], *, variant: Variant = "video") -> Path:
        """As `Client.download`."""
        return await self._run(downloaded(video, Path(path), variant, self.max_retries))

    async def content(self, video: Video | str, *, variant: Variant = "video") -> bytes:
        """As `Client.content`."""
        return await self._run(flows.content(video, variant, self.max_retries))

    async def picture(self, video: Video | str, name: str | None = None) -> bytes:
        """As `Client.picture`."""
        return await self._run(flows.picture(video, name, self.max_retries))

    async def videos(self, *, order: Literal["asc", "desc"] = "desc", page_size: int = 100) -> AsyncIterator[Video]:
        """As `Client.videos`."""
        after: str | None = None
        while True:
            page = await self._run(flows.page(after, page_size, order, self.max_retries))
            for video in page.data:
                yield video
            if not page.has_more or not page.data:
                return
            after = page.last_id or page.data[-1].id

    async def cancel(self, video: Video | str) -> Video:
        """As `Client.cancel`."""
        return await self._run(flows.cancelled(video, self.max_retries))

    async def delete(self, video: Video | str) -> DeletedVideo | CancelledVideo:
        """As `Client.delete`."""
        return await self._run(flows.deleted(video, self.max_retries))

    async def models(self) -> list[Model]:
        """As `Client.models`."""
        return await self._run(flows.models(self.max_retries))

    async def model(self, name: str) -> Model:
        """As `Client.model`."""
        return await self._run(flows.model(name, self.max_retries))

    async def _run(self, flow: Flow[T]) -> T:
        stream: httpx.Response | None = None
        pieces: AsyncIterator[bytes] | None = None
        result: Any = None
        fault: Exception | None = None
        try:
            while True:
                step = flow.send(result) if fault is None else flow.throw(fault)
                result = fault = None
                try:
                    match step:
                        case Ask():
                            if stream is not None:
                                await stream.aclose()
                            result = await self._http.send(
                                self._http.build_request(**self._arguments(step)), stream=step.stream
                            )
                            if step.stream and result.is_success:
                                stream, pieces = result, result.aiter_bytes()
                            else:
                                await result.aread()
                        case NextPiece():
                            result = await anext(pieces, None) if pieces else None
                        case Pause():
                            await anyio.sleep(step.seconds)
                        case Do():
                            result = await anyio.to_thread.run_sync(step.call)
                        case Tell():
                            told = step.listener(step.value)
                            if inspect.isawaitable(told):
                                await told
                except Exception as error:
                    fault = error
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            flow.close()
            if stream is not None:
                with anyio.CancelScope(shield=True):
                    await stream.aclose()
