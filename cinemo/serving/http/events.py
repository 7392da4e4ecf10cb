"""Progress as server-sent events: any number of streams, one query of the store for all of them at a time.

Every replica can answer for every job, so progress is read from the store and not from the runner. A stream says the
state it finds, then every change, and ends with an event that is named after the final status. What comes faster than
the store is asked is told as its latest state; a client that comes back is told the present one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.schema import DeletedVideo, Video
from cinemo.serving.store.jobs import FINAL, Job, JobStore
from cinemo.serving.store.previews import Preview

log = logging.getLogger(__name__)

_RETRY_MILLISECONDS = 2000
_PAUSE_AFTER_FAULT = 2.0
_LOOK_SECONDS = 1.0  # whether a client that waits for its video is still there


@dataclass(eq=False)
class _Stream:
    job: Job | None  # the latest state; None: deleted
    job_id: str
    preview: Preview | None = None  # the latest one that was not sent yet
    preview_step: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def show(self, preview: Preview | None) -> None:
        if preview is not None and preview.step != self.preview_step:
            self.preview, self.preview_step = preview, preview.step
            self.changed.set()

    def tell(self, job: Job | None) -> None:
        if _state(job) != _state(self.job):
            self.job = job
            self.changed.set()


class EventStreams:
    """The event streams of one process and event loop.

    Args:
        interval: seconds between two queries, made while any stream is open.
        keep_alive: seconds of silence after which a comment is sent, for the proxies in between.
        limit: streams at once; more are refused with 429.
    """

    def __init__(self, store: JobStore, interval: float = 0.15, keep_alive: float = 15.0, limit: int = 1000) -> None:
        self._store, self._interval, self._keep_alive, self._limit = store, interval, keep_alive, limit
        self._streams: set[_Stream] = set()
        self._poller: asyncio.Task[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._streams)

    def check_room(self) -> None:
        """Raises `Refused` (429) where no further stream can be opened."""
        if len(self._streams) >= self._limit:
            message = f"{self._limit} event streams are open; poll the video instead, or try again later"
            raise Refused(429, "too_many_streams", message, headers={"Retry-After": "10"})

    def close(self) -> None:
        """End all streams, also those to come, with their latest state; clients reconnect to another replica."""
        self._closed = True
        for stream in self._streams:
            stream.changed.set()

    async def events(self, job: Job) -> AsyncIterator[str]:
        """The events of a job from its state ``job`` to its final one, as text/event-stream."""
        yield f"retry: {_RETRY_MILLISECONDS}\n\n"
        stream = self._open(job)
        try:
            said: tuple[object, ...] | None = None
            while True:
                stream.changed.clear()
                latest, preview, stream.preview = stream.job, stream.preview, None
                if preview is not None:
                    yield _preview_event(preview, job.id)
                if latest is None or _state(latest) != said:
                    yield _event(latest, job.id)
                said = _state(latest)
                if latest is None or latest.status in FINAL:
                    return
                while not self._closed and not await self._change(stream):
                    yield ": still here\n\n"
                if self._closed:
                    return
        finally:
            self._streams.discard(stream)

    async def finished(self, job: Job, seconds: float, is_gone: Callable[[], Awaitable[bool]]) -> Job | None:
        """The job in its final state (None: deleted), or as it is after ``seconds``, at `close`, or where the client
        ``is_gone``."""
        stream, end = self._open(job), asyncio.get_running_loop().time() + seconds
        try:
            while stream.job is not None and stream.job.status not in FINAL and not self._closed:
                left = end - asyncio.get_running_loop().time()
                if left <= 0 or await is_gone():
                    break
                stream.changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, _LOOK_SECONDS)):
                        await stream.changed.wait()
            return stream.job
        finally:
            self._streams.discard(stream)

    def _open(self, job: Job) -> _Stream:
        stream = _Stream(job, job.id)
        self._streams.add(stream)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        return stream

    async def _change(self, stream: _Stream) -> bool:
        """Whether the job changed before it was time for a sign of life."""
        try:
            async with asyncio.timeout(self._keep_alive):
                await stream.changed.wait()
        except TimeoutError:
            return False
        return True

    async def _poll(self) -> None:
        while self._streams:
            await asyncio.sleep(self._interval)
            asked = list(self._streams)
            try:
                found = await run_in_threadpool(self._store.many, {stream.job_id for stream in asked})
                previews = await run_in_threadpool(self._store.previews, found.values())
            except Exception:  # the store may come back; the streams stay and are told then
                log.exception("the state of the jobs with open event streams cannot be read")
                await asyncio.sleep(_PAUSE_AFTER_FAULT)
                continue
            for stream in asked:
                stream.show(previews.get(stream.job_id))
                stream.tell(found.get(stream.job_id))


def is_over(last_event_id: str | None) -> bool:
    """Whether a client that comes back with this ``Last-Event-ID`` has had the last event."""
    return last_event_id in (*FINAL, "deleted")


def _state(job: Job | None) -> tuple[object, ...] | None:
    return None if job is None else (job.status, job.attempts, job.step, job.steps, job.progress)


def _preview_event(preview: Preview, job_id: str) -> str:
    """Without an id: who comes back is told the present state all the same."""
    data = {"id": job_id, "object": "video.preview", "step": preview.step, "frames": preview.frames}
    return f"event: preview\ndata: {json.dumps(data)}\n\n"


def _event(job: Job | None, job_id: str) -> str:
    if job is None:
        name, number, data = "deleted", "deleted", DeletedVideo(id=job_id).model_dump_json()
    else:
        final = job.status in FINAL
        name, number = (job.status, job.status) if final else ("progress", str(job.step))
        data = json.dumps(Video.of(job).model_dump(mode="json"))
    return f"id: {number}\nevent: {name}\ndata: {data}\n\n"
