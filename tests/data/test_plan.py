"""The plan: every clip in exactly one shard, known before anything runs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo.data.manifest.manifest import SCHEMA, Manifest, manifest_of
from cinemo.data.precompute.plan import Plan


def clips(count: int, **change: Any) -> Manifest:
    rows = [
        {"clip_id": f"clip-{k}", "uri": f"/{k}.mp4", "caption": "c", "start": None, "end": None} for k in range(count)
    ]
    if change:
        rows[-1] |= change
    return manifest_of(pa.Table.from_pylist(rows, SCHEMA))


@given(st.integers(1, 60), st.integers(1, 20))
def test_every_clip_is_in_one_shard(count: int, clips_per_shard: int) -> None:
    plan = Plan(clips(count), clips_per_shard, views=2)
    rows = plan.rows(range(plan.shards)).slice().to_pylist()
    assert [row["clip_id"] for row in rows] == [f"clip-{k}" for k in range(count)]
    assert [row["position"] for row in rows] == list(range(count))
    assert [row["shard"] for row in rows] == [k // clips_per_shard for k in range(count)]
    for shard in range(plan.shards):
        alone = plan.rows([shard]).slice().to_pylist()
        assert alone == [row for row in rows if row["shard"] == shard]
        assert {row["shard_clips"] for row in alone} == {len(alone)}


def test_identity_depends_on_every_field() -> None:
    plan = Plan(clips(9), 4, 1)
    assert plan.identity()["shards"] == 3
    digests = {
        Plan(clips(9, **change), 4, 1).identity()["manifest"]
        for change in ({}, {"clip_id": "x"}, {"uri": "x"}, {"caption": "x"}, {"start": 1.0}, {"end": 1.0})
    }
    assert len(digests) == 6


def test_waves_are_of_whole_shards() -> None:
    plan = Plan(clips(23), 4, 1)
    rows = plan.rows([0, 2, 3, 5])
    waves = list(rows.waves(9))
    assert [sorted(set(wave.shards.tolist())) for wave in waves] == [[0, 2], [3, 5]]
    assert pa.concat_tables(wave.slice() for wave in waves) == rows.slice()
    assert rows.slice(3, 2) == rows.slice().slice(3, 2)
    assert [len(wave) for wave in rows.waves(1)] == [4, 4, 4, 3]


@pytest.mark.slow
def test_a_million_clips_plan_in_seconds() -> None:
    count = 1_000_000
    ids = pa.array(np.char.add("clip-", np.arange(count).astype(str)))
    nothing = pa.nulls(count, pa.float64())
    table = pa.table([ids, ids, ids, nothing, nothing], SCHEMA)
    started = time.perf_counter()
    plan = Plan(manifest_of(table), 256, 1)
    assert len(plan.rows(range(plan.shards))) == count
    assert time.perf_counter() - started < 10
