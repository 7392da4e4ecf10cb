"""A step whose gradient is no number moves nothing, on any rank, at any ZeRO stage; what is left out stays proven."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.data.loading.mix import MixedLoader
from cinemo.recipes import override
from cinemo.training.run.left_out import LeftOut, steps_of
from cinemo.training.run.proof import _against_index
from cinemo.types import InputError

from .ranks import made_engine, on_ranks, train_steps

STAGES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")]


def _poisoned(recipe: Recipe, directory: Path) -> list[dict[str, object]]:
    """By stage, what the middle of three steps changed when one micro batch of the last rank has no finite loss."""
    found = []
    for stage, precision in STAGES:
        engine = made_engine(recipe, zero_stage=stage, precision=precision, schedule="cosine", max_steps=9)
        clean = engine.loss
        train_steps(engine, recipe, range(1))
        before = _state(engine, directory / f"before-{stage}-{precision}")
        norm = engine.grad_norm
        if engine.rank == engine.world - 1:
            engine.loss = functools.partial(_infinite, clean)  # type: ignore[method-assign]
        train_steps(engine, recipe, range(1, 2))
        moved, kept = engine.moved, engine.grad_norm == norm
        after = _state(engine, directory / f"after-{stage}-{precision}")
        engine.loss = clean  # type: ignore[method-assign]
        train_steps(engine, recipe, range(2, 3))
        once_more = _state(engine, directory / f"more-{stage}-{precision}")
        finite = all(torch.isfinite(p).all() for p in engine.method.parameters())
        found.append(
            {"stage": stage, "moved": moved, "norm kept": kept, "same": before == after, "on": after != once_more}
            | {"moves again": engine.moved, "finite": finite}
        )
    return found


def _infinite(clean: Callable[..., torch.Tensor], *given: object) -> torch.Tensor:
    return clean(*given) * float("inf")


def _state(engine, directory: Path) -> list[bytes]:  # type: ignore[no-untyped-def]
    """Weights, moments, Adam's step and the schedule, of this rank."""
    engine.snapshot({}).write(directory)
    torch.distributed.barrier()
    return [path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()]


@pytest.mark.slow
def test_a_poisoned_micro_batch_on_one_of_two_ranks_moves_nothing_anywhere(small: Recipe, tmp_path: Path) -> None:
    for rank in on_ranks(2, tmp_path, _poisoned, small, tmp_path):
        for stage, precision in STAGES:
            got = rank[STAGES.index((stage, precision))]
            expected = {
                "moved": False,
                "norm kept": True,
                "same": True,
                "on": True,
                "moves again": True,
                "finite": True,
            }
            assert got == {"stage": stage} | expected, (stage, precision)


def test_steps_are_named_as_reports_count_them(small: Recipe) -> None:
    assert (list(steps_of("7")), list(steps_of("3-5"))) == ([7], [3, 4, 5])
    for wrong in ("0", "5-3", "a", "3-", "-3"):
        with pytest.raises(InputError, match="skip_steps"):
            override(small, [f'train.skip_steps=["{wrong}"]'])
    old = small.to_json()
    assert "skip" not in old, "the recipe of a bundle keeps its bytes"
    assert '"skip_steps"' in override(small, ['train.skip_steps=["3"]']).to_json()


def test_the_proof_knows_what_was_left_out(small: Recipe, dataset: str) -> None:
    loader = MixedLoader([LatentLoader(DatasetIndex.load(dataset), global_batch=4, lanes=2, seed=0)], [Fraction(1)])
    whole = {step: list(loader.batch(step).keys) for step in range(4)}
    gone = whole[2][1]
    recipe = override(small, ['train.skip_steps=["2"]', f'train.skip_samples=["{gone}"]'])
    left_out = LeftOut.of(recipe.train)
    log = {step: list(left_out.batch(loader, step).keys) for step in range(4)}
    assert log == {step: [] if step == 1 else [key for key in keys if key != gone] for step, keys in whole.items()}
    assert [*_against_index(loader, log, 4, left_out)] == []
    assert [*_against_index(loader, whole, 4)] == []
    for wrong in (whole, log | {1: whole[1]}, log | {3: log[3][1:]}):
        assert [*_against_index(loader, wrong, 4, left_out)] != []
