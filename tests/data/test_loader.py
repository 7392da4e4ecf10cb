"""The loader gives back what was stored, in the canonical order, and notices damaged shards."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data.small_data import make_dataset, make_sample

from cinemo import storage
from cinemo.data.loader import LatentLoader
from cinemo.data.shards import DatasetIndex
from cinemo.types import RunError


def loader(index: DatasetIndex, rank: int = 0, world: int = 1, lanes: int = 2) -> LatentLoader:
    return LatentLoader(index, global_batch=4, lanes=lanes, seed=3, rank=rank, world=world)


def keys(loader: LatentLoader, start: int, steps: int) -> list[list[str]]:
    return [[sample.key for sample in batch.samples] for batch in islice(loader.batches(start), steps)]


def test_every_sample_comes_back_once_an_epoch(tmp_path: Path) -> None:
    made = loader(make_dataset(tmp_path, [3, 1, 0, 4]))
    batches = list(islice(made.batches(), made.steps_per_epoch))
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


def test_epochs_are_counted(tmp_path: Path) -> None:
    made = loader(make_dataset(tmp_path, [9]))
    assert [batch.epoch for batch in islice(made.batches(), 5)] == [0, 0, 1, 1, 2]


def test_few_samples_repeat_with_a_note(tmp_path: Path) -> None:
    made = loader(make_dataset(tmp_path, [2, 1]))
    assert made.note == "3 samples are fewer than a global batch of 4: they repeat"
    assert made.steps_per_epoch == 1
    batch = made.batch(0)
    assert len(batch.samples) == 4
    assert len({sample.key for sample in batch.samples}) == 3
    assert loader(make_dataset(tmp_path / "more", [4])).note is None


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    index = make_dataset(tmp_path, [4])
    tar = tmp_path / "shards/shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)
    with pytest.raises(RunError, match=r"shard-000000\.tar: sha256 is .* its record says"):
        loader(index).batch(0)


@pytest.mark.parametrize("lost", ["shard-000000.tar", "shard-000000.json"])
def test_lost_shard_is_named(tmp_path: Path, lost: str) -> None:
    index = make_dataset(tmp_path, [4])
    (tmp_path / "shards" / lost).unlink()
    with pytest.raises(RunError, match=r"shard-000000\.tar: the shard or its record cannot be read"):
        loader(index).batch(0)


@pytest.mark.s3
def test_shards_on_s3(tmp_path: Path, s3_endpoint: str) -> None:
    local = make_dataset(tmp_path, [3, 4])
    storage.upload(tmp_path, "s3://cinemo-test/latents")
    remote = DatasetIndex.load("s3://cinemo-test/latents")
    assert keys(loader(remote), 0, 4) == keys(loader(local), 0, 4)
    np.testing.assert_array_equal(
        loader(remote).batch(1).samples[2].latents_FCHW, loader(local).batch(1).samples[2].latents_FCHW
    )
