"""How every method samples: solver, guidance and length as a recipe's ``sample`` says, as a generator of queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cinemo.config import LongConfig, SampleConfig
from cinemo.diffusion.ddim import Queries, ddim_steps
from cinemo.diffusion.guidance import Sampling, guided, reusing
from cinemo.diffusion.multistep import multistep_steps
from cinemo.diffusion.phased import (
    extended,
    overlap_of,
    phased_steps,
    segments,
    shared_steps,
    window_starts,
    windowed,
)
from cinemo.diffusion.schedule import NoiseSchedule
from cinemo.types import Condition, InputError


def solved(
    x_T: Tensor,
    schedule: NoiseSchedule,
    sample: SampleConfig,
    steps: int,
    branches: Sequence[Condition],
    scales: Sequence[float],
    ready: Callable[[Condition], Condition],
    generator: torch.Generator | None = None,
    frames: int | None = None,
    still: Tensor | None = None,
) -> Sampling:
    """From noise to clean data as a recipe's ``sample`` says: solver, guidance in its interval, features used again.

    Args:
        branches, scales, ready: as `cinemo.diffusion.guidance.guided` has them.
        generator: of fresh noise: what ``sample.eta`` asks for, and that of a longer video.
        frames: of the result; None: as many as x_T has. More are made as ``sample.long`` says.
        still: clean data of a standing picture, shaped like x_T; for ``sample.long.noise = "image"``.
    """
    length, long = x_T.shape[2], sample.long

    def solver(x: Tensor, done: int) -> Queries:
        if sample.solver == "multistep":
            return multistep_steps(x, schedule, steps, done)
        return ddim_steps(x, schedule, steps, sample.eta, generator, sample.spacing, sample.final_level, done)

    frames = length if frames is None else frames
    if frames <= length:
        queries = solver(x_T, 0)
    elif generator is None:
        raise InputError(f"frames is {frames}, more than {length}: expected a generator for the noise of the others")
    elif long.way == "windows":
        overlap = overlap_of(long.overlap, length)
        longer = extended(x_T, frames, length - overlap, generator)
        queries = windowed(solver(longer, 0), length, overlap, long.together)
    else:
        queries = phased_steps(
            solver,
            x_T,
            schedule,
            steps,
            segments(frames, length),
            generator,
            gamma=long.gamma,
            omega=long.omega,
            shuffle=long.shuffle,
            renormalise=long.renormalise,
            still=still if long.noise == "image" else None,
            together=long.together,
        )
    low, high = (round(share * (schedule.train_steps - 1)) for share in sample.guidance_interval)
    asked = guided(queries, branches, scales, (low, high), sample.guidance_rescale, ready)
    x_0 = yield from reusing(asked, sample.reuse_features)
    return x_0[:, :, :frames]


def long_config(sample: SampleConfig, settings: Mapping[str, Any]) -> LongConfig:
    """``sample.long`` in the way that a request's settings ask for."""
    way = settings.get("long_video")
    return sample.long if way is None else sample.long.model_copy(update={"way": way})


def calls(sample: SampleConfig, steps: int, length: int, frames: int) -> int:
    """How often `solved` asks for ``frames`` frames, of ``length`` at once."""
    long, count = sample.long, segments(frames, length)
    if frames <= length:
        return steps
    if long.way == "windows":
        windows = len(window_starts(frames, length, overlap_of(long.overlap, length)))
        return steps * math.ceil(windows / long.together)
    own = steps - shared_steps(steps, long.gamma)
    return steps + math.ceil((count - 1) / long.together) * own + (long.noise == "image" and own > 0)
