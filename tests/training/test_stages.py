"""The same global batch gives the same training, whatever shards it: ZeRO stage, offload, number of workers, a resume
with another of each.

One training of 20 steps: in this process as the only rank, and on two ranks of a group of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cinemo.config import Recipe
from cinemo.methods import build_method
from cinemo.methods.cinemo import CinemoTrain
from cinemo.recipes import override
from cinemo.training.checkpoint.export import consolidated
from cinemo.training.checkpoint.shares import STATE, WEIGHT, Shares
from cinemo.training.checkpoint.snapshots import Mixture
from cinemo.training.run.averaging import EMA, power_average
from tests.training.ranks import Case, made_engine, on_ranks, train_steps

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("stages")]  # all tests read the same trainings

STEPS, HALF = 20, 10
FP32 = [*map(Case, range(4)), *(Case(stage, "optimizer") for stage in (1, 2, 3)), Case(3, "all")]
BF16 = [Case(stage, precision="bf16") for stage in range(4)]
TRAIN = {"schedule": "cosine", "warmup_steps": 4, "max_steps": STEPS, "ema_decay": 0.8, "weight_decay": 0.01}
TRAIN |= {"posthoc_ema": (0.05, 0.2)}
FROZEN = "attn1"

# Relative. Float32: sums in another order; measured 2e-7. Bfloat16: the norm that clips is summed in another order, two
# ranks and two micro batches add other rounded gradients, and ZeRO 3's linear layers round once more before they add
# their bias. Each moves some weights over to the neighbouring bfloat16 value, so that a loss may be off by about one
# rounding (2^-8); measured 1.3e-3.
SAME_FP32, SAME_BF16 = 1e-5, 2**-8
SAME_WEIGHTS = 5e-5  # absolute, after 20 steps of about 1e-3 each


def _name(case: Case) -> str:
    return f"{case.stage}-{case.offload}-{case.precision}"


def _train(recipe: Recipe, case: Case, directory: Path) -> list[float]:
    """The curve of a case, with a checkpoint half way and one at the end."""
    settings = TRAIN | {"zero_stage": case.stage, "offload": case.offload, "precision": case.precision}
    engine = made_engine(recipe, gradient_checkpointing="whole" if case.offload == "all" else "none", **settings)
    curve = train_steps(engine, recipe, range(HALF))
    engine.snapshot({"step": HALF}).write(directory / "half")
    curve += train_steps(engine, recipe, range(HALF, STEPS))
    engine.snapshot({"step": STEPS}).write(directory / "end")
    return curve


def _go_on(recipe: Recipe, case: Case, begun: Path, directory: Path) -> list[float]:
    settings = TRAIN | {"zero_stage": case.stage, "offload": case.offload, "precision": case.precision}
    engine = made_engine(recipe, **settings)
    assert engine.load(begun / "half") == {"step": HALF}
    curve = train_steps(engine, recipe, range(HALF, STEPS))
    engine.snapshot({"step": STEPS}).write(directory / "end")
    return curve


# Whose checkpoint a case goes on from, written by the other number of ranks: 2 to 3, and to and from 0, among them.
BEGUN = {
    Case(0): Case(3, "all"),
    Case(1): Case(0),
    Case(2): Case(1, "optimizer"),
    Case(3): Case(2),
    Case(3, "all"): Case(3),
    BF16[0]: BF16[3],
    BF16[3]: BF16[2],
}


@dataclass(frozen=True)
class Runs:
    """Curves by (ranks, case); ``resumed`` began on the other number of ranks, at another stage."""

    root: Path
    whole: Mapping[tuple[int, Case], list[float]]
    resumed: Mapping[tuple[int, Case], list[float]]


def _all_cases(recipe: Recipe, root: Path) -> tuple[dict[Case, list[float]], dict[Case, list[float]]]:
    world = torch.distributed.get_world_size()
    whole = {case: _train(recipe, case, root / f"{world}" / _name(case)) for case in (*FP32, *BF16)}
    for stage in range(4):
        engine = made_engine(recipe, FROZEN, zero_stage=stage, ema_decay=0.8, precision=("fp32", "bf16")[stage % 2])
        train_steps(engine, recipe, range(2))
        engine.snapshot({}).write(root / f"{world}" / f"frozen-{stage}" / "end")
    return whole, _all_resumes(recipe, root) if world == 2 else {}


def _all_resumes(recipe: Recipe, root: Path) -> dict[Case, list[float]]:
    world = torch.distributed.get_world_size()
    return {
        case: _go_on(recipe, case, root / f"{3 - world}" / _name(begun), root / f"{world}-resumed" / _name(case))
        for case, begun in BEGUN.items()
    }


@pytest.fixture(scope="module")
def slim(small: Recipe) -> Recipe:
    return override(small, ["model.block_out_channels=[32]"])


@pytest.fixture(scope="module")
def runs(slim: Recipe, process_group: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("stages")
    alone, _ = _all_cases(slim, root)
    both = on_ranks(2, root, _all_cases, slim, root)
    assert both[0] == both[1], "every rank sees the mean of all"
    later = _all_resumes(slim, root)
    whole = {(1, case): curve for case, curve in alone.items()} | {(2, case): c for case, c in both[0][0].items()}
    resumed = {(1, case): curve for case, curve in later.items()} | {(2, case): c for case, c in both[0][1].items()}
    return Runs(root, whole, resumed)


def _off(curve: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(curve, expected, strict=True))


def test_curves_do_not_depend_on_what_shards_the_training(runs: Runs) -> None:
    reference = {precision: runs.whole[1, Case(0, precision=precision)] for precision in ("fp32", "bf16")}
    assert sum(reference["fp32"][-5:]) < 0.9 * sum(reference["fp32"][:5]), "something must be learnt in 20 steps"
    off = {key: _off(curve, reference[key[1].precision]) for key, curve in runs.whole.items()}
    print("\n".join(f"{ranks} ranks, {case}: {value:.1e}" for (ranks, case), value in off.items()))
    assert len(off) == 2 * (len(FP32) + len(BF16))
    for (ranks, case), value in off.items():
        assert value < (SAME_FP32 if case.precision == "fp32" else SAME_BF16), (ranks, case, value)
    assert _off(reference["bf16"], reference["fp32"]) > SAME_FP32, "the tolerance tells precisions apart"


def test_a_resume_on_other_workers_at_another_stage_goes_on_as_if_undisturbed(runs: Runs) -> None:
    off = {
        (ranks, case): _off(curve, runs.whole[1, Case(0, precision=case.precision)][HALF:])
        for (ranks, case), curve in runs.resumed.items()
    }
    print("\n".join(f"to {ranks} ranks, {case}: {value:.1e}" for (ranks, case), value in off.items()))
    assert len(off) == 2 * len(BEGUN)
    for (ranks, case), value in off.items():
        assert value < (SAME_FP32 if case.precision == "fp32" else SAME_BF16), (ranks, case, value)


def _exported(recipe: Recipe, directory: Path, case: Case, ema: float) -> dict[str, Tensor]:
    settings = recipe.train.model_dump() | {"zero_stage": case.stage, "ema_decay": ema}
    unet = consolidated(directory / "end", recipe.model_copy(update={"train": CinemoTrain(**settings)}))["unet"]
    return dict(unet.named_parameters())


@pytest.mark.parametrize("ema", [0.0, TRAIN["ema_decay"]])
def test_weights_and_averages_that_are_exported_are_the_same(runs: Runs, slim: Recipe, ema: float) -> None:
    expected = _exported(slim, runs.root / "1" / _name(Case(0)), Case(0), ema)
    for place in ("1", "2", "1-resumed", "2-resumed"):
        for case in FP32:
            if "resumed" in place and case not in BEGUN:
                continue
            for name, value in _exported(slim, runs.root / place / _name(case), case, ema).items():
                torch.testing.assert_close(
                    value, expected[name], rtol=0, atol=SAME_WEIGHTS, msg=f"{place} {case} {name}"
                )
    raw = _exported(slim, runs.root / "1" / _name(Case(0)), Case(0), 0.0)
    apart = max(float((raw[name] - expected[name]).detach().abs().max()) for name in raw)
    print(f"averages are {apart:.1e} from the weights")
    assert (apart > 3 * SAME_WEIGHTS) == bool(ema)  # the schedule ends at zero: the last steps are small


@pytest.mark.parametrize("width", TRAIN["posthoc_ema"])
def test_power_averages_are_the_same(runs: Runs, slim: Recipe, width: float) -> None:
    def average(directory: Path) -> Tensor:
        with Shares(directory / "end" / STATE) as stored:
            found = {name: torch.zeros(math.prod(shape)) for name, shape in sorted(stored.shapes.items())}
        Mixture(width, {str(directory / "end" / STATE): {power_average(width): 1.0}}, 0.0).add_to(found)
        return torch.cat([*found.values()])

    expected = average(runs.root / "1" / _name(Case(0)))
    for place in ("1", "2", "1-resumed", "2-resumed"):
        for case in FP32:
            if "resumed" not in place or case in BEGUN:
                found = average(runs.root / place / _name(case))
                torch.testing.assert_close(found, expected, rtol=0, atol=SAME_WEIGHTS, msg=f"{place} {case}")


def test_shares_are_shares(runs: Runs) -> None:
    """Two ranks write each value once, about half of them each; their files are read without pickle."""
    for case in (*FP32, *BF16):
        one, two = (runs.root / str(ranks) / _name(case) / "end" / STATE for ranks in (1, 2))
        whole = (one / "rank-00000.safetensors").stat().st_size
        parts = [(two / f"rank-{rank:05d}.safetensors").stat().st_size for rank in range(2)]
        assert sum(parts) == pytest.approx(whole, rel=0.1), case
        assert max(parts) < 0.6 * whole, case


def test_frozen_parameters_stay_and_are_kept(runs: Runs, slim: Recipe) -> None:
    torch.manual_seed(0)
    begun = dict(build_method(slim).unet.named_parameters())
    for ranks in ("1", "2"):
        for stage in range(4):
            directory = runs.root / ranks / f"frozen-{stage}"
            rounded = torch.bfloat16 if stage % 2 else torch.float32
            exported = _exported(slim, directory, Case(stage), 0.8)
            moved = {
                name for name, value in exported.items() if not torch.equal(value, begun[name].to(rounded).float())
            }
            assert not [name for name in moved if FROZEN in name], (ranks, stage)
            assert len(moved) > 0.9 * sum(FROZEN not in name for name in begun), (ranks, stage)
            with Shares(directory / "end" / STATE) as stored:
                frozen = [name for name in stored.shapes if FROZEN in name]
                assert frozen
                assert not any(stored.has(EMA, name) for name in frozen)
                assert all(stored.has(WEIGHT, name) for name in stored.shapes)
