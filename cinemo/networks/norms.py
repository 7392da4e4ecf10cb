"""Group norm of activations whose channels are innermost (``channels_last``).

PyTorch's kernel for accelerators knows the plain layout only: it copies what has another one, and its result has to be
copied back for the next convolution. Here the statistics are read where they are. On a CPU, whose kernel knows both
layouts, and in a compiled graph, it is PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`; the same function in any layout."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" or torch.compiler.is_compiling() or not _channels_innermost(x):
            return super().forward(x)
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Of (B, C, h, w) in ``channels_last``, which the result is as well."""
    out: Tensor = _ChannelsLast.apply(x, weight, bias, groups, eps)  # type: ignore[no-untyped-call]
    return out


def _channels_innermost(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class _ChannelsLast(torch.autograd.Function):
    """y = x scale + shift with one scale and shift for each item and channel: x is read twice and y written once.

    Statistics, scale and shift are float32 for a half-precision x; only what has the size of x is not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x_BLC = _rows(x)
        variance_BG, mean_BG = torch.var_mean(x_BLC.view(*x_BLC.shape[:2], groups, -1), dim=(1, 3), correction=0)
        wide = torch.promote_types(x.dtype, torch.float32)
        mean_BG, rstd_BG = mean_BG.to(wide), (variance_BG.to(wide) + eps).rsqrt()
        scale_BGc = weight.to(wide).view(groups, -1) * rstd_BG[:, :, None]
        shift_BGc = bias.to(wide).view(groups, -1) - mean_BG[:, :, None] * scale_BGc
        y_BLC = torch.addcmul(
            shift_BGc.flatten(1)[:, None], x_BLC, scale_BGc.flatten(1)[:, None], out=torch.empty_like(x_BLC)
        )
        ctx.save_for_backward(x, weight, mean_BG, rstd_BG)
        return _images(y_BLC, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean_BG, rstd_BG = ctx.saved_tensors
        x_BLC, g_BLC = _rows(x), _rows(gradient)
        groups, wide = mean_BG.shape[1], mean_BG.dtype
        sum_BGc = g_BLC.sum(1, dtype=wide).view(len(x), groups, -1)
        product_BGc = (g_BLC * x_BLC).sum(1, dtype=wide).view(len(x), groups, -1)
        mean_BG1, rstd_BG1, weight_Gc = mean_BG[:, :, None], rstd_BG[:, :, None], weight.to(wide).view(groups, -1)
        normed_BGc = (product_BGc - mean_BG1 * sum_BGc) * rstd_BG1  # of the gradient with the normalised x
        values = x_BLC.shape[1] * weight_Gc.shape[1]
        along_BG1 = (weight_Gc * normed_BGc).sum(2, keepdim=True) / values
        across_BG1 = (weight_Gc * sum_BGc).sum(2, keepdim=True) / values
        per_x_BG1 = -along_BG1 * rstd_BG1.square()
        rest_BG1 = -across_BG1 * rstd_BG1 - mean_BG1 * per_x_BG1
        found = torch.addcmul(
            *(rest_BG1.expand_as(sum_BGc).flatten(1)[:, None], x_BLC, per_x_BG1.expand_as(sum_BGc).flatten(1)[:, None]),
            out=torch.empty_like(x_BLC),
        )
        torch.addcmul(found, g_BLC, (weight_Gc * rstd_BG1).flatten(1)[:, None], out=found)
        of_weight, of_bias = (sums.sum(0).flatten().to(weight.dtype) for sums in (normed_BGc, sum_BGc))
        return _images(found, x), of_weight, of_bias, None, None


def _rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C), a view where channels are innermost."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _images(rows_BLC: Tensor, like: Tensor) -> Tensor:
    batch, width, rows, columns = like.shape
    return rows_BLC.view(batch, rows, columns, width).permute(0, 3, 1, 2)
