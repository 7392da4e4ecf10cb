"""Which clip goes into which shard, and what the bytes of a sample depend on. Both are settled before anything runs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cinemo.config import Recipe
from cinemo.data.manifest import Manifest
from cinemo.networks.frozen import check_vae, weights_digest

# Raise it when the same recipe no longer gives the same sample bytes.
SAMPLE_VERSION = 2  # 2: swscale into planes, up to one level brighter or darker than version 1
RESIZE = "cover, swscale area with full chroma, centre crop"


@dataclass(frozen=True)
class Plan:
    """Clips in manifest order, cut into shards of ``clips_per_shard``; the last one may be smaller.

    A clip's position is its row in the manifest, and ``position // clips_per_shard`` its shard.
    """

    clips: Manifest
    clips_per_shard: int
    views: int

    @property
    def shards(self) -> int:
        return math.ceil(len(self.clips) / self.clips_per_shard)

    def positions(self, shards: Sequence[int] | np.ndarray) -> np.ndarray:
        """Of all clips of some shards, in order."""
        slots = np.arange(self.clips_per_shard)
        positions = (np.asarray(shards, np.int64)[:, None] * self.clips_per_shard + slots).ravel()
        return positions[positions < len(self.clips)]

    def rows(self, shards: Sequence[int] | np.ndarray) -> PlannedRows:
        """The clips of some shards, in order."""
        positions = self.positions(shards)
        return PlannedRows(self, positions, (positions // self.clips_per_shard).astype(np.int32))

    def identity(self) -> dict[str, Any]:
        """What must agree for two runs to continue each other: every clip, its place, and the shape of the shards."""
        return {
            "clips": len(self.clips),
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
        rows = self.plan.clips.take(positions)
        rows = rows.add_column(0, "shard", pa.array(shards, pa.int32()))
        rows = rows.add_column(1, "shard_clips", pa.array(sizes, pa.int32()))
        return rows.add_column(2, "position", pa.array(positions, pa.int64()))


def make_plan(clips: Manifest, recipe: Recipe) -> Plan:
    return Plan(clips, recipe.data.clips_per_shard, recipe.data.views)


def encoder_dtype(recipe: Recipe) -> str:
    """The published code encodes in half precision on its GPU; CPUs have no fast half."""
    return "float16" if recipe.data.encode_gpus > 0 else "float32"


def fingerprint(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """A digest of everything that decides a sample's bytes, and what it covers.

    Bucket edges are left out: buckets are derived from the stored SSIM when a sample is read.

    Raises:
        InputError: ``encoders.vae`` is no autoencoder.
    """
    data = recipe.data
    check_vae(recipe.encoders.vae)
    covers: dict[str, Any] = {
        "sample_version": SAMPLE_VERSION,
        "frames": data.frames,
        "size": list(data.size),
        "frame_interval": list(data.frame_interval),
        "views": data.views,
        "seed": data.seed,
        "decoder": data.decoder,
        "resize": RESIZE,
        "ssim": data.ssim,
        "vae": weights_digest(recipe.encoders.vae),
        "latent": recipe.encoders.latent,
        "dtype": encoder_dtype(recipe),
    }
    return hashlib.sha256(json.dumps(covers, sort_keys=True).encode()).hexdigest(), covers


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One ``name: there, here`` entry for each field that differs."""
    return [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
