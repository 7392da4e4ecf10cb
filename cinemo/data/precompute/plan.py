"""Which clip goes into which shard, settled before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cinemo.config import Recipe
from cinemo.data.manifest.columns import Columns
from cinemo.data.manifest.manifest import Manifest, read_manifest
from cinemo.progress import doing, say


@dataclass(frozen=True)
class Plan:
    """Clips in manifest order, cut into shards of ``clips_per_shard``; the last one may be smaller.

    A clip's position counts through the whole dataset: in its first part it is the row in the manifest. A part that was
    appended takes the ``chosen`` rows (ascending; None: all) of its own manifest, and begins at ``first_clip`` and
    ``first_shard``.
    """

    clips: Manifest
    clips_per_shard: int
    views: int
    chosen: np.ndarray | None = None
    first_clip: int = 0
    first_shard: int = 0

    def __len__(self) -> int:
        return len(self.clips) if self.chosen is None else len(self.chosen)

    @property
    def shards(self) -> int:
        return math.ceil(len(self) / self.clips_per_shard)

    @property
    def numbers(self) -> range:
        """The planned shards."""
        return range(self.first_shard, self.first_shard + self.shards)

    def positions(self, shards: Sequence[int] | np.ndarray) -> np.ndarray:
        """Of all clips of some shards, in order."""
        slots = np.arange(self.clips_per_shard)
        starts = (np.asarray(shards, np.int64)[:, None] - self.first_shard) * self.clips_per_shard
        places = (starts + slots).ravel()
        return self.first_clip + places[places < len(self)]

    def rows(self, shards: Sequence[int] | np.ndarray) -> PlannedRows:
        """The clips of some shards, in order."""
        positions = self.positions(shards)
        return PlannedRows(self, positions, self.shards_of(positions))

    def shards_of(self, positions: np.ndarray) -> np.ndarray:
        """The shard of each position."""
        return (self.first_shard + (positions - self.first_clip) // self.clips_per_shard).astype(np.int32)

    def manifest_rows(self, positions: np.ndarray) -> np.ndarray:
        """The row of the manifest at each position."""
        places = positions - self.first_clip
        return places if self.chosen is None else self.chosen[places]

    def identity(self) -> dict[str, Any]:
        """What must agree for two runs to continue each other: every clip, its place, and the shape of the shards."""
        return {
            "clips": len(self),
            "clips_per_shard": self.clips_per_shard,
            "shards": self.shards,
            "manifest": self.clips.digest,
        }


@dataclass(frozen=True)
class PlannedRows:
    """Clips that are still to be done, read from the manifest when a part of them is asked for (12 bytes a clip).

    ``positions`` ascend; ``shards`` has the shard of each, which ascends too.
    """

    plan: Plan
    positions: np.ndarray
    shards: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def waves(self, clips: int) -> Iterator[PlannedRows]:
        """Parts of about ``clips`` rows, of whole shards."""
        size = max(1, clips // self.plan.clips_per_shard) * self.plan.clips_per_shard
        for start in range(0, len(self), size):
            yield PlannedRows(self.plan, self.positions[start : start + size], self.shards[start : start + size])

    def slice(self, start: int = 0, count: int | None = None) -> pa.Table:
        """Rows of the manifest; in front ``shard``, that shard's size (``shard_clips``) and ``position``."""
        stop = len(self) if count is None else start + count
        positions, shards = self.positions[start:stop], self.shards[start:stop]
        sizes = np.searchsorted(self.shards, shards, "right") - np.searchsorted(self.shards, shards, "left")
        rows = self.plan.clips.take(self.plan.manifest_rows(positions))
        rows = rows.add_column(0, "shard", pa.array(shards, pa.int32()))
        rows = rows.add_column(1, "shard_clips", pa.array(sizes, pa.int32()))
        return rows.add_column(2, "position", pa.array(positions, pa.int64()))


def plan_manifest(
    uri: str, recipe: Recipe, limit: int | None, columns: Columns | None, names_as_captions: bool
) -> tuple[Plan, Callable[[int], str]]:
    """The plan of a list of clips, and the digest of its first rows, by their number; prints what the list notes.

    Raises:
        InputError: bad manifest.
    """

    def listed(rows: int | None) -> Manifest:
        return read_manifest(uri, rows, columns, recipe.data.seed, names_as_captions)

    with doing("reading the list of clips"):
        clips = listed(limit)
    for note in clips.notes:
        say(f"manifest: {note}")
    with doing("planning shards"):
        return make_plan(clips, recipe), lambda rows: listed(rows).digest


def make_plan(clips: Manifest, recipe: Recipe) -> Plan:
    return Plan(clips, recipe.data.clips_per_shard, recipe.data.views)
