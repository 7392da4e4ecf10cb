"""The fastest setting that fits: chosen rightly from known figures, and put into a recipe and a run in auto's place."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cinemo.accelerators import Accelerator, accelerator, accelerators
from cinemo.config import Checkpointing, Recipe, Setting
from cinemo.data.loading.loader import StepBatch
from cinemo.methods import build_method
from cinemo.recipes import load_recipe, override, parse_recipe
from cinemo.training.plan.activations import Counted
from cinemo.training.plan.cost import SampleFlops
from cinemo.training.plan.footprint import Parameters, stages
from cinemo.training.plan.search import MARGIN, Workload, fastest, room, settings, settled, too_large
from cinemo.training.run.batch import FrozenStates
from cinemo.training.run.loop import train
from cinemo.types import InputError, RunError
from tests.training.conftest import moving_samples

AUTO = ["train.micro_batch=auto", "train.gradient_checkpointing=auto", "train.zero_stage=auto"]
PAPER = load_recipe("cinemo-320x512")
# As `counted` finds them for the paper's recipe, a sample each.
COUNTS: dict[Checkpointing, Counted] = {
    "none": Counted(7_483_000_000, 24_600 * 10**9),
    "selective": Counted(4_216_000_000, 26_171 * 10**9),
    "whole": Counted(1_696_000_000, 31_731 * 10**9),
}


def workload(recipe: Recipe, counts: dict[Checkpointing, Counted] = COUNTS) -> Workload:
    parameters = Parameters(911_000_000, 911_000_000, 30_000_000)
    return Workload(recipe, SampleFlops(8_065 * 10**9, 24_195 * 10**9), parameters, 123_000_000, counts, 1)


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (141, Setting(10, "none", 1, "none")),
        (80, Setting(5, "none", 2, "none")),
        (40, Setting(2, "none", 2, "none")),
        (16, Setting(1, "none", 2, "none")),
        (12, Setting(1, "selective", 2, "none")),
        (9, Setting(1, "whole", 2, "none")),
        (7, Setting(1, "whole", 2, "optimizer")),
        (5, None),
    ],
)
def test_what_the_paper_s_recipe_gets(gigabytes: float, expected: Setting | None) -> None:
    choice = fastest(workload(PAPER), Accelerator("", gigabytes * 1e9, 312e12, 156e12, 3e11, 3.2e10), 1e14)
    assert (choice and choice.setting) == expected


@given(
    st.lists(st.integers(10**8, 60 * 10**9), min_size=3, max_size=3),
    st.lists(st.integers(0, 10**13), min_size=2, max_size=2),
    st.sampled_from(accelerators()),
    st.sampled_from([1, 2, 4, 8]),
)
def test_nothing_that_fits_is_faster(held: list[int], again: list[int], known: Accelerator, workers: int) -> None:
    kept, flops = sorted(held, reverse=True), [24 * 10**12 + more for more in (0, *sorted(again))]
    pairs = zip(get_args(Checkpointing), map(Counted, kept, flops), strict=True)
    work = workload(override(PAPER, [f"train.workers={workers}"]), dict(pairs))
    choice, most = fastest(work, known, 1e14), room(PAPER, known)
    for micro_batch in (size for size in range(1, 81) if 80 // workers % size == 0):
        for checkpointing in get_args(Checkpointing):
            for stage, offload in stages(PAPER):
                other = Setting(micro_batch, checkpointing, stage, offload)
                if work.footprint(other).peak * (1 + MARGIN) <= most:
                    assert choice is not None
                    assert choice.seconds <= work.seconds(other, known, 1e14)
    if choice is not None:
        assert work.footprint(choice.setting).peak == choice.peak <= most / (1 + MARGIN)
        assert 80 % (workers * choice.setting.micro_batch) == 0


def test_waiting_for_weights_and_for_the_host_takes_time() -> None:
    work, known = workload(PAPER), accelerator("A100-80GB")
    order = [(2, "none"), (3, "none"), (3, "optimizer"), (3, "all")]
    seconds = [work.seconds(Setting(5, "none", stage, offload), known, 1e14) for stage, offload in order]  # type: ignore[arg-type]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == len(order)
    assert seconds[0] == pytest.approx(10 * 24_195e9 / 1e14)


def test_auto_leaves_the_other_keys_alone() -> None:
    given = override(PAPER, ["train.micro_batch=auto", "train.zero_stage=3", "train.offload=all"])
    assert set(settings(given, auto=True)) == {Setting(size, "none", 3, "all") for size in (1, 2, 5, 10)}
    refiner = override(load_recipe("longer-320x512-refiner"), AUTO)
    assert {setting.zero_stage for setting in settings(refiner)} == {0, 1, 2}


def test_on_cpus_auto_is_the_safe_value(small: Recipe) -> None:
    chosen, line = settled(override(small, AUTO), None)
    assert chosen.train.setting == Setting(1, "none", 2, "none")
    assert line == "micro batch 1, no checkpointing, ZeRO 2: what auto is on CPUs"
    kept, _ = settled(override(small, ["train.micro_batch=auto", "train.zero_stage=0"]), None)
    assert kept.train.setting == Setting(1, "none", 0, "none")


@pytest.mark.slow
def test_on_an_accelerator_it_becomes_what_fits(small: Recipe) -> None:
    asked = override(small, [*AUTO, "train.gpus_per_worker=1"])
    with pytest.raises(ValueError, match=r"train\.micro_batch, train\.gradient_checkpointing, train\.zero_stage: auto"):
        _ = asked.train.setting
    chosen, line = settled(asked, accelerator("A100-80GB"))
    assert chosen.train.setting == Setting(4, "none", 0, "none")
    assert line == "micro batch 4, no checkpointing, ZeRO 0: 0 of 80 GB by the plan"
    assert parse_recipe(chosen.model_dump(mode="json"), "").train.automatic == ()
    with pytest.raises(InputError, match=r"auto, but nothing fits tiny: the least takes 0\.\d GB, and 0\.0 of 2\.0"):
        settled(asked, Accelerator("tiny", 2.01e9, 1e12, 1e12))


def test_recipes_of_earlier_versions_are_read() -> None:
    for switch, what in ((True, "whole"), (False, "none")):
        values = PAPER.model_dump(mode="json")
        values["train"]["gradient_checkpointing"] = switch
        assert parse_recipe(values, "recipe").train.gradient_checkpointing == what


class FullEngine:
    """An engine whose device has no memory left."""

    rank, world, device, dtype, lr = 0, 1, torch.device("cpu"), torch.float32, 1e-4

    def __init__(self, recipe: Recipe) -> None:
        self.method = build_method(recipe)

    def loss(self, *_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_a_step_that_does_not_fit_says_what_to_lower(small: Recipe) -> None:
    batch = StepBatch(0, 0, moving_samples(small.train.global_batch))
    said = (
        r"step 1: the accelerator's memory is full with micro batch 2, no checkpointing, ZeRO 2; continue with "
        r"--set train\.micro_batch=1 or train\.gradient_checkpointing=selective, which changes no result"
    )
    with pytest.raises(RunError, match=said):
        train(small, FullEngine(small), [batch], FrozenStates.of(small))  # type: ignore[arg-type]
    least = override(small, ["train.micro_batch=1", "train.gradient_checkpointing=whole"])
    assert "--set train.offload=optimizer" in too_large(least.train)
