"""A dataset while it is being made: what is already there, what is missing, what may be tried again, how it is closed.

The commit records decide. ``dataset.json`` and ``index.parquet`` are made from them and from the plan; the journal and
the index of a finished dataset save reading them all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa

from cinemo import checksums, storage
from cinemo.config import MACHINES, DataConfig, Recipe
from cinemo.data.dataset import shards
from cinemo.data.dataset.identity import as_begun, differences, digest, fingerprint
from cinemo.data.dataset.statistics import latent_statistics
from cinemo.data.precompute import shapes
from cinemo.data.precompute.journal import Journal, probe
from cinemo.data.precompute.parts import APPEND, Part, new_rows, read_rows, stored_parts, write_rows
from cinemo.data.precompute.plan import Plan, PlannedRows, cut_by_shape
from cinemo.data.precompute.shapes import Measure
from cinemo.media.scores import SCORES_VERSION
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
    that are in no part come from retries.

    ``plan``: the part that the given manifest belongs to; the only one of which shards can be made.
    ``parts``: all of them. The last one is ``pending`` while an append is not finished.
    ``append``: what to do about clips that are there already, where the manifest is still to be appended.
    """

    uri: str
    recipe: Recipe
    plan: Plan
    fingerprint: str
    covers: dict[str, Any]
    parts: list[Part]
    stored: dict[str, Any] | None
    journal: Journal
    pending: bool = False
    append: str | None = None
    prefix: Callable[[int], str] | None = None
    records: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        uri: str,
        recipe: Recipe,
        plan: Plan,
        append: str | None = None,
        prefix: Callable[[int], str] | None = None,
    ) -> Dataset:
        """Look at an output without changing it; `load` then finds what it holds.

        Args:
            plan: of the whole manifest that was given.
            append: extend a finished dataset by the manifest's new clips; those that are there already are left out
                (``skip``) or refused (``refuse``).
            prefix: digest of the first rows of the manifest, by their number; saves reading the ids of all clips.

        Raises:
            InputError: it cannot be written, or belongs to another recipe or manifest, or cannot be extended.
        """
        identity, covers = fingerprint(recipe)
        place = storage.join(uri, "dataset.json")
        if append is not None and append not in APPEND:
            raise InputError(f"--append {append}: expected {' or '.join(APPEND)}")
        if not storage.exists(place):
            if append:
                raise InputError(f"{uri}: no dataset there to append to; make it without --append first")
            storage.check_writable(uri)
            parts, journal = [Part.of(plan)], _journal(uri, identity, plan)
            return cls(uri, recipe, plan, identity, covers, parts, None, journal)
        try:
            stored = storage.read_json(place)
            covers = as_begun(covers, stored["computed_from"])
            different = differences(stored["computed_from"], covers)
            parts = stored_parts(stored)
            pending, complete = "appending" in stored, bool(stored["complete"])
            there = {name: stored["plan"][name] for name in ("clips", "clips_per_shard", "manifest")}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{place}: not a dataset.json written by this program; choose another --output") from None
        whole = Part.of(plan)
        number = next((number for number, part in enumerate(parts) if part.lists_same_as(whole)), None)
        here = {name: plan.identity()[name] for name in there}
        if number is not None or append:
            here |= {name: there[name] for name in ("clips", "manifest")}
        if different or here != there:
            different += differences(there, here)
            extend = ", or --append the manifest's new clips" if here["manifest"] != there["manifest"] else ""
            raise InputError(f"{uri}: holds another dataset: {'; '.join(different)}; choose another --output{extend}")
        if number is not None:
            plan = _plan_of_part(uri, recipe.data, plan, parts, number)
        elif pending or not complete:
            began = f"an append of {parts[-1].clips} clips of another manifest" if pending else "the dataset"
            raise InputError(f"{uri}: {began} is not finished; run the command that began it again, then append")
        append = append if number is None else None
        identity = digest(covers)
        journal = _journal(uri, identity, plan)
        return cls(uri, recipe, plan, identity, covers, parts, stored, journal, pending, append, prefix)

    def load(self) -> None:
        """Find the shards that are committed, from the index or the journal, and after them record by record; and the
        clips of an append, which is begun with that.

        Nothing is listed on s3://. A local directory is: that is cheap, and sees whatever was removed by hand.

        Raises:
            InputError: another job has changed the dataset since it was opened, shards are missing that another
                manifest is needed for or that would have scores of another version, or a manifest cannot be appended
                (`cinemo.data.precompute.parts.new_rows`).
        """
        place = storage.join(self.uri, "dataset.json")
        if (storage.read_json(place) if storage.exists(place) else None) != self.stored:
            raise InputError(f"{self.uri}: another job has just changed the dataset; run the command again")
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
        if self.append:
            self._extend()
        gone = [number for part in self.parts for number in part.numbers if number not in self.records]
        foreign = sorted(set(gone) - set(self.plan.numbers))
        if foreign:
            raise InputError(
                f"{self.uri}: {len(foreign)} shards are missing that the given manifest has no clips of (the first is "
                f"{shards.shard_name(foreign[0])}); give the manifest that they were made from"
            )
        if self.missing_shards():
            self._check_scores()

    def _check_scores(self) -> None:
        """Refuse to make shards whose scores would be of another version than those that are there."""
        there = self.covers.get("scores", SCORES_VERSION)
        if there != SCORES_VERSION:
            raise InputError(
                f"{self.uri}: holds scores of version {there}, new shards would have version {SCORES_VERSION}; what is "
                "finished of it stays usable; choose another --output for more"
            )

    def _extend(self) -> None:
        """Plan a new part of the clips that are not there yet, behind all shards that are."""
        written = {number: record["checksum"] for number, record in sorted(self.records.items())}
        chosen = new_rows(self.uri, written, self.parts, self.plan.clips, self.prefix, self.append or "skip")
        last = self.parts[-1]
        first_clip, first_shard = last.first_clip + last.clips, max([*self.records, *last.numbers]) + 1
        self.plan = replace(self.plan, chosen=chosen, first_clip=first_clip, first_shard=first_shard)
        if len(chosen):
            self.parts.append(Part.of(self.plan))
            self.pending = True
            self._begin_journal()

    def shape_clips(self, measure: Measure) -> None:
        """Give every clip its shape, where the recipe has several and the clips are not yet planned; see
        `cinemo.data.precompute.shapes`.

        Args:
            measure: see `shapes.kinds`.
        """
        if not self.recipe.data.other_shapes or self.plan.kinds is not None or not len(self.plan):
            return
        kinds = shapes.kinds(self.plan, self.recipe.data, measure)
        self.plan = replace(self.plan, kinds=kinds, shapes=self.recipe.data.shapes)
        self.parts[-1] = Part.of(self.plan)
        self._begin_journal()

    def _begin_journal(self) -> None:
        tables = self.journal
        self.journal = _journal(self.uri, self.fingerprint, self.plan)
        self.journal.adopt(tables.table())

    @property
    def checksum(self) -> str:
        """The algorithm of its checksums: that which it was begun with, so that its bytes do not depend on when."""
        return checksums.DEFAULT if self.stored is None else str(self.stored.get("checksum", checksums.SHA256))

    def _known(self) -> pa.Table:
        """Index rows of shards that need no reading."""
        if self.stored is None:
            self.journal.remove()  # of a dataset that somebody removed
            return shards.INDEX_SCHEMA.empty_table()
        if not self.stored.get("complete"):
            return self.journal.read()
        tables = [shards.INDEX_SCHEMA.empty_table()]
        try:
            table = shards.index_table(storage.read_bytes(storage.join(self.uri, "index.parquet")))
            if table.schema.equals(shards.INDEX_SCHEMA):
                self.journal.adopt(table)
                tables.append(table)
        except (FileNotFoundError, pa.ArrowInvalid):
            pass
        if self.pending and not set(self.plan.numbers) & set(tables[-1]["shard"].to_pylist()):
            tables.append(self.journal.read())
        return pa.concat_tables(tables)

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
        yield from (number for part in self.parts for number in part.numbers if number not in known)
        if self.stored and self.stored.get("complete") and not self.pending:
            yield from (number for number in count(self.parts[-1].numbers.stop) if number not in known)

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
        self.journal.add(row)
        self._note(row)

    def _note(self, row: Mapping[str, Any]) -> None:
        self.records[row["shard"]] = {**{name: row[name] for name in _LIGHT}, "reasons": json.loads(row["reasons"])}

    def missing_shards(self) -> list[int]:
        return [shard for shard in self.plan.numbers if shard not in self.records]

    def retryable(self, reason: str) -> dict[str, tuple[int, str]]:
        """Clips still refused for ``reason`` (any reason for ``""``): clip id -> (shard, reason).

        Raises:
            InputError: none was refused for that reason.
        """
        numbers = [number for number in self.plan.numbers if self.records[number]["quarantined"]]
        refused = {refusal.clip_id: (shard, refusal.reason) for shard, refusal in self._refusals(numbers)}
        found = {clip_id: value for clip_id, value in refused.items() if reason in ("", value[1])}
        if reason and not found:
            known = ", ".join(sorted({why for _, why in refused.values()})) or "none"
            whose = " of this manifest" if len(self.parts) > 1 else ""
            raise InputError(
                f"--retry-quarantine {reason}: no clip{whose} was refused for that; reasons found: {known}"
            )
        return found

    def rows_to_retry(self, refused: dict[str, tuple[int, str]]) -> PlannedRows:
        """Planned rows of refused clips, in plan order, for new shards after the last one.

        Raises:
            InputError: they would have scores of another version than the dataset.
        """
        self._check_scores()
        parts = [np.empty(0, np.int64)]
        for shard in sorted({shard for shard, _ in refused.values()}):
            positions = self.plan.positions([shard])
            ids = self.plan.clips.ids(self.plan.manifest_rows(positions))
            parts.append(positions[[clip_id in refused for clip_id in ids]])
        positions = np.concatenate(parts)
        kinds, size = self.plan.kinds_at(positions), self.plan.clips_per_shard
        first = max(self.records, default=-1) + 1
        if kinds is None or not len(positions):
            return PlannedRows(self.plan, positions, first + np.arange(len(positions)) // size)
        order, bounds = cut_by_shape(kinds, size)
        return PlannedRows(self.plan, positions[order], np.repeat(first + np.arange(len(bounds) - 1), np.diff(bounds)))

    def begin(self) -> None:
        """Say that the dataset is not complete. A finished one that only gains shards stays complete, and readers see
        it as it was.
        """
        if self.pending:
            if self.stored and "appending" not in self.stored:
                write_rows(self.uri, len(self.parts) - 1, self.plan)
                self.stored = {**self.stored, "appending": self.parts[-1].to_json()}
                storage.write_json(storage.join(self.uri, "dataset.json"), self.stored)
        elif self.missing_shards() or self.stored is None:
            if self.stored is None and self.plan.kinds is not None:
                write_rows(self.uri, 0, self.plan)
            measured = (self.stored or {}).get("latent_statistics")
            self._store({"complete": False, **({"latent_statistics": measured} if measured else {})})

    def summarize(self) -> dict[str, Any]:
        """Totals over all committed shards, those of this run included."""
        records = list(self.records.values())
        reasons: Counter[str] = Counter()
        for record in records:
            reasons.update(record["reasons"])
        samples: Counter[tuple[int, ...]] = Counter()
        for record in records:
            if record["samples"]:
                samples[tuple(record["latent_shape"])] += record["samples"]
        own = [shape for shape in samples if shards.pixels(shape) == self.recipe.data.shapes[0]]
        return {
            "clips": sum(part.clips for part in self.parts),
            "samples": sum(record["samples"] for record in records),
            "quarantined": reasons.total(),
            "reasons": {reason: number for reason, number in sorted(reasons.items()) if number},
            "shards": len(records),
            "bytes": sum(record["bytes"] for record in records),
            "latent_shape": list([*own, *samples][0]) if samples else None,
            **({"shapes": self._shapes(samples)} if self.recipe.data.other_shapes else {}),
        }

    def _shapes(self, samples: Mapping[tuple[int, ...], int]) -> list[dict[str, Any]]:
        """Samples of each shape that the recipe has."""
        counts = {shards.pixels(shape): count for shape, count in samples.items()}
        return [
            {"frames": shape[0], "size": list(shape[1:]), "samples": counts.get(shape, 0)}
            for shape in self.recipe.data.shapes
        ]

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
        self.pending = False
        self._store({**summary, "latent_statistics": self._latent_statistics(), "complete": True})
        with storage.tidying(f"{self.uri}: the journal of a finished dataset"):
            self.journal.remove()
            if self.recipe.data.other_shapes:
                storage.remove(storage.join(self.uri, shapes.KEPT))
        storage.sweep(self.uri, "shards", "quarantine", "columns", "parts")

    def _latent_statistics(self) -> dict[str, Any] | None:
        """Of the first part, and measured once: a training normalises by them, and goes on where a dataset grew."""
        if self.stored and self.stored.get("latent_statistics"):
            return dict(self.stored["latent_statistics"])
        sizes = {number: record["samples"] for number, record in self.records.items() if record["samples"]}
        first = {number: samples for number, samples in sizes.items() if number in self.parts[0].numbers}
        return latent_statistics(self.uri, first or sizes) if sizes else None

    def _store(self, values: dict[str, Any]) -> None:
        data = self.recipe.data
        appended = self.parts[1 : len(self.parts) - self.pending]
        content = {
            "schema": shards.SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "computed_from": self.covers,
            "plan": self._first,
            **({"appended": [part.to_json() for part in appended]} if appended else {}),
            "recipe": self.recipe.with_lanes().model_dump(
                mode="json",
                exclude={
                    "data": {*MACHINES, *(name for name in ("scores", "other_shapes") if not getattr(data, name))}
                },
            ),
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

    @property
    def _first(self) -> dict[str, Any]:
        """The ``plan`` of ``dataset.json``."""
        return dict(self.stored["plan"]) if self.stored else self.plan.identity()

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


def _journal(uri: str, fingerprint: str, plan: Plan) -> Journal:
    return Journal(uri, f"{fingerprint} {json.dumps(plan.identity(), sort_keys=True)}", plan.numbers)


def _plan_of_part(uri: str, data: DataConfig, whole: Plan, parts: list[Part], number: int) -> Plan:
    """The plan of a part, from that of the manifest that lists it."""
    part = parts[number]
    chosen, kinds = read_rows(uri, number) if number or data.other_shapes else (None, None)
    return replace(
        whole,
        chosen=chosen if number else None,
        first_clip=part.first_clip,
        first_shard=part.first_shard,
        kinds=kinds,
        shapes=data.shapes if kinds is not None else (),
    )
