"""DDIM sampling and its inversion (arXiv 2010.02502), one loop each over a callable.

Steps are spaced as in the published pipeline: r = T // steps, t_i = i r + 1 ("leading", offset 1); below step 0 the
level is a_0, not 1. Inversion evaluates the network at the level it is going to, as the published editing code does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cinemo.diffusion.schedule import NoiseSchedule
from cinemo.types import InputError

Denoise = Callable[[Tensor, int], Tensor]
Callback = Callable[[int, int, Tensor], None]


def timesteps(schedule: NoiseSchedule, steps: int) -> list[int]:
    """The steps visited, descending: 50 of 1000 are 981, 961, ..., 1."""
    if not 1 <= steps < schedule.train_steps:
        raise InputError(f"steps is {steps}, expected 1..{schedule.train_steps - 1}")
    stride = schedule.train_steps // steps
    return [i * stride + 1 for i in reversed(range(steps))]


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
        denoise: ``denoise(x, t)`` returns the network's output (noise or v, as ``schedule.prediction`` says), shaped
            like ``x``; ``t`` is an int.
        x_T: initial noise, any shape. The arithmetic runs in its dtype: pass float32 even when the network is bf16.
        eta: 0 is deterministic, 1 is DDPM-like; above 0 noise comes from ``generator`` alone.
        callback: called as ``callback(i, steps, x)`` after step i = 0..steps-1.
    """
    if eta > 0 and generator is None:
        raise InputError(f"eta is {eta}, expected a generator for its noise: pass generator=torch.Generator()")
    stride = schedule.train_steps // steps
    x = x_T
    for i, t in enumerate(timesteps(schedule, steps)):
        below = max(t - stride, 0)
        x_0, noise = schedule.split(x, denoise(x, t), t)
        signal, spread = schedule.scales(below)
        if eta == 0:
            x = signal * x_0 + spread * noise
        else:
            here, there = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[below])
            sigma = eta * ((1 - there) / (1 - here) * (1 - here / there)) ** 0.5
            fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=_device(generator)).to(x.device)
            x = signal * x_0 + max(1 - there - sigma**2, 0.0) ** 0.5 * noise + sigma * fresh
        if callback is not None:
            callback(i, steps, x)
    return x


def ddim_invert(
    denoise: Denoise, x_0: Tensor, schedule: NoiseSchedule, steps: int, callback: Callback | None = None
) -> Tensor:
    """From clean data to the noise that `ddim_sample` would (nearly) turn back into it; arguments as there."""
    stride = schedule.train_steps // steps
    x = x_0
    for i, t in enumerate(reversed(timesteps(schedule, steps))):
        clean, noise = schedule.split(x, denoise(x, t), max(t - stride, 0))
        signal, spread = schedule.scales(t)
        x = signal * clean + spread * noise
        if callback is not None:
            callback(i, steps, x)
    return x


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")
