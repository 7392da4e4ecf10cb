"""The routes of jobs that there are: their state, files and end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import anyio
from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from cinemo.media.variants import PREVIEWS
from cinemo.serving.http.access import Asking, Client
from cinemo.serving.http.content import file_answer, input_file, preview_file, video_file
from cinemo.serving.http.description import EVENT, FILE, answers
from cinemo.serving.http.events import EventStreams, is_over
from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.schema import CancelledVideo, DeletedVideo, Video, VideoList
from cinemo.serving.http.uploads import PARAM
from cinemo.serving.store.jobs import FINAL, Job, JobStore

POLL_HEADERS = {"openai-poll-after-ms": "500"}
_PREVIEWS_AT_ONCE = 2  # each decodes a video
VARIANTS = {"video": "video/mp4", **{name: media_type for name, (_, media_type, _) in PREVIEWS.items()}}
"""What can be downloaded of a completed job, with its media type."""

_Variant = Annotated[str, Query(json_schema_extra={"enum": list(VARIANTS)})]


def _file_answers(*media_types: str) -> dict[int | str, dict[str, Any]]:
    content = dict.fromkeys(media_types, FILE)
    return {
        200: {"description": "the file", "content": content},
        206: {"description": "one range of the file", "content": content},
        304: {"description": "the client's copy is up to date"},
    }


def add_jobs(api: FastAPI, store: JobStore) -> None:
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
        job = found(store, video_id, client)
        if job.status not in FINAL:
            response.headers.update(POLL_HEADERS)
        return Video.of(job)

    @api.post("/v1/videos/{video_id}/cancel", responses=answers(401, 404, 409, 507))
    def cancel(video_id: str, client: Asking) -> Video:
        """Cancel an unfinished job; one that finished first keeps its video (409)."""
        job = found(store, video_id, client)
        if not store.cancel(job.id, client.id):
            job = found(store, video_id, client)
            if job.status != "cancelled":
                raise Refused(409, f"video_{job.status}", f"the video is already {job.status}; nothing was cancelled")
        return Video.of(found(store, video_id, client))

    @api.delete("/v1/videos/{video_id}", responses=answers(401, 404, 507))
    def delete(video_id: str, client: Asking) -> DeletedVideo | CancelledVideo:
        """Cancel an unfinished job (it stays visible as cancelled), or remove a finished one with its video."""
        job = found(store, video_id, client)
        if job.status not in FINAL and store.cancel(job.id, client.id):
            return CancelledVideo.of(found(store, video_id, client))
        if not store.delete(job.id, client.id):
            raise unknown(video_id)
        return DeletedVideo(id=job.id)

    previews = anyio.CapacityLimiter(_PREVIEWS_AT_ONCE)

    @api.head("/v1/videos/{video_id}/content", include_in_schema=False)
    @api.get(
        "/v1/videos/{video_id}/content",
        response_class=Response,
        responses=answers(400, 401, 404, 409, 416) | _file_answers(*VARIANTS.values()),
    )
    async def content(request: Request, video_id: str, client: Asking, variant: _Variant = "video") -> Response:
        """The mp4 of a completed job, or a picture for it: the whole, or one range. ``thumbnail``: a WebP of the frame
        in the middle; ``spritesheet``: a JPEG of up to 16 frames, four in a row; ``gif``: the video as a GIF, at
        most 480 pixels on its longer side."""
        if variant not in VARIANTS:
            message = f"variant: got {variant[:32]!r}, expected {' or '.join(VARIANTS)}"
            raise Refused(400, "unsupported_variant", message, "variant")
        job = await run_in_threadpool(found, store, video_id, client)
        if job.status in ("queued", "in_progress"):
            raise Refused(409, "video_not_ready", f"the video is {job.status} ({job.progress} %); ask again later")
        if job.status != "completed":
            message = job.error_message or f"the job was {job.status}; there is no video"
            raise Refused(409, f"video_{job.status}", message)
        try:
            if variant == "video":
                file = video_file(job)
            else:
                file = await anyio.to_thread.run_sync(preview_file, store.media, job, variant, limiter=previews)
            return await run_in_threadpool(file_answer, store.media, file, request.headers, request.method == "GET")
        except FileNotFoundError:
            raise unknown(video_id) from None

    @api.head("/v1/videos/{video_id}/input", include_in_schema=False)
    @api.get(
        "/v1/videos/{video_id}/input",
        response_class=Response,
        responses=answers(401, 404, 416) | _file_answers("image/png"),
    )
    def picture(
        request: Request,
        video_id: str,
        client: Asking,
        name: Annotated[str, Query(max_length=64, description="the picture's field in the form")] = PARAM,
    ) -> Response:
        """A picture that a job came with, as PNG: every pixel as it was sent, upright, without metadata. Sent again
        with the job's settings, it makes the same video again."""
        job = found(store, video_id, client)
        own = "image" if name == PARAM else name
        if own not in job.files or name == "image":
            expected = " or ".join([PARAM, *job.request.get("inputs", ())])
            message = f"name: the video has no picture {name!r}, expected {expected}"
            raise Refused(404, "picture_not_found", message, "name")
        try:
            return file_answer(store.media, input_file(job, own), request.headers, request.method == "GET")
        except FileNotFoundError:
            raise unknown(video_id) from None


def add_events(api: FastAPI, store: JobStore, streams: EventStreams) -> None:
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
        job = await run_in_threadpool(found, store, video_id, client)
        if is_over(last_event_id) and job.status in FINAL:
            return Response(status_code=204)
        streams.check_room()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(streams.events(job), headers=headers, media_type="text/event-stream")


_EVENT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "events until the job is finished", "content": {"text/event-stream": {"schema": EVENT}}},
    204: {"description": "the client has already received the last event"},
}


def found(store: JobStore, video_id: str, client: Client) -> Job:
    job = store.get(video_id, client.id)
    if job is None:
        raise unknown(video_id)
    return job


def unknown(video_id: str) -> Refused:
    return Refused(404, "video_not_found", f"there is no video {video_id[:64]!r} (or it expired)", "video_id")
