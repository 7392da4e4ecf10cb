"""Noise -> video latents, and back: a method, a solver and guidance put together.

`latent_steps` is one video's sampling as a generator of what the network is to be asked; `sample_latents` asks for one
batch and nothing else, `cinemo.serving.denoiser` for several videos at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cinemo.diffusion.ddim import Queries, ddim_invert, ddim_steps, drive
from cinemo.diffusion.guidance import Predict, guided
from cinemo.diffusion.multistep import multistep_steps
from cinemo.methods.cinemo import CinemoMethod
from cinemo.networks.attention import TextKeysValues
from cinemo.networks.lavie_unet import DeepFeatures
from cinemo.types import Condition, LatentBatch

Progress = Callable[[int, int], None]
"""Called as ``progress(done, steps)`` after each sampling step; an exception it raises stops the sampling."""


def sample_latents(
    method: CinemoMethod,
    condition: Condition,
    negative_text_BLD: Tensor | None,
    noise_BCFHW: Tensor,
    steps: int,
    guidance_scale: float,
    progress: Progress | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise -> video latents (B, C, F, h, w), scaled, the first frame being the condition's image.

    Args:
        generator: of the fresh noise that ``sample.eta`` asks for.
        noise_BCFHW: N(0, 1) for frames 2..F, float32: the sampler's arithmetic runs in its dtype.
        negative_text_BLD: text states of the unconditional branch; not needed where ``guidance_scale`` is 1.
    """
    predict = _predictor(method, method.sample.reuse_features)
    rescale = method.sample.guidance_rescale
    denoise = guided(predict, condition, negative_text_BLD, guidance_scale, guided_steps(method), rescale)
    report = None if progress is None else lambda i, total, _: progress(i + 1, total)
    return drive(latent_steps(method, condition, noise_BCFHW, steps, generator), denoise, steps, report)


def latent_steps(
    method: CinemoMethod,
    condition: Condition,
    noise_BCFHW: Tensor,
    steps: int,
    generator: torch.Generator | None = None,
) -> Queries:
    """The queries of `sample_latents`: ``steps`` of them, by the solver of ``method.sample``."""
    sample, schedule = method.sample, method.schedule
    start_BCFHW = method.start(condition, noise_BCFHW)
    if sample.solver == "ddim":
        solver = ddim_steps(start_BCFHW, schedule, steps, sample.eta, generator, sample.spacing, sample.final_level)
    else:
        solver = multistep_steps(start_BCFHW, schedule, steps)
    residual_BCFHW = yield from solver
    return method.finish(residual_BCFHW, condition)


def guided_steps(method: CinemoMethod) -> tuple[int, int]:
    """First and last diffusion step with guidance, see `cinemo.config.SampleConfig.guidance_interval`."""
    low, high = (round(share * (method.schedule.train_steps - 1)) for share in method.sample.guidance_interval)
    return low, high


def _predictor(method: CinemoMethod, every: int = 1) -> Predict:
    """``method.predict`` for the steps of one video: what depends on the text alone is computed once for a condition,
    the network's inner features at every ``every``-th call, or where the batch changes."""
    texts: dict[int, TextKeysValues] = {}
    deep, calls, size = DeepFeatures() if every > 1 else None, 0, 0

    def predict(x: Tensor, t: int, condition: Condition) -> Tensor:
        nonlocal calls, size
        if id(condition) not in texts:
            texts[id(condition)] = method.text(condition)
        if deep is not None and (calls % every == 0 or len(x) != size):
            deep.kept, calls, size = None, 0, len(x)
        calls += 1
        return method.predict(x, t, condition, texts[id(condition)], deep)

    return predict


def invert_latents(method: CinemoMethod, video_BCFHW: Tensor, condition: Condition, steps: int) -> Tensor:
    """Video latents -> the noise (B, C, F-1, h, w) that `sample_latents` turns back into their residuals.

    DDIM inversion without guidance (the published editing code).

    Args:
        condition: the video's own first frame, its prompt and bucket.
    """
    residual_BCFHW = method.target(LatentBatch(video_BCFHW, condition))
    predict = _predictor(method)
    spacing = method.sample.spacing
    return ddim_invert(lambda x, t: predict(x, t, condition), residual_BCFHW, method.schedule, steps, spacing=spacing)
