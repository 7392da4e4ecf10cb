"""The Ray Data graph that turns a manifest into a dataset, and the one that adds fields to its shards.

Rows stay in planned order through every stage, and what is committed together is one planned shard: so its bytes depend
on plan and recipe alone. A run that was killed goes on with the shards that have no commit record.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cinemo import storage
from cinemo.config import DataConfig, EncodersConfig, Recipe
from cinemo.data.dataset import fields
from cinemo.data.dataset.identity import encoder_dtype
from cinemo.data.dataset.sidecars import FieldStore
from cinemo.data.manifest.columns import Columns
from cinemo.data.precompute import cluster, pools, stages
from cinemo.data.precompute.dataset import Dataset
from cinemo.data.precompute.exported import Exported
from cinemo.data.precompute.plan import PlannedRows, plan_manifest
from cinemo.data.precompute.probing import Probe
from cinemo.data.precompute.progress import Figures, describe
from cinemo.lock import Lock, hold
from cinemo.methods import method_class
from cinemo.progress import doing
from cinemo.types import InputError, RunError

# Decoded frames at a time: small enough that a few such blocks fit any object store.
_FRAME_BYTES = 64 << 20
_FRAME_CLIPS = 16
# Of a task that hands on latents, not frames: Ray's driver takes the same time for a block of any size.
_TASK_CLIPS = 64
_TASK_SHARDS = 4  # of a field
# About so many clips have their planned rows in the object store at a time.
_WAVE_CLIPS = 1 << 20
_SECONDS = ("decode_seconds", "score_seconds", "encode_seconds", "commit_seconds")


def run(
    recipe: Recipe,
    manifest: str,
    output: str,
    limit: int | None = None,
    retry_quarantine: str | None = None,
    listener: Callable[[Figures], None] | None = None,
    columns: Columns | None = None,
    names_as_captions: bool = False,
    break_lock: bool = False,
    append: str | None = None,
) -> dict[str, Any]:
    """Make a dataset, or finish one that was begun. A finished one is left as it is, byte for byte.

    Args:
        manifest, columns, names_as_captions: see `cinemo.data.manifest.manifest.read_manifest`.
        output: directory of the dataset, local or s3://.
        limit: use the first clips of the manifest only.
        retry_quarantine: try refused clips of a finished dataset again: those of one reason, or all with ``""``. Those
            that succeed are appended as new shards.
        append: extend a finished dataset by the manifest's clips that it does not have; those that it has are left out
            (``skip``) or refused (``refuse``).
        listener: told every few seconds how the run is doing.
        break_lock: see `cinemo.lock.hold`.

    Returns:
        A summary: clips, samples, quarantined, reasons, shards, bytes of the dataset; and of this run ``done`` (clips),
        ``seconds``, ``clips_per_second``, ``stage_seconds`` (summed over processes) and ``capacity`` (how many
        processes each of these stages had).

    Raises:
        InputError: bad manifest; an output that belongs to another recipe or manifest; nothing to retry; a row that
            changed a clip of the dataset.
        RunError: more clips were refused than ``data.max_quarantine_share`` allows.
    """
    started = time.perf_counter()
    plan, prefix = plan_manifest(manifest, recipe, limit, columns, names_as_captions)
    dataset = Dataset.open(storage.absolute(output), recipe, plan, append, prefix)
    extras = [FieldStore.open(dataset.uri, field, *fields.identity(field, recipe)) for field in recipe.data.fields]
    totals: Counter[str] = Counter()
    capacity: dict[str, float] = {}
    with hold(dataset.uri, break_lock) as lock:
        with doing("looking at what is there already"):
            dataset.load()
            dataset.shape_clips(Probe(dataset.uri, recipe))
            lock.check()  # which may have taken hours
            rows, retried = _rows_to_do(dataset, retry_quarantine)
        if len(rows):
            plan.clips.check_buckets()
            dataset.begin()
            with cluster.watch(len(rows), rows.count_shards(), recipe, Exported(dataset.uri, listener)) as (
                progress,
                meter,
            ):
                capacity = progress.capacity
                for wave in rows.waves(_WAVE_CLIPS):
                    for shard in _execute(wave, dataset, retried, meter):
                        lock.check()
                        if shard["index"]:
                            dataset.committed(json.loads(shard["index"]))
                        progress.add(shard)
                        totals.update({name: shard[name] for name in ("clips", *_SECONDS)})
                        if retried is None:
                            _check_share(progress.refused, len(dataset.plan), dataset)
        with doing("writing the index"):
            summary = dataset.summarize()
            _check_share(summary["reasons"], summary["clips"], dataset)
            lock.check()
            dataset.finish(summary)
        seconds = time.perf_counter() - started
        made = add_fields(dataset, extras, lock)
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

    cluster.connect()
    recipe, data = dataset.recipe, dataset.recipe.data
    found = pools.pools(recipe)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False

    at_once = max(1, min(_FRAME_CLIPS, _FRAME_BYTES // (data.views * math.prod(data.largest) * 3)))
    most = _TASK_CLIPS if data.together else at_once
    size = min(most, math.ceil(len(rows) / (4 * found.decoders)))
    encoder = {
        "data": data,
        "vae": _absolute(recipe.encoders).vae,
        "latent": recipe.encoders.latent,
        "dtype": encoder_dtype(recipe),
        "meter": meter,
    }
    graph = ray.data.from_arrow(list(_blocks(rows, data.clips_per_shard, size, most)))
    if data.together:
        graph = graph.map_batches(
            _whole,
            fn_kwargs={**encoder, "at_once": at_once},
            batch_format="pyarrow",
            batch_size=None,
            **found.decode,
        )
    else:
        graph = graph.map_batches(
            _decode_and_score,
            fn_kwargs={"data": data, "meter": meter},
            batch_format="pyarrow",
            batch_size=None,
            **found.decode,
        ).map_batches(
            _Encoder,
            fn_constructor_kwargs=encoder,
            batch_format="pyarrow",
            batch_size=data.encode_batch,
            **found.encode,
        )
    graph = graph.map_batches(
        _Committer,
        fn_constructor_kwargs={
            "dataset": dataset.uri,
            "fingerprint": dataset.fingerprint,
            "views": data.views,
            "checksum": dataset.checksum,
            "retried": retried,
        },
        batch_format="pyarrow",
        # Exactly one shard: blocks arrive in order, and none crosses the boundary of a shard.
        batch_size=data.clips_per_shard * data.views,
        num_cpus=pools.COMMIT_CPUS,
        compute=ActorPoolStrategy(min_size=pools.LEAST_COMMITS, max_size=found.commits),
    )
    yield from cluster.results(graph)


def _blocks(rows: PlannedRows, shard: int, size: int, most: int) -> Iterator[pa.Table]:
    """Blocks of about ``size`` rows, at most ``most``, that cross no boundary between shards of ``shard`` rows each."""
    piece = math.ceil(shard / math.ceil(shard / size))
    for start in range(0, len(rows), shard):
        yield from _pieces(rows.slice(start, shard).combine_chunks(), piece, most)


def _pieces(rows: pa.Table, size: int, most: int) -> Iterator[pa.Table]:
    """About ``size`` rows each. Clips of one source, one after another, stay together as far as ``most`` rows go: a
    piece is fetched and decoded at once.
    """
    ends = pc.run_end_encode(rows["uri"].combine_chunks()).run_ends.to_numpy()
    begin = 0
    while begin < len(rows):
        end = min(int(ends[np.searchsorted(ends, min(begin + size, len(rows)))]), begin + most)
        yield rows.take(pa.array(range(begin, end)))
        begin = end


def _decode_and_score(clips: pa.Table, data: DataConfig, meter: Any) -> pa.Table:
    rows = stages.score(stages.decode(clips, data), data)
    cluster.report(meter, "decode", rows, data.views, {"decode": ("decode_seconds", "score_seconds")})
    return rows


def _whole(clips: pa.Table, at_once: int, data: DataConfig, vae: str, latent: str, dtype: str, meter: Any) -> pa.Table:
    """All that takes cores, in one process: no frames are copied, and no more processes work than there are cores."""
    made = []
    for piece in _pieces(clips, at_once, at_once):
        made.append(_encoder(data, vae, latent, dtype)(_decode_and_score(piece, data, meter)))
        cluster.report(meter, "encode", made[-1], data.views, {"encode": ("encode_seconds",)})
    return pa.concat_tables(made)


@functools.lru_cache(maxsize=1)
def _encoder(data: DataConfig, vae: str, latent: str, dtype: str) -> stages.Encoder:
    """The one of this process."""
    return stages.Encoder(data, vae, latent, dtype)


class _Encoder(stages.Encoder):
    """An encoder that reports."""

    def __init__(self, data: DataConfig, vae: str, latent: str, dtype: str, meter: Any) -> None:
        super().__init__(data, vae, latent, dtype)
        self.meter = meter

    def __call__(self, decoded: pa.Table) -> pa.Table:
        rows = super().__call__(decoded)
        cluster.report(self.meter, "encode", rows, self.data.views, {"encode": ("encode_seconds",)})
        return rows


class _Committer:
    """`stages.commit` in a process that stays: a task comes so rarely that Ray would start one, and import torch, for
    every shard.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def __call__(self, encoded: pa.Table) -> pa.Table:
        return stages.commit(encoded, **self.settings)


def add_fields(dataset: Dataset, stores: Sequence[FieldStore], lock: Lock) -> dict[str, dict[str, Any]]:
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
    with doing(f"fields {', '.join(store.field for store in stores)}", total, "samples") as work:
        for shard in _execute_fields(sorted(todo.items()), dataset, stores) if todo else ():
            lock.check()
            done += shard["samples"]
            work.advance(shard["samples"])
            for stage in stage_seconds:
                stage_seconds[stage] += shard[f"{stage}_seconds"]
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
    from ray.data import DataContext

    cluster.connect()
    recipe = dataset.recipe
    found = pools.pools(recipe)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    names = sorted({name for _, wanted in todo for name in wanted})
    rows = pa.Table.from_pylist([{"shard": shard, "fields": wanted} for shard, wanted in todo], fields.TODO)
    size = max(1, min(_TASK_SHARDS, len(rows) // (4 * found.decoders)))
    blocks = [rows.slice(start, size).combine_chunks() for start in range(0, len(rows), size)]
    batches: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": 1}
    graph = ray.data.from_arrow(blocks).map_batches(
        fields.read, fn_kwargs={"dataset": dataset.uri, "recipe": recipe}, **batches, **found.decode
    )
    if fields.encoded(recipe.encoders) & set(names):
        graph = graph.map_batches(
            fields.Encoder,
            fn_constructor_kwargs={
                "fields": names,
                "encoders": _absolute(recipe.encoders),
                "dtype": encoder_dtype(recipe),
                "text_layers": method_class(recipe).text_layers(recipe),
            },
            **batches,
            **found.encode,
        )
    fingerprints = {store.field: store.fingerprint for store in stores}
    graph = graph.map_batches(
        fields.commit,
        fn_kwargs={"dataset": dataset.uri, "fingerprints": fingerprints},
        num_cpus=pools.COMMIT_CPUS,
        **batches,
    )
    yield from cluster.results(graph)


def _absolute(encoders: EncodersConfig) -> EncodersConfig:
    """Locations that mean the same in a worker, which has a working directory of its own."""
    places = {
        name: place if place.startswith("package:") else storage.absolute(place)
        for name in ("vae", "text_encoder", "tokenizer", "image_encoder", "flow")
        if (place := getattr(encoders, name)) is not None
    }
    return encoders.model_copy(update=places)


def _check_share(reasons: Mapping[str, int], clips: int, dataset: Dataset) -> None:
    refused = sum(reasons.values())
    allowed = dataset.recipe.data.max_quarantine_share
    if refused > allowed * clips:
        raise RunError(
            f"{refused} of {clips} clips are refused ({describe(reasons)}), more than data.max_quarantine_share = "
            f"{allowed:g} allows; see {storage.join(dataset.uri, 'quarantine')}"
        )
