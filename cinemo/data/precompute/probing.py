"""Pictures and lengths of clips, read from their files by the whole cluster, where the manifest does not tell them.

What was found is kept in ``<output>/.shapes/`` until the dataset is finished, so that a run which is stopped meanwhile
does not read those files again. A file that crashes or hangs its reader costs that process only.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.precompute import cluster, pools
from cinemo.data.precompute.plan import Plan
from cinemo.data.precompute.shapes import KEPT
from cinemo.media.extent import clip_extents
from cinemo.media.sources import Sources
from cinemo.progress import Work, doing
from cinemo.types import Clip, InputError, RunError

_PART_CLIPS = 1 << 14  # of which the results are kept together
_TASK_CLIPS = 16
Measured = tuple[float, float, float]  # width, height, frames
UNKNOWN: Measured = (math.nan, math.nan, math.nan)
_ATTEMPTS = 2  # at a clip that ended its process: something else may have


@dataclass(frozen=True)
class Probe:
    """A `cinemo.data.precompute.shapes.Measure` that keeps its results beside a dataset."""

    dataset: str
    recipe: Recipe

    def __call__(self, plan: Plan, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with doing("reading the sizes and lengths of videos", len(rows), "clips") as work:
            for start in range(0, len(rows), _PART_CLIPS):
                part = rows[start : start + _PART_CLIPS]
                name = hashlib.sha256(plan.clips.digest.encode() + part.astype("<i8").tobytes()).hexdigest()[:32]
                place = storage.join(self.dataset, KEPT, f"{name}.npy")
                if storage.exists(place):
                    extents = np.load(io.BytesIO(storage.read_bytes(place)))
                    work.advance(len(part))
                else:
                    extents = self._measured(plan, part, work)
                    content = io.BytesIO()
                    np.save(content, extents)
                    storage.write_bytes(place, content.getvalue())
                yield part, extents

    def _measured(self, plan: Plan, rows: np.ndarray, work: Work) -> np.ndarray:
        import ray

        cluster.connect()
        pools.wait_for_nodes(self.recipe)
        data = self.recipe.data
        resources = {data.decode_resource: data.decode_cpus} if data.decode_resource else None
        task: Any = ray.remote(num_cpus=data.decode_cpus, resources=resources, max_retries=0)(extents_of)

        # Of the process, whatever ended it; or of its node.
        lost = (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.NodeDiedError,
        )

        def answers(clips: list[Clip], attempts: int) -> list[Measured]:
            try:
                return list(ray.get(task.remote(clips, data.clip_timeout)))
            except lost:
                if len(clips) > 1:
                    return [answer for clip in clips for answer in answers([clip], _ATTEMPTS)]
                return answers(clips, attempts - 1) if attempts > 1 else [UNKNOWN]
            except ray.exceptions.RayError as error:
                raise cluster.cause(error) from error

        clips = _clips(plan, rows)
        groups = [clips[start : start + _TASK_CLIPS] for start in range(0, len(clips), _TASK_CLIPS)]
        with ThreadPoolExecutor(max(1, min(len(groups), 4 * int(ray.cluster_resources().get("CPU", 1))))) as waiting:
            found = work.counting(waiting.map(lambda group: answers(group, _ATTEMPTS), groups), len)
            return np.array(list(itertools.chain.from_iterable(found)), np.float64)


def measured_here(plan: Plan, rows: np.ndarray, seconds: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A `Measure` for a few clips, in a process beside this one."""
    extents, clips = list[Measured](), _clips(plan, rows)
    while len(extents) < len(clips):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as beside:
            try:
                for clip in clips[len(extents) :]:
                    extents += beside.submit(extents_of, [clip], seconds).result()
            except BrokenProcessPool:
                extents.append(UNKNOWN)
    yield rows, np.array(extents, np.float64)


def _clips(plan: Plan, rows: np.ndarray) -> list[Clip]:
    names = ("clip_id", "uri", "caption", "start", "end")
    return [Clip(**{name: row[name] for name in names}) for row in plan.clips.clips_at(rows).to_pylist()]


def extents_of(clips: list[Clip], seconds: float) -> list[Measured]:
    """(width, height, frames) of clips, nan for those that cannot be read; clips of one file that follow each other are
    read at once. A file that takes longer than ``seconds`` ends the process.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    found: list[Measured] = []
    with Sources() as sources:
        for uri, group in itertools.groupby(clips, key=lambda clip: clip.uri):
            same = list(group)
            try:
                with sources.file(uri) as path:
                    signal.setitimer(signal.ITIMER_REAL, seconds)
                    found += clip_extents(path, same)
            except (InputError, RunError):
                raise
            except Exception:  # `ClipError`, or whatever a library raises: decoding it will say more
                found += [UNKNOWN] * len(same)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    return found
