"""DDIM sampling and its inversion (arXiv 2010.02502), each a generator of what the network is to be asked.

`ddim_steps` and `ddim_invert_steps` yield (x, t), are sent the network's output and return the result, so that whoever
drives them decides what runs the network: `drive` asks a callable, a server asks for several videos at once.

Unless asked otherwise, steps are spaced as in Cinemo's published pipeline ("leading", offset 1), and below step 0 the
level is a_0, not 1. Inversion evaluates the network at the level it is going to, as the published editing code does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from cinemo.diffusion.schedule import NoiseSchedule
from cinemo.types import InputError

Denoise = Callable[[Tensor, int], Tensor]
Callback = Callable[[int, int, Tensor], None]
Queries = Generator[tuple[Tensor, int], Tensor, Tensor]
"""Yields (x, t), is sent the network's output for it, shaped like ``x``, and returns the result. The ``x`` of the next
query (at the end: the result) is where the step led to."""


Spacing = Literal["leading", "trailing"]
FinalLevel = Literal["a_0", "clean"]


def timesteps(schedule: NoiseSchedule, steps: int, spacing: Spacing = "leading") -> list[int]:
    """The steps visited, descending, ``steps`` of them whether or not they divide T.

    ``leading``: i r + 1 with r = T // steps; 50 of 1000 are 981, 961, ..., 1, and 30 begin at 958. Where more
    than three would begin below three quarters of T (334 at 667), floor(i T / steps) + 1. ``trailing``:
    round(i T / steps) - 1; 50 of 1000 are 999, 979, ..., 19: what zero terminal SNR needs, as it begins at pure noise.
    """
    total, limit = schedule.train_steps, schedule.train_steps - (spacing == "leading")
    if not 1 <= steps <= limit:
        raise InputError(f"steps is {steps}, expected 1..{limit}")
    if spacing == "trailing":
        return [round(i * total / steps) - 1 for i in range(steps, 0, -1)]
    stride = total // steps
    if steps > 3 and (steps - 1) * stride + 1 < 0.75 * total:
        return [i * total // steps + 1 for i in reversed(range(steps))]
    return [i * stride + 1 for i in reversed(range(steps))]


def drive(queries: Queries, denoise: Denoise, steps: int, callback: Callback | None = None) -> Tensor:
    """The result of ``queries``, every one answered by ``denoise``.

    Args:
        denoise: ``denoise(x, t)`` returns the network's output (noise or v, as ``schedule.prediction`` says), shaped
            like ``x``; ``t`` is an int.
        steps: how many queries there are, for the callback.
        callback: called as ``callback(i, steps, x)`` after step i = 0..steps-1.
    """
    x, t = next(queries)
    for i in count():
        try:
            x, t = queries.send(denoise(x, t))
        except StopIteration as end:
            x, t = end.value, -1
        if callback is not None:
            callback(i, steps, x)
        if t < 0:
            break
    return x


def ddim_steps(
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    spacing: Spacing = "leading",
    final: FinalLevel = "a_0",
    done: int = 0,
) -> Queries:
    """From noise to clean data: the queries of `ddim_sample`, arguments as there.

    ``done``: how many of the steps lie behind ``x_T``, which has the level of the next one.
    """
    if eta > 0 and generator is None:
        raise InputError(f"eta is {eta}, expected a generator for its noise: pass generator=torch.Generator()")
    visited = timesteps(schedule, steps, spacing)[done:]
    x = x_T
    for t, below in zip(visited, [*visited[1:], None], strict=False):
        output = yield x, t
        fresh = None
        if eta > 0:
            fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=_device(generator)).to(x.device)
        x, _ = ddim_step(schedule, x, output, t, below, eta, fresh, final)
    return x


def ddim_step(
    schedule: NoiseSchedule,
    x: Tensor,
    output: Tensor,
    t: int,
    below: int | None,
    eta: float = 0.0,
    fresh: Tensor | None = None,
    final: FinalLevel = "a_0",
) -> tuple[Tensor, Tensor]:
    """(x at step ``below``, predicted x_0) from x and the network's output at step ``t`` (arXiv 2010.02502, eq. 12).

    Args:
        below: None at the last step, which goes to ``final``: a_0, the least noise of training, or none at all.
            There x_0 keeps the schedule's ``clean_scale`` of ``t``, as published.
        fresh: N(0, 1), shaped like ``x``; with ``eta`` above 0.
    """
    x_0, noise = schedule.predict_x0_eps(x, output, t)
    if below is not None and schedule.clean_scale is not None:
        x_0 = x_0 * schedule.scale_change(t, below)
    level = below or 0
    clean = below is None and final == "clean"
    signal, spread = (1.0, 0.0) if clean else schedule.scales(level)
    if eta == 0 or fresh is None:
        return signal * x_0 + spread * noise, x_0
    here, there = float(schedule.alpha_bar[t]), 1.0 if clean else float(schedule.alpha_bar[level])
    sigma = eta * ((1 - there) / (1 - here) * (1 - here / there)) ** 0.5
    return signal * x_0 + max(1 - there - sigma**2, 0.0) ** 0.5 * noise + sigma * fresh, x_0


def ddim_sample(
    denoise: Denoise,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    eta: float = 0.0,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
    spacing: Spacing = "leading",
    final: FinalLevel = "a_0",
) -> Tensor:
    """From noise to clean data.

    Args:
        denoise, callback: as `drive` has them.
        x_T: initial noise, any shape. The arithmetic runs in its dtype: pass float32 even when the network is bf16.
        eta: 0 is deterministic, 1 is DDPM-like; above 0 noise comes from ``generator`` alone.
        spacing: as `timesteps` has it. ``final``: as `ddim_step` has it.
    """
    queries = ddim_steps(x_T, schedule, steps, eta, generator, spacing, final)
    return drive(queries, denoise, steps, callback)


def ddim_invert_steps(x_0: Tensor, schedule: NoiseSchedule, steps: int, spacing: Spacing = "leading") -> Queries:
    """From clean data to noise: the queries of `ddim_invert`, arguments as there."""
    visited = timesteps(schedule, steps, spacing)
    x = x_0
    for t, below in zip(reversed(visited), [0, *reversed(visited[1:])], strict=True):
        clean, noise = schedule.predict_x0_eps(x, (yield x, t), below)
        if schedule.clean_scale is not None:
            clean = clean * schedule.scale_change(below, t)
        signal, spread = schedule.scales(t)
        x = signal * clean + spread * noise
    return x


def ddim_invert(
    denoise: Denoise,
    x_0: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    callback: Callback | None = None,
    spacing: Spacing = "leading",
) -> Tensor:
    """From clean data to the noise that `ddim_sample` would (nearly) turn back into it; arguments as there."""
    return drive(ddim_invert_steps(x_0, schedule, steps, spacing), denoise, steps, callback)


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")
