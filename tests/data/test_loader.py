"""The loader gives back what was stored, in the canonical order, and notices damaged shards."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.small_data import make_dataset, make_sample
from faulty_s3 import FaultyS3

from cinemo import s3, storage
from cinemo.cache import Damaged
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading import reader
from cinemo.data.loading.loader import HeldOut, LatentLoader, Skipped, StepBatch
from cinemo.types import InputError, RunError


def loader(index: DatasetIndex, rank: int = 0, world: int = 1, lanes: int = 2, **options: Any) -> LatentLoader:
    return LatentLoader(index, global_batch=4, lanes=lanes, seed=3, rank=rank, world=world, **options)


def keys(batches: Iterator[StepBatch] | LatentLoader, start: int = 0, steps: int = 1000) -> list[list[str]]:
    if isinstance(batches, LatentLoader):
        batches = islice(batches.batches(start), steps)
    return [[sample.key for sample in batch.samples] for batch in batches]


def flat(batches: list[list[str]]) -> list[str]:
    return [key for batch in batches for key in batch]


def damage(tar: Path) -> None:
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)


def test_every_sample_comes_back_once_an_epoch(tmp_path: Path) -> None:
    made = loader(make_dataset(tmp_path, [3, 1, 0, 4]))
    batches = list(islice(made.batches(), 2))
    assert [batch.step for batch in batches] == [0, 1]
    samples = [sample for batch in batches for sample in batch.samples]
    assert sorted(sample.key for sample in samples) == [f"{k:09d}-0" for k in range(8)]
    for sample in samples:
        original = make_sample(int(sample.key[:9]))
        np.testing.assert_array_equal(sample.latents_FCHW, original.latents_FCHW)
        assert (sample.caption, sample.ssim, sample.start_frame) == (
            original.caption,
            original.ssim,
            original.start_frame,
        )
    assert all(batch.weights is None for batch in batches)
    assert made.skipped == Skipped(0, 0)


def test_any_step_is_the_tail_of_the_whole(tmp_path: Path) -> None:
    index = make_dataset(tmp_path, [5, 6, 2])
    whole = keys(loader(index), 0, 12)
    for start in (1, 5, 9):
        assert keys(loader(index), start, 3) == whole[start : start + 3]


def test_ranks_share_the_global_batch(tmp_path: Path) -> None:
    index = make_dataset(tmp_path, [5, 6, 2])
    whole = keys(loader(index), 0, 7)
    halves = [keys(loader(index, rank, 2), 0, 7) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_a_batch_goes_on_into_the_next_epoch(tmp_path: Path) -> None:
    made = loader(make_dataset(tmp_path, [9]), lanes=1)
    assert [batch.epoch for batch in islice(made.batches(), 5)] == [0, 0, 0, 1, 1]
    read = flat(keys(made, 0, 9))
    for epoch in range(4):
        assert sorted(read[9 * epoch : 9 * epoch + 9]) == [f"{k:09d}-0" for k in range(9)]


def test_few_samples_repeat_with_a_note(tmp_path: Path) -> None:
    made = loader(make_dataset(tmp_path, [2, 1]))
    assert made.note == "3 samples are fewer than a global batch of 4, so a batch repeats some"
    assert len(set(keys(made, 0, 1)[0])) == 3
    assert sorted(flat(keys(made, 0, 3))) == sorted(f"{k:09d}-0" for k in [0, 1, 2] * 4)
    assert loader(make_dataset(tmp_path / "more", [4])).note is None


def test_views_of_a_clip_take_turns(tmp_path: Path) -> None:
    made = loader(make_dataset(tmp_path, [3, 4, 1], views=2))
    first, second = (flat(keys(made, start, 2)) for start in (0, 2))
    assert sorted(key[:9] for key in first) == sorted(key[:9] for key in second) == [f"{k:09d}" for k in range(8)]
    assert sorted(first + second) == [f"{k:09d}-{view}" for k in range(8) for view in range(2)]
    assert {key[-1] for key in first} == {"0", "1"}


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    index = make_dataset(tmp_path, [4])
    damage(tmp_path / "shards/shard-000000.tar")
    made = loader(index)
    for _ in range(2):
        with pytest.raises(Damaged, match=r"shard-000000\.tar: has blake3 .* its record says .* remove .*000\.json"):
            made.batch(0)


def test_a_record_of_another_shard_is_named(tmp_path: Path) -> None:
    index = make_dataset(tmp_path, [4, 4])
    record = tmp_path / "shards/shard-000001.json"
    record.write_bytes((tmp_path / "shards/shard-000000.json").read_bytes())
    with pytest.raises(RunError, match=r"shard-000001\.tar: its record says blake3 .* the index"):
        keys(loader(index), 0, 3)


@pytest.mark.parametrize("lost", ["shard-000000.tar", "shard-000000.json"])
def test_lost_shard_is_named(tmp_path: Path, lost: str) -> None:
    index = make_dataset(tmp_path, [4])
    (tmp_path / "shards" / lost).unlink()
    with pytest.raises(RunError, match=r"shard-000000\.tar: the shard or its record cannot be read"):
        loader(index).batch(0)


def test_a_record_cut_short_is_named(tmp_path: Path) -> None:
    index = make_dataset(tmp_path, [4])
    record = tmp_path / "shards/shard-000000.json"
    record.write_bytes(record.read_bytes()[:50])
    with pytest.raises(RunError, match=r"shard-000000\.tar: the shard or its record cannot be read"):
        loader(index).batch(0)


def test_what_is_damaged_is_left_out_and_nothing_else_moves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = make_dataset(tmp_path, [5, 6, 2, 4])
    whole = keys(loader(index), 0, 17)
    damage(tmp_path / "shards/shard-000001.tar")
    (tmp_path / "shards/shard-000002.tar").unlink()
    gone = {f"{k:09d}-0" for k in range(5, 13)}
    made = loader(index, on_damaged="skip")
    with caplog.at_level(logging.WARNING):
        batches = list(islice(made.batches(), 17))  # four epochs
    for batch, expected in zip(batches, whole, strict=True):
        weights = batch.weights or [1.0] * 4
        assert weights == [float(key not in gone) for key in expected]
        assert [sample.key for sample, weight in zip(batch.samples, weights, strict=True) if weight] == [
            key for key in expected if key not in gone
        ]
        assert not {sample.key for sample in batch.samples} & gone
    assert made.skipped == Skipped(2, 4 * len(gone))
    assert len(caplog.messages) == 2
    assert all("shard is left out" in message for message in caplog.messages)


def test_a_rank_without_any_sample_still_has_a_batch(tmp_path: Path) -> None:
    index = make_dataset(tmp_path, [4, 4, 4, 4])
    for shard in (0, 1, 2):
        damage(tmp_path / f"shards/shard-{shard:06d}.tar")
    batches = list(islice(loader(index, on_damaged="skip", lanes=1).batches(), 4))
    assert sorted(sum(batch.weights or [1.0] * 4) for batch in batches) == [0, 0, 0, 4]
    assert all(len(batch.samples) == 4 for batch in batches)
    damage(tmp_path / "shards/shard-000003.tar")
    with pytest.raises(RunError, match="every shard is damaged or missing"):
        loader(index, on_damaged="skip").batch(0)


def test_held_out_shards_are_read_by_validation_alone(tmp_path: Path) -> None:
    index = make_dataset(tmp_path, [3, 2, 4, 3], views=2)
    made = loader(index, held_out_shards=2)
    assert {int(key[:9]) for batch in keys(made, 0, 10) for key in batch} == set(range(5))
    held_out = HeldOut(index, 2)
    assert len(held_out) == 7
    assert keys(held_out.batches(3)) == [
        ["000000005-0", "000000006-0", "000000007-0"],
        ["000000008-0", "000000009-0", "000000010-0"],
        ["000000011-0"] * 3,
    ]
    assert [batch.weights for batch in held_out.batches(3)] == [None, None, [1.0, 0.0, 0.0]]
    assert len(HeldOut(index, 0)) == 0
    with pytest.raises(InputError, match=r"held_out_shards is 4, but .* has 4 shards; expected at most 3"):
        loader(index, held_out_shards=4)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_validates_equally_often(tmp_path: Path, world: int) -> None:
    index = make_dataset(tmp_path, [1, 4, 5])
    ranks = [list(HeldOut(index, 2).batches(2, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    there = [
        sample.key
        for batches in ranks
        for batch in batches
        for sample, weight in zip(batch.samples, batch.weights or [1.0, 1.0], strict=True)
        if weight
    ]
    assert sorted(there) == [f"{k:09d}-0" for k in range(1, 10)]


def test_validation_does_without_a_damaged_shard(tmp_path: Path) -> None:
    index = make_dataset(tmp_path, [1, 2, 2])
    damage(tmp_path / "shards/shard-000002.tar")
    with pytest.raises(Damaged):
        list(HeldOut(index, 2).batches(4))
    (batch,) = HeldOut(index, 2, on_damaged="skip").batches(4)
    assert batch.weights == [1.0, 1.0, 0.0, 0.0]


def test_a_shard_is_read_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a lane comes to its next shard, that shard is open: a step never waits for a change of shard."""
    index = make_dataset(tmp_path, [8] * 6)
    made = loader(index)
    real = reader.ShardReader.get
    waits: list[int] = []

    def watch(self: reader.ShardReader, position: int) -> reader.OpenShard:
        if position not in self._open:
            waits.append(position)
        return real(self, position)

    monkeypatch.setattr(reader.ShardReader, "want", _remember(opened := [], reader.ShardReader.want))
    monkeypatch.setattr(reader.ShardReader, "get", watch)
    for step in range(24):
        before = set(made._reader._open)
        batch = made.order.batch(step)
        made.batch(step)
        if step:
            assert {place.shard for place in batch} <= before
    assert not waits
    assert max(map(len, opened)) <= 4  # the shard of each lane, and its next one
    assert len(made._reader._open) <= 8


def _remember(calls: list[list[int]], real: Any) -> Any:
    def want(self: reader.ShardReader, positions: Any) -> None:
        calls.append(list(dict.fromkeys(positions)))
        real(self, calls[-1])

    return want


@pytest.mark.s3
def test_shards_on_s3(tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    local = make_dataset(tmp_path, [3, 4, 5])
    root = f"s3://cinemo-test/{tmp_path.name}"
    storage.upload(tmp_path, root)
    asked: list[str] = []
    real = s3.call

    def watch(uri: str, method: str, *arguments: Any, **options: Any) -> Any:
        asked.append(method)
        return real(uri, method, *arguments, **options)

    monkeypatch.setattr(s3, "call", watch)
    remote = DatasetIndex.load(root)
    assert keys(loader(remote), 0, 9) == keys(loader(local), 0, 9)
    assert set(asked) == {"cat_file", "get_file"}  # nothing is listed
    assert asked.count("get_file") == 3  # each shard is fetched once
    np.testing.assert_array_equal(
        loader(remote).batch(1).samples[2].latents_FCHW, loader(local).batch(1).samples[2].latents_FCHW
    )


@pytest.mark.slow
@pytest.mark.s3
def test_an_outage_is_no_damage(tmp_path: Path, s3_faults: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, [2, 6])  # bytes that no other test has in the cache
    root = f"s3://cinemo-test/{tmp_path.name}"
    storage.upload(tmp_path, root)
    remote = DatasetIndex.load(root)
    monkeypatch.setenv(s3.PATIENCE, "0.1")
    s3_faults.meet({"503": 1.0}, only=".tar")
    with pytest.raises(RunError, match="storage has been failing") as raised:
        keys(loader(remote, on_damaged="skip"), 0, 4)
    assert not isinstance(raised.value, Damaged)
    s3_faults.meet()
    storage.remove_file(f"{root}/shards/shard-000001.tar")
    made = loader(remote, on_damaged="skip")
    keys(made, 0, 6)
    assert made.skipped == Skipped(1, 18)
