"""The HTTP interface over the job store. It decodes nothing but pictures, runs no model and knows nothing of Ray.

Every answer that is not a success has the body ``{"error": {"code", "message", "param"}}``; no answer holds a path or a
stack trace, and bad input never ends in a 5xx.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Form, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import cinemo
from cinemo.animate import load_image
from cinemo.bundle import BundleCard
from cinemo.serving.jobs import FINAL, Job, JobStore, QueueFull
from cinemo.serving.schema import (
    DeletedVideo,
    ErrorBody,
    Fault,
    Health,
    Model,
    ModelList,
    Video,
    VideoForm,
    VideoList,
    video_seconds,
    video_size,
)
from cinemo.types import InputError

log = logging.getLogger(__name__)

_HTTP_CODES = {
    400: "malformed_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Limits:
    """What a request may hold: bytes of the whole body, and pixels of the picture (checked before it is decoded)."""

    body_bytes: int = 20 * 2**20
    pixels: int = 40_000_000


class Refused(Exception):
    """An answer that is not a success, from inside an endpoint."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.fault, self.headers = status, Fault(code=code, message=message, param=param), headers


def build_api(
    store: JobStore, card: BundleCard, ready: Callable[[], Awaitable[bool]], limits: Limits = Limits()
) -> FastAPI:
    """The application. ``ready``: whether the model is loaded and its runner alive."""
    answers = {code: {"model": ErrorBody} for code in (400, 404, 409, 413, 415, 422, 429)}
    api = FastAPI(title="cinemo", version=cinemo.__version__, responses=answers)  # type: ignore[arg-type]
    api.add_middleware(BodyLimit, limit=limits.body_bytes)
    _add_error_answers(api)

    @api.post("/v1/videos", status_code=202)
    async def create(form: Annotated[VideoForm, Form()]) -> Video:
        """Queue the animation of a picture."""
        _check_supported(form, card)
        content = await form.input_reference.read()
        await run_in_threadpool(_check_picture, content, limits.pixels)
        try:
            return Video.of(await run_in_threadpool(store.submit, form.controls(card), content))
        except QueueFull as full:
            message = f"{full.waiting} jobs are waiting; try again in {full.retry_after} seconds"
            raise Refused(429, "queue_full", message, headers={"Retry-After": str(full.retry_after)}) from None

    @api.get("/v1/videos")
    def page(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
        order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    ) -> VideoList:
        """Jobs, the newest first unless ``order=asc``."""
        jobs = store.page(limit + 1, after, order == "desc")
        data = [Video.of(job) for job in jobs[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return VideoList(data=data, has_more=len(jobs) > limit, first_id=first, last_id=last)

    @api.get("/v1/videos/{video_id}")
    def retrieve(video_id: str) -> Video:
        """One job."""
        return Video.of(_found(store, video_id))

    @api.get("/v1/videos/{video_id}/content", response_class=FileResponse)
    def content(video_id: str) -> FileResponse:
        """The mp4 of a completed job."""
        job = _found(store, video_id)
        if job.status in ("queued", "in_progress"):
            raise Refused(409, "video_not_ready", f"the video is {job.status} ({job.progress} %); ask again later")
        if job.status != "completed":
            raise Refused(
                409, f"video_{job.status}", job.error_message or f"the job was {job.status}, there is no video"
            )
        path = store.media.local_path(job.media_name) if job.media_name else None
        if path is None or not path.is_file():
            raise _unknown(video_id)
        return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4")

    @api.delete("/v1/videos/{video_id}")
    def delete(video_id: str) -> Video | DeletedVideo:
        """Cancel an unfinished job (it stays visible as cancelled), or remove a finished one with its video."""
        job = _found(store, video_id)
        if job.status not in FINAL and store.cancel(job.id):
            return Video.of(_found(store, video_id))
        if not store.delete(job.id):
            raise _unknown(video_id)
        return DeletedVideo(id=job.id)

    @api.get("/v1/models")
    def models() -> ModelList:
        """The models that can be asked for: one per server."""
        return ModelList(data=[Model.of(card)])

    @api.get("/healthz")
    def health() -> Health:
        """The HTTP process lives."""
        return Health(status="ok")

    @api.get("/readyz", responses={503: {"model": Health}})
    async def readiness() -> JSONResponse:
        """The model is loaded and works jobs off (200), or not yet (503)."""
        is_ready = await ready()
        body = Health(status="ok" if is_ready else "starting", queued=await run_in_threadpool(store.waiting))
        return JSONResponse(body.model_dump(), 200 if is_ready else 503)

    return api


def _found(store: JobStore, video_id: str) -> Job:
    job = store.get(video_id)
    if job is None:
        raise _unknown(video_id)
    return job


def _unknown(video_id: str) -> Refused:
    return Refused(404, "video_not_found", f"there is no video {video_id[:64]!r} (or it expired)", "video_id")


def _check_supported(form: VideoForm, card: BundleCard) -> None:
    if form.model not in (None, card.recipe.name):
        raise Refused(
            404, "model_not_found", f"model {form.model!r} is not served; expected {card.recipe.name!r}", "model"
        )
    if form.size not in (None, video_size(card)):
        raise Refused(
            400, "unsupported_size", f"size {form.size!r} is not supported; expected {video_size(card)!r}", "size"
        )
    if form.seconds not in (None, video_seconds(card)):
        message = f"seconds {form.seconds!r} is not supported; expected {video_seconds(card)!r}"
        raise Refused(400, "unsupported_seconds", message, "seconds")


def _check_picture(content: bytes, max_pixels: int) -> None:
    """Refuse by format and by size from the header alone, then decode once to see that the rest is whole."""
    param = "input_reference"
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as picture:
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        message = f"input_reference is no {', '.join(IMAGE_FORMATS)} picture"
        raise Refused(415, "unsupported_image", message, param) from None
    if width * height > max_pixels:
        message = f"the picture has {width}x{height} pixels, expected at most {max_pixels / 1e6:.0f} megapixels"
        raise Refused(413, "image_too_large", message, param)
    try:
        load_image(content, max_pixels)
    except InputError as error:
        raise Refused(422, "invalid_image", str(error), param) from None


def _add_error_answers(api: FastAPI) -> None:
    """One body for every fault, whoever found it: an endpoint, pydantic, the router, or nobody (500, logged)."""

    @api.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return _answer(error.status, error.fault, error.headers)

    @api.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> JSONResponse:
        return _answer(422, Fault(code="invalid_request", message=str(error)))

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        fault = error.errors()[0]
        names = [str(part) for part in fault["loc"] if part not in ("body", "query", "path", "form")]
        param = names[-1] if names else None
        code = {"missing": "missing_field", "extra_forbidden": "unknown_field"}.get(fault["type"], "invalid_value")
        message = str(fault["msg"]).removeprefix("Value error, ")
        if param and not message.startswith(f"{param}:"):
            message = f"{param}: {message}"
        return _answer(422, Fault(code=code, message=message, param=param))

    @api.exception_handler(HTTPException)
    async def http_fault(_: Request, error: HTTPException) -> JSONResponse:
        code = _HTTP_CODES.get(error.status_code, "refused")
        return _answer(error.status_code, Fault(code=code, message=str(error.detail)), error.headers)

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _answer(500, Fault(code="internal_error", message="the server failed; the fault was logged"))


def _answer(status: int, fault: Fault, headers: Any = None) -> JSONResponse:
    return JSONResponse(ErrorBody(error=fault).model_dump(), status, headers)


class BodyLimit:
    """Refuse a body above ``limit`` bytes with 413: by its declared length at once, else while it arrives."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message_413 = f"the request body is too large, expected at most {self.limit / 2**20:g} MiB"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.limit:
            await _answer(413, Fault(code="body_too_large", message=message_413))(scope, receive, send)
            return
        arrived = 0

        async def counted() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self.limit:
                raise HTTPException(413, message_413)  # the one kind that FastAPI's form parser lets through
            return message

        await self.app(scope, counted, send)
