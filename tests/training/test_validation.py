"""The held-out loss is the same each time and on any number of ranks, and leaves the training as it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_dataset

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.dataset import shards
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import HeldOut, LatentLoader
from cinemo.methods import build_method
from cinemo.recipes import override
from cinemo.training.report.metrics import Losses, Report
from cinemo.training.report.validation import LEAST, MOST, STRATA, Validation, plan_draws
from cinemo.training.run.batch import FrozenStates
from cinemo.training.run.engine import Engine
from cinemo.training.run.loop import train
from cinemo.types import InputError, RunError


@given(st.integers(1, 3000), st.sampled_from([1000, 999, 50]))
def test_what_is_measured(samples: int, train_steps: int) -> None:
    draws = plan_draws(samples, train_steps)
    assert min(LEAST, STRATA * samples) <= len(draws) <= MOST
    assert len(set(draws)) == len({(draw.number, draw.t) for draw in draws}) == len(draws)
    assert {draw.number for draw in draws} <= set(range(samples))
    if samples >= MOST:  # spread over all of them
        numbers = sorted(draw.number for draw in draws)
        assert numbers[0] == 0
        assert max(b - a for a, b in zip(numbers, [*numbers[1:], samples], strict=True)) <= -(-samples // MOST)
    strata = Counter(draw.t * STRATA // train_steps for draw in draws)
    assert len(strata) == min(STRATA, len(draws))
    assert max(strata.values()) - min(strata.values()) <= -(-LEAST // min(samples, LEAST))
    assert all(0 <= draw.t < train_steps for draw in draws)


def test_nothing_is_measured_of_nothing() -> None:
    assert plan_draws(0, 1000) == []


def test_empty_held_out_shards_are_refused(small: Recipe, tmp_path: Path) -> None:
    root = write_dataset(tmp_path, (4, 4, 4, 4), sizes=(3, 0))
    with pytest.raises(InputError, match=r"held_out_shards is 1: these shards hold no samples"):
        _validation(override(small, ["train.held_out_shards=1"]), Rank(torch.nn.Identity(), 0, 1), str(root))


@dataclass
class Rank:
    """What validation needs of `Engine`, for ranks that run one after the other: sums are handed over at the end."""

    method: torch.nn.Module
    rank: int
    world: int
    sums: list[torch.Tensor] = field(default_factory=list)
    device = torch.device("cpu")
    dtype = torch.float32

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        self.sums.append(values)
        return values


class Counting(torch.nn.Module):
    def __init__(self, method: torch.nn.Module) -> None:
        super().__init__()
        self.method, self.calls = method, 0

    def forward(self, *arguments: object, **options: object) -> torch.Tensor:
        self.calls += 1
        return self.method(*arguments, **options)  # type: ignore[no-any-return]


def _text(recipe: Recipe) -> FrozenStates:
    return FrozenStates.of(recipe)


def _validation(recipe: Recipe, engine: object, dataset: str) -> Validation:
    held_out = HeldOut.of(DatasetIndex.load(dataset), recipe.train)
    return Validation(recipe, engine, _text(recipe), held_out)  # type: ignore[arg-type]


def _losses(recipe: Recipe, dataset: str, world: int) -> tuple[Losses, set[int]]:
    torch.manual_seed(0)
    method = build_method(recipe).eval()
    torch.nn.init.normal_(method.unet.conv_out.weight, std=0.05)
    calls, sums = set(), []
    for rank in range(world):
        counted = Counting(method)
        one = Rank(counted, rank, world)
        _validation(recipe, one, dataset)()
        sums += one.sums
        calls.add(counted.calls)
    return Losses.of_sums(*(torch.stack(sums).sum(0)).tolist()), calls


def test_the_number_of_ranks_does_not_matter(small: Recipe, dataset: str) -> None:
    recipe = override(small, ["train.held_out_shards=1"])
    alone, _ = _losses(recipe, dataset, 1)
    assert alone.overall > 0.1
    assert len(set(alone.quartiles)) == 4
    assert len(alone.buckets) == 4
    for world in (2, 3, 5):
        made, calls = _losses(recipe, dataset, world)
        assert len(calls) == 1, "under ZeRO-3 a rank with fewer passes stops all others"
        assert made.overall == pytest.approx(alone.overall, rel=1e-5)
        assert made.quartiles == pytest.approx(alone.quartiles, rel=1e-5)
        assert made.buckets == pytest.approx(alone.buckets, rel=1e-5)


def test_the_plain_error_is_measured_whatever_the_training_weighs(small: Recipe, dataset: str) -> None:
    plain, _ = _losses(override(small, ["train.held_out_shards=1"]), dataset, 1)
    weighted, _ = _losses(override(small, ["train.held_out_shards=1", "train.min_snr_gamma=0.5"]), dataset, 1)
    assert weighted == plain


def test_a_lost_shard_counts_as_not_there(small: Recipe, dataset: str, tmp_path: Path) -> None:
    storage.upload(Path(dataset), str(tmp_path))
    both, _ = _losses(override(small, ["train.held_out_shards=2"]), str(tmp_path), 2)
    Path(shards.tar_uri(str(tmp_path), 1)).unlink()
    skipping = ["train.held_out_shards=2", "train.on_damaged=skip"]
    rest, calls = _losses(override(small, skipping), str(tmp_path), 2)
    assert len(calls) == 1
    assert len(rest.buckets) == 4
    assert 0.1 < rest.overall != both.overall
    with pytest.raises(RunError, match="shard-000001"):
        _losses(override(small, skipping[:1]), str(tmp_path), 1)


def test_only_the_weights_matter(small: Recipe, dataset: str) -> None:
    recipe = override(small, ["train.held_out_shards=1"])
    alone, _ = _losses(recipe, dataset, 1)
    other = override(recipe, ["train.seed=5", "train.prompt_dropout=1", "train.micro_batch=4", "train.lr=1"])
    made, _ = _losses(other, dataset, 1)
    assert made.overall == pytest.approx(alone.overall, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [2, 3])
def test_validation_is_reported_and_leaves_the_training_as_it_is(small: Recipe, dataset: str, stage: int) -> None:
    keys = ["train.max_steps=5", "train.log_every=3", "train.validate_every=2", "train.held_out_shards=1"]
    recipe = override(small, [*keys, f"train.zero_stage={stage}"])

    def run(validated: bool) -> list[Report]:
        torch.manual_seed(0)
        engine = Engine(build_method(recipe), recipe.train, torch.device("cpu"))
        loader = LatentLoader.of(DatasetIndex.load(dataset), recipe.train)
        reports: list[Report] = []
        validate = _validation(recipe, engine, dataset) if validated else None
        train(recipe, engine, loader.batches(), _text(recipe), on_report=reports.append, validate=validate)
        assert engine.method.training
        return reports

    reports, plain = run(True), run(False)
    assert [report.step for report in reports] == [2, 3, 4, 5]
    assert [report.val_loss > 0 for report in reports] == [True, False, True, True]
    assert len([name for name in reports[0].buckets if name.startswith("val_loss_bucket_")]) == 4
    assert reports[-1].val_loss < reports[0].val_loss  # steps of 2e-3 from a network that answers nothing
    by_step = {report.step: report for report in reports}
    assert [report.step for report in plain] == [3, 5]
    # The reports cover other steps: 4 and 5 together here, one by one there.
    assert plain[1].loss == pytest.approx((by_step[4].loss + by_step[5].loss) / 2, abs=2e-6)
    assert plain[1].grad_norm == pytest.approx(by_step[5].grad_norm, rel=1e-4)
