"""The canonical order: complete, seeded, the same for every number of ranks, and enterable at any step."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemo.data.order import SampleOrder
from cinemo.types import InputError

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)
lanes = st.sampled_from([1, 2, 4])


def order(samples_of_shards: list[int], lanes: int, per_lane: int, seed: int = 0) -> SampleOrder:
    return SampleOrder(np.array(samples_of_shards), global_batch=lanes * per_lane, lanes=lanes, seed=seed)


def epoch(order: SampleOrder, number: int) -> list[tuple[int, int]]:
    steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
    return [(place.shard, place.index) for step in steps for place in order.batch(step)]


@given(sizes, lanes, st.integers(1, 4), st.integers(0, 3))
def test_no_sample_twice_in_an_epoch(samples: list[int], lanes: int, per_lane: int, number: int) -> None:
    made = order(samples, lanes, per_lane)
    seen = Counter(epoch(made, number))
    assert all(index < samples[shard] for shard, index in seen)
    if sum(samples) < lanes * per_lane:
        assert made.steps_per_epoch == 1
        assert max(seen.values()) - min(seen.values()) <= 1
        assert len(seen) == sum(samples)
        return
    assert max(seen.values()) == 1
    # What an epoch leaves out is less than a global batch and a remainder of lanes.
    assert sum(samples) - len(seen) < lanes * per_lane + lanes


@given(lanes, st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_every_sample_once_when_the_batch_divides(lanes: int, per_lane: int, batches: int, shards: int) -> None:
    samples = [lanes * per_lane * batches] * shards
    seen = epoch(order(samples, lanes, per_lane), 0)
    assert sorted(seen) == [(shard, index) for shard, size in enumerate(samples) for index in range(size)]


@settings(max_examples=50)
@given(sizes, st.integers(1, 3), st.integers(0, 30))
def test_global_batch_is_the_same_for_every_world(samples: list[int], per_lane: int, step: int) -> None:
    made = order(samples, 4, per_lane)
    whole = made.batch(step)
    for world in (2, 4):
        fresh = order(samples, 4, per_lane)
        assert [place for rank in range(world) for place in fresh.batch(step, rank, world)] == whole


@given(sizes, lanes, st.integers(1, 4))
def test_lanes_are_contiguous_slices_of_one_sequence(samples: list[int], lanes: int, per_lane: int) -> None:
    """The definition, written out once more: S, cut in equal slices that are read side by side."""
    if sum(samples) < lanes * per_lane:
        return
    single = order(samples, 1, 1)
    sequence = epoch(single, 0)
    made = order(samples, lanes, per_lane)
    n = len(sequence) // lanes
    for k in range(made.steps_per_epoch):
        expected = [
            s for lane in range(lanes) for s in sequence[lane * n + k * per_lane : lane * n + (k + 1) * per_lane]
        ]
        assert [(place.shard, place.index) for place in made.batch(k)] == expected


def test_shards_are_read_one_after_another() -> None:
    """A lane stays in a shard until it is used up, so that storage is read in runs."""
    places = epoch(order([10] * 8, 1, 1), 0)
    shards = [shard for shard, _ in places]
    assert sum(a != b for a, b in pairwise(shards)) == 7
    assert shards != sorted(shards)
    assert [index for _, index in places[:10]] != list(range(10))


def test_seed_and_epoch_change_the_order() -> None:
    base = order([20, 20, 20], 2, 2)
    assert epoch(base, 0) != epoch(base, 1)
    assert epoch(base, 0) != epoch(order([20, 20, 20], 2, 2, seed=1), 0)
    assert epoch(base, 1) == epoch(order([20, 20, 20], 2, 2), 1)


def test_the_order_is_frozen() -> None:
    """A running training depends on it: these numbers may never change."""
    places = [(place.shard, place.index) for place in order([3, 4, 5], 2, 2).batch(4)]
    assert places == [(2, 3), (2, 4), (1, 3), (1, 0)]


def test_bad_geometry() -> None:
    with pytest.raises(InputError, match="3 ranks"):
        order([8], 4, 1).batch(0, 0, 3)
    with pytest.raises(InputError, match="global_batch is 6"):
        SampleOrder(np.array([8]), global_batch=6, lanes=4, seed=0)
    with pytest.raises(InputError, match="no samples"):
        order([0, 0], 1, 1)
