"""The same measurements by workers of a Ray cluster: each fills in parts that whoever evaluates then reads."""

from __future__ import annotations

import os
from typing import Any

import ray
import torch

from cinemo import storage
from cinemo.data.precompute.cluster import connect
from cinemo.evaluation.measuring import Measurer, Plan, Say
from cinemo.evaluation.scenes import open_scenes
from cinemo.progress import counted


class _Worker:
    """Holds one bundle and measures scenes and pictures with it, by their numbers."""

    def __init__(self, bundle: str, data: str, output: str, plan: Plan, device: str | None) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self._measurer = Measurer(bundle, open_scenes(data, plan.limit), output, plan, device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        if row["kind"] == "scene":
            self._measurer.scene(number)
        else:
            self._measurer.moved(self._measurer.picture(number))
        return row


def measure_on_ray(measurer: Measurer, output: str, workers: int, device: str | None, say: Say) -> None:
    """Measure by ``workers`` actors what ``measurer`` is to find: it then reads what they stored.

    Args:
        output: a place that all workers see: ``s3://``, or a file system that they share.
    """
    connect(workers)
    gpus = float(device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    work = [{"kind": "scene", "number": number} for number in range(len(measurer.scenes))]
    work += [{"kind": "picture", "number": int(number)} for number in measurer.pictures()]
    places = (storage.absolute(measurer.location), measurer.scenes.location, storage.absolute(output))
    # A block of its own for each: what is measured is said when it is.
    rows = ray.data.from_items(work, override_num_blocks=len(work)).map(
        _Worker,
        fn_constructor_args=(*places, measurer.plan, device),
        concurrency=min(workers, len(work)),
        num_cpus=1,
        num_gpus=gpus,
    )
    for done, row in enumerate(counted(f"measuring on {workers} workers", rows.iter_rows(), len(work), "scenes"), 1):
        name = measurer.bundle.recipe.name
        say(f"{name}: {done} of {len(work)} on {workers} workers ({row['kind']} {row['number']})")
