"""Which clip goes into which shard, settled before anything runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cinemo.config import Recipe, Shape
from cinemo.data.manifest.columns import Columns
from cinemo.data.manifest.manifest import Manifest, read_manifest
from cinemo.progress import doing, say


@dataclass(frozen=True)
class Plan:
    """Clips in manifest order, cut into shards of ``clips_per_shard``; the last one may be smaller.

    A clip's position counts through the whole dataset: in its first part it is the row in the manifest. A part that was
    appended takes the ``chosen`` rows (ascending; None: all) of its own manifest, and begins at ``first_clip`` and
    ``first_shard``.

    Where clips have several ``shapes``, ``kinds`` is the number of each clip's shape (uint8, by row). Every shard is
    then of one shape: those of each shape are cut as if there were no other, and all are numbered in the order of their
    first clips; the last one of each shape may be smaller. Positions follow the shards.
    """

    clips: Manifest
    clips_per_shard: int
    views: int
    chosen: np.ndarray | None = None
    first_clip: int = 0
    first_shard: int = 0
    shapes: tuple[Shape, ...] = ()
    kinds: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.clips) if self.chosen is None else len(self.chosen)

    @property
    def shards(self) -> int:
        return len(self._cut[1]) - 1

    @property
    def numbers(self) -> range:
        """The planned shards."""
        return range(self.first_shard, self.first_shard + self.shards)

    @functools.cached_property
    def _cut(self) -> tuple[np.ndarray | None, np.ndarray]:
        """The clips in the order of their positions (None: as they are), and where shards begin and end among them."""
        if self.kinds is not None:
            return cut_by_shape(self.kinds, self.clips_per_shard)
        shards = math.ceil(len(self) / self.clips_per_shard)
        return None, np.minimum(np.arange(shards + 1) * self.clips_per_shard, len(self))

    def positions(self, shards: Sequence[int] | np.ndarray) -> np.ndarray:
        """Of all clips of some shards, in order."""
        bounds, places = self._cut[1], np.asarray(shards, np.int64) - self.first_shard
        return self.first_clip + _ranges(bounds[places], bounds[places + 1])

    def rows(self, shards: Sequence[int] | np.ndarray) -> PlannedRows:
        """The clips of some shards, in order."""
        numbers = np.asarray(shards, np.int32)
        sizes = np.diff(self._cut[1])[numbers - self.first_shard]
        return PlannedRows(self, self.positions(numbers), np.repeat(numbers, sizes))

    def shards_of(self, positions: np.ndarray) -> np.ndarray:
        """The shard of each position."""
        places = np.searchsorted(self._cut[1], positions - self.first_clip, "right") - 1
        return (self.first_shard + places).astype(np.int32)

    def manifest_rows(self, positions: np.ndarray) -> np.ndarray:
        """The row of the manifest at each position."""
        clips = self._clips(positions)
        return clips if self.chosen is None else self.chosen[clips]

    def kinds_at(self, positions: np.ndarray) -> np.ndarray | None:
        """The number of the shape at each position, where there are several."""
        return None if self.kinds is None else self.kinds[self._clips(positions)]

    def _clips(self, positions: np.ndarray) -> np.ndarray:
        places, order = positions - self.first_clip, self._cut[0]
        return places if order is None else order[places]

    def identity(self) -> dict[str, Any]:
        """What must agree for two runs to continue each other: every clip, its place, and the shape of the shards."""
        return {
            "clips": len(self),
            "clips_per_shard": self.clips_per_shard,
            "shards": self.shards,
            "manifest": self.clips.digest,
        }


def cut_by_shape(kinds: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips in shards of ``size`` of one shape each, see `Plan`.

    Args:
        kinds: of each clip, the number of its shape.

    Returns:
        The clips in the order of shards, and where shards begin and end among them (one number more than shards).
    """
    by_shape = np.argsort(kinds, kind="stable").astype(np.int32)
    ends = np.cumsum(np.bincount(kinds))
    begins = np.concatenate([np.arange(begin, end, size) for begin, end in zip([0, *ends[:-1]], ends, strict=True)])
    stops = np.minimum(begins + size, ends[np.searchsorted(ends, begins, "right")])
    in_order = np.argsort(by_shape[begins])
    begins, stops = begins[in_order], stops[in_order]
    order = np.concatenate([by_shape[begin:stop] for begin, stop in zip(begins, stops, strict=True)])
    return order, np.append(0, np.cumsum(stops - begins))


def _ranges(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers of some half-open ranges, one range after the other."""
    sizes = ends - begins
    offsets = np.cumsum(sizes) - sizes
    return np.repeat(begins - offsets, sizes) + np.arange(sizes.sum())


@dataclass(frozen=True)
class PlannedRows:
    """Clips that are still to be done, read from the manifest when a part of them is asked for (12 bytes a clip).

    ``shards`` has the shard of each, which ascends; ``positions`` ascend within a shard.
    """

    plan: Plan
    positions: np.ndarray
    shards: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def count_shards(self) -> int:
        return int(np.count_nonzero(np.diff(self.shards))) + bool(len(self))

    def waves(self, clips: int) -> Iterator[PlannedRows]:
        """Parts of about ``clips`` rows, of whole shards, of which all but the last one of a part are full."""
        size, most = self.plan.clips_per_shard, max(1, clips // self.plan.clips_per_shard)
        ends = np.append(np.flatnonzero(np.diff(self.shards)) + 1, len(self))
        begin = before = shards = 0
        for end in ends.tolist() if len(self) else ():
            shards += 1
            if end - before < size or shards == most or end == len(self):
                yield PlannedRows(self.plan, self.positions[begin:end], self.shards[begin:end])
                begin, shards = end, 0
            before = end

    def slice(self, start: int = 0, count: int | None = None) -> pa.Table:
        """Rows of the manifest; in front ``shard``, that shard's size (``shard_clips``), ``position`` and, where clips
        have several, ``video_shape``.
        """
        stop = len(self) if count is None else start + count
        positions, shards = self.positions[start:stop], self.shards[start:stop]
        sizes = np.searchsorted(self.shards, shards, "right") - np.searchsorted(self.shards, shards, "left")
        wanted = self.plan.manifest_rows(positions)
        ascending = np.argsort(wanted, kind="stable")
        rows = self.plan.clips.take(wanted[ascending])
        if (np.diff(ascending) < 0).any():
            rows = rows.take(pa.array(np.argsort(ascending)))
        rows = rows.add_column(0, "shard", pa.array(shards, pa.int32()))
        rows = rows.add_column(1, "shard_clips", pa.array(sizes, pa.int32()))
        rows = rows.add_column(2, "position", pa.array(positions, pa.int64()))
        kinds = self.plan.kinds_at(positions)
        if kinds is None:
            return rows
        shapes = pa.array([self.plan.shapes[kind] for kind in kinds.tolist()], pa.list_(pa.int32()))
        return rows.add_column(3, "video_shape", shapes)


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
