"""A training whose dataset grows takes the new shards from the next epoch on, whatever is killed, and says so."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training.conftest import moving_samples
from training.jobs import ROOT, Job

from cinemo import storage
from cinemo.config import Recipe, TrainConfig
from cinemo.data.dataset import shards, sidecars
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.source import Source
from cinemo.recipes import override
from cinemo.training.checkpoint import checkpoints
from cinemo.training.report import sample_log
from cinemo.training.run.dataset_check import dataset_digest, shards_of
from cinemo.training.run.growth import Batches, TrainingData, batches_of, generations_of
from cinemo.training.run.loop import AHEAD
from cinemo.training.run.proof import verify_resume
from cinemo.types import InputError

PER_SHARD, STEPS = 4, 120


def grow(root: str, number: int, fingerprint: str = "f" * 64) -> DatasetIndex:
    """Make a dataset of ``number`` shards, or a longer one of a shorter one."""
    samples = moving_samples(PER_SHARD * number)
    there = len(storage.names(storage.join(root, "shards"))) // 2
    for shard in range(there, number):
        shards.commit(root, shard, samples[PER_SHARD * shard : PER_SHARD * (shard + 1)], [], fingerprint)
    records = [storage.read_json(shards.record_uri(root, shard)) for shard in range(number)]
    storage.write_bytes(storage.join(root, "index.parquet"), shards.index_bytes(records))
    place = storage.join(root, "dataset.json")
    info = storage.read_json(place) if storage.exists(place) else {
        "schema": shards.SCHEMA_VERSION, "complete": True, "fingerprint": fingerprint, "quarantined": 0,
    }  # fmt: skip
    storage.write_json(place, info | {"samples": len(samples), "shards": number})
    return DatasetIndex.load(root)


def settings_of(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"workers": 1, "global_batch": 4, "micro_batch": 4, "lanes": 2, **changes})


def whole(
    index: DatasetIndex,
    generations: list[tuple[int, int]],
    steps: int,
    train: TrainConfig,
    batches: Sequence[Batches] | None = None,
) -> list[list[str]]:
    """What a training sees, from its generations and batches alone."""
    loader = data_of(index, generations, train, batches=batches).loader
    return [[sample.key for sample in loader.at(step).batch(step).samples] for step in range(steps)]


def data_of(
    index: DatasetIndex,
    generations: list[tuple[int, int]],
    train: TrainConfig,
    fields: Sequence[str] = (),
    batches: Sequence[Batches] | None = None,
) -> TrainingData:
    return TrainingData([Source(index.uri)], [index], [generations], train, fields=fields, batches=batches)


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 9), st.booleans(), st.integers(0, 2), st.sampled_from([(4, 2), (4, 2), (8, 4), (6, 3)])
        ),
        min_size=1,
        max_size=8,
    )
)
def test_kills_growth_and_other_batches_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, bool, int, tuple[int, int]]]
) -> None:
    """Each life trains some steps (a checkpoint every third) with a batch of its own, and the dataset grows in the
    middle of it or before it.
    """
    root, train, number = str(tmp_path_factory.mktemp("data")), settings_of(held_out_shards=1), 4
    index = grow(root, number)
    state: dict[str, Any] = {"step": 0, **data_of(index, [(0, number)], train).identity}
    log: dict[int, list[str]] = {}
    for steps, before, more, (size, lanes) in lives:
        if before:
            grow(root, number := number + more)
        index = DatasetIndex.load(root)
        train = settings_of(held_out_shards=1, global_batch=size, micro_batch=size, lanes=lanes)
        batches = batches_of(state, {}, train)
        data = data_of(index, generations_of([index], [Source(root)], state)[0], train, batches=batches)
        log = {step: keys for step, keys in log.items() if step < state["step"]}
        first = step = state["step"]
        made = count(first)
        ready: dict[int, list[str]] = {}
        for step in range(first, first + steps):
            if step == first and step:
                data.follow(step, 0)
            while len(ready) < AHEAD:  # made ahead, as `prefetch` does
                batch = data.loader.batch(next(made))
                ready[batch.step] = [sample.key for sample in batch.samples]
            log[step] = ready.pop(step)
            if step == first + 1 and not before:
                grow(root, number := number + more)
            if (step + 1) % 3 == 0:
                data.follow(step + 1, AHEAD)
                state = json.loads(json.dumps({"step": step + 1, **data.identity}))
    index = DatasetIndex.load(root)
    kept = {step: keys for step, keys in log.items() if step < state["step"]}
    generations, batches = generations_of([index], [Source(root)], state)[0], batches_of(state, {}, train)
    expected = whole(index, generations, state["step"], train, batches)
    assert kept == dict(enumerate(expected))
    loader = data_of(index, generations, train, batches=batches).loader
    seen = Counter(one.place for step in range(state["step"]) for one in loader.at(step).places(step))
    assert set(seen.values()) <= {1}
    by_epoch = Counter(place.epoch for place in seen)
    for epoch in range(loader.loaders[0].order.epoch_before(loader.read_before(state["step"], 0))):
        shards_then = [shards for first, shards in generations if first <= epoch][-1]
        assert by_epoch[epoch] == PER_SHARD * (shards_then - 1), "all but those held out"
    held_out = {f"clip{PER_SHARD * 3 + k:03d}_0" for k in range(PER_SHARD)}
    assert not held_out & {key for keys in kept.values() for key in keys}


def test_a_checkpoint_that_knows_no_other_batch_had_one() -> None:
    made_with = {"global_batch": 4, "lanes": 2}
    assert batches_of({"step": 7}, made_with, settings_of()) == [(0, 4, 2)]
    doubled = settings_of(global_batch=8)
    assert batches_of({"step": 7}, made_with, doubled) == [(0, 4, 2), (7, 8, 2)]
    assert batches_of({"step": 9, "batches": [[0, 4, 2], [7, 8, 2]]}, {}, doubled) == [(0, 4, 2), (7, 8, 2)]


def test_other_data_begin_with_their_first_epoch(tmp_path: Path) -> None:
    index = grow(str(tmp_path), 2)
    data = data_of(index, [(0, 2)], settings_of(), batches=[(100, 4, 2)])
    from_nothing = whole(index, [(0, 2)], 6, settings_of())
    got = [[sample.key for sample in data.loader.batch(step).samples] for step in range(100, 106)]
    assert got == from_nothing
    assert [data.loader.epoch(step) for step in (100, 101, 102, 104)] == [0, 0, 1, 2]
    assert data.identity["batches"] == [[100, 4, 2]]


def test_an_epoch_after_growth_sees_every_sample_once(tmp_path: Path) -> None:
    index = grow(str(tmp_path), 6)
    batches = whole(index, [(0, 2), (1, 4), (3, 6)], 2 + 2 * 4 + 6, settings_of())
    epochs = [batches[:2], batches[2:6], batches[6:10], batches[10:]]
    for epoch, size in zip(epochs, (2, 4, 4, 6), strict=True):
        seen = Counter(key for batch in epoch for key in batch)
        assert len(seen) == PER_SHARD * size
        assert set(seen.values()) == {1}


def test_a_prefix_is_known_by_its_digest(tmp_path: Path) -> None:
    digests = [dataset_digest(grow(str(tmp_path), number)) for number in (1, 2, 4)]
    index = DatasetIndex.load(str(tmp_path))
    assert [shards_of(index, digest) for digest in digests] == [1, 2, 4]
    assert shards_of(index, "0" * 16) is None
    source = Source(str(tmp_path))
    assert generations_of([index], [source], {"dataset": digests[1]}) == [[(0, 2)]]  # of an older checkpoint
    with pytest.raises(InputError, match="was trained on dataset 0000000000000000, but --data is"):
        generations_of([index], [source], {"dataset": "0" * 16})


def test_a_field_that_the_new_shards_lack_keeps_them_out(tmp_path: Path) -> None:
    root = str(tmp_path)
    index = grow(root, 2)
    for shard, digest in enumerate(index.table["checksum"].to_pylist()):
        sidecars.commit(root, "flow", shard, digest, {}, {"missing": 4}, "f" * 64)
    store = sidecars.FieldStore.open(root, "flow", "f" * 64, {})
    store.begin()
    store.finish([0, 1])
    data = data_of(index, [(0, 2)], settings_of(), ["flow"])
    assert data.follow(1, 0) == []
    index = grow(root, 3)
    (said,) = (news.text for news in data.follow(1, 0))
    assert "has grown from 2 to 3 shards, but this training goes on without the new ones: " in said
    assert "field flow is not complete, it covers 2 of 3 shards" in said
    assert data.follow(1, 0) == []  # said once
    assert data.generations == [[(0, 2)]]
    store = sidecars.FieldStore.open(root, "flow", "f" * 64, {})
    assert store.missing([0, 1, 2]) == [2]
    store.begin()
    data = data_of(index, [(0, 2)], settings_of(), ["flow"])  # a training that starts again meanwhile
    sidecars.commit(root, "flow", 2, index.table["checksum"].to_pylist()[2], {}, {"missing": 4}, "f" * 64)
    store.finish([0, 1, 2])
    data.follow(1, 0)
    assert data.generations == [[(0, 2), (1, 3)]]


def test_shares_are_part_of_what_is_continued(tmp_path: Path) -> None:
    indexes = [grow(str(tmp_path / name), number, name * 64) for name, number in (("a", 3), ("b", 2))]
    sources = [Source.parse(f"{indexes[0].uri}=0.7"), Source.parse(f"{indexes[1].uri}=0.3", still=True)]
    data = TrainingData(sources, indexes, [[(0, 3)], [(0, 2)]], settings_of(where="ssim < 0.8"))
    assert list(data.lines()) == [
        f"70.0% of samples: {indexes[0].uri}",
        f"{indexes[0].uri}: 9 of 12 clips are seen, where ssim < 0.8",
        f"30.0% of samples: {indexes[1].uri} as stills",
        f"{indexes[1].uri}: 6 of 8 clips are seen, where ssim < 0.8",
    ]
    made = json.loads(json.dumps(data.identity))
    grow(indexes[1].uri, 4, "b" * 64)
    longer = [DatasetIndex.load(index.uri) for index in indexes]
    assert generations_of(longer, sources, made) == [[(0, 3)], [(0, 2)]]
    (said,) = (news.text for news in data.follow(2, AHEAD))
    assert said.startswith(f"{indexes[1].uri}: the dataset has grown from 2 to 4 shards (8 to 16 samples)")
    assert generations_of(longer, sources, data.identity) == data.generations
    for others, message in [
        ([replace(sources[0], weight=Fraction(1)), sources[1]], r"another weight 7/10 -> 1 of "),
        ([sources[0], replace(sources[1], still=False)], r"another still True -> False of "),
    ]:
        with pytest.raises(InputError, match=message):
            generations_of(longer, others, made)
    for order in (longer[::-1], longer[:1]):
        with pytest.raises(InputError, match=r"was trained on dataset \w+\+\w+, but --data is"):
            generations_of(order, sources[: len(order)], made)


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.ray
def test_a_filtered_mix_and_another_batch_are_proved(small: Recipe, dataset: str, tmp_path: Path) -> None:
    """Killed twice, resized, and with a larger batch from the middle on: the same samples in the same order, those of
    the canonical order.
    """
    root = str(tmp_path / "longer")
    storage.upload(Path(dataset), root)
    grow(root, 5, storage.read_json(f"{root}/dataset.json")["fingerprint"])
    recipe = override(small, ["train.workers=2", "train.micro_batch=1", "train.canary=0", "train.where=ssim < 0.8"])
    sources = [Source.parse(f"{dataset}=0.7"), Source.parse(f"{root}=0.3", still=True)]
    lines = verify_resume(recipe, sources, str(tmp_path / "proof"), str(ROOT / "pipelines/train.py"), True)
    assert any(line.endswith("from step 12 on with global batch 8 and 4 lanes") for line in lines), lines
    log = sample_log.read(str(tmp_path / "proof/interrupted"))
    assert [len(log[step]) for step in (0, 11, 12, 23)] == [4, 4, 8, 8]
    assert any(line == "first epoch:  24 of 24 samples, each exactly once" for line in lines), lines
    assert {key[:2] for keys in sample_log.read(str(tmp_path / "proof/straight")).values() for key in keys} == {
        "0/",
        "1/",
    }


def generations(card: checkpoints.CheckpointCard | None) -> list[tuple[int, int]]:
    assert card is not None
    return [(epoch, number) for epoch, number in card.sources[0]["generations"]]


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.ray
def test_a_running_training_goes_on_with_the_longer_dataset(small: Recipe, dataset: str, tmp_path: Path) -> None:
    """It grows while the training runs, is killed, and grows again before it is continued."""
    root, output = str(tmp_path / "data"), tmp_path / "run"
    storage.upload(Path(dataset), root)
    fingerprint = storage.read_json(f"{root}/dataset.json")["fingerprint"]
    keys = ["train.checkpoint_every=4", "train.log_every=1", "train.sample_every=0", "train.canary=0"]
    recipe = override(small, [f"train.max_steps={STEPS}", *keys])

    job = Job(recipe, root, output, tmp_path / "first.log")
    job.wait_for(lambda: (card := checkpoints.latest(str(output))) is not None and card.step >= 4)
    grow(root, 5, fingerprint)
    job.wait_for(lambda: "the dataset has grown" in job.log.read_text())

    def has_begun() -> bool:
        card = checkpoints.latest(str(output))
        return len(generations(card)) == 2 and card is not None and 4 * card.step > 12 * generations(card)[1][0]

    job.wait_for(has_begun)  # the epoch with the new shards
    job.kill_all()
    epoch = generations(checkpoints.latest(str(output)))[1][0]
    assert (
        f"the dataset has grown from 3 to 5 shards (12 to 20 samples); they are used from epoch {epoch} on"
        in (tmp_path / "first.log").read_text()
    )

    grow(root, 6, fingerprint)
    job = Job(recipe, root, output, tmp_path / "second.log")
    assert job.process.wait() == 0, job.log.read_text()
    assert "the dataset has grown from 5 to 6 shards (20 to 24 samples)" in job.log.read_text()
    card = checkpoints.latest(str(output))
    assert [number for _, number in generations(card)] == [3, 5, 6]
    index = DatasetIndex.load(root)
    expected = whole(index, generations(card), STEPS, recipe.train)
    assert sample_log.read(str(output)) == dict(enumerate(expected))
