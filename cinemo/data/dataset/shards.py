"""Shards on storage: deterministic tar files, their commit records, and the index of a finished dataset.

A shard is a plain USTAR tar of ``KEY.json`` and ``KEY.latents.npy`` members that ``tar`` and webdataset read. It exists
once its commit record does; the record says where every member lies, so that one sample is one range of bytes.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cinemo import checksums, storage
from cinemo.config import Shape
from cinemo.types import InputError, LatentSample, Refusal, check_schema

SCHEMA_VERSION = 1
SSIM_BINS = 1000  # of width 0.001 over 0..1: fine enough to cut motion buckets at quantiles
# What the JSON of every sample holds; a manifest's extra columns stand beside it.
SAMPLE_FIELDS = ("clip_id", "uri", "caption", "fps", "frame_interval", "start_frame", "ssim", "view")
_GROUP = 1000  # index rows of a row group
_BLOCK = tarfile.BLOCKSIZE
_READERS = 16
_NAME = tarfile.LENGTH_NAME
# A header without name, size and checksum, and the sum of its bytes with blanks for the latter.
_TEMPLATE = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_TEMPLATE_SUM = sum(_TEMPLATE) - sum(_TEMPLATE[124:136]) - sum(_TEMPLATE[148:156]) + 8 * ord(" ")
INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("samples", pa.int32()),
        ("quarantined", pa.int32()),
        ("recovered", pa.int32()),
        ("bytes", pa.int64()),
        ("checksum", pa.string()),  # in a file of sha256 alone, `sha256`
        ("ssim_sum", pa.float64()),
        ("ssim_min", pa.float64()),
        ("ssim_max", pa.float64()),
        ("ssim_histogram", pa.list_(pa.int32())),
        ("reasons", pa.string()),  # JSON: reason -> clips refused for it, less those that this shard recovered
        ("latent_shape", pa.list_(pa.int32())),
    ]
)


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}"


def tar_uri(dataset: str, shard: int) -> str:
    return storage.join(dataset, "shards", f"{shard_name(shard)}.tar")


def record_uri(dataset: str, shard: int) -> str:
    return storage.join(dataset, "shards", f"{shard_name(shard)}.json")


def ledger_uri(dataset: str, shard: int) -> str:
    return storage.join(dataset, "quarantine", f"{shard_name(shard)}.jsonl")


@dataclass(frozen=True)
class Members:
    """Where the samples of a shard lie in its tar: one entry a sample. ``array`` is past the .npy header."""

    keys: list[str]
    json_offset: list[int]
    json_size: list[int]
    array_offset: list[int]
    array_shape: list[int]


def pixels(latent_shape: Sequence[int]) -> Shape:
    """(frames, height, width) of the video whose latents are frames x channels x rows x columns."""
    frames, _, rows, columns = latent_shape
    return frames, 8 * rows, 8 * columns  # the VAE reduces each side by 8


def encode_tar(samples: Sequence[LatentSample]) -> tuple[list[bytes | memoryview], Members]:
    """The tar of some samples, in pieces to be written one after the other: equal samples give equal bytes.

    Latents are float16, all of one shape, and are not copied.
    """
    shape = list(samples[0].latents_FCHW.shape) if samples else []
    members = Members([], [], [], [], shape)
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)})
    array_header = npy.getvalue()
    pieces: list[bytes | memoryview] = []
    written, padding = 0, b""
    for sample in samples:
        array = np.ascontiguousarray(sample.latents_FCHW)
        if array.dtype != np.float16 or list(array.shape) != shape:
            raise ValueError(f"{sample.key}: latents are {array.dtype} {array.shape}, expected float16 and one shape")
        text = json.dumps(sample_metadata(sample), sort_keys=True, ensure_ascii=False).encode()
        size = len(array_header) + array.nbytes
        before = padding + _tar_header(f"{sample.key}.json", len(text))
        head = (
            before + text + bytes(-len(text) % _BLOCK) + _tar_header(f"{sample.key}.latents.npy", size) + array_header
        )
        padding = bytes(-size % _BLOCK)
        pieces += [head, array.data.cast("B")]
        members.keys.append(sample.key)
        members.json_offset.append(written + len(before))
        members.json_size.append(len(text))
        members.array_offset.append(written + len(head))
        written += len(head) + array.nbytes
    return [*pieces, padding + bytes(2 * _BLOCK)], members


def _tar_header(name: str, size: int) -> bytes:
    """What tarfile makes of it, twenty times as fast: only name, size and checksum differ between members."""
    name_bytes, size_bytes = name.encode(), b"%011o" % size
    if len(name_bytes) > _NAME or size >= 8**11:
        raise ValueError(f"{name} of {size} bytes: USTAR allows names of at most {_NAME} bytes and members below 8 GiB")
    checksum = _TEMPLATE_SUM + sum(name_bytes) + sum(size_bytes)
    name_bytes = name_bytes.ljust(_NAME, b"\0")
    return b"".join(
        [name_bytes, _TEMPLATE[100:124], size_bytes, _TEMPLATE[135:148], b"%06o\0 " % checksum, _TEMPLATE[156:]]
    )


def sample_metadata(sample: LatentSample) -> dict[str, Any]:
    """What ``KEY.json`` says."""
    return {**sample.extra, **{name: getattr(sample, name) for name in SAMPLE_FIELDS}}


def read_sample(tar: memoryview, members: Members, index: int) -> LatentSample:
    """One sample out of a shard's bytes; the latents are a view of them."""
    start, count = members.array_offset[index], math.prod(members.array_shape)
    latents_FCHW = np.frombuffer(tar, "<f2", count, start).reshape(members.array_shape)
    place = members.json_offset[index]
    metadata = json.loads(str(tar[place : place + members.json_size[index]], "utf-8"))
    return _sample(members.keys[index], latents_FCHW, metadata)


def _sample(key: str, latents_FCHW: np.ndarray, metadata: dict[str, Any]) -> LatentSample:
    known = {name: metadata.pop(name) for name in SAMPLE_FIELDS}
    return LatentSample(key=key, latents_FCHW=latents_FCHW, **known, extra=metadata)


def read_metadata(dataset: str, shard: int, members: Members) -> list[dict[str, Any]]:
    """What ``KEY.json`` says, for all samples of a shard, without reading their latents."""
    uri = tar_uri(dataset, shard)
    with ThreadPoolExecutor(_READERS if storage.is_remote(uri) else 1) as pool:
        texts = pool.map(lambda *place: storage.read_bytes(uri, *place), members.json_offset, members.json_size)
        return [json.loads(text) for text in texts]


def fetch_sample(dataset: str, shard: int, members: Members, index: int) -> LatentSample:
    """One sample by two ranges of bytes, for whoever needs only a few of a shard."""
    uri, size = tar_uri(dataset, shard), 2 * math.prod(members.array_shape)
    metadata = json.loads(storage.read_bytes(uri, members.json_offset[index], members.json_size[index]))
    latents = np.frombuffer(storage.read_bytes(uri, members.array_offset[index], size), "<f2")
    return _sample(members.keys[index], latents.reshape(members.array_shape), metadata)


def commit(
    dataset: str,
    shard: int,
    samples: Sequence[LatentSample],
    refusals: Sequence[Refusal],
    fingerprint: str,
    retry_of: Mapping[str, tuple[int, str]] | None = None,
    checksum: str = checksums.DEFAULT,
) -> dict[str, Any]:
    """Write a shard: tar, ledger, and last the record that makes it exist. Returns the record.

    Args:
        checksum: the algorithm; one for all shards of a dataset.
        retry_of: the clips of this shard that an earlier one refused: clip id -> (shard, reason).
    """
    tar, members = encode_tar(samples)
    storage.write_bytes(tar_uri(dataset, shard), tar)
    write_ledger(dataset, shard, refusals)
    record = {
        "shard": shard,
        "fingerprint": fingerprint,
        "samples": len(samples),
        "quarantined": len(refusals),
        "reasons": dict(Counter(refusal.reason for refusal in refusals)),
        "retry_of": {clip_id: {"shard": number, "reason": why} for clip_id, (number, why) in (retry_of or {}).items()},
        "bytes": sum(map(len, tar)),
        **checksums.entry(checksums.checksum(tar, checksum)),
        "ssim": ssim_statistics([sample.ssim for sample in samples]),
        "members": asdict(members),
    }
    # Compact: a record is one line of a few kilobytes and is read by machines.
    storage.write_bytes(record_uri(dataset, shard), json.dumps(record, sort_keys=True).encode() + b"\n")
    return record


def ssim_statistics(scores: Sequence[float]) -> dict[str, Any]:
    """What a record says of its samples' motion scores."""
    values = np.array(scores, np.float64)
    return {
        "sum": float(values.sum()),
        "min": float(values.min()) if len(values) else None,
        "max": float(values.max()) if len(values) else None,
        "histogram": np.histogram(values.clip(0, 1), SSIM_BINS, (0, 1))[0].tolist(),
    }


def write_ledger(dataset: str, shard: int, refusals: Sequence[Refusal]) -> None:
    """The refused clips of a shard, one JSON line each; no file where none was refused."""
    uri = ledger_uri(dataset, shard)
    lines = "".join(json.dumps(asdict(refusal), sort_keys=True, ensure_ascii=False) + "\n" for refusal in refusals)
    if lines:
        storage.write_bytes(uri, lines.encode())
    else:
        storage.remove(uri)


def read_ledger(dataset: str, shard: int) -> list[Refusal]:
    try:
        lines = storage.read_bytes(ledger_uri(dataset, shard)).decode().splitlines()
    except FileNotFoundError:
        return []
    return [Refusal(**json.loads(line)) for line in lines]


def index_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """What ``index.parquet`` says of a shard."""
    reasons = Counter(record["reasons"])
    reasons.subtract(Counter(value["reason"] for value in record["retry_of"].values()))
    return {
        **{name: record[name] for name in ("shard", "samples", "quarantined", "bytes")},
        "checksum": checksums.recorded(record),
        "recovered": len(record["retry_of"]),
        **{f"ssim_{name}": value for name, value in record["ssim"].items()},
        "reasons": json.dumps(reasons, sort_keys=True),
        "latent_shape": record["members"]["array_shape"],
    }


def index_bytes(records: Sequence[Mapping[str, Any]]) -> bytes:
    """``index.parquet`` of some commit records: one narrow row for each shard, ordered by shard."""
    rows = sorted(map(index_row, records), key=lambda row: row["shard"])
    return index_table_bytes(pa.Table.from_pylist(rows, INDEX_SCHEMA))


def index_table_bytes(table: pa.Table) -> bytes:
    """``index.parquet`` of index rows in order: the same bytes however the table came together."""
    sink = io.BytesIO()
    schema = INDEX_SCHEMA
    if all(checksums.algorithm_of(checksum) == checksums.SHA256 for checksum in table["checksum"][:1].to_pylist()):
        names = [checksums.SHA256 if name == "checksum" else name for name in schema.names]
        table, schema = (
            table.rename_columns(names),
            pa.schema([f.with_name(n) for f, n in zip(schema, names, strict=True)]),
        )
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for start in range(0, max(1, len(table)), _GROUP):
            writer.write_table(table.slice(start, _GROUP).combine_chunks())
    return sink.getvalue()


def index_table(content: bytes) -> pa.Table:
    """The inverse of `index_table_bytes`; also of what holds some of its rows."""
    table = pq.read_table(pa.BufferReader(content))
    names = ["checksum" if name == checksums.SHA256 else name for name in table.column_names]
    return table.rename_columns(names).replace_schema_metadata(table.schema.metadata)


@dataclass(frozen=True)
class DatasetIndex:
    """A finished dataset: what a trainer reads before it opens a shard.

    ``info`` is ``dataset.json``; ``table`` is ``index.parquet``, one row a shard.
    """

    uri: str
    info: dict[str, Any]
    table: pa.Table

    @classmethod
    def load(cls, uri: str) -> DatasetIndex:
        """Read two files, list nothing.

        Raises:
            InputError: no dataset there, or one that precompute has not finished.
        """
        place = storage.join(uri, "dataset.json")
        try:
            info = storage.read_json(place)
        except (FileNotFoundError, NotADirectoryError) as error:
            if isinstance(error, InputError):  # no such bucket
                raise
            why = "dataset.json is missing" if storage.is_remote(uri) or storage.exists(uri) else "no such directory"
            raise InputError(f"{uri}: no dataset there ({why}); make one with precompute.py") from None
        except ValueError as error:
            raise InputError(f"{place}: not JSON ({error})") from None
        if not isinstance(info, dict) or info.get("schema") != SCHEMA_VERSION:
            check_schema(info.get("schema") if isinstance(info, dict) else None, SCHEMA_VERSION, place)
            raise InputError(f"{place}: is no record of a dataset; make one with precompute.py")
        if not info["complete"]:
            raise InputError(f"{uri}: the dataset is not complete; run the same precompute.py command to finish it")
        table = index_table(storage.read_bytes(storage.join(uri, "index.parquet")))
        if not info["samples"]:
            raise InputError(f"{uri}: the dataset has no samples: all {info['quarantined']} clips were refused")
        return cls(uri, info, table)

    def first(self, shards: int) -> DatasetIndex:
        """The dataset as it was when it had so many shards: whatever is added goes behind them."""
        return replace(self, table=self.table.slice(0, shards))

    def of_shape(self, latent_shape: Sequence[int]) -> DatasetIndex:
        """Its shards of one shape."""
        same = [shape == list(latent_shape) for shape in self.table["latent_shape"].to_pylist()]
        return replace(self, table=self.table.filter(pa.array(same, pa.bool_())))

    @property
    def latent_shapes(self) -> list[tuple[int, ...]]:
        """All shapes that there are samples of, in the order of their first shards."""
        if "latent_shape" not in self.table.column_names:  # of the first versions
            return [tuple(self.info["latent_shape"])]
        rows = zip(self.table["latent_shape"].to_pylist(), self.table["samples"].to_pylist(), strict=True)
        return list(dict.fromkeys(tuple(shape) for shape, samples in rows if samples))

    @property
    def shards(self) -> list[int]:
        return [int(shard) for shard in self.table["shard"].to_pylist()]

    @property
    def samples_of_shards(self) -> np.ndarray:
        """Samples in each shard, in the order of `shards`."""
        return np.asarray(self.table["samples"], np.int64)

    @property
    def views(self) -> int:
        """Samples of each clip; they lie side by side in a shard."""
        return int(self.info.get("recipe", {}).get("data", {}).get("views", 1))

    @property
    def ssim_histogram(self) -> np.ndarray:
        """Samples in each of `SSIM_BINS` equal bins of mean SSIM over 0..1."""
        histograms = self.table["ssim_histogram"].combine_chunks().flatten().to_numpy()
        return np.asarray(histograms.reshape(-1, SSIM_BINS).sum(0, dtype=np.int64))
