"""Works the jobs of a store off, one after the other, in a background thread of the process that holds the model."""

from __future__ import annotations

import logging
import secrets
import threading
import time

from cinemo.animate import AnimateRequest, animate, load_image
from cinemo.bundle import ModelBundle
from cinemo.media.saving import save_animation
from cinemo.serving.jobs import Job, JobStore
from cinemo.serving.media import image_name, video_name
from cinemo.types import InputError

log = logging.getLogger(__name__)

_SWEEP_SECONDS = 60.0


class _Stop(Exception):
    """The job is no longer wanted, or the runner is being closed."""


class JobRunner:
    """Claims job after job; what a runner that died left unfinished is claimed once its lease has run out.

    Args:
        poll_seconds: how long to wait where no job is queued.
    """

    def __init__(
        self,
        store: JobStore,
        bundle: ModelBundle,
        worker: str = "",
        max_batch: int = 4,
        max_joined: int = 8,
        poll_seconds: float = 0.2,
    ) -> None:
        self._store, self._bundle, self._poll_seconds = store, bundle, poll_seconds
        self._worker = worker or f"runner-{secrets.token_hex(4)}"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cinemo-jobs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def swap(self, bundle: ModelBundle) -> None:
        self._bundle = bundle

    def close(self, drain_seconds: float = 0) -> None:
        """Stop at the next sampling step; the running job goes back to the queue."""
        self._closing.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        swept = 0.0
        while not self._closing.is_set():
            if time.monotonic() - swept > _SWEEP_SECONDS:
                self._store.sweep()
                swept = time.monotonic()
            claimed = self._store.claim(self._worker, 1)
            if not claimed:
                self._closing.wait(self._poll_seconds)
            for job in claimed:
                self._work(job)

    def _work(self, job: Job) -> None:
        def progress(done: int, steps: int) -> None:
            if self._closing.is_set() or self._store.beat(self._worker, {job.id: (done, steps)}):
                raise _Stop

        try:
            asked = job.request
            if asked["model"] != self._bundle.recipe.name:
                self._store.fail(job, "model_not_found", f"model {asked['model']!r} is no longer served")
                return
            request = AnimateRequest(
                image=load_image(self._store.media.read(image_name(job.id))),
                prompt=asked["prompt"],
                negative_prompt=asked["negative_prompt"],
                motion_bucket=asked["motion_bucket"],
                steps=asked["num_inference_steps"],
                guidance_scale=asked["guidance_scale"],
                seed=asked["seed"],
                dct_init=asked["dct_init"],
                solver=asked["solver"],
                guidance_interval=tuple(asked["guidance_interval"]),
                reuse_features=asked["reuse_features"],
            )
            name = video_name(job.id, job.attempts)
            with self._store.media.writing(name) as path:
                save_animation(path, animate(self._bundle, request, progress))
            if not self._store.complete(job, name):
                self._store.media.remove_file(name)
        except _Stop:
            self._store.release(job)  # no effect on a job that was cancelled
        except InputError as error:
            self._store.fail(job, "invalid_request", str(error))
        except Exception:  # whatever it was, it is this job's: the replica goes on with the next one
            log.exception("%s: failed", job.id)
            self._store.fail(job, "internal_error", "the server failed to make this video; the fault was logged")
