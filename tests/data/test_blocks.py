"""Blocks of planned rows: in order, within shards, and clips of one source together as far as memory allows."""

from __future__ import annotations

import itertools

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from cinemo.data.manifest.manifest import manifest_of
from cinemo.data.precompute.graph import _blocks
from cinemo.data.precompute.plan import Plan


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(0, 8),
)
def test_blocks(runs: list[int], shard: int, size: int, more: int) -> None:
    uris = [f"/{video}.mp4" for video, count in enumerate(runs) for _ in range(count)]
    table = {"clip_id": [str(k) for k in range(len(uris))], "uri": uris, "caption": ["x"] * len(uris)}
    plan = Plan(manifest_of(pa.table(table)), shard, 1)
    rows, most = plan.rows(range(plan.shards)), size + more
    blocks = list(_blocks(rows, shard, size, most))
    assert pa.concat_tables(blocks).equals(rows.slice().combine_chunks())
    assert max(len(block) for block in blocks) <= most
    assert all(len(set(block["shard"].to_pylist())) == 1 for block in blocks)
    for before, after in itertools.pairwise(blocks):
        parted = before["uri"][-1] == after["uri"][0] and before["shard"][-1] == after["shard"][0]
        assert not parted or len(before) == most
    if all(count == 1 for count in runs):
        assert {len(block) for block in blocks} <= set(range(1, size + 1))
