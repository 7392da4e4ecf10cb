"""Works the jobs of a store off, one after the other, in a background thread of the process that holds the model."""

from __future__ import annotations

import logging
import threading
import time

from cinemo.animate import AnimateRequest, animate, load_image
from cinemo.bundle import ModelBundle
from cinemo.media.saving import save_animation
from cinemo.serving.jobs import Job, JobStore
from cinemo.types import InputError

log = logging.getLogger(__name__)

_SWEEP_SECONDS = 60.0


class _Stop(Exception):
    """The job is no longer wanted, or the runner is being closed."""


class JobRunner:
    """The only runner of a store: it queues again what an earlier one left unfinished, then claims job after job.

    Args:
        poll_seconds: how long to wait where no job is queued.
    """

    def __init__(self, store: JobStore, bundle: ModelBundle, poll_seconds: float = 0.2) -> None:
        self._store, self._bundle, self._poll_seconds = store, bundle, poll_seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cinemo-jobs", daemon=True)

    def start(self) -> None:
        queued, failed = self._store.recover()
        if queued or failed:
            log.warning("jobs left by an earlier runner: %d queued again, %d failed", queued, failed)
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop at the next sampling step; the running job goes back to the queue."""
        self._closing.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        swept = 0.0
        while not self._closing.is_set():
            if time.monotonic() - swept > _SWEEP_SECONDS:
                self._store.sweep()
                swept = time.monotonic()
            job = self._store.claim()
            if job is None:
                self._closing.wait(self._poll_seconds)
            else:
                self._work(job)

    def _work(self, job: Job) -> None:
        def progress(done: int, steps: int) -> None:
            # 100 is for completed jobs: decoding and writing come after the last step.
            if self._closing.is_set() or not self._store.report_progress(job.id, min(99, 100 * done // steps)):
                raise _Stop

        try:
            asked = job.request
            if asked["model"] != self._bundle.recipe.name:
                self._store.fail(job.id, "model_not_found", f"model {asked['model']!r} is no longer served")
                return
            request = AnimateRequest(
                image=load_image(self._store.image_path(job.id).read_bytes()),
                prompt=asked["prompt"],
                negative_prompt=asked["negative_prompt"],
                motion_bucket=asked["motion_bucket"],
                steps=asked["num_inference_steps"],
                guidance_scale=asked["guidance_scale"],
                seed=asked["seed"],
                dct_init=asked["dct_init"],
            )
            save_animation(self._store.video_path(job.id), animate(self._bundle, request, progress))
            self._store.complete(job.id)
        except _Stop:
            self._store.release(job.id)  # no effect on a job that was cancelled
        except InputError as error:
            self._store.fail(job.id, "invalid_request", str(error))
        except Exception:  # whatever it was, it is this job's: the replica goes on with the next one
            log.exception("%s: failed", job.id)
            self._store.fail(job.id, "internal_error", "the server failed to make this video; the fault was logged")
