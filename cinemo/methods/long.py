"""Long videos in a chain: each part begins with the last frame of the one before, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cinemo.config import Recipe
from cinemo.diffusion.guidance import Sampling
from cinemo.methods.base import Encoders, Method
from cinemo.methods.sampling import calls, long_config
from cinemo.types import keyed_seed


def prepare(
    method: Method, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: dict[str, Any]
) -> tuple[Sampling, int]:
    """A request -> its sampling and how often that asks: `Method.prepare`, or a chain of them where the settings ask
    for one."""
    if settings.get("long_video") != "chain":
        return method.prepare(recipe, encoders, inputs, settings)
    lengths = parts(settings["frames"], recipe.data.frames)
    first = settings | {"frames": lengths[0]}
    sampling, calls = method.prepare(recipe, encoders, inputs, first)
    settings.update(first | {"frames": settings["frames"]})
    return _chained(method, recipe, encoders, inputs, first, sampling, lengths), calls * len(lengths)


def expected_calls(recipe: Recipe, settings: Mapping[str, Any]) -> int:
    """How often a video of these settings will ask the network, as far as they alone tell: longer ones to within a
    few."""
    steps, length = int(settings["steps"]), recipe.data.frames
    frames = settings.get("frames", length)
    if settings.get("long_video") == "chain":
        return steps * len(parts(frames, length))
    return calls(recipe.sample.model_copy(update={"long": long_config(recipe.sample, settings)}), steps, length, frames)


def parts(frames: int, length: int) -> list[int]:
    """Frames of each part: the first frame of one is the last of the one before, and is kept once.

    The last part is at least two frames long; it is sampled whole and cut.
    """
    lengths = [min(frames, length)]
    while (left := frames - sum(lengths) + len(lengths) - 1) > 0:
        lengths.append(min(left + 1, length))
    return lengths


def _chained(
    method: Method,
    recipe: Recipe,
    encoders: Encoders,
    inputs: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    sampling: Sampling,
    lengths: list[int],
) -> Sampling:
    video_BCFHW = yield from sampling
    for number, length in enumerate(lengths[1:], 1):
        picture_HWC = encoders.vae.decode(video_BCFHW[0, :, -1:].transpose(0, 1))[0]
        seed = keyed_seed(settings["seed"], "part of a chain", number)
        further = {**settings, "frames": length, "seed": seed}
        sampling, _ = method.prepare(recipe, encoders, {**inputs, "image": picture_HWC}, further)
        part_BCFHW = yield from sampling
        video_BCFHW = torch.cat([video_BCFHW, part_BCFHW[:, :, 1:].to(video_BCFHW)], dim=2)
    return video_BCFHW
