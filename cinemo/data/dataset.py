"""A dataset while it is being made: what is already there, what is missing, what may be tried again, how it is closed.

The commit records decide. ``dataset.json`` and ``index.parquet`` are made from them and from the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data import shards
from cinemo.data.identity import differences, fingerprint
from cinemo.data.plan import Plan
from cinemo.types import InputError, Refusal

_READERS = 16


@dataclass
class Dataset:
    """The state of one output. ``records`` are the commit records by shard; those past the plan's come from retries."""

    uri: str
    recipe: Recipe
    plan: Plan
    fingerprint: str
    covers: dict[str, Any]
    identity: dict[str, Any]
    stored: dict[str, Any] | None
    records: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, uri: str, recipe: Recipe, plan: Plan) -> Dataset:
        """Look at an output without changing it.

        Raises:
            InputError: it cannot be written, or belongs to another recipe or manifest.
        """
        digest, covers = fingerprint(recipe)
        identity = plan.identity()
        place = storage.join(uri, "dataset.json")
        stored = None
        if storage.exists(place):
            try:
                stored = storage.read_json(place)
                different = differences(stored["computed_from"], covers) + differences(stored["plan"], identity)
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{place}: not a dataset.json of this program; choose another --output") from None
            if different:
                raise InputError(f"{uri}: holds another dataset: {'; '.join(different)}; choose another --output")
        else:
            storage.check_writable(uri)
        dataset = cls(uri, recipe, plan, digest, covers, identity, stored)
        dataset._read_records()
        return dataset

    def missing_shards(self) -> list[int]:
        return [shard for shard in range(self.plan.shards) if shard not in self.records]

    def retryable(self, reason: str) -> dict[str, tuple[int, str]]:
        """Clips still refused for ``reason`` (any reason for ``""``): clip id -> (shard, reason).

        Raises:
            InputError: none was refused for that reason.
        """
        refused = {refusal.clip_id: (shard, refusal.reason) for shard, refusal in self._refusals()}
        found = {clip_id: value for clip_id, value in refused.items() if reason in ("", value[1])}
        if reason and not found:
            known = ", ".join(sorted({why for _, why in refused.values()})) or "none"
            raise InputError(f"--retry-quarantine {reason}: no clip is refused for that; reasons there: {known}")
        return found

    def rows_to_retry(self, refused: dict[str, tuple[int, str]]) -> pa.Table:
        """Planned rows of refused clips, in plan order, for new shards after the last one."""
        positions: list[int] = []
        for shard in sorted({shard for shard, _ in refused.values()}):
            rows = self.plan.rows([shard])
            ids = rows["clip_id"].to_pylist()
            positions += [p for p, clip_id in zip(rows["position"].to_pylist(), ids, strict=True) if clip_id in refused]
        first = max(self.records, default=-1) + 1
        numbers = first + np.arange(len(positions)) // self.plan.clips_per_shard
        return self.plan.take(np.array(positions, np.int64), numbers)

    def begin(self) -> None:
        """Say that the dataset is not complete. A finished one that only gains shards stays complete."""
        if self.missing_shards() or self.stored is None:
            self._store({"complete": False})

    def summarize(self) -> dict[str, Any]:
        """Totals over all commit records, those of this run included."""
        self._read_records()
        records = list(self.records.values())
        reasons: Counter[str] = Counter()
        for record in records:
            reasons.update(record["reasons"])
            reasons.subtract(Counter(value["reason"] for value in record["retry_of"].values()))
        shapes = {tuple(record["members"]["array_shape"]) for record in records if record["samples"]}
        return {
            "clips": self.identity["clips"],
            "samples": sum(record["samples"] for record in records),
            "quarantined": reasons.total(),
            "reasons": {reason: count for reason, count in sorted(reasons.items()) if count},
            "shards": len(records),
            "bytes": sum(record["bytes"] for record in records),
            "latent_shape": list(shapes.pop()) if shapes else None,
        }

    def finish(self, summary: dict[str, Any]) -> None:
        """Write what readers need; files whose content is already right are left alone."""
        for shard in sorted({value["shard"] for value in self._recovered().values()}):
            # The ledger lists only what is still refused; the shard's own record keeps its history.
            kept = [refusal for _, refusal in self._refusals([shard])]
            if len(kept) != len(shards.read_ledger(self.uri, shard)):
                shards.write_ledger(self.uri, shard, kept)
        table = shards.index_bytes(list(self.records.values()))
        place = storage.join(self.uri, "index.parquet")
        if not storage.exists(place) or storage.read_bytes(place) != table:
            storage.write_bytes(place, table)
        self._store({**summary, "complete": True})
        self._sweep()

    def _sweep(self) -> None:
        """Remove what a killed process was still writing (a local file only; objects appear whole)."""
        for directory in (self.uri, storage.join(self.uri, "shards"), storage.join(self.uri, "quarantine")):
            for name in [] if storage.is_remote(directory) else storage.names(directory):
                if name.startswith(".") and name.endswith(".partial"):
                    storage.remove(storage.join(directory, name))

    def _store(self, values: dict[str, Any]) -> None:
        data = self.recipe.data
        content = {
            "schema": shards.SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "computed_from": self.covers,
            "plan": self.identity,
            "recipe": self.recipe.model_dump(mode="json"),
            "size": list(data.size),
            "frames": data.frames,
            "bucket_edges": list(data.bucket_edges),
            "samples": 0,
            "quarantined": 0,
            **values,
        }
        if content != self.stored:
            storage.write_json(storage.join(self.uri, "dataset.json"), content)
            self.stored = content

    def _read_records(self) -> None:
        """Read the commit records that are not known yet: one listing, and a small file for each."""
        directory = storage.join(self.uri, "shards")
        names = set(storage.names(directory))
        known = {f"{shards.shard_name(shard)}.json" for shard in self.records}
        new = sorted(
            name for name in names - known if name.endswith(".json") and name.removesuffix(".json") + ".tar" in names
        )
        with ThreadPoolExecutor(_READERS) as pool:
            for record in pool.map(lambda name: storage.read_json(storage.join(directory, name)), new):
                if record["fingerprint"] == self.fingerprint:
                    self.records[record["shard"]] = record

    def _recovered(self) -> dict[str, dict[str, Any]]:
        return {clip_id: value for record in self.records.values() for clip_id, value in record["retry_of"].items()}

    def _refusals(self, numbers: Iterable[int] | None = None) -> list[tuple[int, Refusal]]:
        """``(shard, refusal)`` of clips that no retry has recovered."""
        recovered = self._recovered()
        if numbers is None:
            numbers = sorted(shard for shard, record in self.records.items() if record["quarantined"])
        return [
            (shard, refusal)
            for shard in numbers
            for refusal in shards.read_ledger(self.uri, shard)
            if refusal.clip_id not in recovered
        ]
