"""Which clip goes into which shard, settled before anything runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cinemo.config import Recipe


@dataclass(frozen=True)
class Plan:
    """Clips in manifest order, cut into shards of ``clips_per_shard``; the last one may be smaller.

    ``clips`` has the manifest's columns. A clip's position is its row and ``position // clips_per_shard`` its shard.
    """

    clips: pa.Table
    clips_per_shard: int
    views: int

    @property
    def shards(self) -> int:
        return math.ceil(len(self.clips) / self.clips_per_shard)

    def rows(self, shards: Sequence[int] | np.ndarray) -> pa.Table:
        """The clips of some shards, in order, with the columns of `take`."""
        slots = np.arange(self.clips_per_shard)
        positions = (np.asarray(shards, np.int64)[:, None] * self.clips_per_shard + slots).ravel()
        positions = positions[positions < self.clips.num_rows]
        return self.take(positions, positions // self.clips_per_shard)

    def take(self, positions: np.ndarray, shards: np.ndarray) -> pa.Table:
        """Clips by position, each with its ``shard``, that shard's size (``shard_clips``) and ``position`` in front."""
        _, place, sizes = np.unique(shards, return_inverse=True, return_counts=True)
        rows = self.clips.take(pa.array(positions))
        rows = rows.add_column(0, "shard", pa.array(shards.astype(np.int32)))
        rows = rows.add_column(1, "shard_clips", pa.array(sizes[place].astype(np.int32)))
        return rows.add_column(2, "position", pa.array(positions))

    def identity(self) -> dict[str, Any]:
        """What must agree for two runs to continue each other: every clip, its place, and the shape of the shards."""
        lengths, texts = hashlib.sha256(), hashlib.sha256()
        for batch in self.clips.to_batches(max_chunksize=1 << 16):
            columns = [pc.fill_null(pc.cast(column, pa.string()), "") for column in batch.columns]
            joined = pc.binary_join_element_wise(*columns, "\x1f").cast(pa.large_binary())
            # Lengths as well as text, so that no row can pretend to be two.
            lengths.update(pc.binary_length(joined).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            texts.update(b"".join(joined.to_pylist()))
        return {
            "clips": self.clips.num_rows,
            "clips_per_shard": self.clips_per_shard,
            "shards": self.shards,
            "manifest": hashlib.sha256(lengths.digest() + texts.digest()).hexdigest(),
        }


def make_plan(clips: pa.Table, recipe: Recipe) -> Plan:
    return Plan(clips, recipe.data.clips_per_shard, recipe.data.views)
