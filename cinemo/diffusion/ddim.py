"""DDIM sampling and its inversion (arXiv 2010.02502), each a generator of what the network is to be asked.

`ddim_steps` and `ddim_invert_steps` yield (x, t), are sent the network's output and return the result, so that whoever
drives them decides what runs the network: `drive` asks a callable, a server asks for several videos at once.

Steps are spaced as in the published pipeline: r = T // steps, t_i = i r + 1 ("leading", offset 1); below step 0 the
level is a_0, not 1. Inversion evaluates the network at the level it is going to, as the published editing code does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import count

import torch
from torch import Tensor

from cinemo.diffusion.schedule import NoiseSchedule
from cinemo.types import InputError

Denoise = Callable[[Tensor, int], Tensor]
Callback = Callable[[int, int, Tensor], None]
Queries = Generator[tuple[Tensor, int], Tensor, Tensor]
"""Yields (x, t), is sent the network's output for it, shaped like ``x``, and returns the result. The ``x`` of the next
query (at the end: the result) is where the step led to."""


def timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """The steps visited, descending: 50 of 1000 are 981, 961, ..., 1."""
    if not 1 <= steps < schedule.train_steps:
        raise InputError(f"steps is {steps}, expected 1..{schedule.train_steps - 1}")
    stride = schedule.train_steps // steps
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
    x_T: Tensor, schedule: NoiseSchedule, steps: int, eta: float = 0.0, generator: torch.Generator | None = None
) -> Queries:
    """From noise to clean data: the queries of `ddim_sample`, arguments as there."""
    if eta > 0 and generator is None:
        raise InputError(f"eta is {eta}, expected a generator for its noise: pass generator=torch.Generator()")
    visited, stride = timesteps(schedule, steps), schedule.train_steps // steps
    x = x_T
    for t in visited:
        below = max(t - stride, 0)
        x_0, noise = schedule.split(x, (yield x, t), t)
        signal, spread = schedule.scales(below)
        if eta == 0:
            x = signal * x_0 + spread * noise
        else:
            here, there = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[below])
            sigma = eta * ((1 - there) / (1 - here) * (1 - here / there)) ** 0.5
            fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=_device(generator)).to(x.device)
            x = signal * x_0 + max(1 - there - sigma**2, 0.0) ** 0.5 * noise + sigma * fresh
    return x


def ddim_sample(
    denoise: Denoise,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    eta: float = 0.0,
    callback: Callback | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """From noise to clean data.

    Args:
        denoise, callback: as `drive` has them.
        x_T: initial noise, any shape. The arithmetic runs in its dtype: pass float32 even when the network is bf16.
        eta: 0 is deterministic, 1 is DDPM-like; above 0 noise comes from ``generator`` alone.
    """
    return drive(ddim_steps(x_T, schedule, steps, eta, generator), denoise, steps, callback)


def ddim_invert_steps(x_0: Tensor, schedule: NoiseSchedule, steps: int) -> Queries:
    """From clean data to noise: the queries of `ddim_invert`, arguments as there."""
    visited, stride = timesteps(schedule, steps), schedule.train_steps // steps
    x = x_0
    for t in reversed(visited):
        clean, noise = schedule.split(x, (yield x, t), max(t - stride, 0))
        signal, spread = schedule.scales(t)
        x = signal * clean + spread * noise
    return x


def ddim_invert(
    denoise: Denoise, x_0: Tensor, schedule: NoiseSchedule, steps: int, callback: Callback | None = None
) -> Tensor:
    """From clean data to the noise that `ddim_sample` would (nearly) turn back into it; arguments as there."""
    return drive(ddim_invert_steps(x_0, schedule, steps), denoise, steps, callback)


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")
