"""The Ray Data graph that turns a manifest into a dataset, and the connection to Ray that it runs on.

One planned shard is one block. Its rows stay in planned order through every stage, so a shard's bytes depend on plan
and recipe alone; a run that was killed goes on with the shards that have no commit record.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data import stages
from cinemo.data.dataset import Dataset
from cinemo.data.lock import hold
from cinemo.data.manifest import read_manifest
from cinemo.data.plan import PlannedRows, encoder_dtype, make_plan
from cinemo.types import InputError, RunError

_WORKER_ENVIRONMENT = {
    # Ray would otherwise hide the accelerator from tasks that ask for none of it, with a warning in every worker.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
_SHARED_MEMORY = Path("/dev/shm")
_OBJECT_STORE_LIMIT = 2 << 30
# Decoded frames of one task: small enough that a few tasks in flight fit any object store.
_TASK_BYTES = 64 << 20
_TASK_CLIPS = 16
# Equal for decode and score, which Ray Data then runs as one task, and unequal to an encoder's: it would otherwise pull
# both into the encoder processes.
_DECODING = {"max_calls": 500}  # and what a decoder leaks ends with its process
# It mostly waits for storage. And on two cores decode and repartition reserve one each: asking for any share, it would
# get none before the last clip is decoded, and a killed run would have nothing to go on from.
_COMMIT_CPUS = 0.0
# About so many clips have their planned rows in the object store at a time.
_WAVE_CLIPS = 1 << 20
_PROGRESS_SECONDS = 3.0
_SECONDS = ("decode_seconds", "score_seconds", "encode_seconds", "commit_seconds")


def connect(cpus: int = 1) -> None:
    """Join the cluster of ``RAY_ADDRESS`` (set under ``ray job submit``), or start a private one on this machine.

    A second call in the same process does nothing. ``CINEMO_DEBUG=1`` shows what the workers print.

    Args:
        cpus: a private one counts at least so many logical CPUs, also where the machine has fewer cores.
    """
    if ray.is_initialized():
        return
    for name, value in _WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": _WORKER_ENVIRONMENT})
        return
    memory = _OBJECT_STORE_LIMIT
    if _SHARED_MEMORY.is_dir():
        memory = min(memory, shutil.disk_usage(_SHARED_MEMORY).free // 2)
    ray.init(
        address="local",  # never a cluster that happens to run on this machine
        num_cpus=max(cpus, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=bool(os.environ.get("CINEMO_DEBUG")),
        object_store_memory=memory,
    )


def run(
    recipe: Recipe, manifest: str, output: str, limit: int | None = None, retry_quarantine: str | None = None
) -> dict[str, Any]:
    """Make a dataset, or finish one that was begun. A finished one is left as it is, byte for byte.

    Args:
        manifest: see `cinemo.data.manifest.read_manifest`.
        output: directory of the dataset, local or s3://.
        limit: use the first clips of the manifest only.
        retry_quarantine: try refused clips of a finished dataset again: those of one reason, or all with ``""``. Those
            that succeed are appended as new shards.

    Returns:
        A summary: clips, samples, quarantined, reasons, shards, bytes of the dataset; and of this run ``done`` (clips),
        ``seconds``, ``clips_per_second`` and ``stage_seconds`` (summed over processes).

    Raises:
        InputError: bad manifest; an output that belongs to another recipe or manifest; nothing to retry.
        RunError: more clips were refused than ``data.max_quarantine_share`` allows.
    """
    started = time.perf_counter()
    plan = make_plan(read_manifest(manifest, limit), recipe)
    dataset = Dataset.open(storage.absolute(output), recipe, plan)
    totals: Counter[str] = Counter()
    with hold(dataset.uri) as lock:
        dataset.load()
        rows, retried = _rows_to_do(dataset, retry_quarantine)
        if len(rows):
            dataset.begin()
            progress = _Progress(len(rows))
            for wave in rows.waves(_WAVE_CLIPS):
                for shard in _execute(wave, dataset, retried):
                    lock.check()
                    if shard["index"]:
                        dataset.committed(json.loads(shard["index"]))
                    progress.add(shard)
                    totals.update({name: shard[name] for name in ("clips", *_SECONDS)})
                    if retried is None:
                        _check_share(progress.refused, dataset)
        summary = dataset.summarize()
        _check_share(summary["reasons"], dataset)
        lock.check()
        dataset.finish(summary)
    seconds = time.perf_counter() - started
    return {
        **summary,
        "output": dataset.uri,
        "done": totals["clips"],
        "seconds": seconds,
        "clips_per_second": totals["clips"] / seconds,
        "stage_seconds": {name.removesuffix("_seconds"): float(totals[name]) for name in _SECONDS},
    }


def _rows_to_do(dataset: Dataset, retry: str | None) -> tuple[PlannedRows, dict[str, tuple[int, str]] | None]:
    """The clips to run over; of a retry also which shards refused them, and why."""
    missing = dataset.missing_shards()
    if retry is None:
        return dataset.plan.rows(missing), None
    if missing:
        raise InputError(f"{dataset.uri}: {len(missing)} shards are still to be made; finish it without a retry")
    retried = dataset.retryable(retry)
    return dataset.rows_to_retry(retried), retried


def _execute(
    rows: PlannedRows, dataset: Dataset, retried: Mapping[str, tuple[int, str]] | None
) -> Iterator[dict[str, Any]]:
    """Run the stages over planned rows; yields the totals of each shard once it is committed."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    connect()
    recipe, data = dataset.recipe, dataset.recipe.data
    cpus, encoder = _resources(recipe)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False

    size = max(1, min(_TASK_CLIPS, _TASK_BYTES // (data.views * data.frames * data.size[0] * data.size[1] * 3)))
    size = min(size, math.ceil(len(rows) / (4 * cpus)))
    blocks = [rows.slice(start, size).combine_chunks() for start in range(0, len(rows), size)]
    vae = recipe.encoders.vae
    graph = (
        ray.data.from_arrow(blocks)
        .map_batches(stages.decode, fn_kwargs={"data": data}, batch_format="pyarrow", batch_size=None, **_DECODING)
        .map_batches(stages.score, fn_kwargs={"data": data}, batch_format="pyarrow", batch_size=None, **_DECODING)
        .map_batches(
            stages.Encoder,
            fn_constructor_kwargs={
                "data": data,
                "vae": vae if vae.startswith("package:") else storage.absolute(vae),
                "latent": recipe.encoders.latent,
                "dtype": encoder_dtype(recipe),
            },
            compute=ActorPoolStrategy(size=data.encode_actors),
            batch_format="pyarrow",
            batch_size=data.encode_batch,
            **encoder,
        )
        .repartition(target_num_rows_per_block=data.clips_per_shard * data.views, strict=True)
        .map_batches(
            stages.commit,
            fn_kwargs={
                "dataset": dataset.uri,
                "fingerprint": dataset.fingerprint,
                "views": data.views,
                "retried": retried,
            },
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=_COMMIT_CPUS,
        )
    )
    for table in graph.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()


def _resources(recipe: Recipe) -> tuple[int, dict[str, float]]:
    """CPUs of the cluster, and what one encoder asks for.

    Raises:
        InputError: the cluster cannot hold the encoders, so that a run would wait for ever.
    """
    data, have = recipe.data, ray.cluster_resources()
    cpus, gpus = int(have.get("CPU", 1)), have.get("GPU", 0)
    if data.encode_gpus * data.encode_actors > gpus:
        raise InputError(
            f"data.encode_gpus is {data.encode_gpus:g} for {data.encode_actors} encoders, the cluster has {gpus:g} "
            "accelerators; --set data.encode_gpus=0 encodes on CPUs"
        )
    # An encoder takes a core where one is left for decoding and one for repartitioning.
    share = 1.0 if cpus >= data.encode_actors + 2 else 0.0
    return cpus, {"num_cpus": share, **({"num_gpus": data.encode_gpus} if data.encode_gpus else {})}


def _check_share(reasons: Mapping[str, int], dataset: Dataset) -> None:
    refused, clips = sum(reasons.values()), len(dataset.plan.clips)
    allowed = dataset.recipe.data.max_quarantine_share
    if refused > allowed * clips:
        raise RunError(
            f"{refused} of {clips} clips are refused ({describe(reasons)}), more than data.max_quarantine_share = "
            f"{allowed:g} allows; see {storage.join(dataset.uri, 'quarantine')}"
        )


def describe(reasons: Mapping[str, int]) -> str:
    """``missing 3, too_few_frames 1``: the most frequent reason first."""
    return ", ".join(
        f"{reason} {count}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    )


class _Progress:
    """A line every few seconds: done, rate, time left, refused."""

    def __init__(self, clips: int) -> None:
        self.clips, self.done, self.refused = clips, 0, Counter[str]()
        self.started = self.printed = time.perf_counter()

    def add(self, shard: Mapping[str, Any]) -> None:
        self.done += shard["clips"]
        self.refused.update(json.loads(shard["reasons"]))
        now = time.perf_counter()
        if now - self.printed < _PROGRESS_SECONDS and self.done < self.clips:
            return
        self.printed = now
        rate = self.done / (now - self.started)
        left = datetime.timedelta(seconds=round((self.clips - self.done) / rate))
        refused = f", refused: {describe(self.refused)}" if self.refused else ""
        print(f"{self.done}/{self.clips} clips, {rate:.2f} clips/s, {left} left{refused}", flush=True)
