"""Videos of more frames than the network has, as generators around a solver's queries.

`phased_steps`: Controllable Longer Image Animation (arXiv 2405.17306, equations 9-12). Layout is decided early, motion
late: all segments share the first steps, and then each goes its own way with noise of its own order.
`windowed`: every step asks for overlapping windows of one long video and blends the answers (Gen-L-Video, arXiv
2305.18264), from noise whose later frames are earlier ones in another order (FreeNoise, arXiv 2310.15169).

Tensors are (1, C, F, h, w) or, inside a network's query, segments or windows as rows (K, C, F, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cinemo.diffusion.ddim import Queries
from cinemo.diffusion.schedule import NoiseSchedule
from cinemo.types import InputError

Solver = Callable[[Tensor, int], Queries]
"""(x, how many steps lie behind it) -> the queries of those that are left."""

Shuffle = Literal["sequence", "segment"]


def segments(frames: int, length: int) -> int:
    """How many segments of ``length`` frames it takes."""
    return max(1, math.ceil(frames / length))


def shared_steps(steps: int, gamma: float) -> int:
    """M = ceil(gamma T): the steps, from the noisiest on, that all segments share (equation 9).

    Steps count in the order of denoising: gamma = 1 makes copies of one segment, as the paper says, in no other order.
    """
    return math.ceil(round(gamma * steps, 9))


def phased_calls(steps: int, gamma: float, count: int) -> int:
    """Segments that are denoised by a step, over all steps: T + (K - 1)(T - M), for each branch of guidance."""
    return steps + (count - 1) * (steps - shared_steps(steps, gamma))


def reschedule(
    noise: Tensor, eps_KCFHW: Tensor, omega: float, order: Tensor, renormalise: bool = False
) -> tuple[Tensor, Tensor]:
    """Noise for further segments (equations 10-12): (before, after) its frames are shuffled.

    Args:
        noise: (1, C, F, h, w), what the network took for noise.
        eps_KCFHW: N(0, 1), one for each of K further segments, each added with weight ``omega``.
        order: (K F,), where each frame of the sequence of all segments is taken from.
        renormalise: divide by sqrt(1 + omega^2), the deviation of the sum, which the paper leaves.

    Returns:
        Both (K, C, F, h, w).
    """
    mixed = noise + omega * eps_KCFHW
    if renormalise:
        mixed = mixed / (1 + omega**2) ** 0.5
    count, _, length = mixed.shape[:3]
    sequence = mixed.transpose(1, 2).flatten(0, 1)[order.to(mixed.device)]
    return mixed, sequence.view(count, length, *sequence.shape[1:]).transpose(1, 2)


def frame_order(count: int, length: int, shuffle: Shuffle, generator: torch.Generator) -> Tensor:
    """An order of the frames of ``count`` segments: of the whole sequence (equation 12), or within each segment."""
    if shuffle == "sequence":
        return torch.randperm(count * length, generator=generator)
    return torch.cat([k * length + torch.randperm(length, generator=generator) for k in range(count)])


def phased_steps(
    solver: Solver,
    x_T: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    count: int,
    generator: torch.Generator,
    *,
    gamma: float = 0.8,
    omega: float = 0.2,
    shuffle: Shuffle = "sequence",
    renormalise: bool = False,
    still: Tensor | None = None,
    together: int = 4,
) -> Queries:
    """From the noise of one segment to ``count`` segments, one after the other along frames: (1, C, K F, h, w).

    After step M the network's idea of clean data is the start of every further segment, and its idea of the noise is
    what is mixed, shuffled and added to it at the level of step M + 1.

    Args:
        generator: of the shuffles and of what is added to the noise.
        still: clean data of a standing picture, like x_T: the noise is then what the network finds in it at that level,
            in one call more (the sentence before equation 10). None: what it found in the first segment.
        together: further segments in one query; it bounds the memory.
    """
    shared, length = shared_steps(steps, gamma), x_T.shape[2]
    if len(x_T) != 1:
        raise InputError(f"noise has {len(x_T)} rows, expected 1: a long video is sampled alone")
    if not 1 <= shared <= steps:
        raise InputError(f"gamma is {gamma}: {shared} of {steps} steps are shared, expected 1..{steps}")
    if count == 1:
        return (yield from solver(x_T, 0))
    queries, further, number = solver(x_T, 0), [], 0
    x, t = next(queries)
    while True:
        output, number, here = (yield x, t), number + 1, (x, t)
        try:
            x, t = queries.send(output)
        except StopIteration as end:
            first: Tensor = end.value
            break
        if number == shared:
            x_0, noise = schedule.predict_x0_eps(here[0], output.to(x_T.dtype), here[1])
            x_0, (signal, spread) = x_0 * schedule.scale_change(here[1], t), schedule.scales(t)
            if still is not None:
                fresh = torch.randn(still.shape, generator=generator).to(still)
                noised = signal * still + spread * fresh
                _, noise = schedule.predict_x0_eps(noised, (yield noised, t).to(x_T.dtype), t)
            eps = torch.randn(count - 1, *x_T.shape[1:], generator=generator).to(x_T)
            order = frame_order(count - 1, length, shuffle, generator)
            _, shuffled = reschedule(noise, eps, omega, order, renormalise)
            further = list(torch.split(signal * x_0 + spread * shuffled, together))
    if shared == steps:
        return torch.cat([first] * count, dim=2)
    results = [first]
    for rows in further:
        results += torch.split((yield from solver(rows, shared)), 1)
    return torch.cat(results, dim=2)


def overlap_of(wanted: int, length: int) -> int:
    """Frames that neighbouring windows of ``length`` frames share: at most half of them."""
    return min(wanted, length // 2)


def window_starts(frames: int, length: int, overlap: int) -> list[int]:
    """First frames of windows that cover all frames; neighbours share ``overlap`` of them, the last two maybe more."""
    if not 0 <= overlap < length:
        raise InputError(f"overlap is {overlap}, expected 0..{length - 1} of a window's {length} frames")
    last = max(0, frames - length)
    return [*range(0, last, length - overlap), last]


def extended(x_T: Tensor, frames: int, block: int, generator: torch.Generator) -> Tensor:
    """Noise for ``frames`` frames: those of x_T, then again and again, shuffled within blocks of ``block`` frames."""
    order = list(range(x_T.shape[2]))
    while len(order) < frames:
        source = order[len(order) - x_T.shape[2] :][:block]
        order += [source[place] for place in torch.randperm(len(source), generator=generator).tolist()]
    return x_T[:, :, order[:frames]]


def windowed(queries: Queries, length: int, overlap: int, together: int = 4) -> Queries:
    """A solver's queries for a long video, each asked as windows of ``length`` frames, blended where they overlap.

    Args:
        queries: of (1, C, F, h, w), F at least ``length``.
        overlap: frames that neighbours share; there the answers fade into each other.
        together: windows in one query; it bounds the memory.
    """
    x, t = next(queries)
    starts = window_starts(x.shape[2], length, overlap)
    ramp = torch.arange(1, length + 1, dtype=x.dtype, device=x.device)
    weight = torch.minimum(torch.minimum(ramp, ramp.flip(0)), torch.full_like(ramp, overlap + 1))[:, None, None]
    total = torch.zeros(x.shape[2], 1, 1, dtype=x.dtype, device=x.device)
    for start in starts:
        total[start : start + length] += weight
    while True:
        blended = torch.zeros_like(x)
        for first in range(0, len(starts), together):
            some = starts[first : first + together]
            outputs = yield torch.cat([x[:, :, start : start + length] for start in some]), t
            for start, output in zip(some, outputs, strict=True):
                blended[0, :, start : start + length] += weight * output.to(x.dtype)
        try:
            x, t = queries.send(blended / total)
        except StopIteration as end:
            result: Tensor = end.value
            return result
