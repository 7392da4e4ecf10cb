"""The same measurements by workers of a Ray cluster: each fills in parts that whoever evaluates then reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import ray
import torch

from cinemo import storage
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.precompute.cluster import connect
from cinemo.evaluation.measuring import Measurer, Plan, Say


class _Worker:
    """Holds one bundle and measures samples and pictures of it, by their numbers."""

    def __init__(self, bundle: str, data: str, output: str, plan: Plan, device: str | None) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self._measurer = Measurer(bundle, DatasetIndex.load(data), output, plan, device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        if row["kind"] == "sample":
            self._measurer.sample(number)
        else:
            self._measurer.moved(self._measurer.picture(number))
        return row


def measure_on_ray(
    bundles: Sequence[str], data: str, output: str, plan: Plan, workers: int, device: str | None, say: Say
) -> None:
    """Measure bundles by ``workers`` actors, one bundle after the other; what is stored already costs nothing.

    Args:
        output: a place that all workers see: ``s3://``, or a file system that they share.
    """
    data, output = storage.absolute(data), storage.absolute(output)
    connect(workers)
    gpus = float(device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    for location in map(storage.absolute, bundles):
        planned = Measurer(location, DatasetIndex.load(data), output, plan, "cpu")  # what does not fit is said at once
        work = [{"kind": "sample", "number": number} for number in range(len(planned.samples))]
        work += [{"kind": "picture", "number": int(number)} for number in planned.pictures()]
        total, name = len(work), planned.bundle.recipe.name
        rows = ray.data.from_items(work, override_num_blocks=min(total, 4 * workers)).map(
            _Worker,
            fn_constructor_args=(location, data, output, plan, device),
            concurrency=min(workers, total),
            num_cpus=1,
            num_gpus=gpus,
        )
        for done, row in enumerate(rows.iter_rows(), 1):
            say(f"{name}: {done} of {total} on {workers} workers ({row['kind']} {row['number']})")
