"""DeepSpeed's settings follow from the recipe, and its stages, schedule and checkpoints do the same arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cinemo.config import Recipe, TrainConfig
from cinemo.methods import build_method
from cinemo.recipes import RECIPES
from cinemo.training import engine
from cinemo.training.batch import host_batch
from cinemo.types import Condition, LatentBatch, RunError
from tests.training.conftest import moving_samples


def test_settings_follow_from_the_recipe() -> None:
    paper = RECIPES["cinemo-320x512"]().train
    settings = engine.deepspeed_config(paper.model_copy(update={"micro_batch": 5}))
    assert settings["train_batch_size"] == 80
    assert settings["train_micro_batch_size_per_gpu"] == 5
    assert settings["gradient_accumulation_steps"] == 2  # 80 = 8 workers x 5 x 2
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["bf16"]["enabled"] is True
    assert settings["gradient_clipping"] == 1.0
    assert engine.deepspeed_config(RECIPES["cinemo-tiny"]().train)["bf16"]["enabled"] is False


def test_weight_decay_makes_it_adamw() -> None:
    weight = [torch.nn.Parameter(torch.zeros(1))]
    assert type(engine.optimizer(TrainConfig(), weight)) is torch.optim.Adam
    decayed = engine.optimizer(TrainConfig(weight_decay=0.1, betas=(0.8, 0.9), lr=3e-4), weight)
    assert type(decayed) is torch.optim.AdamW
    group = decayed.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.1, (0.8, 0.9), 3e-4)


def test_schedule() -> None:
    constant = TrainConfig(warmup_steps=4, max_steps=100)
    assert [engine.lr_factor(constant, step) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = TrainConfig(warmup_steps=10, max_steps=110, schedule="cosine")
    assert engine.lr_factor(cosine, 10) == 1.0
    assert engine.lr_factor(cosine, 60) == pytest.approx(0.5)
    assert engine.lr_factor(cosine, 109) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    assert engine.lr_factor(cosine, 500) == 0.0
    assert engine.lr_factor(TrainConfig(schedule="cosine"), 0) == 1.0


def _engine(recipe: Recipe, **train: object) -> engine.Engine:
    settings = TrainConfig(**(recipe.train.model_dump() | train))
    torch.manual_seed(0)
    return engine.Engine(build_method(recipe), settings, torch.device("cpu"))


def _run(made: engine.Engine, recipe: Recipe, steps: range) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        for start in (0, 2):
            host = host_batch(moving_samples(4)[start : start + 2], step, recipe)
            text = torch.zeros(2, 3, recipe.model.cross_attention_dim, dtype=made.dtype)
            condition = Condition(host.video_BCFHW[:, :, 0], text, host.motion_bucket_B)
            loss = made.loss(LatentBatch(host.video_BCFHW, condition), host.t_B, host.noise_BCFHW).mean()
            made.step(loss)
            losses.append(loss.item())
        norms.append(made.grad_norm)
    return losses, norms


@pytest.mark.usefixtures("process_group")
def test_every_zero_stage_does_the_same_arithmetic(small: Recipe) -> None:
    plain_losses, plain_norms = _run(_engine(small, zero_stage=0), small, range(3))
    assert len(set(plain_losses)) == 6
    assert min(plain_norms) > 0
    for stage in (1, 2, 3):
        losses, norms = _run(_engine(small, zero_stage=stage), small, range(3))
        assert losses == pytest.approx(plain_losses, abs=2e-6), stage
        assert norms == pytest.approx(plain_norms, rel=1e-4), stage


@pytest.mark.usefixtures("process_group")
def test_accumulated_micro_batches_equal_one_batch(small: Recipe) -> None:
    """Weights move once per global batch, by the mean gradient: with SGD-like first steps the losses agree."""
    twice = _engine(small, micro_batch=2)
    whole = _engine(small, micro_batch=4)
    _run(twice, small, range(1))
    host = host_batch(moving_samples(4), 0, small)
    text = torch.zeros(4, 3, small.model.cross_attention_dim)
    condition = Condition(host.video_BCFHW[:, :, 0], text, host.motion_bucket_B)
    whole.step(whole.loss(LatentBatch(host.video_BCFHW, condition), host.t_B, host.noise_BCFHW).mean())
    assert whole.grad_norm == pytest.approx(twice.grad_norm, rel=1e-4)
    assert whole.lr == twice.lr


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_checkpoint_continues_as_if_nothing_happened(
    small: Recipe, tmp_path: Path, stage: int, precision: str
) -> None:
    settings = {"zero_stage": stage, "precision": precision, "schedule": "cosine", "warmup_steps": 3, "max_steps": 9}
    undisturbed, _ = _run(made := _engine(small, **settings), small, range(2))
    made.save(tmp_path, {"step": 2, "note": [1.5]})
    after, _ = _run(made, small, range(2, 4))
    restored = _engine(small, **settings)
    assert restored.load(tmp_path) == {"step": 2, "note": [1.5]}
    assert _run(restored, small, range(2, 4))[0] == pytest.approx(after, abs=1e-6)
    assert restored.lr == made.lr
    assert after != undisturbed


@pytest.mark.usefixtures("process_group")
def test_loading_nothing_is_refused(small: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no DeepSpeed state"):
        _engine(small).load(tmp_path)
