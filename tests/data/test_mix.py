"""Several datasets in one training: right shares, one order for every number of ranks, whole epochs of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.small_data import make_dataset, make_sample
from hypothesis import example, given
from hypothesis import strategies as st

from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader, as_still
from cinemo.data.loading.mix import MixedLoader, Shares
from cinemo.data.loading.order import SampleOrder
from cinemo.data.loading.source import Source
from cinemo.types import InputError

weights = st.lists(st.fractions(min_value=Fraction(1, 20), max_value=20), min_size=1, max_size=4)


@given(weights, st.integers(1, 6), st.integers(0, 200))
def test_shares_are_right_at_any_point(weights: list[Fraction], lanes: int, position: int) -> None:
    shares, total = Shares(weights, lanes), sum(weights)
    lane_counts = [shares.counts(lane, position) for lane in range(lanes)]
    for lane, counts in enumerate(lane_counts):
        assert sum(counts) == position
        steps = [after - before for before, after in zip(counts, shares.counts(lane, position + 1), strict=True)]
        assert sorted(steps) == [0] * (len(weights) - 1) + [1]
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - position * weight / total) < len(weights)
    if len(weights) == 2:  # the global batches hold the shares to within a sample
        first = sum(counts[0] for counts in lane_counts)
        assert abs(first - lanes * position * weights[0] / total) < 1


def index_of(root: Path, number: int) -> DatasetIndex:
    """A large and a small dataset, whose keys are the same."""
    place = root / str(number)
    return DatasetIndex.load(str(place)) if place.exists() else make_dataset(place, ([5, 6, 2], [3, 1])[number])


def mixed(
    root: Path, rank: int = 0, world: int = 1, shares: tuple[str, ...] = ("0.7", "0.3"), **more: Any
) -> MixedLoader:
    loaders = [
        LatentLoader(index_of(root, number), global_batch=8, lanes=4, seed=3, rank=rank, world=world, **more)
        for number in range(len(shares))
    ]
    return MixedLoader(loaders, [Fraction(share) for share in shares])


def test_every_number_of_ranks_sees_the_same(tmp_path: Path) -> None:
    whole = mixed(tmp_path)
    batches = [whole.batch(step) for step in range(9)]
    for world in (2, 4, 8):  # of four lanes
        parts = [mixed(tmp_path, rank, world) for rank in range(world)]
        for step in reversed(range(9)):  # any step, without those before it
            got = [part.batch(step) for part in parts]
            assert tuple(key for batch in got for key in batch.keys) == batches[step].keys
            assert [epoch for batch in got for epoch in batch.epochs or []] == batches[step].epochs


def test_each_dataset_has_whole_epochs_of_its_own(tmp_path: Path) -> None:
    whole, seen = mixed(tmp_path), Counter[tuple[int, int, int, int]]()
    for step in range(20):
        for one in whole.places(step):
            seen[one.source, one.place.epoch, one.place.shard, one.place.index] += 1
    assert set(seen.values()) == {1}
    for source, size in ((0, 13), (1, 4)):
        finished = whole.loaders[source].order.epoch_before(whole.read_before(20, source))
        assert finished >= 8
        by_epoch = Counter(key[1] for key in seen if key[0] == source)
        assert all(by_epoch[epoch] == size for epoch in range(finished))
    shares = Counter(key[0] for key in seen.elements())
    assert shares == {0: 112, 1: 48}


def test_another_batch_goes_on_where_each_epoch_stands(tmp_path: Path) -> None:
    """After 3 steps of 8 samples come 7 of 12 in 6 lanes, then any of 4 in 1."""
    whole = mixed(tmp_path).changed(3, 12, 6).changed(10, 4, 1)
    assert [whole.at(step).global_batch for step in (0, 2, 3, 9, 10)] == [8, 8, 12, 12, 4]
    seen = Counter((one.source, one.place) for step in range(60) for one in whole.at(step).places(step))
    assert set(seen.values()) == {1}
    for source, size in ((0, 13), (1, 4)):
        finished = whole.loaders[source].order.epoch_before(whole.read_before(60, source))
        assert finished >= 8
        by_epoch = Counter(place.epoch for number, place in seen if number == source)
        assert all(by_epoch[epoch] == size for epoch in range(finished))
    for world in (2, 4):
        parts = [mixed(tmp_path, rank, world).changed(3, 12, 6).changed(10, 4, 1) for rank in range(world)]
        for step in (10, 11, 25):
            keys = tuple(key for part in parts for key in part.batch(step).keys)
            assert keys == whole.batch(step).keys
            assert keys == tuple(sample.key for sample in whole.batch(step).samples)
    parts = [mixed(tmp_path, rank, 3).changed(3, 12, 6) for rank in range(3)]  # which could not share a batch of 8
    assert tuple(key for part in parts for key in part.batch(4).keys) == mixed(tmp_path).changed(3, 12, 6).batch(4).keys


def test_samples_are_told_apart_and_are_what_was_stored(tmp_path: Path) -> None:
    samples = mixed(tmp_path).batch(0).samples
    assert {sample.key[:2] for sample in samples} == {"0/", "1/"}
    for sample in samples:
        np.testing.assert_array_equal(sample.latents_FCHW, make_sample(int(sample.key[2:11])).latents_FCHW)


def test_a_mix_of_one_is_the_dataset_itself(tmp_path: Path) -> None:
    alone = mixed(tmp_path, shares=("5",))
    for step in range(6):
        assert alone.batch(step).keys == alone.loaders[0].batch(step).keys
        assert [one.place for one in alone.places(step)] == alone.loaders[0].order.batch(step)
        assert alone.epoch(step) == alone.loaders[0].order.epoch(step)


def test_damage_in_one_dataset_costs_its_samples_alone(tmp_path: Path) -> None:
    whole = [mixed(tmp_path).batch(step) for step in range(6)]
    (tmp_path / "1/shards/shard-000000.tar").unlink()
    made = mixed(tmp_path, on_damaged="skip")
    gone = {f"1/{k:09d}-0" for k in range(3)}
    for step, batch in enumerate(whole):
        assert made.batch(step).keys == tuple(key for key in batch.keys if key not in gone)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 2**20), st.integers(0, 9))
def test_a_filter_leaves_whole_epochs_of_what_passes(sizes: list[int], views: int, bits: int, seed: int) -> None:
    counts = np.array(sizes) * views
    kept = np.array([bool(bits >> k % 20 & 1) for k in range(counts.sum())], bool)
    if not kept.any():
        return
    made = SampleOrder(counts, global_batch=4, lanes=2, seed=seed, views=views, kept=kept)
    passing = [
        (shard, clip, [view for view in range(views) if part[clip * views + view]])
        for shard, part in enumerate(np.split(kept, np.cumsum(counts)[:-1]))
        for clip in range(sizes[shard])
    ]
    seen: dict[int, list[tuple[int, int]]] = {epoch: [] for epoch in range(6)}
    step = 0
    while made.epoch_before([step * 2] * 2) < 6:
        for place in made.batch(step):
            seen.setdefault(place.epoch, []).append((place.shard, place.index))
        step += 1
    for epoch in range(6):
        assert sorted((shard, index // views) for shard, index in seen[epoch]) == sorted(
            (shard, clip) for shard, clip, views_left in passing if views_left
        )
    for shard, clip, left in passing:
        for first in range(6 - len(left) if left else 0):
            shown = [
                index % views
                for epoch in range(first, first + len(left))
                for place, index in seen[epoch]
                if (place, index // views) == (shard, clip)
            ]
            assert sorted(shown) == left


def test_a_still_does_not_move() -> None:
    fields = {"flow": np.ones((5, 2, 4, 6), np.float16), "frame_tokens": np.arange(12.0).reshape(6, 2, 1)}
    sample = as_still(replace(make_sample(3), fields=fields))
    assert (sample.latents_FCHW == make_sample(3).latents_FCHW[0]).all()
    assert sample.ssim == 1.0
    assert not sample.fields["flow"].any()
    assert (sample.fields["frame_tokens"] == fields["frame_tokens"][0]).all()


@pytest.mark.parametrize(
    ("text", "uri", "weight"),
    [
        ("s3://b/a", "s3://b/a", "1"),
        ("s3://b/a=0.7", "s3://b/a", "0.7"),
        ("/data=.5", "/data", "0.5"),
        ("s3://b/day=mon", "s3://b/day=mon", "1"),
        ("s3://b/year=2024=1", "s3://b/year=2024", "1"),
    ],
)
def test_weights_stand_behind_a_uri(text: str, uri: str, weight: str) -> None:
    source = Source.parse(text)
    assert (source.uri, source.weight) == (uri, Fraction(weight))
    assert Source.parse(source.flags[1]) == source


def test_no_weight_is_refused() -> None:
    with pytest.raises(InputError, match="the weight is 0, expected more"):
        Source.parse("/data=0")
    with pytest.raises(InputError, match="weight has 5000 characters, expected at most 40"):
        Source.parse("/data=" + "9" * 5000)


@given(
    st.lists(
        st.fractions(min_value="1/1000", max_value=1000) | st.just(Fraction("0.12345678901234567")),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 10**12),
)
@example([Fraction(1, 1000), Fraction("999.12345678901234567")], 8, 0)
def test_a_table_of_shares_says_what_they_say_one_by_one(weights: list[Fraction], lanes: int, first: int) -> None:
    shares, positions = Shares(weights, lanes), range(first, first + 4)
    expected = [[shares.counts(lane, position) for position in positions] for lane in range(lanes)]
    assert shares.table(range(lanes), positions).transpose(1, 2, 0).tolist() == expected
