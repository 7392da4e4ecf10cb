"""The canonical order: complete, seeded, the same for every number of ranks, and enterable at any step."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import count, groupby, islice
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemo.data.loading.order import Place, SampleOrder
from cinemo.types import InputError

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)
lanes = st.sampled_from([1, 2, 3, 4, 6])
EPOCHS = 4


def order(samples_of_shards: list[int], lanes: int, per_lane: int, seed: int = 0, views: int = 1) -> SampleOrder:
    counts = np.array(samples_of_shards) * views
    return SampleOrder(counts, global_batch=lanes * per_lane, lanes=lanes, seed=seed, views=views)


def epochs(order: SampleOrder, number: int = EPOCHS) -> list[list[tuple[int, int]]]:
    """(shard, sample) of the first epochs, each in the order in which a global batch after the other brings it."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(number)]
    # A lane is at most one sample behind its share.
    for step in range((order._before(number) + order.lanes) // order.global_batch + 1):
        for place in order.batch(step):
            if place.epoch < number:
                found[place.epoch].append((place.shard, place.index))
    return found


def stream(order: SampleOrder, lane: int, positions: int) -> list[Place]:
    """What one lane reads, from the beginning on."""
    steps = -(-positions // order.per_lane)
    part = slice(lane * order.per_lane, (lane + 1) * order.per_lane)
    return [place for step in range(steps) for place in order.batch(step)[part]][:positions]


@given(sizes, lanes, st.integers(1, 4), st.integers(0, 99))
def test_every_sample_once_an_epoch(samples: list[int], lanes: int, per_lane: int, seed: int) -> None:
    everything = [(shard, index) for shard, size in enumerate(samples) for index in range(size)]
    for epoch in epochs(order(samples, lanes, per_lane, seed)):
        assert sorted(epoch) == everything


@given(sizes, lanes, st.integers(1, 4), st.integers(2, 4))
def test_views_take_turns(samples: list[int], lanes: int, per_lane: int, views: int) -> None:
    """An epoch sees every clip once; as many epochs as there are views see every view of it once."""
    made = epochs(order(samples, lanes, per_lane, views=views), views)
    clips = [(shard, clip) for shard, size in enumerate(samples) for clip in range(size)]
    for epoch in made:
        assert sorted((shard, index // views) for shard, index in epoch) == clips
    assert len({place for epoch in made for place in epoch}) == len(clips) * views


def test_an_epoch_mixes_first_and_second_views() -> None:
    first = Counter(index % 3 for _, index in epochs(order([40] * 10, 2, 4, views=3), 1)[0])
    assert all(100 < first[view] < 170 for view in range(3)), first


@settings(max_examples=50)
@given(sizes, st.integers(1, 3), st.integers(0, 30), st.sampled_from([1, 2, 3]))
def test_global_batch_is_the_same_for_every_world(samples: list[int], per_lane: int, step: int, views: int) -> None:
    whole = order(samples, 4, 3 * per_lane, views=views).batch(step)
    assert len(whole) == 12 * per_lane
    for world in (2, 3, 4, 6, 12):  # as many as there are lanes, fewer, more, and numbers that do not divide them
        fresh = order(samples, 4, 3 * per_lane, views=views)
        assert [place for rank in range(world) for place in fresh.batch(step, rank, world)] == whole


@given(sizes, lanes, st.integers(1, 4), st.integers(0, 40), st.integers(1, 5))
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    samples: list[int], lanes: int, per_lane: int, stop: int, more: int
) -> None:
    undisturbed = order(samples, lanes, per_lane)
    whole = [undisturbed.batch(step) for step in range(stop + more)]
    resumed = order(samples, lanes, per_lane)
    assert [resumed.batch(step) for step in range(stop, stop + more)] == whole[stop:]


@given(sizes, lanes, st.integers(1, 4))
def test_lanes_are_slices_of_one_sequence(samples: list[int], lanes: int, per_lane: int) -> None:
    """The definition, written out once more: each epoch's sequence dealt into slices, which a lane reads in turn."""
    total = sum(samples)
    sequences = epochs(order(samples, 1, 1))
    made = order(samples, lanes, per_lane)
    streams: list[list[tuple[int, int, int]]] = [[] for _ in range(lanes)]
    for epoch, sequence in enumerate(sequences):
        start = 0
        for lane in range(lanes):
            share = [floor(Fraction(total * number + lane, lanes)) for number in (epoch, epoch + 1)]
            stop = start + share[1] - share[0]
            streams[lane] += [(epoch, *place) for place in sequence[start:stop]]
            start = stop
        assert start == total
    for lane, expected in enumerate(streams):
        got = stream(made, lane, len(expected))
        assert [(place.epoch, place.shard, place.index) for place in got] == expected


@given(sizes, lanes, st.integers(1, 4))
def test_a_lane_has_at_most_one_shard_half_read(samples: list[int], lanes: int, per_lane: int) -> None:
    """It reads its part of a shard in one run: a resume passes over whole shards, and enters one."""
    made = order(samples, lanes, per_lane)
    for lane in range(lanes):
        places = stream(made, lane, EPOCHS * made.samples // lanes)
        runs = [run for run, _ in groupby((place.epoch, place.shard) for place in places)]
        assert len(runs) == len(set(runs))


@given(sizes, lanes, st.integers(1, 4), st.integers(0, 30))
def test_what_a_lane_reads_next_is_known(samples: list[int], lanes: int, per_lane: int, step: int) -> None:
    made = order(samples, lanes, per_lane)
    for lane in range(lanes):
        part = slice(lane * per_lane, (lane + 1) * per_lane)
        last = made.batch(step)[part][-1]
        after = (place for k in count(step + 1) for place in made.batch(k)[part])
        expected = next(place.shard for place in after if (place.shard, place.epoch) != (last.shard, last.epoch))
        assert made.next_shard(step, lane) == expected


@given(sizes, lanes, st.integers(1, 4), st.integers(0, 50))
def test_a_step_begins_in_its_epoch(samples: list[int], lanes: int, per_lane: int, step: int) -> None:
    made = order(samples, lanes, per_lane)
    assert made.epoch(step) == step * lanes * per_lane // sum(samples)
    assert min(place.epoch for place in made.batch(step)) == made.epoch(step)
    assert made.steps_per_epoch == sum(samples) / (lanes * per_lane)


def test_shards_are_read_one_after_another() -> None:
    """A lane stays in a shard until it is used up, so that storage is read in runs."""
    places = epochs(order([10] * 8, 1, 1), 1)[0]
    shards = [shard for shard, _ in groupby(shard for shard, _ in places)]
    assert len(shards) == 8
    assert shards != sorted(shards)
    assert [index for _, index in places[:10]] != list(range(10))


def test_seed_and_epoch_change_the_order() -> None:
    first, second = epochs(order([20, 20, 20], 2, 2), 2)
    assert first != second
    assert first != epochs(order([20, 20, 20], 2, 2, seed=1), 1)[0]
    assert second == epochs(order([20, 20, 20], 2, 2), 2)[1]


def test_the_order_is_frozen() -> None:
    """A running training depends on it: these numbers may never change."""
    places = [(place.shard, place.index) for place in order([3, 4, 5], 2, 2).batch(4)]
    assert places == [(2, 3), (2, 4), (1, 3), (1, 0)]
    places = [(place.shard, place.index) for place in order([3, 4, 4], 2, 2, views=2).batch(5)]
    assert places == [(0, 1), (2, 6), (1, 3), (0, 0)]


def test_a_large_dataset_far_into_a_run() -> None:
    """Steps are found without walking to them, and nothing overflows."""
    made = order([256] * 136_719, 64, 16)
    step = 10**9
    places = made.batch(step)
    assert {place.epoch for place in places} <= {made.epoch(step), made.epoch(step) + 1}
    assert len(set(places)) == 64 * 16
    assert len({place.shard for place in places}) <= 2 * 64
    assert list(islice(places, 16)) == made.batch(step, 0, 64)


def test_bad_geometry() -> None:
    with pytest.raises(InputError, match="3 ranks, expected a number that divides the global batch"):
        order([8], 4, 1).batch(0, 0, 3)
    with pytest.raises(InputError, match="global_batch is 6"):
        SampleOrder(np.array([8]), global_batch=6, lanes=4, seed=0)
    with pytest.raises(InputError, match="no samples"):
        order([0, 0], 1, 1)
    with pytest.raises(InputError, match=r"shard 1 of the index has 9 samples, expected a multiple of .* 2 views"):
        SampleOrder(np.array([8, 9]), global_batch=4, lanes=4, seed=0, views=2)


growths = st.lists(st.tuples(st.integers(1, 3), st.lists(st.integers(0, 9), min_size=1, max_size=6)), max_size=3)


@given(sizes, growths, lanes, st.integers(1, 4), st.integers(0, 99))
def test_a_dataset_that_grows_is_used_whole_from_an_epoch_on(
    samples: list[int], growths: list[tuple[int, list[int]]], lanes: int, per_lane: int, seed: int
) -> None:
    made, stages, epoch = order(samples, lanes, per_lane, seed), [(0, samples)], 0
    for later, more in growths:
        before, epoch = made, epoch + later
        stages.append((epoch, [*stages[-1][1], *more]))
        made = made.grown(epoch, np.array(stages[-1][1]))
        step = 0
        while before.epoch_after([(step + 1) * per_lane] * lanes) <= epoch:
            assert made.batch(step) == before.batch(step)
            step += 1
        assert not step or all(place.epoch < epoch for place in made.batch(step - 1))
    for number, seen in enumerate(epochs(made, epoch + 2)):
        sizes_then = [sizes for first, sizes in stages if first <= number][-1]
        assert sorted(seen) == [(shard, index) for shard, size in enumerate(sizes_then) for index in range(size)]


@given(
    sizes,
    st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4)), min_size=2, max_size=4
    ),
    growths,
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_another_batch_and_other_lanes_go_on_where_the_epoch_stands(
    samples: list[int],
    phases: list[tuple[int, int, int]],
    growths: list[tuple[int, list[int]]],
    views: int,
    seed: int,
) -> None:
    """Whenever it changes and however often, each epoch sees each clip once; a dataset may grow before and after."""
    made, stages, epoch = order(samples, *phases[0][1:], seed, views), [(0, samples)], 0
    seen: list[Place] = []
    for number, (steps, lanes, per_lane) in enumerate(phases):
        if number:
            read = [phases[number - 1][0] * phases[number - 1][2]] * made.lanes
            made = made.changed(read, lanes * per_lane, lanes)
            assert (made.global_batch, made.lanes) == (lanes * per_lane, lanes)
        if number < len(growths):
            later, more = growths[number]
            epoch = max(epoch, made.epoch_after([0] * made.lanes)) + later
            stages.append((epoch, [*stages[-1][1], *more]))
            made = made.grown(epoch, np.array(stages[-1][1]) * views)
        batches = [made.batch(step) for step in range(steps)]
        whole = [place for batch in batches for place in batch]
        if lanes * per_lane % 2 == 0:
            assert [place for step in range(steps) for rank in (0, 1) for place in made.batch(step, rank, 2)] == whole
        for step in range(steps):
            for lane in range(lanes):
                last = batches[step][(lane + 1) * per_lane - 1]
                after = (made.read(lane, position, 1)[0] for position in count((step + 1) * per_lane))
                expected = next(one.shard for one in after if (one.shard, one.epoch) != (last.shard, last.epoch))
                assert made.next_shard(step, lane) == expected
        seen += whole
    by_epoch: dict[int, list[tuple[int, int]]] = {}
    for place in seen:
        by_epoch.setdefault(place.epoch, []).append((place.shard, place.index // views))
    steps, lanes, per_lane = phases[-1]
    finished = made.epoch_before([steps * per_lane] * lanes)
    for number, clips in by_epoch.items():
        there = [shape for first, shape in stages if first <= number][-1]
        everything = [(shard, clip) for shard, size in enumerate(there) for clip in range(size)]
        assert sorted(clips) == everything if number < finished else set(clips) <= set(everything)
        assert len(set(clips)) == len(clips)
    assert set(by_epoch) >= set(range(finished))


def test_what_an_epoch_has_left_keeps_its_order() -> None:
    before = order([4, 4, 4], 2, 1)
    rest = [place for lane in range(2) for place in before.read(lane, 2, 4)]  # of 6 each
    after = before.changed([2, 2], 4, 4)
    assert [place for lane in range(4) for place in after.read(lane, 0, 2)] == rest
    assert {place.epoch for place in after.batch(2)} == {1}


def test_a_growth_before_the_one_before_began_takes_its_place() -> None:
    once = order([3], 2, 2).grown(2, np.array([3, 4]))
    again, direct = once.grown(2, np.array([3, 4, 5])), order([3], 2, 2).grown(2, np.array([3, 4, 5]))
    assert [again.batch(step) for step in range(12)] == [direct.batch(step) for step in range(12)]
