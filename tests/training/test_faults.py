"""What is wrong with the data ends in one line that names it, or is left out and counted; the log stays a proof."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from cinemo import storage
from cinemo.config import Recipe, Setting
from cinemo.data.dataset import shards
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.methods.cinemo import CinemoTrain
from cinemo.recipes import override, parse_recipe
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


@pytest.mark.release
def test_auto_is_what_it_stands_for_from_then_on(
    recipe: Recipe, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said in one line and recorded; a resume may choose otherwise, and sees the same samples."""
    output, auto = str(tmp_path / "run"), [f"train.{key}=auto" for key in Setting._fields[:3]]
    worker.run(override(recipe, [*auto, "train.max_steps=2"]), dataset, output)
    assert "micro batch 1, no checkpointing, ZeRO 2: what auto is on CPUs" in capsys.readouterr().out
    card = checkpoints.latest(output)
    assert card is not None
    assert parse_recipe(dict(card.recipe), "").train.setting == Setting(1, "none", 2, "none")
    changed = ["train.micro_batch=4", "train.gradient_checkpointing=selective", "train.max_steps=4"]
    worker.run(override(recipe, changed), dataset, output)
    told = capsys.readouterr().out
    assert "train.micro_batch 1 -> 4" in told
    assert "train.gradient_checkpointing none -> selective" in told
    loader = LatentLoader.of(DatasetIndex.load(dataset), recipe.train)
    assert sample_log.read(output) == {step: list(loader.batch(step).keys) for step in range(4)}


@pytest.mark.release
def test_a_sample_that_is_no_number_is_named_and_can_be_left_out(
    recipe: Recipe, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two workers: its steps move nothing, and a resume without it sees everything else as ever."""
    from mlflow.tracking import MlflowClient

    data = shutil.copytree(dataset, tmp_path / "data")
    samples = moving_samples(12)
    poisoned = dataclasses.replace(samples[5], latents_FCHW=np.full_like(samples[5].latents_FCHW, np.nan))
    samples[5] = poisoned
    records = [
        shards.commit(str(data), k, samples[4 * k : 4 * k + 4], [], DatasetIndex.load(dataset).info["fingerprint"])
        for k in range(3)
    ]
    storage.write_bytes(str(data / "index.parquet"), shards.index_bytes(records))
    output = str(tmp_path / "run")
    two = override(recipe, ["train.workers=2", "train.micro_batch=1"])
    loader = LatentLoader.of(DatasetIndex.load(str(data)), recipe.train)
    whole = {step: list(loader.batch(step).keys) for step in range(9)}
    struck = [step + 1 for step in range(6) if poisoned.key in whole[step]]
    assert len(struck) == 2

    summary = worker.run(two, str(data), output)
    told = capsys.readouterr().out
    for step in struck:
        assert f"step {step} moved no weights: its gradient is not finite; samples {poisoned.key} " in told
    assert (summary.steps, summary.skipped_steps) == (6, 2)
    assert sample_log.read(output) == {step: whole[step] for step in range(6)}

    without = override(two, ["train.max_steps=9", f'train.skip_samples=["{poisoned.key}"]', "train.lr=1e-3"])
    summary = worker.run(without, str(data), output)
    told = capsys.readouterr().out
    assert (
        f"resuming with train.max_steps 6 -> 9; train.lr 0.002 -> 0.001; train.skip_samples [] -> ['{poisoned.key}'"
        in (told)
    )
    assert "moved no weights" not in told
    assert (summary.steps, summary.skipped_steps) == (9, 2)
    expected = {step: [key for key in whole[step] if step < 6 or key != poisoned.key] for step in range(9)}
    assert sample_log.read(output) == expected
    client = MlflowClient(summary.mlflow_uri)
    runs = client.search_runs([client.get_experiment_by_name("cinemo").experiment_id])
    assert {(run.data.tags.get("mlflow.parentRunId"), run.data.params["train.lr"]) for run in runs} == {
        (None, "0.002"),
        (summary.mlflow_run, "0.001"),
    }


def test_a_mistyped_init_leaves_no_mlflow_run(recipe: Recipe, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.init: .*nowhere"):
        worker.run(override(recipe, [f"train.init={tmp_path / 'nowhere'}"]), dataset, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "mlflow.db").exists()


def test_another_recipe_than_the_datasets_is_refused_field_by_field(
    recipe: Recipe, dataset: str, tmp_path: Path
) -> None:
    views = recipe.model_copy(update={"data": recipe.data.model_copy(update={"views": 4, "seed": 9})})
    check_dataset(DatasetIndex.load(dataset), views)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"frame_interval": (2, 5)})})
    with pytest.raises(InputError, match=r"frame_interval is \[3, 10\] there and \[2, 5\] here"):
        worker.run(other, dataset, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
