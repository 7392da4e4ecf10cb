"""Fields beside the latents, in tars of their own: one for each shard, whose samples they name by the same keys.

A sidecar exists once its commit record does, and shards know nothing of it: a field can be added to a finished dataset,
or removed with its directory.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from cinemo import checksums, storage
from cinemo.cache import Damaged, FileCache
from cinemo.data.dataset.identity import differences
from cinemo.data.dataset.shards import DatasetIndex, shard_name
from cinemo.types import InputError

SCHEMA_VERSION = 1
EXTENSIONS = {"text_states": "npy", "image_tokens": "npy", "frame_tokens": "npy", "flow": "npy"} | {
    "first_frame": "jpg",
    "frames": "jpg",
}
_READERS = 16
_BLOCK = tarfile.BLOCKSIZE


def directory(dataset: str, field: str) -> str:
    return storage.join(dataset, "fields", field)


def info_uri(dataset: str, field: str) -> str:
    return f"{directory(dataset, field)}.json"


def tar_uri(dataset: str, field: str, shard: int) -> str:
    return storage.join(directory(dataset, field), f"{shard_name(shard)}.tar")


def record_uri(dataset: str, field: str, shard: int) -> str:
    return storage.join(directory(dataset, field), f"{shard_name(shard)}.json")


@dataclass
class FieldStore:
    """One field of a dataset in the making. ``stored`` is ``fields/FIELD.json`` as it lies there."""

    dataset: str
    field: str
    fingerprint: str
    covers: dict[str, Any]
    stored: dict[str, Any] | None

    @classmethod
    def open(cls, dataset: str, field: str, fingerprint: str, covers: dict[str, Any]) -> FieldStore:
        """Look at a field without changing it.

        Raises:
            InputError: it was made from something else.
        """
        place = info_uri(dataset, field)
        stored = None
        if storage.exists(place):
            try:
                stored = storage.read_json(place)
                different = differences(stored["computed_from"], covers)
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{place}: not a field written by this program; remove it and its directory") from None
            if different:
                raise InputError(
                    f"{dataset}: holds another {field}: {'; '.join(different)}; "
                    f"remove {directory(dataset, field)} and {place} to make it again"
                )
        return cls(dataset, field, fingerprint, covers, stored)

    def missing(self, shards: Iterable[int]) -> list[int]:
        """Shards without a committed sidecar; a field that is complete is not listed."""
        numbers = sorted(shards)
        if self.stored and self.stored["complete"] and self.stored["shards"] == len(numbers):
            return []
        names = set(storage.names(directory(self.dataset, self.field)))
        return [n for n in numbers if not {f"{shard_name(n)}.json", f"{shard_name(n)}.tar"} <= names]

    def begin(self) -> None:
        """Say that the field is not complete, before the first shard of it is written. One that was complete stays so
        for the shards that it covers.
        """
        if not (self.stored and self.stored["complete"]):
            self._store({"complete": False})

    def finish(self, shards: Iterable[int]) -> dict[str, Any]:
        """Write ``fields/FIELD.json`` from the records of all sidecars; returns it."""
        numbers = sorted(shards)
        if not (self.stored and self.stored["complete"] and self.stored["shards"] == len(numbers)):
            with ThreadPoolExecutor(_READERS) as pool:
                records = list(pool.map(lambda n: storage.read_json(record_uri(self.dataset, self.field, n)), numbers))
            self._store({**totals(records), "complete": True})
            storage.sweep(storage.join(self.dataset, "fields"), self.field)
        assert self.stored is not None
        return self.stored

    def _store(self, values: dict[str, Any]) -> None:
        content = {
            "schema": SCHEMA_VERSION,
            "field": self.field,
            "fingerprint": self.fingerprint,
            "computed_from": self.covers,
            **totals([]),
            **values,
        }
        if content != self.stored:
            storage.write_json(info_uri(self.dataset, self.field), content)
            self.stored = content


def totals(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``fields/FIELD.json`` says of all records together."""
    missing: Counter[str] = Counter()
    for record in records:
        missing.update(record["missing"])
    return {
        "shards": len(records),
        "samples": sum(record["samples"] for record in records),
        "missing": dict(missing),
        "bytes": sum(record["bytes"] for record in records),
    }


def stored_info(dataset: str, field: str) -> dict[str, Any] | None:
    """``fields/FIELD.json``; None where the dataset has no such field."""
    try:
        return dict(storage.read_json(info_uri(dataset, field)))
    except FileNotFoundError:
        return None


def require(index: DatasetIndex, field: str) -> None:
    """Refuse a dataset that lacks a field, or has it for some of its shards only.

    Raises:
        InputError: saying what makes it.
    """
    advice = f"run the same precompute.py command with --set data.fields='[\"{field}\"]'"
    info = stored_info(index.uri, field)
    if info is None:
        raise InputError(f"{index.uri}: has no field {field}; {advice}")
    if not info["complete"] or info["shards"] < len(index.shards):
        covered = f"it covers {info['shards']} of {len(index.shards)} shards"
        raise InputError(f"{index.uri}: field {field} is not complete, {covered}; {advice}")


def commit(
    dataset: str,
    field: str,
    shard: int,
    shard_checksum: str,
    values: Mapping[str, bytes],
    missing: Mapping[str, int],
    fingerprint: str,
) -> dict[str, Any]:
    """Write the sidecar of a shard: the tar, and last the record that makes it exist. Returns the record.

    Args:
        values: the member of each sample that has one: key -> content.
        missing: how many samples have none, by reason.
    """
    tar, offsets = encode_tar([(f"{key}.{field}.{EXTENSIONS[field]}", value) for key, value in values.items()])
    storage.write_bytes(tar_uri(dataset, field, shard), tar)
    record = {
        "shard": shard,
        **checksums.entry(shard_checksum, "shard_"),
        "fingerprint": fingerprint,
        "samples": len(values),
        "missing": dict(missing),
        "bytes": len(tar),
        **checksums.entry(checksums.checksum([tar], checksums.algorithm_of(shard_checksum))),
        "members": {"keys": list(values), "offset": offsets, "size": [len(value) for value in values.values()]},
    }
    line = json.dumps(record, sort_keys=True).encode() + b"\n"
    storage.write_bytes(record_uri(dataset, field, shard), line)
    return record


def encode_tar(members: Sequence[tuple[str, bytes]]) -> tuple[bytes, list[int]]:
    """A plain USTAR tar of named members, and where each one's content begins. Equal members give equal bytes."""
    parts: list[bytes] = []
    offsets, place = [], 0
    for name, content in members:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        padding = bytes(-len(content) % _BLOCK)
        parts += [info.tobuf(tarfile.USTAR_FORMAT), content, padding]
        offsets.append(place + _BLOCK)
        place += _BLOCK + len(content) + len(padding)
    return b"".join([*parts, bytes(2 * _BLOCK)]), offsets


@dataclass(frozen=True)
class Sidecar:
    """A field of one shard, open for reading."""

    field: str
    tar: memoryview
    places: dict[str, tuple[int, int]]  # key -> offset and size

    @classmethod
    def open(cls, dataset: str, field: str, shard: int, shard_checksum: str, check: bool, cache: FileCache) -> Sidecar:
        """Map a sidecar (from s3:// through the cache) and compare it with its record.

        Args:
            shard_checksum: of the shard that it must belong to.
            check: whether to read all of it for its checksum.

        Raises:
            Damaged: it is missing, its bytes are not those of its record, or it was made for another shard.
        """
        uri, place = tar_uri(dataset, field, shard), record_uri(dataset, field, shard)
        again = f"run precompute.py again with --set data.fields='[\"{field}\"]'"
        try:
            record = storage.read_json(place)
            tar = cache.map(uri, checksums.recorded(record), record["bytes"], check)
            if (made_for := checksums.recorded(record, "shard_")) != shard_checksum:
                shown = checksums.brief(shard_checksum), checksums.brief(made_for)
                raise Damaged(f"{uri}: the shard has {shown[0]}, its record says {shown[1]}")
        except Damaged as error:
            raise Damaged(f"{error}; remove {place} and {info_uri(dataset, field)} and {again}") from None
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise Damaged(
                f"{uri}: the sidecar or its record cannot be read ({error}); "
                f"remove {info_uri(dataset, field)} and {again}"
            ) from None
        members = record["members"]
        places = zip(members["offset"], members["size"], strict=True)
        return cls(field, tar, dict(zip(members["keys"], places, strict=True)))

    def read(self, key: str) -> np.ndarray | bytes | None:
        """A sample's array (a view of the tar), or the bytes of its picture; None where it has no member."""
        if key not in self.places:
            return None
        offset, size = self.places[key]
        content = self.tar[offset : offset + size]
        return read_array(content) if EXTENSIONS[self.field] == "npy" else bytes(content)


def array_bytes(array: np.ndarray) -> bytes:
    """The .npy file of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_array(content: memoryview) -> np.ndarray:
    """The array of a .npy file, without a copy."""
    head = io.BytesIO(bytes(content[:128]))
    np.lib.format.read_magic(head)
    shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    return np.frombuffer(content, dtype, offset=head.tell()).reshape(shape)
