"""Which clip goes into which shard, and what the bytes of a sample depend on. Both are settled before anything runs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cinemo.config import Recipe
from cinemo.networks.frozen import check_vae, weights_digest

# Raise it when the same recipe no longer gives the same sample bytes.
SAMPLE_VERSION = 2  # 2: swscale into planes, up to one level brighter or darker than version 1
RESIZE = "cover, swscale area with full chroma, centre crop"


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
