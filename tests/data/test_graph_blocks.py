"""How planned rows are cut into what a task takes (`cinemo.data.precompute.graph`)."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from cinemo.data.precompute.graph import _blocks, _pieces

RUNS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def rows(runs: list[int]) -> pa.Table:
    """Clips of as many sources as there are numbers."""
    uris = [f"source-{number}" for number, count in enumerate(runs) for _ in range(count)]
    return pa.table({"position": list(range(len(uris))), "uri": uris})


@given(RUNS, st.integers(1, 10), st.integers(0, 10))
def test_pieces_hold_every_row_once_in_order_and_clips_of_one_source_together(
    runs: list[int], size: int, more: int
) -> None:
    table, most = rows(runs), size + more
    pieces = list(_pieces(table, size, most))
    assert pa.concat_tables(pieces).equals(table)
    assert all(0 < len(piece) <= most for piece in pieces)
    parts = [uri for piece in pieces for uri in set(piece["uri"].to_pylist())]
    for number, count in enumerate(runs):
        if size + count <= most:
            assert parts.count(f"source-{number}") == 1


@given(RUNS, st.integers(1, 20), st.integers(1, 10), st.integers(0, 10))
def test_blocks_do_not_cross_shards(runs: list[int], shard: int, size: int, more: int) -> None:
    table = rows(runs)
    blocks = list(_blocks(table, shard, size, size + more))
    assert pa.concat_tables(blocks).equals(table)
    assert all(len({position // shard for position in block["position"].to_pylist()}) == 1 for block in blocks)
