"""A checkpoint counts when it is whole; what a killed job left is swept; a run continues only with what fits it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cinemo import storage
from cinemo.config import Recipe
from cinemo.training.checkpoint import checkpoints
from tests.training.conftest import sizes


def _store(output: Path, name: str, step: int, recipe: Recipe) -> Path:
    directory = output / checkpoints.RUN / f"checkpoint_{name}"
    (directory / "state").mkdir(parents=True)
    for rank in range(2):
        (directory / "state" / f"rank{rank}.pt").write_bytes(bytes(10 + rank))
    checkpoints.describe(directory, recipe, step, 2, "digest", sizes(directory))
    return directory


def test_the_latest_whole_one_counts(tmp_path: Path, small: Recipe) -> None:
    output = str(tmp_path)
    assert checkpoints.latest(output) is None
    _store(tmp_path, "2030-01-01_00-00-00.000003", 4, small)
    _store(tmp_path, "2030-01-01_00-00-00.000001", 8, small)
    _store(tmp_path, "2030-01-01_00-00-00.000002", 12, small)
    card = checkpoints.latest(output)
    assert card is not None
    assert (card.step, card.world, card.dataset, card.recipe) == (12, 2, "digest", json.loads(small.to_json()))
    assert checkpoints.find(output) == card
    assert checkpoints.find(card.uri) == card

    Path(card.uri, "state", "rank1.pt").write_bytes(b"")  # cut short
    assert [one.step for one in checkpoints.complete(output)] == [4, 8]
    Path(checkpoints.find(output).uri, "state", "rank0.pt").unlink()
    assert [one.step for one in checkpoints.complete(output)] == [4]


def test_prune_sweeps_what_was_left_behind(tmp_path: Path, small: Recipe) -> None:
    for step in (1, 2, 3, 4):
        _store(tmp_path, f"2030-01-01_00-00-00.00000{step}", step, small)
    run = tmp_path / checkpoints.RUN
    (run / "checkpoint_2030-01-01_00-00-00.000004" / "state" / "rank0.pt").unlink()
    (run / "checkpoint_2030-01-01_00-00-00.000005").mkdir()  # nothing uploaded yet
    (run / "checkpoint_manager_snapshot.json").write_text('{"cut')
    (run / "notes.txt").write_text("mine")
    checkpoints.prune(str(tmp_path), keep=2)
    left = sorted(path.name for path in run.iterdir())
    assert left == ["checkpoint_2030-01-01_00-00-00.000002", "checkpoint_2030-01-01_00-00-00.000003", "notes.txt"]
    checkpoints.prune(str(tmp_path / "nothing"), keep=2)


def test_a_recipe_of_another_version_is_no_reason_to_sweep(tmp_path: Path, small: Recipe) -> None:
    directory = _store(tmp_path, "2030-01-01_00-00-00.000001", 1, small)
    strange = small.model_dump(mode="json") | {"added_later": 1}
    storage.write_json(str(directory / "recipe.json"), strange)
    record = storage.read_json(str(directory / "checkpoint.json"))
    record["files"]["recipe.json"] = storage.size(str(directory / "recipe.json"))
    storage.write_json(str(directory / "checkpoint.json"), record)
    checkpoints.prune(str(tmp_path), keep=1)
    assert [card.recipe for card in checkpoints.complete(str(tmp_path))] == [strange]


@pytest.mark.s3
def test_the_same_on_s3(s3_endpoint: str, tmp_path: Path, small: Recipe) -> None:
    for step in (1, 2):
        _store(tmp_path, f"2030-01-01_00-00-00.00000{step}", step, small)
    output = "s3://cinemo-test/run"
    storage.upload(tmp_path, output)
    storage.remove(f"{output}/train/checkpoint_2030-01-01_00-00-00.000002/state/rank1.pt")
    assert checkpoints.find(output).step == 1
    checkpoints.prune(output, keep=2)
    assert checkpoints.stored(output) == [f"{output}/train/checkpoint_2030-01-01_00-00-00.000001"]
