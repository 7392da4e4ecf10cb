"""Works the jobs of a store off, several at once, in background threads of the process that holds the model.

Three kinds of threads, so that the device never waits for a database or a disk: one denoises, one keeps the store
informed (leases, progress, claims), and a few read pictures and write videos. A job is *held* from its claim until the
store knows its end; as many are held as `JobRunner` is told to, so a store that does not answer stops the intake and
nothing else: what is held goes on, and its end is told when the store is back.
"""

from __future__ import annotations

import base64
import io
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from cinemo import monitoring
from cinemo.animate import AnimateRequest, load_image
from cinemo.bundle import ModelBundle
from cinemo.media.saving import save_animation
from cinemo.methods import Controls, controls_of
from cinemo.methods.controls import size_of
from cinemo.serving.engine.pace import Cost
from cinemo.serving.engine.sampling import Outcome, SamplingEngine, fault_of
from cinemo.serving.store.estimates import Pace
from cinemo.serving.store.jobs import Job, JobStore
from cinemo.serving.store.media import video_name
from cinemo.serving.store.previews import Preview
from cinemo.serving.store.results import weights_digest
from cinemo.types import Animation, InputError, RunError

log = logging.getLogger(__name__)
T = TypeVar("T")
Pictures = Mapping[str, np.ndarray]  # of a job, by name, decoded

_SWEEP_SECONDS = 60.0
_BEAT_SECONDS = 0.05  # at least between two beats, however short the steps
_QUIET_SECONDS = 1.0  # at most, so that a cancelled job is dropped within a long step
_LONGEST_PAUSE = 2.0  # between two tries where the store does not answer
_TELL_SECONDS, _TELL_IDLE_SECONDS = 0.5, 10.0  # at least between two words about the pace
_NEAR = 0.2  # of what is left: by less than that an estimate is not changed
_MEDIA_SECONDS = 300.0  # for which a picture is read or a video written again after a fault of the storage
_MEDIA_THREADS = 3


@dataclass(eq=False)
class _Held:
    """A job of ours in one of its attempts. ``gone``: it is ours no more, there is no use in going on."""

    job: Job
    step: int = 0
    steps: int = 0
    is_sampled: bool = False
    ends_at: float | None = None  # an estimate, by the monotonic clock
    sampled_at: float | None = None
    gone: threading.Event = field(default_factory=threading.Event)

    @property
    def key(self) -> str:
        return f"{self.job.id}/{self.job.attempts}"


class JobRunner:
    """Claims jobs as places become free and works them off; any number of runners may share a store.

    Args:
        worker: a name that no other runner has; drawn where None.
        max_batch: jobs in one call of the network.
        max_joined: jobs that take turns in those calls; None: twice ``max_batch``. As many again may be held whose
            videos are being written.
        poll_seconds: how long to wait where no job is queued.
    """

    def __init__(
        self,
        store: JobStore,
        bundle: ModelBundle,
        worker: str | None = None,
        max_batch: int = 4,
        max_joined: int | None = None,
        poll_seconds: float = 0.05,
    ) -> None:
        self._store, self._max_batch, self._poll_seconds = store, max_batch, poll_seconds
        self._max_joined = max_joined or 2 * max_batch
        self.worker = worker or f"runner-{secrets.token_hex(4)}"
        self._engines = [self._engine(bundle)]  # the last takes new jobs, the others end theirs
        self._tail: float | None = None  # seconds from a video's last step until it is stored
        self._told_at = -float("inf")
        self._held: dict[str, _Held] = {}
        self._ready: deque[tuple[_Held, Pictures]] = deque()
        self._leaving: deque[str] = deque()
        self._changed = threading.Condition()  # guards the four above; notified where the device has something to do
        self._news, self._closing, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._is_over = threading.Event()
        self._claim_at = 0.0
        self._media = ThreadPoolExecutor(_MEDIA_THREADS, "cinemo-media")
        self._device = threading.Thread(target=self._denoise, name="cinemo-denoise", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name="cinemo-store", daemon=True)

    def start(self) -> None:
        self._device.start()
        self._keeper.start()

    def alive(self) -> bool:
        """Whether jobs are being worked off. False after `close`, and where the device was lost: then this process
        is of no more use, and others claim its jobs when their leases have run out."""
        return self._device.is_alive() and self._keeper.is_alive() and not self._closing.is_set()

    def held(self) -> int:
        """Jobs claimed and not yet ended."""
        with self._changed:
            return len(self._held)

    def wake(self) -> None:
        """Look for jobs now: one was just submitted."""
        self._claim_at = 0.0
        self._news.set()

    def swap(self, bundle: ModelBundle) -> None:
        """Jobs that have not begun go to ``bundle``, running ones finish on the one they began with."""
        fresh = self._engine(bundle)
        with self._changed:
            self._engines.append(fresh)

    def close(self, drain_seconds: float = 0.0) -> None:
        """Claim no more, finish what is held while there is time, then stop at the next step and release the rest."""
        self._closing.set()
        self._news.set()
        end = time.monotonic() + drain_seconds
        with self._changed:
            while self._held and self._device.is_alive() and (left := end - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.5))
        is_lost = self._device.ident is not None and not self._device.is_alive()
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        if self._device.ident is not None:
            self._device.join(timeout=60)
        self._media.shutdown(wait=True, cancel_futures=True)
        self._is_over.set()
        self._news.set()
        if self._keeper.ident is not None:
            self._keeper.join(timeout=60)
        # Where the device was lost the attempt counts, or a job that breaks it would be tried for ever.
        for held in [] if is_lost else self._held.values():
            try:
                self._store.release(held.job)
            except Exception as error:
                log.warning(
                    "%s: not released (%s); it will be claimed again when its lease runs out", held.job.id, error
                )

    def _engine(self, bundle: ModelBundle) -> SamplingEngine:
        try:
            last = self._store.last_pace(bundle.digest)
        except RunError:  # it will be measured anew
            last = None
        before = None if last is None else Cost(last.per_step, last.per_row, last.rows)
        return SamplingEngine(bundle, self._max_batch, before=before)

    # The device's thread.

    def _denoise(self) -> None:
        try:
            while not self._stopped.is_set():
                with self._changed:
                    while len(self._engines) > 1 and not len(self._engines[0]):
                        del self._engines[0]
                    engines = list(self._engines)
                    ready, leaving = list(self._ready), list(self._leaving)
                    self._ready.clear()
                    self._leaving.clear()
                    if not ready and not leaving and not any(map(len, engines)):
                        self._changed.wait(0.5)
                        continue
                for held, pictures in ready:
                    self._join(engines[-1], held, pictures)
                for engine in engines:
                    for key in leaving:
                        engine.leave(key)
                    if len(engine):
                        self._report(engine.step(), engine.seconds_left(self._tail or 0.0))
        except Exception:
            log.exception("the device was lost; the jobs of this runner are left to others")
        finally:
            self._news.set()

    def _join(self, engine: SamplingEngine, held: _Held, pictures: Pictures) -> None:
        if held.gone.is_set():
            return
        model = engine.bundle.recipe.name
        if held.job.request.get("model", model) != model:
            self._end_with(held, ("model_not_found", f"model {held.job.request['model']!r} is no longer served"))
            return
        try:
            request = animate_request(held.job.request, pictures, engine.bundle.method.controls_type)
            held.steps = engine.join(held.key, request, bool(held.job.request.get("previews")))
        except Exception as error:
            self._end_with(held, fault_of(error))
        self._news.set()

    def _report(self, outcome: Outcome, seconds_left: Mapping[str, float]) -> None:
        now = time.monotonic()
        for seconds, videos in outcome.calls:
            monitoring.record(monitoring.DENOISING, seconds)
            monitoring.record(monitoring.VIDEO_STEPS, videos)
        with self._changed:
            for key, (done, steps) in outcome.progress.items():
                if held := self._held.get(key):
                    held.step, held.steps = done, steps
                    held.sampled_at = now if done == steps else None
            for key, seconds in seconds_left.items():
                if held := self._held.get(key):
                    held.ends_at = promised(held.ends_at, now, seconds)
            finished = [(held, each) for key, each in outcome.finished.items() if (held := self._held.get(key))]
            shown = [(held, each) for key, each in outcome.previews.items() if (held := self._held.get(key))]
            failed = [(held, each) for key, each in outcome.failed.items() if (held := self._held.get(key))]
        for held, (step, frames) in shown:
            self._submit(self._show, held, step, frames)
        for held, animation in finished:
            held.is_sampled = True
            self._submit(self._write, held, animation)
        for held, fault in failed:
            self._end_with(held, fault)
        self._news.set()

    # The store's thread.

    def _keep(self) -> None:
        beat_at, swept_at, pause = 0.0, -_SWEEP_SECONDS, _BEAT_SECONDS
        while not self._is_over.is_set():
            is_news = self._news.wait(self._poll_seconds)
            self._news.clear()
            try:
                if is_news or time.monotonic() - beat_at >= _QUIET_SECONDS:
                    self._beat()
                    self._tell()
                    beat_at = time.monotonic()
                if time.monotonic() >= self._claim_at:
                    self._claim_at = time.monotonic() + self._poll_seconds
                    self._claim()
                if time.monotonic() - swept_at > _SWEEP_SECONDS and not self._closing.is_set():
                    swept_at = time.monotonic()
                    self._media.submit(self._sweep)
                pause = _BEAT_SECONDS
            except Exception as error:
                pause = min(2 * pause, _LONGEST_PAUSE)
                self._news.set()  # what was to be said is still to be said
                log.warning("the store does not answer (%s); jobs already held continue", error)
            self._is_over.wait(pause)

    def _beat(self) -> None:
        """Tell how far all are; drop those that are no longer ours. A lost device tells nothing: its leases run out."""
        with self._changed:
            all_held = list(self._held.values())
        if not all_held or (self._device.ident is not None and not self._device.is_alive()):
            return
        gone = self._store.beat(self.worker, {held.job.id: (held.step, held.steps) for held in all_held})
        for held in all_held:
            if held.job.id in gone and self._forget(held):
                log.info("%s: dropped (%s)", held.job.id, gone[held.job.id])

    def _tell(self) -> None:
        """Tell the store what steps take and when jobs will end, for those who wait."""
        now = time.monotonic()
        with self._changed:
            engine, all_held = self._engines[-1], list(self._held.values())
        cost = engine.cost()
        if cost is None or now - self._told_at < (_TELL_SECONDS if all_held else _TELL_IDLE_SECONDS):
            return
        steps = (cost.per_step, cost.per_row, cost.rows)
        pace = Pace(engine.bundle.digest, *steps, self._max_batch, self._max_joined, self._tail or 0.0)
        left = {held.job.id: held.ends_at - now for held in all_held if held.ends_at is not None}
        self._told_at = now
        try:
            self._store.tell_pace(self.worker, pace, left)
        except Exception as error:  # nothing depends on it
            log.warning("the pace was not stored (%s); trying again", error)

    def _claim(self) -> None:
        with self._changed:
            sampling = sum(not held.is_sampled for held in self._held.values())
            room = min(self._max_joined - sampling, 2 * self._max_joined - len(self._held))
        if room < 1 or self._closing.is_set() or not self._device.is_alive():
            return
        for job in self._store.claim(self.worker, room):
            with self._changed:
                # One that we hold already was lost to us meanwhile: this is its next attempt.
                earlier = [held for held in self._held.values() if held.job.id == job.id]
            for held in earlier:
                self._forget(held)
            held = _Held(job, steps=job.steps)
            with self._changed:
                self._held[held.key] = held
            self._submit(self._load, held)

    def _sweep(self) -> None:
        try:
            self._store.sweep()
        except Exception as error:
            log.warning("expired jobs were not removed (%s); trying again later", error)

    # The media threads.

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            self._media.submit(work, *arguments)
        except RuntimeError:  # closed meanwhile: the job is released
            log.debug("closing")

    def _load(self, held: _Held) -> None:
        """Read a job's pictures and hand it to the device."""
        try:
            files = {
                name: self._patiently(held, partial(self._store.media.read, place), _MEDIA_SECONDS)
                for name, place in held.job.files.items()
            }
        except _Gone:
            return
        except Exception as error:
            self._fail(held, _internal(held, error))
            return
        try:
            pictures = {name: load_image(content) for name, content in files.items()}
        except Exception as error:
            self._fail(
                held, ("invalid_request", str(error)) if isinstance(error, InputError) else _internal(held, error)
            )
            return
        with self._changed:
            self._ready.append((held, pictures))
            self._changed.notify_all()

    def _show(self, held: _Held, step: int, frames_FHWC: np.ndarray) -> None:
        try:
            self._store.show(held.job, Preview(step, tuple(map(small_picture, frames_FHWC))))
        except Exception as error:  # a later one may come through, and nobody needs it
            log.warning("%s: a preview was not stored (%s)", held.job.id, error)

    def _write(self, held: _Held, animation: Animation) -> None:
        name = video_name(held.job.id, held.job.attempts)

        def write() -> None:
            with self._store.media.writing(name) as path:
                save_animation(path, animation)

        try:
            self._patiently(held, write, _MEDIA_SECONDS)
        except _Gone:
            return
        except Exception as error:
            self._fail(held, _internal(held, error))
            return
        try:
            made = weights_digest(animation.settings["bundle"], animation.settings.get("lora_sha256"))
            if not self._patiently(held, lambda: self._store.complete(held.job, name, made)):
                self._store.media.remove_file(name)  # another attempt's video counts
            elif held.sampled_at is not None:
                took = time.monotonic() - held.sampled_at
                self._tail = took if self._tail is None else 0.8 * self._tail + 0.2 * took
        except _Gone:
            return  # the video is removed by a sweep
        except Exception:
            log.exception("%s: its end was not stored; it will be made again when its lease runs out", held.job.id)
        self._forget(held)

    def _end_with(self, held: _Held, fault: tuple[str, str]) -> None:
        held.is_sampled = True
        self._submit(self._fail, held, fault)

    def _fail(self, held: _Held, fault: tuple[str, str]) -> None:
        try:
            self._patiently(held, lambda: self._store.fail(held.job, *fault))
        except _Gone:
            return
        except Exception:
            log.exception("%s: its failure was not stored", held.job.id)
        self._forget(held)

    def _patiently(self, held: _Held, work: Callable[[], T], seconds: float = float("inf")) -> T:
        """What ``work`` returns, tried again after faults of the storage or the database, while the job is ours."""
        begun, pause = time.monotonic(), 0.1
        while not held.gone.is_set() and not self._stopped.is_set():
            try:
                return work()
            except FileNotFoundError:
                raise
            except (RunError, OSError) as error:
                if time.monotonic() - begun > seconds:
                    raise
                log.warning("%s: %s; trying again", held.job.id, error)
            held.gone.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise _Gone

    def _forget(self, held: _Held) -> bool:
        """Hold a job no longer, whatever became of it; False where it was not held."""
        held.gone.set()
        with self._changed:
            was_held = self._held.pop(held.key, None) is not None
            self._leaving.append(held.key)
            self._changed.notify_all()
        self.wake()
        return was_held


def small_picture(pixels_HWC: np.ndarray) -> str:
    """A data URL."""
    content = io.BytesIO()
    Image.fromarray(pixels_HWC).save(content, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def promised(before: float | None, now: float, seconds: float) -> float:
    """When a job will end that needs so many seconds: as said ``before`` where that is near, so that what is left
    falls as time goes by and does not rise with every slow step."""
    if before is not None and abs(before - now - seconds) <= _NEAR * seconds:
        return before
    return now + seconds


class _Gone(Exception):
    """The job is not ours any more."""


def animate_request(asked: Mapping[str, Any], pictures: Pictures, controls: type[Controls]) -> AnimateRequest:
    """A job's controls, as the HTTP interface accepted them, and its pictures. Raises `InputError`."""
    given = {name: asked.get(info.alias) for name, info in controls_of(controls).items()}
    others = {name: picture for name, picture in pictures.items() if name != "image"}
    size = size_of(asked["size"]) if "size" in asked else None
    return AnimateRequest(pictures["image"], asked["prompt"], size=size, inputs=others, lora=asked.get("lora"), **given)


def _internal(held: _Held, error: Exception) -> tuple[str, str]:
    log.error("%s: failed", held.job.id, exc_info=error)
    return "internal_error", "the server failed to make this video; the error was logged"
