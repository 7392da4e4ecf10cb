"""The routes that make jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from cinemo.bundle import BundleCard
from cinemo.serving.http.access import Asking
from cinemo.serving.http.content import file_answer, video_file
from cinemo.serving.http.description import FILE, answers
from cinemo.serving.http.events import EventStreams
from cinemo.serving.http.form import VideoRequest, parse, read_body
from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.schema import Video
from cinemo.serving.http.submission import Submission
from cinemo.serving.http.videos import POLL_HEADERS, found, unknown
from cinemo.serving.store.jobs import Job, JobStore

_REFUSALS = answers(400, 401, 404, 408, 413, 415, 422, 429, 507)
_FAILURES = {"invalid_request": 422, "deadline_exceeded": 504}

Again = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="sending the same request again with the same key returns the same job",
    ),
]


def add_creation(
    api: FastAPI,
    store: JobStore,
    card: Callable[[], BundleCard],
    submission: Submission,
    streams: EventStreams,
    sync_seconds: float,
) -> None:
    async def body(request: Request) -> AsyncIterator[dict[str, Any]]:
        """The request's fields; its files are closed after the answer."""
        try:
            yield await read_body(request)
        finally:
            await request.close()

    async def now(fields: Mapping[str, Any] = Depends(body)) -> tuple[BundleCard, VideoRequest]:
        """The model that is served now, and what was asked of it."""
        model = card()
        return model, parse(fields, model)

    async def known(video_id: str, client: Asking) -> Job:
        return await run_in_threadpool(found, store, video_id, client)

    @api.post("/v1/videos", status_code=202, responses=_REFUSALS)
    async def create(
        client: Asking,
        response: Response,
        asked: tuple[BundleCard, VideoRequest] = Depends(now),
        idempotency_key: Again = None,
    ) -> Video:
        """Queue the animation of a picture."""
        model, wanted = asked
        job = await submission.submit(wanted, model, client, idempotency_key)
        response.headers["Location"] = _place(job)
        return Video.of(job)

    @api.post("/v1/videos/{video_id}/remix", status_code=202, responses=_REFUSALS | answers(409))
    async def remix(
        client: Asking,
        response: Response,
        source: Job = Depends(known),  # noqa: B008
        fields: Mapping[str, Any] = Depends(body),
        idempotency_key: Again = None,
    ) -> Video:
        """Queue a video of the same picture with another prompt. Settings that are not given are those of the source,
        its seed included."""
        model = card()
        job = await submission.submit(parse(fields, model, source.request), model, client, idempotency_key, source)
        response.headers["Location"] = _place(job)
        return Video.of(job)

    @api.post("/v1/videos/sync", response_class=Response, responses=_REFUSALS | answers(409, 504) | _SYNC_ANSWERS)
    async def create_and_wait(
        request: Request,
        client: Asking,
        asked: tuple[BundleCard, VideoRequest] = Depends(now),
        idempotency_key: Again = None,
    ) -> Response:
        """Queue the animation of a picture, and answer with its video. Where that takes longer than this server waits,
        the answer is the job (202), which goes on; so it does where the client leaves."""
        model, wanted = asked
        streams.check_room()
        job = await submission.submit(wanted, model, client, idempotency_key)
        own = {"X-Video-Id": job.id, "Location": _place(job)}
        latest = await streams.finished(job, sync_seconds, request.is_disconnected)
        if latest is None:
            raise unknown(job.id)
        if latest.status == "completed":
            try:
                answer = await run_in_threadpool(file_answer, store.media, video_file(latest), Headers())
            except FileNotFoundError:
                raise unknown(job.id) from None
            answer.headers.update(own)
            return answer
        if latest.status == "cancelled":
            raise Refused(409, "video_cancelled", "the job was cancelled; there is no video", headers=own)
        if latest.status == "failed":
            code, message = latest.error_code or "internal_error", latest.error_message or "the job failed"
            raise Refused(_FAILURES.get(code, 500), code, message, headers=own)
        return JSONResponse(Video.of(latest).model_dump(mode="json"), 202, own | POLL_HEADERS)


def _place(job: Job) -> str:
    return f"/v1/videos/{job.id}"


_VIDEO_ID = {"X-Video-Id": {"description": "of the job", "schema": {"type": "string"}}}
_SYNC_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the mp4", "content": {"video/mp4": FILE}, "headers": _VIDEO_ID},
    202: {
        "description": "not finished yet: the job, to be followed at its Location",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Video"}}},
        "headers": _VIDEO_ID,
    },
}
