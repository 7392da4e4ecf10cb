"""Drives one sampling: asks the network what a method's generator wants to know, until it has the video.

`cinemo.serving.denoiser` drives several at once instead.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cinemo.diffusion.guidance import Sampling
from cinemo.methods.base import Method
from cinemo.networks.lavie_unet import DeepFeatures

Progress = Callable[[int], None]
"""Called as ``progress(done)`` after each call of the network; an exception it raises stops the sampling."""


def run(method: Method, sampling: Sampling, progress: Progress | None = None) -> Tensor:
    """What ``sampling`` returns, every query answered by ``method``: the latents of a video, or noise."""
    deep, done = DeepFeatures(), 0
    query = next(sampling)
    while True:
        if query.features == "keep":
            deep.kept = None
        output = method.predict(query.x, query.t, query.condition, deep if query.features else None)
        done += 1
        if progress is not None:
            progress(done)
        try:
            query = sampling.send(output)
        except StopIteration as end:
            result: Tensor = end.value
            return result
