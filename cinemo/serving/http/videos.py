"""The routes of jobs that there are: their state, files and end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from cinemo.serving.http.access import Asking, Client
from cinemo.serving.http.content import video_answer
from cinemo.serving.http.description import EVENT, answers
from cinemo.serving.http.events import EventStreams, is_over
from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.schema import CancelledVideo, DeletedVideo, Video, VideoList
from cinemo.serving.store.jobs import FINAL, Job, JobStore

_POLL_MILLISECONDS = 500


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
            response.headers["openai-poll-after-ms"] = str(_POLL_MILLISECONDS)
        return Video.of(job)

    @api.post("/v1/videos/{video_id}/cancel", responses=answers(401, 404, 409))
    def cancel(video_id: str, client: Asking) -> Video:
        """Cancel an unfinished job; one that finished first keeps its video (409)."""
        job = found(store, video_id, client)
        if not store.cancel(job.id, client.id):
            job = found(store, video_id, client)
            if job.status != "cancelled":
                raise Refused(409, f"video_{job.status}", f"the video is already {job.status}; nothing was cancelled")
        return Video.of(found(store, video_id, client))

    @api.delete("/v1/videos/{video_id}", responses=answers(401, 404))
    def delete(video_id: str, client: Asking) -> DeletedVideo | CancelledVideo:
        """Cancel an unfinished job (it stays visible as cancelled), or remove a finished one with its video."""
        job = found(store, video_id, client)
        if job.status not in FINAL and store.cancel(job.id, client.id):
            return CancelledVideo.of(found(store, video_id, client))
        if not store.delete(job.id, client.id):
            raise unknown(video_id)
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
        job = found(store, video_id, client)
        if job.status in ("queued", "in_progress"):
            raise Refused(409, "video_not_ready", f"the video is {job.status} ({job.progress} %); ask again later")
        if job.status != "completed":
            message = job.error_message or f"the job was {job.status}; there is no video"
            raise Refused(409, f"video_{job.status}", message)
        try:
            return video_answer(store.media, job, request.headers, body=request.method == "GET")
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


def found(store: JobStore, video_id: str, client: Client) -> Job:
    job = store.get(video_id, client.id)
    if job is None:
        raise unknown(video_id)
    return job


def unknown(video_id: str) -> Refused:
    return Refused(404, "video_notfound", f"there is no video {video_id[:64]!r} (or it expired)", "video_id")
