"""Classifier-free guidance (arXiv 2207.12598) as a wrapper: a conditional predictor becomes a denoise callable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cinemo.diffusion.ddim import Denoise
from cinemo.types import Condition, InputError

Predict = Callable[[Tensor, int, Condition], Tensor]


def guided(
    predict: Predict,
    condition: Condition,
    negative_text_BLD: Tensor | None,
    scale: float,
    interval: tuple[int, int] | None = None,
) -> Denoise:
    """``e = e_u + scale (e_c - e_u)``, both branches in one batch ordered [unconditional, conditional].

    Only the text is dropped: image and motion are the same in both branches. With ``scale <= 1`` there is a single
    conditional pass and ``negative_text_BLD`` is not used.

    Args:
        interval: first and last diffusion step with guidance (arXiv 2404.07724); outside there is a single conditional
            pass. None: guidance at every step.
    """
    if scale <= 1:
        return lambda x, t: predict(x, t, condition)
    if negative_text_BLD is None:
        raise InputError(
            f"guidance scale is {scale}, expected text states of the negative prompt: pass negative_text_BLD"
        )
    both = Condition(
        torch.cat([condition.image_BCHW] * 2),
        torch.cat([negative_text_BLD.to(condition.text_BLD), condition.text_BLD]),
        torch.cat([condition.motion_bucket_B] * 2),
    )

    def denoise(x: Tensor, t: int) -> Tensor:
        if interval is not None and not interval[0] <= t <= interval[1]:
            return predict(x, t, condition)
        return combined(predict(torch.cat([x, x]), t, both).to(x.dtype), scale)

    return denoise


def combined(branches: Tensor, scale: float) -> Tensor:
    """The guided output (B, ...) of both branches' (2B, ...), the unconditional one first."""
    unconditional, conditional = branches.chunk(2)
    return unconditional + scale * (conditional - unconditional)
