"""The steps of precompute as plain functions from rows to rows; whatever runs them is no business of theirs.

A row is one view of one clip. A clip that cannot be used keeps its rows, with the fault in ``stage``, ``reason`` and
``detail`` and without frames or latents: so every shard always has the number of rows that was planned.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import torch

from cinemo import checksums
from cinemo.config import DataConfig
from cinemo.data.dataset import columns, shards
from cinemo.media.guard import Decode, Guard, Views
from cinemo.media.motion import adjacent_ssim
from cinemo.media.scores import clip_scores
from cinemo.media.sources import Sources, naming_source
from cinemo.media.video import decode_windows
from cinemo.networks.frozen import Vae
from cinemo.networks.memory import keep_freed_memory
from cinemo.networks.transfer import pipelined
from cinemo.types import Clip, ClipError, LatentSample, Refusal, keyed_generator

# A planned clip (`Plan.rows`), once for each view, and what the stages add to it.
_CLIP = [
    ("shard", pa.int32()),
    ("shard_clips", pa.int32()),
    ("position", pa.int64()),
    ("video_shape", pa.list_(pa.int32())),  # frames, height, width; null: the recipe's own
    ("clip_id", pa.string()),
    ("uri", pa.string()),
    ("caption", pa.string()),
    ("start", pa.float64()),
    ("end", pa.float64()),
    ("extra", pa.string()),
]
_FAULT = [("stage", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
_VIEW = [("view", pa.int32()), ("fps", pa.float64()), ("frame_interval", pa.int32()), ("start_frame", pa.int64())]
_SECONDS = [("decode_seconds", pa.float64()), ("score_seconds", pa.float64()), ("encode_seconds", pa.float64())]
_ROW = [*_CLIP, *_VIEW, ("ssim", pa.float64()), ("scores", pa.string()), *_FAULT, *_SECONDS]
DECODED = pa.schema([*_ROW, ("frames", pa.large_binary())])
ENCODED = pa.schema([*_ROW, ("latents", pa.large_binary()), ("shape", pa.list_(pa.int32()))])
COMMITTED = pa.schema(
    [
        ("shard", pa.int32()),
        ("clips", pa.int32()),
        ("samples", pa.int32()),
        ("quarantined", pa.int32()),
        ("bytes", pa.int64()),
        ("reasons", pa.string()),
        ("index", pa.string()),  # JSON of `shards.index_row`; null where no shard was written
        *_SECONDS,
        ("commit_seconds", pa.float64()),
    ]
)

Row = dict[str, Any]


def use_one_thread() -> None:
    """Many workers share a machine, and one thread each also makes their arithmetic the same everywhere."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def decode(clips: pa.Table, data: DataConfig, decode: Decode = decode_windows) -> pa.Table:
    """Planned clips -> ``data.views`` rows each, with frames (uint8 ``FHWC``), decoded in a process beside this one.

    Clips of one source, one after another, are fetched once and decoded in one pass.
    """
    use_one_thread()
    guard = _guard(data, decode)
    data = of_block(clips, data)
    rows: list[Row] = []
    frames_NFHWC = np.empty((clips.num_rows * data.views, data.frames, *data.size, 3), np.uint8)
    count = 0
    with Sources() as sources:
        for uri, group in itertools.groupby(clips.to_pylist(), key=lambda planned: planned["uri"]):
            started = time.perf_counter()
            same = list(group)
            names = ("clip_id", "uri", "caption", "start", "end")
            windows = [Clip(**{name: planned[name] for name in names}) for planned in same]
            for planned, found in zip(same, _windows(sources, guard, uri, windows, data), strict=True):
                views = [_fault(found)] * data.views if isinstance(found, ClipError) else []
                for view in found if isinstance(found, list) else ():
                    frames_NFHWC[count] = view.frames_FHWC
                    count += 1
                    views.append({name: getattr(view, name) for name in ("fps", "frame_interval", "start_frame")})
                seconds = {"score_seconds": 0.0, "encode_seconds": 0.0}
                rows += [{**planned, **view, "view": number, **seconds} for number, view in enumerate(views)]
            spent = (time.perf_counter() - started) / (len(same) * data.views)
            for row in rows[-len(same) * data.views :]:
                row["decode_seconds"] = spent
    valid = np.array([row.get("reason") is None for row in rows], bool)
    offsets = np.append(0, np.cumsum(valid * frames_NFHWC[:1].nbytes)).astype(np.int64)
    buffers = [pa.array(valid).buffers()[1], pa.py_buffer(offsets), pa.py_buffer(frames_NFHWC[:count])]
    frames = pa.Array.from_buffers(pa.large_binary(), len(rows), buffers)  # without a copy
    return pa.Table.from_pylist(rows, pa.schema(_ROW)).append_column(DECODED.field("frames"), frames)


def _windows(sources: Sources, guard: Guard, uri: str, clips: list[Clip], data: DataConfig) -> Iterator[Views]:
    """The views of some clips of one source, or why each is refused."""
    try:
        # Fetched here, so that the time limit is the decoder's and not the storage's.
        with sources.file(uri) as path:
            for views in guard.windows(path, clips, data):
                yield naming_source(views, path, uri) if isinstance(views, ClipError) else views
    except ClipError as error:
        yield from [error] * len(clips)


def of_block(rows: pa.Table, data: DataConfig) -> DataConfig:
    """The settings for rows of one shape."""
    found = rows["video_shape"][0].as_py() if "video_shape" in rows.column_names else None
    return data if found is None else data.of_shape(found)


@functools.lru_cache(maxsize=1)
def _guard(data: DataConfig, decode: Decode) -> Guard:
    return Guard(data, decode)


def score(decoded: pa.Table, data: DataConfig) -> pa.Table:
    """Fill in ``ssim`` (Cinemo eq. 2) and, where the recipe asks for them, ``scores`` (JSON of `clip_scores`)."""
    use_one_thread()
    means, scores, seconds = [], [], []
    for row in _rows(decoded, "frames"):
        started = time.perf_counter()
        mean = found = None
        if not row["reason"]:
            frames_FHWC = _pixels(row, data)
            mean, lowest = adjacent_ssim(frames_FHWC, data.ssim)
            found = json.dumps(clip_scores(frames_FHWC, lowest)) if data.scores else None
        means.append(mean)
        scores.append(found)
        seconds.append(time.perf_counter() - started)
    for name, values in (("ssim", means), ("scores", scores), ("score_seconds", seconds)):
        field = DECODED.field(name)
        decoded = decoded.set_column(decoded.schema.get_field_index(name), field, pa.array(values, field.type))
    return decoded


class Encoder:
    """Frames -> float16 latents. Holds a frozen VAE; build one in each process that encodes.

    Every view is encoded alone with noise of its own, so that its bytes depend on nothing beside it.
    """

    def __init__(self, data: DataConfig, vae: str, latent: str, dtype: str) -> None:
        use_one_thread()
        device = "cuda" if data.encode_gpus > 0 else "cpu"
        if device == "cpu":
            keep_freed_memory()
        self.data, self.latent = data, latent
        self.vae = Vae(vae, device, getattr(torch, dtype))

    def __call__(self, decoded: pa.Table) -> pa.Table:
        rows = list(_rows(decoded, "frames"))
        views = [(_pixels(row, self.data), row["clip_id"], row["view"]) for row in rows if not row["reason"]]
        encoded = self._encoded(views)
        for row in rows:
            started = time.perf_counter()
            if not row["reason"]:
                latents_FCHW = next(encoded)
                try:
                    _check(latents_FCHW)
                    row |= {"latents": latents_FCHW, "shape": latents_FCHW.shape}
                except ClipError as error:
                    row |= _fault(error)
            row["encode_seconds"] = time.perf_counter() - started
        return _table(rows, ENCODED, "latents")

    def encode(self, frames_FHWC: np.ndarray, clip_id: str, view: int) -> np.ndarray:
        """Scaled latents, ``FCHW`` float16, of one view."""
        [latents_FCHW] = self._encoded([(frames_FHWC, clip_id, view)])
        _check(latents_FCHW)
        return latents_FCHW

    def _encoded(self, views: Sequence[tuple[np.ndarray, str, int]]) -> Iterator[np.ndarray]:
        keys = iter([(clip_id, view) for _, clip_id, view in views])

        def latents(frames_FHWC: torch.Tensor) -> torch.Tensor:
            generator = keyed_generator(self.data.seed, *next(keys), "posterior") if self.latent == "sample" else None
            frames_FCHW = frames_FHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
            return self.vae.encode(frames_FCHW, generator).to(torch.float16)

        # Frames go up as bytes, a quarter of what floats would be, and become floats there.
        frames = (torch.tensor(frames_FHWC) for frames_FHWC, _, _ in views)
        for latents_FCHW in pipelined(frames, latents, self.vae.network.device):
            yield np.ascontiguousarray(latents_FCHW.numpy())


def _check(latents_FCHW: np.ndarray) -> None:
    if not np.isfinite(latents_FCHW).all():
        raise ClipError("encode", "not_finite", "latents exceed the range of float16")


def commit(
    encoded: pa.Table,
    dataset: str,
    fingerprint: str,
    views: int,
    retried: Mapping[str, tuple[int, str]] | None = None,
    checksum: str = checksums.DEFAULT,
) -> pa.Table:
    """All rows of one planned shard -> that shard on storage, and one row of totals.

    A clip with a refused view is refused as a whole.

    Args:
        checksum: the dataset's algorithm.
        retried: in a retry, the clips that earlier shards refused: clip id -> (shard, reason). Those that fail again
            stay in that shard's ledger, and a shard without a success is not written.
    """
    started = time.perf_counter()
    rows = list(_rows(encoded, "latents"))
    shard, expected = rows[0]["shard"], rows[0]["shard_clips"] * views
    order = [(row["position"], row["view"]) for row in rows]
    if len(rows) != expected or {row["shard"] for row in rows} != {shard} or order != sorted(set(order)):
        found = Counter(row["shard"] for row in rows)
        raise AssertionError(f"shard {shard}: expected its {expected} rows in order, got rows of shards {dict(found)}")
    refused: dict[str, Refusal] = {}
    for row in rows:
        if row["reason"]:
            fault = Refusal(row["clip_id"], row["uri"], row["stage"], row["reason"], row["detail"])
            refused.setdefault(row["clip_id"], fault)
    samples = [_sample(row) for row in rows if row["clip_id"] not in refused]
    record = None
    if samples or retried is None:
        clips = {row["clip_id"]: row for row in rows}
        ranges = {clip_id: {name: row[name] for name in ("start", "end")} for clip_id, row in clips.items()}
        named = [{name: clips[clip_id][name] for name in ("clip_id", "uri", "caption")} for clip_id in refused]
        columns.write(
            dataset,
            shard,
            [{**shards.sample_metadata(sample), **ranges[sample.clip_id]} for sample in samples],
            [{**clip, **ranges[clip["clip_id"]]} for clip in named] if retried is None else [],
        )
    if retried is None:
        record = shards.commit(dataset, shard, samples, list(refused.values()), fingerprint, checksum=checksum)
    elif samples:
        recovered = {sample.clip_id: retried[sample.clip_id] for sample in samples}
        record = shards.commit(dataset, shard, samples, [], fingerprint, recovered, checksum)
    totals = {
        "shard": shard,
        "clips": rows[0]["shard_clips"],
        "samples": len(samples),
        "quarantined": len(refused),
        "bytes": record["bytes"] if record else 0,
        "reasons": json.dumps(Counter(refusal.reason for refusal in refused.values())),
        "index": json.dumps(shards.index_row(record)) if record else None,
        **{name: sum(row[name] for row in rows) for name, _ in _SECONDS},
        "commit_seconds": time.perf_counter() - started,
    }
    return pa.Table.from_pylist([totals], COMMITTED)


def _sample(row: Row) -> LatentSample:
    extra, scores = json.loads(row["extra"] or "{}"), json.loads(row["scores"] or "{}")
    return LatentSample(
        key=f"{row['position']:09d}-{row['view']}",
        latents_FCHW=np.frombuffer(row["latents"], np.float16).reshape(row["shape"]),
        extra={f"manifest_{name}" if name in scores else name: value for name, value in extra.items()} | scores,
        **{
            name: row[name]
            for name in ("clip_id", "uri", "caption", "ssim", "fps", "frame_interval", "start_frame", "view")
        },
    )


def _fault(error: ClipError) -> Row:
    return {"stage": error.stage, "reason": error.reason, "detail": error.detail}


def _pixels(row: Row, data: DataConfig) -> np.ndarray:
    return np.frombuffer(row["frames"], np.uint8).reshape(*(row["video_shape"] or data.shapes[0]), 3)


def _rows(table: pa.Table, heavy: str) -> Iterator[Row]:
    """Rows as dictionaries; the ``heavy`` column stays where it is (a buffer, or None)."""
    for row, value in zip(table.drop_columns([heavy]).to_pylist(), table[heavy], strict=True):
        yield {**row, heavy: value.as_buffer() if value.is_valid else None}


def _table(rows: list[Row], schema: pa.Schema, heavy: str) -> pa.Table:
    """The inverse of `_rows`, for arrays in the ``heavy`` column."""
    columns = [
        [None if (value := row.get(name)) is None else memoryview(value).cast("B") for row in rows]
        if name == heavy
        else [row.get(name) for row in rows]
        for name in schema.names
    ]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)
