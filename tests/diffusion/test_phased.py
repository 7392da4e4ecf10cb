"""Long videos: calls and hand-off as published, and the laws that both ways keep."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from goldens import Family, golden_files
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cinemo.config import DiffusionConfig
from cinemo.diffusion.ddim import Queries, ddim_sample, ddim_steps
from cinemo.diffusion.multistep import multistep_steps
from cinemo.diffusion.phased import (
    extended,
    frame_order,
    phased_calls,
    phased_steps,
    reschedule,
    segments,
    shared_steps,
    window_starts,
    windowed,
)
from cinemo.diffusion.schedule import noise_schedule
from cinemo.types import InputError

SCHEDULE = noise_schedule(DiffusionConfig())
SHAPE = (1, 2, 4, 3, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(frames: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(1, 2, frames, 3, 3, generator=generator(seed), dtype=torch.float64)


def denoise(x: Tensor, t: int) -> Tensor:
    """Anything smooth that treats every row and frame alike."""
    return torch.sin(1.3 * x + t / 1000)


def answered(queries: Queries, asked: list[tuple[int, int]] | None = None) -> Tensor:
    """The result, every query answered by `denoise`; ``asked``: (rows, t) of each."""
    x, t = next(queries)
    while True:
        if asked is not None:
            asked.append((len(x), t))
        try:
            x, t = queries.send(denoise(x, t))
        except StopIteration as end:
            result: Tensor = end.value
            return result


def solver(steps: int, spacing: Any = "leading") -> Callable[[Tensor, int], Queries]:
    return lambda x, done: ddim_steps(x, SCHEDULE, steps, spacing=spacing, done=done)


@pytest.mark.golden
def test_golden_plan(say: Callable[[str], None]) -> None:
    cases = 0
    for path in golden_files("sisters/longer_phased*.json"):
        for case in json.loads(path.read_text())["cases"]:
            steps, gamma, count, length = case["T"], case["gamma"], case["K"], case["L"]
            assert shared_steps(steps, gamma) == case["M"]
            assert segments(case["frames"], length) == count
            assert phased_calls(steps, gamma, count) == case["denoiser_calls"]
            spacing = "leading" if case["spacing"] == "uniform" else case["spacing"]
            asked: list[tuple[int, int]] = []
            x_T = noise(2)
            queries = phased_steps(
                solver(steps, spacing), x_T, SCHEDULE, steps, count, generator(), gamma=gamma, together=count
            )
            answered(queries, asked)
            first, *further = case["segments"]
            assert [t for rows, t in asked[:steps]] == first["timesteps"]
            assert {rows for rows, t in asked[:steps]} == {1}
            for segment in further:  # all of them as one batch
                assert asked[steps:] == [(count - 1, t) for t in segment["timesteps"]]
            if case["M"] < steps:
                assert asked[case["M"] - 1][1] == case["handoff_timestep_last_shared"]
                assert asked[case["M"]][1] == case["handoff_level_timestep"]
            assert sum(rows for rows, _ in asked) == case["denoiser_calls"]
            cases += 1
    say(f"golden longer_phased: {cases} cases, calls and timesteps equal")


@pytest.mark.golden
def test_golden_reschedule(say: Callable[[str], None]) -> None:
    family = Family("longer_reschedule")
    for where, meta, arrays in family:
        tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
        x_0, n, eps, level = tensors["x0_hat"], tensors["n"][None], tensors["eps"], meta["alpha_bar_next"]

        def check(kind: str, got: Tensor, where: str = where, arrays: Any = arrays) -> None:
            family.check(where, kind, got, arrays[kind], 1e-10)

        def joined(rows: Tensor) -> Tensor:
            return torch.cat(list(rows), dim=1)

        def handoff(rows: Tensor, x_0: Tensor = x_0, level: float = level) -> Tensor:
            return joined(level**0.5 * x_0[None] + (1 - level) ** 0.5 * rows)

        mixed, shuffled = reschedule(n, eps, meta["omega"], tensors["perm"])
        check("noise_tilde", mixed)
        check("noise_shuffled", joined(shuffled))
        within = tensors["perm_segment"]
        order = (within + torch.arange(len(within))[:, None] * within.shape[1]).flatten()
        check("noise_shuffled_segment", joined(reschedule(n, eps, meta["omega"], order)[1]))
        check("z_handoff", handoff(shuffled))
        check("z_handoff_renorm", handoff(reschedule(n, eps, meta["omega"], tensors["perm"], True)[1]))
    family.finish(say)


@pytest.mark.golden
def test_golden_statistics_of_rescheduled_noise(say: Callable[[str], None]) -> None:
    errors = []
    for path in golden_files("sisters/longer_reschedule_stats*.json"):
        for case in json.loads(path.read_text())["cases"]:
            count, length, omega, theory = case["K"], case["L"], case["omega"], case["theory"]
            drawn, sums = generator(1), np.zeros(4)
            for trial in range(400):
                n = torch.randn(1, 16, length, 4, 4, generator=drawn)
                eps = torch.randn(count - 1, 16, length, 4, 4, generator=drawn)
                shuffle = "sequence" if trial % 2 else "segment"
                mixed, shuffled = reschedule(n, eps, omega, frame_order(count - 1, length, shuffle, drawn))  # type: ignore[arg-type]
                alike = float((mixed[0] * mixed[1]).mean() / mixed.var())
                after = float((shuffled[0] * shuffled[1]).mean() / mixed.var())
                sums += (float(mixed.var()), alike, after * (trial % 2), after * (1 - trial % 2))
            got = sums / 400 * (1, 1, 2, 2)
            expected = (
                theory["var"],
                theory["corr_same_frame_across_segments_before_shuffle"],
                theory["expected_corr_same_position_two_segments_sequence_shuffle"],
                theory["expected_corr_same_position_two_segments_segment_shuffle"],
            )
            np.testing.assert_allclose(got[:2], expected[:2], atol=0.005)
            np.testing.assert_allclose(got[2:], expected[2:], atol=0.02)  # few frames meet their own source
            errors.append(np.abs(got - expected).max())
    say(f"golden longer_reschedule_stats: {len(errors)} cases; worst {max(errors):.1e}")


def test_the_first_segment_is_the_video_that_would_have_been_made_alone() -> None:
    x_T = noise()
    alone = ddim_sample(denoise, x_T, SCHEDULE, 10)
    for options in ({}, {"shuffle": "segment"}, {"still": torch.zeros_like(x_T)}, {"together": 1}):
        long = answered(phased_steps(solver(10), x_T, SCHEDULE, 10, 3, generator(), **options))  # type: ignore[arg-type]
        assert long.shape == (1, 2, 12, 3, 3)
        torch.testing.assert_close(long[:, :, :4], alone)
        assert (long[:, :, 4:8] - long[:, :, 8:]).abs().max() > 1e-3


def test_with_nothing_added_and_nothing_shuffled_segments_are_copies() -> None:
    """Whatever enters the hand-off is then where the first segment was: deterministic DDIM goes the same way."""
    x_T = noise()
    alone = ddim_sample(denoise, x_T, SCHEDULE, 10)
    one_frame = answered(
        phased_steps(solver(10), x_T[:, :, :1], SCHEDULE, 10, 3, generator(), omega=0.0, shuffle="segment")
    )
    torch.testing.assert_close(one_frame, alone[:, :, :1].expand(-1, -1, 3, -1, -1))
    copies = answered(phased_steps(solver(10), x_T, SCHEDULE, 10, 3, generator(), gamma=1.0))
    torch.testing.assert_close(copies, torch.cat([alone] * 3, 2))


@settings(max_examples=20)
@given(st.integers(2, 12), st.floats(0.05, 1), st.integers(1, 5), st.integers(1, 3))
def test_calls(steps: int, gamma: float, count: int, together: int) -> None:
    asked: list[tuple[int, int]] = []
    queries = phased_steps(solver(steps), noise(), SCHEDULE, steps, count, generator(), gamma=gamma, together=together)
    assert answered(queries, asked).shape[2] == 4 * count
    assert sum(rows for rows, _ in asked) == phased_calls(steps, gamma, count)
    assert max(rows for rows, _ in asked) <= max(1, together)


def test_the_other_solver_hands_off_as_well() -> None:
    x_T = noise().float()
    of = lambda x, done: multistep_steps(x, SCHEDULE, 8, done)  # noqa: E731
    asked: list[tuple[int, int]] = []
    long = answered(phased_steps(of, x_T, SCHEDULE, 8, 2, generator(), gamma=0.5), asked)
    torch.testing.assert_close(long[:, :, :4], answered(multistep_steps(x_T, SCHEDULE, 8)))
    assert asked[8:] == [(1, t) for _, t in asked[4:8]]


def test_a_network_that_sees_frames_alone_cannot_tell_windows() -> None:
    x_T = noise(11)
    whole = ddim_sample(denoise, x_T, SCHEDULE, 6)
    for overlap, together in ((0, 1), (1, 2), (3, 9)):
        asked: list[tuple[int, int]] = []
        got = answered(windowed(ddim_steps(x_T, SCHEDULE, 6), 4, overlap, together), asked)
        torch.testing.assert_close(got, whole)
        assert sum(rows for rows, _ in asked) == 6 * len(window_starts(11, 4, overlap))
        assert max(rows for rows, _ in asked) <= together


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 16), st.data())
def test_windows_cover_every_frame_and_share_what_they_should(frames: int, length: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, length - 1))
    starts = window_starts(frames, length, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, frames - length)
    assert all(0 < b - a <= length - overlap for a, b in itertools.pairwise(starts))


def test_extended_noise_is_made_of_the_same_frames() -> None:
    x_T = torch.arange(4.0).view(1, 1, 4, 1, 1)
    long = extended(x_T, 14, 2, generator())[0, 0, :, 0, 0].tolist()
    assert long[:4] == [0, 1, 2, 3]
    assert {*long[4:6]} == {0, 1}
    assert {*long[6:8]} == {2, 3}
    assert len(long) == 14


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="2 rows, expected 1"):
        next(phased_steps(solver(5), noise().expand(2, -1, -1, -1, -1), SCHEDULE, 5, 2, generator()))
    with pytest.raises(InputError, match="gamma is 0"):
        next(phased_steps(solver(5), noise(), SCHEDULE, 5, 2, generator(), gamma=0.0))
    with pytest.raises(InputError, match=r"overlap is 4, expected 0\.\.3"):
        window_starts(20, 4, 4)
