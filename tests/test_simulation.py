"""Laws of the simulated precompute cluster (`benchmarks/simulation.py`)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Fleet, Limits, Result, Work, simulate

PARTS = ("useful", "lost", "waiting", "booting", "idle")


def check(made: Result, work: Work) -> None:
    assert made.committed == work.blocks()
    assert sum(made.shares().values()) == pytest.approx(1)
    assert all(getattr(made, name) >= -1e-6 * made.paid for name in PARTS)
    assert made.shards == sorted(made.shards)
    assert len(made.shards) == math.ceil(work.clips / work.shard)


def test_without_any_trouble_all_cores_work_all_the_time() -> None:
    work = Work(16_000, 0.3, spread=0.0)
    made = simulate(work, Fleet(2, 4, boot=0.0))
    check(made, work)
    assert made.seconds == pytest.approx(16_000 * 0.3 / 8)
    assert made.useful == pytest.approx(made.paid)


@given(
    clips=st.integers(300, 6000),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    nodes=st.integers(1, 6),
    hours=st.sampled_from([None, 0.02, 0.1]),
    notice=st.sampled_from([0.0, 20.0]),
    accelerators=st.sampled_from([0, 1, 3]),
    limits=st.sampled_from([Limits(), Limits(200.0, 5.0, 1.0), Limits(tasks_per_second=1.0)]),
)
@settings(max_examples=40, deadline=None)
def test_every_block_is_committed_and_every_second_accounted_for(
    clips: int,
    spread: float,
    nodes: int,
    hours: float | None,
    notice: float,
    accelerators: int,
    limits: Limits,
) -> None:
    work = Work(clips, 0.2, spread, 0.01, 20.0, 0.05 if accelerators else 0.0)
    fleet = Fleet(nodes, 3, accelerators, hours, notice, provision=10.0, boot=2.0)
    made = simulate(work, fleet, limits)
    check(made, work)
    assert made == simulate(work, fleet, limits), "the same arguments, the same run"
    if hours is None:
        assert (made.interruptions, made.again, made.lost) == (0, 0, 0)


def test_a_node_that_is_taken_away_costs_what_it_had_begun() -> None:
    work = Work(3200, 0.5, spread=0.0)
    calm = simulate(work, Fleet(2, 1, boot=0.0))
    made = simulate(work, Fleet(2, 1, boot=0.0, provision=100.0, taken=((1, 404.0),)))
    assert made.interruptions == 1
    # Blocks of 8 s: half a block of work and, of what the other had not overtaken, nothing is lost.
    assert made.lost == pytest.approx(4.0)
    assert made.again == 1
    assert made.seconds == pytest.approx(calm.seconds + (100 + 4) / 2, abs=8)


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        (Limits(objects_per_second=50.0), 16_000 / 50),
        (Limits(tasks_per_second=4.0), 1000 / 4),
    ],
    ids=["storage", "driver"],
)
def test_the_slowest_part_decides(limits: Limits, seconds: float) -> None:
    work = Work(16_000, 0.1, spread=0.0)
    assert simulate(work, Fleet(10, 10, boot=0.0), limits).seconds == pytest.approx(seconds, rel=0.02)
    encoded = replace(work, encode_seconds=0.2)
    made = simulate(encoded, Fleet(10, 10, 4, boot=0.0), Limits())
    assert made.seconds == pytest.approx(16_000 * 0.2 / 4, rel=0.02)
    assert made.accelerator_busy == pytest.approx(16_000 * 0.2)


def test_late_blocks_hold_back_those_behind_them_up_to_the_window() -> None:
    work = Work(20_000, 0.1, spread=0.0, stalled=2e-4, stall_seconds=120.0)
    fleet = Fleet(4, 5, boot=0.0)
    wide = simulate(work, fleet, Limits(window=400.0))
    narrow = simulate(work, fleet, Limits(window=2.0))
    assert narrow.longest_hold < 2 * 20 < wide.longest_hold
    assert narrow.seconds > 1.2 * wide.seconds


def test_encoding_without_accelerators_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.1 s a clip to encode, but no accelerators"):
        simulate(Work(10, 1.0, encode_seconds=0.1), Fleet(1, 1))
