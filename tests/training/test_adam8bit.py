"""Moments of a byte a value: as near to Adam as they can be, and back from a checkpoint to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cinemo.config import Recipe
from cinemo.recipes import override
from cinemo.training.run import worker
from cinemo.training.run.adam8bit import BLOCK, Adam8bit
from cinemo.types import InputError
from tests.training.ranks import made_engine, on_ranks, train_steps


def _steps(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        for weight in weights:
            # Of many magnitudes in a block, and none in another.
            weight.grad = torch.randn(weight.shape, generator=generator) * torch.logspace(-6, 1, weight.numel())
            weight.grad[BLOCK : 2 * BLOCK] = 0
        optimizer.step()


def _weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(size)) for size in (100, 4096, 20_001)]


def test_it_steps_as_adamw_does() -> None:
    ours, theirs = _weights(), _weights()
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    adam8bit = Adam8bit(ours, **settings)
    _steps(adam8bit, ours, 20)
    _steps(torch.optim.AdamW(theirs, **settings), theirs, 20)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-5)  # small tensors have float32 moments
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        large = other.abs() > 5e-3
        assert (mine - other)[large].abs().mean() < 0.1 * other[large].abs().mean()
    held = sum(value.nbytes for key, value in adam8bit.state[ours[2]].items() if key.startswith(("state", "absmax")))
    assert held < 2.1 * ours[2].numel()


def test_moments_come_back_to_the_bit() -> None:
    ours = _weights()
    adam8bit = Adam8bit(ours, lr=1e-3)
    _steps(adam8bit, ours, 7)
    again = Adam8bit(ours, lr=1e-3)
    for weight in ours:
        moments = adam8bit.unpacked(weight)
        again.pack(weight, moments, 7)
        before, after = adam8bit.state[weight], again.state[weight]
        assert before.keys() == after.keys()
        assert before["step"] == after["step"] == 7
        for number in (1, 2):
            codes, found = before[f"state{number}"], after[f"state{number}"]
            if codes.dtype == torch.uint8:
                scales = before[f"absmax{number}"]
                assert torch.equal(scales, after[f"absmax{number}"])
                live = _live(codes, scales)
                codes, found = codes[live], found[live]
            assert torch.equal(codes, found)
        assert moments["exp_avg"].dtype == torch.float32
        assert (moments["exp_avg"] < 0).any()


def test_averages_are_refused_with_it(small: Recipe) -> None:
    with pytest.raises(InputError, match=r"ema_decay is 0\.9 and posthoc_ema \[\] with optimizer adam8bit, expected 0"):
        override(small, ["train.ema_decay=0.9", "train.optimizer=adam8bit"])


@pytest.mark.parametrize(
    ("setting", "package"), [("optimizer=adam8bit", "bitsandbytes"), ("tensorboard=true", "tensorboardX")]
)
def test_a_package_that_is_missing_is_named(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"which needs the package {package}: pip install {package}"):
        worker.run(override(small, [f"train.{setting}"]), str(tmp_path), str(tmp_path / "run"))


def test_who_does_not_ask_for_it_does_not_load_it() -> None:
    loaded = "sorted({'bitsandbytes', 'tensorboardX'} & set(sys.modules))"
    code = f"import sys, cinemo.training.run.worker; sys.exit(str({loaded}) if {loaded} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def _live(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Which codes mean something: in a block of zeros none does."""
    return (scales > 0).repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)


def _curve(
    recipe: Recipe, directory: Path, begun: Path | None, **train: Any
) -> tuple[list[float], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Six steps with a checkpoint after three, or from one on the last three; and the moments' codes at the end."""
    made = made_engine(recipe, optimizer="adam8bit", **train)
    curve = []
    if begun is None:
        curve += train_steps(made, recipe, range(3))
        made.snapshot({}).write(directory)
    else:
        made.load(begun)
    curve += train_steps(made, recipe, range(3, 6))
    states = [state for state in made._adam.state.values() if "qmap1" in state]
    return curve, [(state[f"state{number}"], state[f"absmax{number}"]) for state in states for number in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
@pytest.mark.usefixtures("process_group")
def test_a_resumed_training_is_the_same_to_the_bit(small: Recipe, tmp_path: Path, stage: int, precision: str) -> None:
    settings: dict[str, Any] = {"zero_stage": stage, "precision": precision}
    whole, codes = _curve(small, tmp_path, None, **settings)
    rest, again = _curve(small, tmp_path, tmp_path, **settings)
    assert codes
    assert whole[3:] == rest
    for (code, scale), (found, same) in zip(codes, again, strict=True):
        assert torch.equal(scale, same)
        assert torch.equal(code * _live(code, scale), found * _live(code, scale))
    # Any other optimiser and stage goes on with the moments' values.
    plain = made_engine(small, zero_stage=2)
    plain.load(tmp_path)
    assert train_steps(plain, small, range(3, 6)) == pytest.approx(rest, rel=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_another_number_of_workers_goes_on(small: Recipe, tmp_path: Path) -> None:
    """Their blocks are cut elsewhere, so that the moments are rounded once more, as they are in every step."""
    curves = on_ranks(2, tmp_path, _whole, small, tmp_path / "checkpoint")
    assert curves[0] == curves[1]
    rest, _ = _curve(small, tmp_path, tmp_path / "checkpoint", zero_stage=2)
    assert rest == pytest.approx(curves[0][3:], rel=1e-2)


def _whole(recipe: Recipe, directory: Path) -> list[float]:
    return _curve(recipe, directory, None, zero_stage=2)[0]
