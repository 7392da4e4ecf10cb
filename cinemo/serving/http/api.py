"""The HTTP interface over the job store. It decodes nothing but pictures, runs no model and knows nothing of Ray.

Every answer that is not a success has the body ``{"error": {"code", "message", "param", "type"}}``; no answer holds a
path or a stack trace, and bad input never ends in a 5xx.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import anyio
from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

import cinemo
from cinemo.bundle import BundleCard
from cinemo.methods import method_class
from cinemo.methods.controls import MAX_FRAMES, MIN_FRAMES, size_of
from cinemo.serving.http.access import Client, KeyCheck
from cinemo.serving.http.content import video_answer
from cinemo.serving.http.description import EVENT, answers, describe
from cinemo.serving.http.events import EventStreams, is_over
from cinemo.serving.http.exposition import Exposition, Observed
from cinemo.serving.http.fetch import Fetcher
from cinemo.serving.http.form import VideoForm, VideoRequest, frames_of, read_form
from cinemo.serving.http.refusals import BodyLimit, Refused, add_error_answers
from cinemo.serving.http.schema import (
    CancelledVideo,
    DeletedVideo,
    Health,
    Model,
    ModelList,
    Video,
    VideoList,
    video_seconds,
    video_size,
)
from cinemo.serving.http.uploads import PARAM, cleaned, data_url, read_header
from cinemo.serving.page.routes import add_page
from cinemo.serving.store.jobs import FINAL, Job, JobStore, KeyReused, QueueFull, QuotaExceeded
from cinemo.serving.store.keys import KeyStore
from cinemo.types import InputError

_POLL_MILLISECONDS = 500
_PICTURES_AT_ONCE = 2  # a picture of 40 megapixels takes some 300 MB and a second or two to make anew


@dataclass(frozen=True)
class ApiSettings:
    """How the HTTP interface behaves.

    Args:
        body_bytes, body_seconds: of a request's whole body, and until it must have arrived.
        pixels: of a picture; checked before it is decoded.
        fetch_urls: whether ``input_reference`` may be an http(s) URL, which is then fetched under guard (`fetch`),
            within ``fetch_seconds``, from ``fetch_ports`` alone.
        event_seconds: between two looks at the jobs with open event streams; ``event_streams``: of them at once, in
            one process; ``keep_alive_seconds``: of silence on a stream.
        metrics: who may read ``/metrics``: everybody, holders of an API key, or nobody.
    """

    body_bytes: int = 20 * 2**20
    body_seconds: float = 60.0
    pixels: int = 40_000_000
    fetch_urls: bool = False
    fetch_seconds: float = 10.0
    fetch_ports: tuple[int, ...] = (80, 443)
    event_seconds: float = 0.15
    event_streams: int = 1000
    keep_alive_seconds: float = 15.0
    metrics: Literal["open", "key", "off"] = "open"


def build_api(
    store: JobStore,
    card: Callable[[], BundleCard],
    ready: Callable[[], Awaitable[bool]],
    settings: ApiSettings = ApiSettings(),
    keys: KeyStore | None = None,
    fetcher: Fetcher | None = None,
) -> FastAPI:
    """The application.

    Args:
        card: of the bundle that is served now.
        ready: whether a model is loaded and its runner alive.
        keys: where given, every request under ``/v1`` needs one of them, and sees that key's jobs alone.
        fetcher: where URLs are fetched, instead of one by the settings.

    Returns:
        the application; ``state.streams`` are its `EventStreams`.
    """
    api = FastAPI(
        title="cinemo", version=cinemo.__version__, docs_url=None, redoc_url=None, responses=answers(500, 503)
    )
    streams = EventStreams(store, settings.event_seconds, settings.keep_alive_seconds, settings.event_streams)
    exposition = Exposition(store.statistics, lambda: len(streams))
    api.state.streams = streams
    # The last one added sees a request first: who asks is known before anything of the body is taken.
    api.add_middleware(BodyLimit, limit=settings.body_bytes, seconds=settings.body_seconds)
    api.add_middleware(KeyCheck, keys=keys, also=("/metrics",) if settings.metrics == "key" else ())
    api.add_middleware(Observed, exposition=exposition)
    add_error_answers(api)
    if settings.fetch_urls and fetcher is None:
        fetcher = Fetcher(settings.body_bytes, settings.fetch_seconds, settings.fetch_ports)
    _add_creation(api, store, card, settings, fetcher)
    _add_jobs(api, store)
    _add_events(api, store, streams)
    _add_models(api, card)
    _add_operation(api, store, ready, exposition if settings.metrics != "off" else None)
    add_page(api)
    api.openapi = partial(describe, api, keys is not None, card)  # type: ignore[method-assign]
    return api


def _client(request: Request) -> Client:
    client: Client = request.state.client
    return client


Asking = Annotated[Client, Depends(_client)]


def _add_creation(
    api: FastAPI, store: JobStore, card: Callable[[], BundleCard], settings: ApiSettings, fetcher: Fetcher | None
) -> None:
    places = anyio.CapacityLimiter(_PICTURES_AT_ONCE)

    async def asked_form(request: Request) -> AsyncIterator[tuple[BundleCard, VideoRequest]]:
        """The model that is served now, and the form read for it; its files are closed after the answer."""
        model = card()
        try:
            yield model, await read_form(request, model)
        finally:
            await request.close()

    @api.post("/v1/videos", status_code=202, responses=answers(400, 401, 404, 408, 413, 415, 422, 429))
    async def create(
        client: Asking,
        response: Response,
        form: tuple[BundleCard, VideoRequest] = Depends(asked_form),
        idempotency_key: Annotated[
            str | None,
            Header(
                alias="Idempotency-Key",
                min_length=1,
                max_length=255,
                description="sending the same request again with the same key returns the same job",
            ),
        ] = None,
    ) -> Video:
        """Queue the animation of a picture."""
        model, asked = form
        _check_supported(asked, model)
        content, declared = await _reference(asked.form, fetcher)
        image = await anyio.to_thread.run_sync(cleaned, content, declared, settings.pixels, limiter=places)
        header = read_header(image)
        asked.controls.check_picture((header.height, header.width))
        others = {}
        for name, given in asked.pictures.items():
            try:
                content, declared = await _picture(given, fetcher)
                others[name] = await anyio.to_thread.run_sync(
                    cleaned, content, declared, settings.pixels, limiter=places
                )
            except Refused as fault:
                raise fault.about(PARAM, name) from None
        submit = partial(
            store.submit,
            asked.asked(model),
            image,
            client=client.id,
            idempotency_key=idempotency_key,
            timeout=asked.form.timeout,
            quota=client.quota,
            drawn=("seed",) if asked.seed_drawn else (),
            others=others,
        )
        try:
            job = await run_in_threadpool(submit)
        except QueueFull as full:
            message = f"{full.waiting} jobs are waiting; try again in {full.retry_after} seconds"
            raise Refused(429, "queue_full", message, headers={"Retry-After": str(full.retry_after)}) from None
        except QuotaExceeded as quota:
            headers = {"Retry-After": str(quota.retry_after)}
            raise Refused(429, "quota_exceeded", quota.message, headers=headers) from None
        except KeyReused:
            message = "this Idempotency-Key was used before with another request; use a new one"
            raise Refused(422, "idempotency_key_reused", message, "Idempotency-Key") from None
        response.headers["Location"] = f"/v1/videos/{job.id}"
        return Video.of(job)


def _add_jobs(api: FastAPI, store: JobStore) -> None:
    @api.get("/v1/videos", responses=answers(401, 422))
    def page(
        client: Asking,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=64, description="last_id of the previous page")] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """Jobs, newest first unless ``order=asc``."""
        jobs = store.page(limit + 1, after, order == "desc", client.id)
        data = [Video.of(job) for job in jobs[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return VideoList(data=data, has_more=len(jobs) > limit, first_id=first, last_id=last)

    @api.get("/v1/videos/{video_id}", responses=answers(401, 404))
    def retrieve(video_id: str, client: Asking, response: Response) -> Video:
        """One job."""
        job = _found(store, video_id, client)
        if job.status not in FINAL:
            response.headers["openai-poll-after-ms"] = str(_POLL_MILLISECONDS)
        return Video.of(job)

    @api.post("/v1/videos/{video_id}/cancel", responses=answers(401, 404, 409))
    def cancel(video_id: str, client: Asking) -> Video:
        """Cancel an unfinished job; one that finished first keeps its video (409)."""
        job = _found(store, video_id, client)
        if not store.cancel(job.id, client.id):
            job = _found(store, video_id, client)
            if job.status != "cancelled":
                raise Refused(409, f"video_{job.status}", f"the video is already {job.status}; nothing was cancelled")
        return Video.of(_found(store, video_id, client))

    @api.delete("/v1/videos/{video_id}", responses=answers(401, 404))
    def delete(video_id: str, client: Asking) -> DeletedVideo | CancelledVideo:
        """Cancel an unfinished job (it stays visible as cancelled), or remove a finished one with its video."""
        job = _found(store, video_id, client)
        if job.status not in FINAL and store.cancel(job.id, client.id):
            return CancelledVideo.of(_found(store, video_id, client))
        if not store.delete(job.id, client.id):
            raise _unknown(video_id)
        return DeletedVideo(id=job.id)

    @api.head("/v1/videos/{video_id}/content", include_in_schema=False)
    @api.get(
        "/v1/videos/{video_id}/content",
        response_class=Response,
        responses=answers(400, 401, 404, 409, 416) | _FILE_ANSWERS,
    )
    def content(request: Request, video_id: str, client: Asking, variant: str = "video") -> Response:
        """The mp4 of a completed job: whole, or one range of it. Only ``variant=video`` is kept."""
        if variant != "video":
            message = f"variant {variant[:32]!r} is not supported; expected 'video'"
            raise Refused(400, "unsupported_variant", message, "variant")
        job = _found(store, video_id, client)
        if job.status in ("queued", "in_progress"):
            raise Refused(409, "video_not_ready", f"the video is {job.status} ({job.progress} %); ask again later")
        if job.status != "completed":
            message = job.error_message or f"the job was {job.status}; there is no video"
            raise Refused(409, f"video_{job.status}", message)
        try:
            return video_answer(store.media, job, request.headers, body=request.method == "GET")
        except FileNotFoundError:
            raise _unknown(video_id) from None


def _add_events(api: FastAPI, store: JobStore, streams: EventStreams) -> None:
    @api.get(
        "/v1/videos/{video_id}/events",
        response_class=StreamingResponse,
        responses=answers(401, 404, 422, 429) | _EVENT_ANSWERS,
    )
    async def events(
        video_id: str, client: Asking, last_event_id: Annotated[str | None, Header(max_length=64)] = None
    ) -> Response:
        """Progress as server-sent events: ``progress`` at every change, then one named after the final status, each
        with the video as data. 204: the ``Last-Event-ID`` was the last one."""
        job = await run_in_threadpool(_found, store, video_id, client)
        if is_over(last_event_id) and job.status in FINAL:
            return Response(status_code=204)
        streams.check_room()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(streams.events(job), headers=headers, media_type="text/event-stream")


def _add_models(api: FastAPI, card: Callable[[], BundleCard]) -> None:
    @api.get("/v1/models", responses=answers(401))
    def models() -> ModelList:
        """The available models: one per server."""
        return ModelList(data=[Model.of(card())])

    @api.get("/v1/models/{model}", responses=answers(401, 404))
    def model(model: str) -> Model:
        """One model, with what it supports and its defaults."""
        served = card()
        if model != served.recipe.name:
            raise _no_model(model, served)
        return Model.of(served)


def _add_operation(
    api: FastAPI, store: JobStore, ready: Callable[[], Awaitable[bool]], exposition: Exposition | None
) -> None:
    @api.get("/healthz")
    def health() -> Health:
        """The HTTP process is alive."""
        return Health(status="ok")

    @api.get("/readyz", responses={503: {"model": Health}})
    async def readiness() -> JSONResponse:
        """The model is loaded and ready for jobs (200), or not yet (503)."""
        is_ready = await ready()
        body = Health(status="ok" if is_ready else "starting", queued=await run_in_threadpool(store.waiting))
        return JSONResponse(body.model_dump(), 200 if is_ready else 503, None if is_ready else {"Retry-After": "2"})

    if exposition is not None:

        @api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": _TEXT}}})
        def metrics(accept: Annotated[str, Header()] = "") -> Response:
            """For Prometheus."""
            text, kind = exposition.render(accept)
            return Response(text, media_type=kind)


_TEXT = {"schema": {"type": "string"}}
_FILE = {"schema": {"type": "string", "format": "binary"}}
_FILE_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the mp4", "content": {"video/mp4": _FILE}},
    206: {"description": "one range of the mp4", "content": {"video/mp4": _FILE}},
    304: {"description": "the client's copy is up to date"},
}
_EVENT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "events until the job is finished", "content": {"text/event-stream": {"schema": EVENT}}},
    204: {"description": "the client has already received the last event"},
}


async def _reference(form: VideoForm, fetcher: Fetcher | None) -> tuple[bytes, str | None]:
    """The picture to animate as it was sent, or fetched, and its declared type."""
    given = form.input_reference if form.image_url is None else form.image_url
    if given is None:
        message = "input_reference: Field required; this server animates a picture: send one as a file"
        raise Refused(422, "missing_field", message, PARAM)
    return await _picture(given, fetcher)


async def _picture(given: UploadFile | str, fetcher: Fetcher | None) -> tuple[bytes, str | None]:
    if isinstance(given, UploadFile):
        return await given.read(), given.content_type
    if given.startswith("data:"):
        return data_url(given)
    if fetcher is None:
        message = "input_reference: send the picture itself, as a file or a data URL; this server does not fetch URLs"
        raise Refused(400, "url_not_supported", message, PARAM)
    return await fetcher.fetch(given)


def _check_supported(asked: VideoRequest, card: BundleCard) -> None:
    form, wanted = asked.form, getattr(asked.controls, "frames", None)
    frames = wanted or card.recipe.data.frames
    if form.model not in (None, card.recipe.name):
        raise _no_model(str(form.model), card)
    if form.size is not None:
        _check_size(form.size, card)
    if form.seconds is not None and frames_of(form.seconds, card.recipe) != frames:
        expected = f"{video_seconds(card, frames)!r}"
        if "frames" in method_class(card.recipe).controls_type.model_fields and wanted is None:
            expected = f"{video_seconds(card, MIN_FRAMES)} to {video_seconds(card, MAX_FRAMES)}"
        message = f"seconds {form.seconds!r} is not supported; expected {expected}"
        raise Refused(400, "unsupported_seconds", message, "seconds")


def _check_size(text: str, card: BundleCard) -> None:
    recipe = card.recipe
    try:
        size = size_of(text)
        method_class(recipe).sized(recipe, size)
    except InputError as error:
        raise Refused(
            400, "unsupported_size", f"{error}; the model's own size is {video_size(card)!r}", "size"
        ) from None
    if math.prod(size) > math.prod(recipe.data.size):
        message = f"size {text!r} is not supported; expected at most as many pixels as {video_size(card)!r} has"
        raise Refused(400, "unsupported_size", message, "size")


def _found(store: JobStore, video_id: str, client: Client) -> Job:
    job = store.get(video_id, client.id)
    if job is None:
        raise _unknown(video_id)
    return job


def _unknown(video_id: str) -> Refused:
    return Refused(404, "video_not_found", f"there is no video {video_id[:64]!r} (or it expired)", "video_id")


def _no_model(name: str, card: BundleCard) -> Refused:
    message = f"model {name[:64]!r} is not served; expected {card.recipe.name!r}"
    return Refused(404, "model_not_found", message, "model")
