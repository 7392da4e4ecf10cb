"""Runners over a real store: jobs end once, whoever is killed, closed, swapped or cut off meanwhile."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FRAMES, random_unet, tiny_bundle, tiny_recipe

from cinemo.bundle import ModelBundle, load_bundle, save_bundle
from cinemo.media.mp4 import read_metadata
from cinemo.media.video import probe
from cinemo.serving.engine.runner import JobRunner
from cinemo.serving.engine.sampling import Outcome, SamplingEngine
from cinemo.serving.store import database as database_room
from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import FINAL, Job, JobStore, QueueLimits
from cinemo.serving.store.media import MediaStore, video_name

ROOT = Path(__file__).resolve().parents[2]
MODEL = "random-32x48"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def bundle(directory: Path) -> ModelBundle:
    return load_bundle(tiny_bundle(directory), "cpu")


class WatchedStore(JobStore):
    """The store, which also keeps what it was told of progress."""

    told: list[dict[str, tuple[int, int]]]

    def beat(self, worker: str, progress: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        self.told.append(dict(progress))
        return super().beat(worker, progress)


def open_store(directory: Path, clock: Callable[[], float] | None = None, **limits: Any) -> WatchedStore:
    database = Database(f"sqlite:///{directory}/serving.sqlite", patience=0.5)
    limits = {"lease_seconds": 3.0} | limits
    store = WatchedStore(database, MediaStore(str(directory / "media")), QueueLimits(**limits), clock)
    store.told = []
    return store


@pytest.fixture
def store(tmp_path: Path) -> WatchedStore:
    return open_store(tmp_path)


@pytest.fixture
def runner(store: WatchedStore, bundle: ModelBundle) -> Iterator[JobRunner]:
    runner = JobRunner(store, bundle, poll_seconds=0.05)
    yield runner
    runner.close()


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def submit(store: JobStore, image: bytes | None = None, timeout: float | None = None, **controls: Any) -> Job:
    request = {
        "model": MODEL, "prompt": "waves", "negative_prompt": "", "motion_bucket": 7, "seed": 3,
        "num_inference_steps": 4, "guidance_scale": 2.0, "dct_init": True,
    }  # fmt: skip
    return store.submit(request | controls, picture() if image is None else image, timeout=timeout)


def until(store: JobStore, job: Job, good: Callable[[Job], bool], seconds: float = 60) -> Job:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        now = store.get(job.id)
        assert now is not None
        if good(now):
            return now
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s; the job is {now}")


def is_final(job: Job) -> bool:
    return job.status in FINAL


def is_running(job: Job) -> bool:
    return job.status == "in_progress" and job.step >= 1


def videos(store: JobStore, job: Job) -> list[str]:
    path = store.media.local_path(f"{job.id}/image")
    assert path is not None
    return sorted(each.name for each in path.parent.glob("video*"))


def metadata(store: JobStore, job: Job) -> dict[str, Any]:
    assert job.media_name is not None
    path = store.media.local_path(job.media_name)
    assert path is not None
    assert probe(path).frames == FRAMES
    return json.loads(read_metadata(path)["comment"])


def test_several_jobs_are_worked_off_and_tell_every_step(
    store: WatchedStore, runner: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, last = SamplingEngine.step, dict[str, tuple[int, int]]()

    def as_long_as_a_large_network(self: SamplingEngine) -> Outcome:
        """A step that begins when the one before was told: beats come at most twenty times a second."""
        end = time.monotonic() + 5
        while not any(last.items() <= told.items() for told in store.told) and time.monotonic() < end:
            time.sleep(0.01)
        outcome = step(self)
        last.clear()
        last.update({key.split("/")[0]: done for key, done in outcome.progress.items() if done[0] < done[1]})
        return outcome

    monkeypatch.setattr(SamplingEngine, "step", as_long_as_a_large_network)
    jobs = [submit(store, num_inference_steps=12, seed=k, solver="ddim" if k else "multistep") for k in range(3)]
    runner.start()
    for k, job in enumerate(jobs):
        done = until(store, job, is_final)
        assert (done.status, done.progress, done.attempts, done.worker) == ("completed", 100, 1, runner.worker)
        made = metadata(store, done)
        assert (made["seed"], made["steps"], made["solver"]) == (k, 12, "ddim" if k else "multistep")
        assert done.media_name == video_name(job.id, 1)
        told = [each[job.id] for each in store.told if job.id in each]
        assert told == sorted(told)
        assert set(told) >= {(number, 12) for number in range(1, 12)}
    assert runner.alive()
    lets_go(runner)


def lets_go(runner: JobRunner) -> None:
    """It holds no job any more, soon after the last one is seen to have ended."""
    deadline = time.monotonic() + 10
    while runner.held():
        assert time.monotonic() < deadline, runner.held()
        time.sleep(0.01)


def test_a_cancelled_and_a_late_job_are_dropped_within_a_step_or_two(store: WatchedStore, runner: JobRunner) -> None:
    cancelled = submit(store, num_inference_steps=900)
    late = submit(store, num_inference_steps=900, timeout=4.0)
    other = submit(store, num_inference_steps=40)
    runner.start()
    until(store, cancelled, is_running)
    assert store.cancel(cancelled.id)
    assert until(store, late, is_final).error_code == "deadline_exceeded"
    assert until(store, other, is_final).status == "completed"
    lets_go(runner)
    seen = len(store.told)
    time.sleep(0.5)
    assert not any(store.told[seen:])
    assert until(store, cancelled, is_final).status == "cancelled"
    assert videos(store, cancelled) == videos(store, late) == []


def test_bad_jobs_fail_with_a_reason_and_no_path(store: WatchedStore, runner: JobRunner, tmp_path: Path) -> None:
    expected = {
        submit(store, image=b"no picture").id: "invalid_request",
        submit(store, model="another").id: "model_not_found",
        submit(store, solver="multistep", num_inference_steps=1).id: "invalid_request",
        (gone := submit(store)).id: "internal_error",
    }
    store.media.remove(gone.id)
    good = submit(store)
    runner.start()
    assert until(store, good, is_final).status == "completed"
    for job_id, code in expected.items():
        job = until(store, store.many([job_id])[job_id], is_final)
        assert (job.status, job.error_code) == ("failed", code)
        assert str(tmp_path) not in (job.error_message or "")
    lets_go(runner)


def test_closing_finishes_what_there_is_time_for_and_releases_the_rest(
    store: WatchedStore, bundle: ModelBundle
) -> None:
    runner = JobRunner(store, bundle, max_batch=1, max_joined=1, poll_seconds=0.05)
    first, second = submit(store, num_inference_steps=10), submit(store)
    runner.start()
    until(store, first, is_running)
    runner.close(drain_seconds=60)
    assert not runner.alive()
    assert until(store, first, is_final).status == "completed"
    waiting = store.get(second.id)
    assert waiting is not None
    assert (waiting.status, waiting.attempts) == ("queued", 0)

    long = submit(store, num_inference_steps=900)
    runner = JobRunner(store, bundle, poll_seconds=0.05)
    runner.start()
    until(store, long, is_running)
    begun = time.monotonic()
    runner.close()
    assert time.monotonic() - begun < 10
    released = store.get(long.id)
    assert released is not None
    assert (released.status, released.attempts, released.worker) == ("queued", 0, None)


def test_a_new_bundle_takes_new_jobs_while_running_ones_end_on_the_old(
    store: WatchedStore, runner: JobRunner, bundle: ModelBundle, directory: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(directory / "encoders")
    unet = random_unet(recipe)
    with torch.no_grad():
        unet.conv_out.bias.add_(0.1)  # type: ignore[union-attr]
    save_bundle(tmp_path / "newer", recipe, {"unet": unet}, {"made": "by a test"})
    newer = load_bundle(tmp_path / "newer", "cpu")
    assert newer.digest != bundle.digest
    old = submit(store, num_inference_steps=30)
    runner.start()
    until(store, old, is_running)
    runner.swap(newer)
    new = submit(store)
    assert metadata(store, until(store, new, is_final))["bundle"] == newer.digest
    assert not is_final(until(store, old, lambda job: True))
    assert metadata(store, until(store, old, is_final))["bundle"] == bundle.digest


def test_a_job_that_another_worker_took_is_dropped(store: WatchedStore, runner: JobRunner, tmp_path: Path) -> None:
    job = submit(store, num_inference_steps=900)
    runner.start()
    until(store, job, is_running)
    (taken,) = open_store(tmp_path, clock=lambda: time.time() + 100).claim("thief", 1)
    assert (taken.id, taken.attempts) == (job.id, 2)
    end = time.monotonic() + 20
    while runner.held() and time.monotonic() < end:
        time.sleep(0.02)
    lets_go(runner)
    assert store.complete(taken, video_name(job.id, 2))
    assert store.statistics().finished["completed"] == 1


def test_a_store_that_is_away_stops_nothing(
    store: WatchedStore, runner: JobRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_room, "_SQLITE_BUSY_SECONDS", 0.1)
    store = open_store(tmp_path, lease_seconds=60.0)
    runner._store = store
    job = submit(store, num_inference_steps=20)
    runner.start()
    until(store, job, is_running)
    blocking = sqlite3.connect(tmp_path / "serving.sqlite", isolation_level=None)
    blocking.execute("BEGIN IMMEDIATE")  # nobody else writes now
    end = time.monotonic() + 30
    path = store.media.local_path(video_name(job.id, 1))
    assert path is not None
    while not path.exists():
        assert time.monotonic() < end, "the video is made although nothing can be told"
        time.sleep(0.05)
    assert runner.alive()
    blocking.execute("ROLLBACK")
    blocking.close()
    done = until(store, job, is_final)
    assert (done.status, done.attempts) == ("completed", 1)
    assert until(store, submit(store), is_final).status == "completed"


def test_a_lost_device_leaves_its_jobs_to_others(
    store: WatchedStore, runner: JobRunner, bundle: ModelBundle, directory: Path
) -> None:
    def lose(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    broken = load_bundle(directory / "bundle", "cpu")
    broken.method.unet.register_forward_hook(lose)
    dying = JobRunner(store, broken, poll_seconds=0.05)
    job = submit(store)
    dying.start()
    end = time.monotonic() + 30
    while dying.alive() and time.monotonic() < end:
        time.sleep(0.02)
    assert not dying.alive()
    dying.close(drain_seconds=5)
    runner.start()
    done = until(store, job, is_final)
    assert (done.status, done.attempts) == ("completed", 2), "the attempt that broke the device counts"


PROCESS = """
import sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/serving"]
from cinemo.bundle import load_bundle
from cinemo.serving.engine.runner import JobRunner
from test_runner import open_store
runner = JobRunner(open_store(Path(sys.argv[1])), load_bundle(sys.argv[2], "cpu"), worker="doomed")
runner.start()
runner._keeper.join()
"""


@pytest.mark.slow
def test_jobs_of_a_killed_process_are_finished_once_by_another(
    store: WatchedStore, runner: JobRunner, directory: Path, tmp_path: Path
) -> None:
    jobs = [submit(store, num_inference_steps=60, seed=k) for k in range(2)]
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", PROCESS, str(tmp_path), str(directory / "bundle")]
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment)
    try:
        for job in jobs:
            assert until(store, job, is_running).worker == "doomed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    runner.start()
    for job in jobs:
        done = until(store, job, is_final)
        assert (done.status, done.attempts, done.worker) == ("completed", 2, runner.worker)
        assert videos(store, job) == ["video-2.mp4"]
    assert store.statistics().finished["completed"] == 2
