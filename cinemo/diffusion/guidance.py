"""Classifier-free guidance (arXiv 2207.12598) as a wrapper: a conditional predictor becomes a denoise callable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    rescale: float = 0.0,
) -> Denoise:
    """``e = e_u + scale (e_c - e_u)``, both branches in one batch ordered [unconditional, conditional].

    Only the text is dropped: image and motion are the same in both branches. With ``scale <= 1`` there is a single
    conditional pass and ``negative_text_BLD`` is not used.

    Args:
        interval: first and last diffusion step with guidance (arXiv 2404.07724); outside there is a single conditional
            pass. None: guidance at every step.
        rescale: as `combined` has it.
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
        return combined(predict(torch.cat([x, x]), t, both).to(x.dtype), (scale,), rescale)

    return denoise


def needed(scales: Sequence[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Of branches 0..n, guided by ``scales`` 1..n, those that the result depends on, and the scales between them.

    The result is o_0 + sum s_i (o_i - o_(i-1)): a branch between two equal scales cancels out, as does the first where
    s_1 is 1, and the last where s_n is 0. ``needed((1.0,))`` is the conditional branch alone.
    """
    steps = (1.0, *scales, 0.0)
    kept = [branch for branch in range(len(scales) + 1) if steps[branch] != steps[branch + 1]]
    return tuple(kept), tuple(steps[branch] for branch in kept[1:])


def combined(branches: Tensor, scales: Sequence[float], rescale: float = 0.0) -> Tensor:
    """The guided output (B, ...) of n + 1 branches' ((n + 1) B, ...): o_0 + sum s_i (o_i - o_(i-1)), i = 1..n.

    With one scale that is classifier-free guidance; with two, the image's and the text's (arXiv 2310.12190).

    Args:
        rescale: share of the result that is brought back to the deviation of the last branch, sample by sample
            (arXiv 2305.08891, section 3.4): guidance widens the output, which overexposes the picture.
    """
    outputs = branches.chunk(len(scales) + 1)
    result = outputs[0]
    for scale, without, with_it in zip(scales, outputs, outputs[1:], strict=False):
        result = result + scale * (with_it - without)
    if rescale:
        deviations = [x.flatten(1).std(1).view(-1, *[1] * (x.dim() - 1)) for x in (outputs[-1], result)]
        result = rescale * (result * (deviations[0] / deviations[1])) + (1 - rescale) * result
    return result
