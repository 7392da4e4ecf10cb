"""The Ray Data graph that turns a manifest into a dataset, and the connection to Ray that it runs on.

One planned shard is one block. Its rows stay in planned order through every stage, so a shard's bytes depend on plan
and recipe alone; a run that was killed goes on with the shards that have no commit record.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from cinemo import storage
from cinemo.config import DataConfig, EncodersConfig, Recipe
from cinemo.data import fields, stages
from cinemo.data.dataset import Dataset
from cinemo.data.identity import encoder_dtype
from cinemo.data.lock import hold
from cinemo.data.manifest import read_manifest
from cinemo.data.plan import PlannedRows, make_plan
from cinemo.data.progress import Figures, Meter, Progress, describe
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
# What a decoder leaks ends with its process. And options unlike an encoder's keep Ray Data from decoding inside it.
_DECODING = {"max_calls": 500}
_TASK_SHARDS = 4  # of a field
_PROGRESS_SECONDS = 3.0
# It mostly waits for storage. And decoding reserves all cores there are: asking for any share, a commit would get none
# before the last clip is decoded, and a killed run would have nothing to go on from.
_COMMIT_CPUS = 0.0
# So many at a time: a slow storage must not be met with ever more processes, each holding a shard.
_CPUS_PER_COMMIT = 8
_FEW_CPUS = 4
_METER_SECONDS = 2.0
# About so many clips have their planned rows in the object store at a time.
_WAVE_CLIPS = 1 << 20
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
        patience = {storage.PATIENCE: os.environ[storage.PATIENCE]} if storage.PATIENCE in os.environ else {}
        ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": _WORKER_ENVIRONMENT | patience})
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
    recipe: Recipe,
    manifest: str,
    output: str,
    limit: int | None = None,
    retry_quarantine: str | None = None,
    listener: Callable[[Figures], None] | None = None,
) -> dict[str, Any]:
    """Make a dataset, or finish one that was begun. A finished one is left as it is, byte for byte.

    Args:
        manifest: see `cinemo.data.manifest.read_manifest`.
        output: directory of the dataset, local or s3://.
        limit: use the first clips of the manifest only.
        retry_quarantine: try refused clips of a finished dataset again: those of one reason, or all with ``""``. Those
            that succeed are appended as new shards.
        listener: told every few seconds how the run is doing.

    Returns:
        A summary: clips, samples, quarantined, reasons, shards, bytes of the dataset; and of this run ``done`` (clips),
        ``seconds``, ``clips_per_second``, ``stage_seconds`` (summed over processes) and ``capacity`` (how many
        processes each of these stages had).

    Raises:
        InputError: bad manifest; an output that belongs to another recipe or manifest; nothing to retry.
        RunError: more clips were refused than ``data.max_quarantine_share`` allows.
    """
    started = time.perf_counter()
    plan = make_plan(read_manifest(manifest, limit), recipe)
    dataset = Dataset.open(storage.absolute(output), recipe, plan)
    extras = [FieldStore.open(dataset.uri, field, *fields.identity(field, recipe)) for field in recipe.data.fields]
    totals: Counter[str] = Counter()
    capacity: dict[str, float] = {}
    with hold(dataset.uri) as lock:
        dataset.load()
        rows, retried = _rows_to_do(dataset, retry_quarantine)
        if len(rows):
            dataset.begin()
            with watch(len(rows), dataset, listener) as (progress, meter):
                capacity = progress.capacity
                for wave in rows.waves(_WAVE_CLIPS):
                    for shard in _execute(wave, dataset, retried, meter):
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
        made = add_fields(dataset, extras)
    return {
        **summary,
        "fields": made,
        "output": dataset.uri,
        "done": totals["clips"],
        "seconds": seconds,
        "clips_per_second": totals["clips"] / seconds,
        "stage_seconds": {name.removesuffix("_seconds"): float(totals[name]) for name in _SECONDS},
        "capacity": capacity,
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


@contextlib.contextmanager
def watch(
    clips: int, dataset: Dataset, listener: Callable[[Figures], None] | None = None
) -> Iterator[tuple[Progress, Any]]:
    """The progress of a run, and the handle that its workers report to."""
    connect()
    data = dataset.recipe.data
    resources = _resources(dataset.recipe)
    meter = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(Meter).remote()

    def read() -> Mapping[str, Mapping[str, float]] | None:
        try:
            figures: Mapping[str, Mapping[str, float]] = ray.get(meter.read.remote(), timeout=_METER_SECONDS)
            return figures
        except ray.exceptions.RayError:  # being started, or its node went away
            return None

    try:
        with Progress(
            clips,
            math.ceil(clips / data.clips_per_shard),
            {"decode": resources.decoders, "encode": resources.encoders},
            read,
            listener,
        ) as progress:
            yield progress, meter
    finally:
        ray.kill(meter)


def _execute(
    rows: PlannedRows, dataset: Dataset, retried: Mapping[str, tuple[int, str]] | None, meter: Any = None
) -> Iterator[dict[str, Any]]:
    """Run the stages over planned rows; yields the totals of each shard once it is committed.

    Args:
        meter: handle of a `Meter` that workers report to.

    Raises:
        InputError, RunError: what a worker met and a person can mend, such as storage that does not answer.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    connect()
    recipe, data = dataset.recipe, dataset.recipe.data
    resources = _resources(recipe)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False

    size = max(1, min(_TASK_CLIPS, _TASK_BYTES // (data.views * data.frames * data.size[0] * data.size[1] * 3)))
    size = min(size, math.ceil(len(rows) / (4 * resources.decoders)))
    blocks = [rows.slice(start, count).combine_chunks() for start, count in _pieces(len(rows), data, size)]
    graph = (
        ray.data.from_arrow(blocks)
        .map_batches(
            _decode_and_score,
            fn_kwargs={"data": data, "meter": meter},
            batch_format="pyarrow",
            batch_size=None,
            **resources.decode,
        )
        .map_batches(
            _Encoder,
            fn_constructor_kwargs={
                "data": data,
                "vae": _absolute(recipe.encoders).vae,
                "latent": recipe.encoders.latent,
                "dtype": encoder_dtype(recipe),
                "meter": meter,
            },
            compute=ActorPoolStrategy(min_size=resources.least_encoders, max_size=resources.encoders),
            batch_format="pyarrow",
            batch_size=data.encode_batch,
            **resources.encode,
        )
        .map_batches(
            _Committer,
            fn_constructor_kwargs={
                "dataset": dataset.uri,
                "fingerprint": dataset.fingerprint,
                "views": data.views,
                "retried": retried,
            },
            batch_format="pyarrow",
            # Exactly one shard: blocks arrive in order, and none crosses the boundary of a shard.
            batch_size=data.clips_per_shard * data.views,
            num_cpus=_COMMIT_CPUS,
            compute=ActorPoolStrategy(min_size=1, max_size=resources.commits),
        )
    )
    try:
        for table in graph.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from table.to_pylist()
    except ray.exceptions.RayError as error:
        raise _cause(error) from None


def _pieces(clips: int, data: DataConfig, size: int) -> Iterator[tuple[int, int]]:
    """``(first, count)`` of blocks of about ``size`` rows that do not cross shards, which come one after the other."""
    shard = data.clips_per_shard
    piece = math.ceil(shard / math.ceil(shard / size))
    for start in range(0, clips, shard):
        end = min(start + shard, clips)
        yield from ((first, min(piece, end - first)) for first in range(start, end, piece))


def _cause(error: Exception) -> Exception:
    """What a worker raised for a person to read; else the error as it is. Ray keeps it as text only."""
    found = re.findall(r"^cinemo\.\w+\.(RunError|InputError|AccessDenied): (.+)$", str(error), re.MULTILINE)
    if not found:
        return error
    kind, message = found[-1]
    return RunError(message) if kind == "RunError" else InputError(message)


def _decode_and_score(clips: pa.Table, data: DataConfig, meter: Any) -> pa.Table:
    rows = stages.score(stages.decode(clips, data), data)
    _report(meter, "decode", rows, data.views, {"decode": ("decode_seconds", "score_seconds")})
    return rows


class _Encoder(stages.Encoder):
    """An encoder that reports."""

    def __init__(self, data: DataConfig, vae: str, latent: str, dtype: str, meter: Any) -> None:
        super().__init__(data, vae, latent, dtype)
        self.meter = meter

    def __call__(self, decoded: pa.Table) -> pa.Table:
        rows = super().__call__(decoded)
        _report(self.meter, "encode", rows, self.data.views, {"encode": ("encode_seconds",)})
        return rows


class _Committer:
    """`stages.commit` in a process that stays: a task comes so rarely that Ray would start one, and import torch, for
    every shard.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def __call__(self, encoded: pa.Table) -> pa.Table:
        return stages.commit(encoded, **self.settings)


def _report(meter: Any, stage: str, rows: pa.Table, views: int, seconds: Mapping[str, tuple[str, ...]]) -> None:
    """Tell the meter, and wait for nothing."""
    if meter is None:
        return
    spent = {name: sum(pc.sum(rows[column]).as_py() or 0.0 for column in columns) for name, columns in seconds.items()}
    own = [where == "encode" for where in rows["stage"].to_pylist()]
    reasons = Counter(
        reason
        for reason, encoding, view in zip(rows["reason"].to_pylist(), own, rows["view"].to_pylist(), strict=True)
        if reason and view == 0 and encoding == (stage == "encode")
    )
    meter.add.remote(stage, rows.num_rows / views, spent, dict(reasons))


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
    resources = _resources(recipe)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    names = sorted({name for _, wanted in todo for name in wanted})
    rows = pa.Table.from_pylist([{"shard": shard, "fields": wanted} for shard, wanted in todo], fields.TODO)
    size = max(1, min(_TASK_SHARDS, len(rows) // (4 * resources.decoders)))
    blocks = [rows.slice(start, size).combine_chunks() for start in range(0, len(rows), size)]
    batches: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": 1}
    graph = ray.data.from_arrow(blocks).map_batches(
        fields.read, fn_kwargs={"dataset": dataset.uri, "data": data}, **batches, **resources.decode
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
            compute=ActorPoolStrategy(min_size=resources.least_encoders, max_size=resources.encoders),
            **batches,
            **resources.encode,
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


@dataclass(frozen=True)
class Resources:
    """Who does what on this cluster: processes at a time, and what Ray reserves for each of them."""

    decoders: int
    encoders: int
    least_encoders: int
    commits: int
    decode: dict[str, Any]
    encode: dict[str, Any]


def _resources(recipe: Recipe) -> Resources:
    """Decoding takes cores, of the nodes that offer ``data.decode_resource`` where it is set; encoders take theirs.

    Raises:
        InputError: the cluster cannot hold them, so that a run would wait for ever.
    """
    from ray.data import TaskPoolStrategy

    data, have = recipe.data, ray.cluster_resources()
    cpus, gpus, special = int(have.get("CPU", 1)), have.get("GPU", 0), data.decode_resource
    wanted = data.encode_gpus * max(1, data.encode_actors)
    if wanted > gpus:
        raise InputError(
            f"data.encode_gpus is {data.encode_gpus:g} for {max(1, data.encode_actors)} encoders, the cluster has "
            f"{gpus:g} accelerators; --set data.encode_gpus=0 encodes on CPUs"
        )
    if special and not have.get(special):
        known = ", ".join(sorted(name for name in have if ":" not in name))
        raise InputError(
            f"data.decode_resource is {special!r}, which no node of the cluster offers (there: {known}); "
            "--set data.decode_resource=null decodes wherever a core is free"
        )
    # On accelerators, and on few cores, all work from the beginning; on many cores Ray adds encoders while clips wait.
    # On few it would stop and start them again and again, each time for seconds of imports.
    most = data.encode_actors or (int(gpus / data.encode_gpus) if data.encode_gpus else cpus)
    least = most if data.encode_gpus or data.encode_actors or cpus <= _FEW_CPUS else 1
    # An encoder takes a core where one is left for decoding.
    share = 1.0 if cpus >= least + 2 else 0.0
    decoders = max(1, int((have[special] if special else cpus) / data.decode_cpus))
    decode: dict[str, Any] = {
        **_DECODING,
        "num_cpus": data.decode_cpus,
        "compute": TaskPoolStrategy(size=decoders),
    }
    if special:
        decode["resources"] = {special: data.decode_cpus}
    return Resources(
        decoders=decoders,
        encoders=most,
        least_encoders=least,
        commits=max(2, cpus // _CPUS_PER_COMMIT),
        decode=decode,
        encode={"num_cpus": share, **({"num_gpus": data.encode_gpus} if data.encode_gpus else {})},
    )


def _check_share(reasons: Mapping[str, int], dataset: Dataset) -> None:
    refused, clips = sum(reasons.values()), len(dataset.plan.clips)
    allowed = dataset.recipe.data.max_quarantine_share
    if refused > allowed * clips:
        raise RunError(
            f"{refused} of {clips} clips are refused ({describe(reasons)}), more than data.max_quarantine_share = "
            f"{allowed:g} allows; see {storage.join(dataset.uri, 'quarantine')}"
        )
