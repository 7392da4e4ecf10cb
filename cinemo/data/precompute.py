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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from cinemo import storage
from cinemo.config import EncodersConfig, Recipe
from cinemo.data import fields, stages
from cinemo.data.dataset import Dataset
from cinemo.data.identity import encoder_dtype
from cinemo.data.manifest import read_manifest
from cinemo.data.plan import make_plan
from cinemo.data.sidecars import FieldStore
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
_TASK_SHARDS = 4
# Equal for decode and score, which Ray Data then runs as one task, and unequal to an encoder's: it would otherwise pull
# both into the encoder processes.
_DECODING = {"max_calls": 500}  # and what a decoder leaks ends with its process
# It mostly waits for storage. And on two cores decode and repartition reserve one each: asking for any share, it would
# get none before the last clip is decoded, and a killed run would have nothing to go on from.
_COMMIT_CPUS = 0.0
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
    extras = [FieldStore.open(dataset.uri, field, *fields.identity(field, recipe)) for field in recipe.data.fields]
    missing, retried = dataset.missing_shards(), None
    if retry_quarantine is None:
        rows = plan.rows(missing)
    elif missing:
        raise InputError(f"{output}: {len(missing)} shards are still to be made; finish it without --retry-quarantine")
    else:
        retried = dataset.retryable(retry_quarantine)
        rows = dataset.rows_to_retry(retried)
    totals: Counter[str] = Counter()
    if len(rows):
        dataset.begin()
        progress = _Progress(len(rows))
        for shard in _execute(rows, dataset, retried):
            progress.add(shard)
            totals.update({name: value for name, value in shard.items() if name == "clips" or name in _SECONDS})
            if retried is None:
                _check_share(progress.refused, dataset)
    summary = dataset.summarize()
    _check_share(summary["reasons"], dataset)
    dataset.finish(summary)
    seconds = time.perf_counter() - started
    return {
        **summary,
        "fields": add_fields(dataset, extras),
        "output": dataset.uri,
        "done": totals["clips"],
        "seconds": seconds,
        "clips_per_second": totals["clips"] / seconds,
        "stage_seconds": {name.removesuffix("_seconds"): float(totals[name]) for name in _SECONDS},
    }


def _execute(
    rows: pa.Table, dataset: Dataset, retried: Mapping[str, tuple[int, str]] | None
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
    graph = (
        ray.data.from_arrow(blocks)
        .map_batches(stages.decode, fn_kwargs={"data": data}, batch_format="pyarrow", batch_size=None, **_DECODING)
        .map_batches(stages.score, fn_kwargs={"data": data}, batch_format="pyarrow", batch_size=None, **_DECODING)
        .map_batches(
            stages.Encoder,
            fn_constructor_kwargs={
                "data": data,
                "vae": _absolute(recipe.encoders).vae,
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


def add_fields(dataset: Dataset, stores: Sequence[FieldStore]) -> dict[str, dict[str, Any]]:
    """Write the sidecars that are missing beside committed shards, which stay as they are.

    Returns:
        By field: its ``fields/FIELD.json``, and of this run ``done`` (samples), ``seconds`` and ``stage_seconds``
        (summed over processes and fields).
    """
    todo: dict[int, list[str]] = {}
    for store in stores:
        missing = store.missing(dataset.records)
        for number in missing:
            todo.setdefault(number, []).append(store.field)
        if missing:
            store.begin()
    total = sum(dataset.records[number]["samples"] for number in todo)
    done, started, stage_seconds = 0, time.perf_counter(), {"decode": 0.0, "encode": 0.0}
    printed = started
    for shard in _execute_fields(sorted(todo.items()), dataset, stores) if todo else ():
        done += shard["samples"]
        for stage in stage_seconds:
            stage_seconds[stage] += shard[f"{stage}_seconds"]
        now = time.perf_counter()
        if now - printed >= _PROGRESS_SECONDS or done == total:
            printed = now
            print(f"fields: {done}/{total} samples, {done / (now - started):.2f} samples/s", flush=True)
    this_run = {"seconds": time.perf_counter() - started, "stage_seconds": stage_seconds}
    made = {name for wanted in todo.values() for name in wanted}
    return {
        store.field: {**store.finish(dataset.records), "done": done if store.field in made else 0, **this_run}
        for store in stores
    }


def _execute_fields(
    todo: Sequence[tuple[int, list[str]]], dataset: Dataset, stores: Sequence[FieldStore]
) -> Iterator[dict[str, Any]]:
    """Run the fields' stages; yields the totals of each shard once its sidecars are committed.

    A row is a shard, so no more of them are in memory than there are tasks and free places between the stages.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    connect()
    recipe, data = dataset.recipe, dataset.recipe.data
    cpus, encoder = _resources(recipe)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    names = sorted({name for _, wanted in todo for name in wanted})
    rows = pa.Table.from_pylist([{"shard": shard, "fields": wanted} for shard, wanted in todo], fields.TODO)
    size = max(1, min(_TASK_SHARDS, len(rows) // (4 * cpus)))
    blocks = [rows.slice(start, size).combine_chunks() for start in range(0, len(rows), size)]
    batches: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": 1}
    graph = ray.data.from_arrow(blocks).map_batches(
        fields.read, fn_kwargs={"dataset": dataset.uri, "data": data}, **batches, **_DECODING
    )
    if fields.ENCODED & set(names):
        graph = graph.map_batches(
            fields.Encoder,
            fn_constructor_kwargs={
                "fields": names,
                "encoders": _absolute(recipe.encoders),
                "size": data.size,
                "dtype": encoder_dtype(recipe),
            },
            compute=ActorPoolStrategy(size=data.encode_actors),
            **batches,
            **encoder,
        )
    fingerprints = {store.field: store.fingerprint for store in stores}
    graph = graph.map_batches(
        fields.commit,
        fn_kwargs={"dataset": dataset.uri, "fingerprints": fingerprints},
        num_cpus=_COMMIT_CPUS,
        **batches,
    )
    for table in graph.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()


def _absolute(encoders: EncodersConfig) -> EncodersConfig:
    """Locations that mean the same in a worker, which has a working directory of its own."""
    places = {
        name: place if place.startswith("package:") else storage.absolute(place)
        for name in ("vae", "text_encoder", "tokenizer", "image_encoder")
        if (place := getattr(encoders, name)) is not None
    }
    return encoders.model_copy(update=places)


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
