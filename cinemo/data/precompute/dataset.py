"""A dataset while it is being made: what is already there, what is missing, what may be tried again, how it is closed.

The commit records decide. ``dataset.json`` and ``index.parquet`` are made from them and from the plan; the journal and
the index of a finished dataset save reading them all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa

from cinemo import checksums, storage
from cinemo.config import MACHINES, Recipe
from cinemo.data.dataset import shards
from cinemo.data.dataset.identity import differences, fingerprint
from cinemo.data.dataset.statistics import latent_statistics
from cinemo.data.precompute.journal import Journal, probe
from cinemo.data.precompute.plan import Plan, PlannedRows
from cinemo.types import InputError, Refusal

_READERS = 16
# On s3:// up to so many shards are looked at one by one; of more, the journal is believed.
_LOOKED_AT = 2000
# Shards without a record after which no more are looked for. Fewer are in flight; one that is missed is made again.
_WINDOW = 128
_LIGHT = ("shard", "samples", "quarantined", "recovered", "bytes", "checksum", "reasons", "latent_shape")


@dataclass
class Dataset:
    """The state of one output. ``records`` says the most important of each commit record (`_LIGHT`), by shard; those
    past the plan's come from retries.
    """

    uri: str
    recipe: Recipe
    plan: Plan
    fingerprint: str
    covers: dict[str, Any]
    identity: dict[str, Any]
    stored: dict[str, Any] | None
    journal: Journal
    records: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, uri: str, recipe: Recipe, plan: Plan) -> Dataset:
        """Look at an output without changing it; `load` then finds what it holds.

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
                raise InputError(
                    f"{place}: not a dataset.json written by this program; choose another --output"
                ) from None
            if different:
                raise InputError(f"{uri}: holds another dataset: {'; '.join(different)}; choose another --output")
        else:
            storage.check_writable(uri)
        journal = Journal(uri, f"{digest} {json.dumps(identity, sort_keys=True)}")
        return cls(uri, recipe, plan, digest, covers, identity, stored, journal)

    def load(self) -> None:
        """Find the shards that are committed: from the index or the journal, and after them record by record.

        Nothing is listed on s3://. A local directory is: that is cheap, and sees whatever was removed by hand.
        """
        for row in self._known().select(_LIGHT).to_pylist():
            self._note(row)
        remote = storage.is_remote(self.uri)
        there = self._looked_up() if remote else self._listed()
        lost = self.records.keys() - there
        self.journal.drop(lost)
        for number in lost:
            del self.records[number]
        numbers = self._unknown() if remote else iter(sorted(there - self.records.keys()))
        for row in probe(numbers, self._row, _WINDOW):
            self.committed(row)

    @property
    def checksum(self) -> str:
        """The algorithm of its checksums: that which it was begun with, so that its bytes do not depend on when."""
        return checksums.DEFAULT if self.stored is None else str(self.stored.get("checksum", checksums.SHA256))

    def _known(self) -> pa.Table:
        """Index rows of shards that need no reading."""
        if self.stored is None:
            self.journal.remove()  # of a dataset that somebody removed
        elif self.stored.get("complete"):
            try:
                table = shards.index_table(storage.read_bytes(storage.join(self.uri, "index.parquet")))
            except (FileNotFoundError, pa.ArrowInvalid):
                return shards.INDEX_SCHEMA.empty_table()
            if table.schema.equals(shards.INDEX_SCHEMA):
                self.journal.adopt(table)
                return table
        else:
            return self.journal.read()
        return shards.INDEX_SCHEMA.empty_table()

    def _listed(self) -> set[int]:
        """Shards with tar and record in a local directory."""
        names = set(storage.names(storage.join(self.uri, "shards")))
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return {int(stem.removeprefix("shard-")) for stem in stems if f"{stem}.tar" in names}

    def _looked_up(self) -> set[int]:
        """Those of the known shards that are there; of very many, all of them."""
        numbers = list(self.records)
        if len(numbers) > _LOOKED_AT:
            return set(numbers)
        with ThreadPoolExecutor(_READERS) as pool:
            return {number for number, there in zip(numbers, pool.map(self._is_there, numbers), strict=True) if there}

    def _is_there(self, number: int) -> bool:
        return all(storage.exists(uri(self.uri, number)) for uri in (shards.record_uri, shards.tar_uri))

    def _unknown(self) -> Iterator[int]:
        """Shards that may have a record: of the plan, and past it only once the plan is done."""
        known = set(self.records)
        yield from (number for number in range(self.plan.shards) if number not in known)
        if self.stored and self.stored.get("complete"):
            yield from (number for number in count(self.plan.shards) if number not in known)

    def _row(self, number: int) -> dict[str, Any] | None:
        try:
            record = storage.read_json(shards.record_uri(self.uri, number))
        except FileNotFoundError:
            return None
        if record["fingerprint"] != self.fingerprint or not storage.exists(shards.tar_uri(self.uri, number)):
            return None
        return shards.index_row(record)

    def committed(self, row: Mapping[str, Any]) -> None:
        """Take note of a shard that now exists (a `shards.index_row`)."""
        self.journal.add(row, self.plan.shards)
        self._note(row)

    def _note(self, row: Mapping[str, Any]) -> None:
        self.records[row["shard"]] = {**{name: row[name] for name in _LIGHT}, "reasons": json.loads(row["reasons"])}

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
            raise InputError(f"--retry-quarantine {reason}: no clip was refused for that; reasons found: {known}")
        return found

    def rows_to_retry(self, refused: dict[str, tuple[int, str]]) -> PlannedRows:
        """Planned rows of refused clips, in plan order, for new shards after the last one."""
        parts = [np.empty(0, np.int64)]
        for shard in sorted({shard for shard, _ in refused.values()}):
            positions = self.plan.positions([shard])
            parts.append(positions[[clip_id in refused for clip_id in self.plan.clips.ids(positions)]])
        positions = np.concatenate(parts)
        first = max(self.records, default=-1) + 1
        return PlannedRows(self.plan, positions, first + np.arange(len(positions)) // self.plan.clips_per_shard)

    def begin(self) -> None:
        """Say that the dataset is not complete. A finished one that only gains shards stays complete."""
        if self.missing_shards() or self.stored is None:
            self._store({"complete": False})

    def summarize(self) -> dict[str, Any]:
        """Totals over all committed shards, those of this run included."""
        records = list(self.records.values())
        reasons: Counter[str] = Counter()
        for record in records:
            reasons.update(record["reasons"])
        shapes = {tuple(record["latent_shape"]) for record in records if record["samples"]}
        return {
            "clips": self.identity["clips"],
            "samples": sum(record["samples"] for record in records),
            "quarantined": reasons.total(),
            "reasons": {reason: number for reason, number in sorted(reasons.items()) if number},
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
        table = shards.index_table_bytes(self.journal.table())
        place = storage.join(self.uri, "index.parquet")
        if not storage.exists(place) or storage.read_bytes(place) != table:
            storage.write_bytes(place, table)
        self._store({**summary, "latent_statistics": self._latent_statistics(summary), "complete": True})
        with storage.tidying(f"{self.uri}: the journal of a finished dataset"):
            self.journal.remove()
        storage.sweep(self.uri, "shards", "quarantine")

    def _latent_statistics(self, summary: dict[str, Any]) -> dict[str, Any] | None:
        """Of the shards as they are; not measured again where none came."""
        if self.stored and self.stored.get("shards") == summary["shards"] and self.stored.get("latent_statistics"):
            return dict(self.stored["latent_statistics"])
        sizes = {number: record["samples"] for number, record in self.records.items() if record["samples"]}
        return latent_statistics(self.uri, sizes) if sizes else None

    def _store(self, values: dict[str, Any]) -> None:
        data = self.recipe.data
        content = {
            "schema": shards.SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "computed_from": self.covers,
            "plan": self.identity,
            "recipe": self.recipe.model_dump(mode="json", exclude={"data": set(MACHINES)}),
            "size": list(data.size),
            "frames": data.frames,
            "bucket_edges": list(data.bucket_edges),
            "samples": 0,
            "quarantined": 0,
            **({} if self.checksum == checksums.SHA256 else {"checksum": self.checksum}),
            **values,
        }
        if content != self.stored:
            storage.write_json(storage.join(self.uri, "dataset.json"), content)
            self.stored = content

    def _recovered(self) -> dict[str, dict[str, Any]]:
        """What retries have recovered: clip id -> the shard that refused it, and why."""
        numbers = sorted(number for number, record in self.records.items() if record["recovered"])
        with ThreadPoolExecutor(_READERS) as pool:
            records = pool.map(lambda number: storage.read_json(shards.record_uri(self.uri, number)), numbers)
            return {clip_id: value for record in records for clip_id, value in record["retry_of"].items()}

    def _refusals(self, numbers: Iterable[int] | None = None) -> list[tuple[int, Refusal]]:
        """``(shard, refusal)`` of clips that no retry has recovered."""
        recovered = self._recovered()
        if numbers is None:
            numbers = sorted(number for number, record in self.records.items() if record["quarantined"])
        chosen = list(numbers)
        with ThreadPoolExecutor(_READERS) as pool:
            ledgers = pool.map(lambda number: shards.read_ledger(self.uri, number), chosen)
            return [
                (number, refusal)
                for number, ledger in zip(chosen, ledgers, strict=True)
                for refusal in ledger
                if refusal.clip_id not in recovered
            ]
