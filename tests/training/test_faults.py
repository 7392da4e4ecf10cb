"""What is wrong with the data ends in one line that names it, or is left out and counted; the log stays a proof."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.dataset import shards
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.methods.cinemo import CinemoTrain
from cinemo.training.checkpoint import checkpoints
from cinemo.training.report import sample_log
from cinemo.training.run import worker
from cinemo.training.run.dataset_check import check_dataset
from cinemo.types import InputError, RunError

from .conftest import moving_samples

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


@pytest.fixture
def recipe(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = {"max_steps": 6, "checkpoint_every": 2, "sample_every": 0, "max_failures": 1, "canary": 0}
    return small.model_copy(update={"train": CinemoTrain(**(small.train.model_dump() | settings))})


def damaged(dataset: str, place: Path) -> str:
    """A copy with one byte of the second shard's latents changed."""
    shutil.copytree(dataset, place)
    tar = place / "shards/shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    return str(place)


def test_a_changed_shard_stops_the_run_by_its_name(recipe: Recipe, dataset: str, tmp_path: Path) -> None:
    data = damaged(dataset, tmp_path / "data")
    with pytest.raises(RunError, match=r"shard-000001\.tar: .*blake3"):
        worker.run(recipe, data, str(tmp_path / "run"))
    done = checkpoints.latest(str(tmp_path / "run"))
    assert list(sample_log.read(str(tmp_path / "run"))) == list(range(done.step if done else 0))


def test_a_changed_shard_is_left_out_where_the_recipe_says_so(recipe: Recipe, dataset: str, tmp_path: Path) -> None:
    data, skipping = damaged(dataset, tmp_path / "data"), recipe.train.model_copy(update={"on_damaged": "skip"})
    recipe = recipe.model_copy(update={"train": skipping})
    worker.run(recipe, data, str(tmp_path / "run"))
    lost = {sample.key for sample in moving_samples(12)[4:8]}
    loader = LatentLoader.of(DatasetIndex.load(dataset), recipe.train)
    whole = {step: loader.batch(step).keys for step in range(6)}
    assert lost & {key for keys in whole.values() for key in keys}
    log = sample_log.read(str(tmp_path / "run"))
    assert log == {step: [key for key in keys if key not in lost] for step, keys in whole.items()}
    text = (tmp_path / "run" / "loss.csv").read_text().splitlines()
    skipped = dict(zip(text[0].split(","), text[-1].split(","), strict=True))["skipped"]
    assert float(skipped) >= 24 - sum(map(len, log.values()))  # those read ahead count as well


def test_a_sample_that_is_no_number_stops_the_run_before_a_checkpoint_holds_it(
    recipe: Recipe, small: Recipe, dataset: str, tmp_path: Path
) -> None:
    data = shutil.copytree(dataset, tmp_path / "data")
    samples = moving_samples(12)
    poisoned = dataclasses.replace(samples[5], latents_FCHW=np.full_like(samples[5].latents_FCHW, np.nan))
    samples[5] = poisoned
    records = [
        shards.commit(str(data), k, samples[4 * k : 4 * k + 4], [], DatasetIndex.load(dataset).info["fingerprint"])
        for k in range(3)
    ]
    storage.write_bytes(str(data / "index.parquet"), shards.index_bytes(records))
    with pytest.raises(RunError, match=r"step \d: the loss is nan"):
        worker.run(recipe, str(data), str(tmp_path / "run"))
    for keys in sample_log.read(str(tmp_path / "run")).values():
        assert poisoned.key not in keys, "no checkpoint comes after the poison"


def test_another_recipe_than_the_datasets_is_refused_field_by_field(
    recipe: Recipe, dataset: str, tmp_path: Path
) -> None:
    views = recipe.model_copy(update={"data": recipe.data.model_copy(update={"views": 4, "seed": 9})})
    check_dataset(DatasetIndex.load(dataset), views)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"frame_interval": (2, 5)})})
    with pytest.raises(InputError, match=r"frame_interval is \[3, 10\] there and \[2, 5\] here"):
        worker.run(other, dataset, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
