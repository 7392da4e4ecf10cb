"""Building blocks of the LaVie UNet, some of which other networks share.

Activations are images (B*N, C, h, w), frames of an item one after another, in ``channels_last`` memory. In that layout
the same bytes also are (B, C, N*h, w) for statistics over all frames and (B*N, h*w, C) for attention, so changing
between them copies nothing; other layouts give the same numbers.

Memory is what there is to win beside the kernels. Without gradients, activations are changed in place, and a
transformer goes through them in pieces that stay in the cache (`residual`). With gradients, what a norm or an
activation function makes for a convolution or matrix product is made again in the backward pass (`recomputed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cinemo.config import Checkpointing
from cinemo.networks.attention import Attention, TemporalAttention, TextKeysValues
from cinemo.networks.memory import add, lean, made_again, plainly, recomputed, residual, silu
from cinemo.networks.norms import GroupNorm


def join_frames(x: Tensor, batch: int) -> Tensor:
    """(B*N, C, h, w) -> (B, C, N*h, w)."""
    return x.permute(0, 2, 3, 1).reshape(batch, -1, x.shape[3], x.shape[1]).permute(0, 3, 1, 2)


def part_frames(x: Tensor, frames: int) -> Tensor:
    """(B, C, N*h, w) -> (B*N, C, h, w)."""
    batch, width, rows, columns = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch * frames, rows // frames, columns, width).permute(0, 3, 1, 2)


def convolved(conv: nn.Conv2d, x: Tensor, plain: bool = False) -> Tensor:
    """``conv(x)``, where the weights are the larger side with ``x`` in plain layout: they and their gradient would
    otherwise be rearranged in every call. ``plain``: in that layout anyway."""
    if plain or 9 * conv.out_channels > x.numel() // x.shape[1]:
        x = x.contiguous()
    out: Tensor = conv(x)
    return out


def sinusoid(values: Tensor | float, batch: int, width: int, like: Tensor) -> Tensor:
    """(B, width): cosines, then sines of ``values`` times 10000^(-k / (width/2)), and a zero where ``width`` is odd;
    in float32, then in ``like``'s dtype."""
    half = width // 2
    if not isinstance(values, Tensor):
        values = torch.full((batch,), values, device=like.device, dtype=torch.float32)
    # In this order: an angle of 1000 turns the last bit of a frequency into 3e-5.
    frequencies = (-math.log(10000) * torch.arange(half, dtype=torch.float32, device=like.device) / half).exp()
    angles = values.to(like.device, torch.float32).expand(batch)[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(like.dtype)
    return waves if width == 2 * half else F.pad(waves, (0, 1))


class Embedding(nn.Module):
    """Two linear layers that turn a sinusoid into the conditioning vector of all resnets."""

    def __init__(self, sinusoid: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(sinusoid, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, sinusoid: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(sinusoid)))
        return out


class Resnet(nn.Module):
    """Two per-frame convolutions; both group norms take their statistics jointly over all frames."""

    def __init__(self, in_width: int, out_width: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_width, eps=1e-5)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out_width)
        self.norm2 = GroupNorm(groups, out_width, eps=1e-5)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else nn.Identity()

    def forward(self, x: Tensor, activated_embedding_BE: Tensor) -> Tensor:
        batch = len(activated_embedding_BE)
        frames = len(x) // batch

        def first(x: Tensor) -> Tensor:
            return convolved(self.conv1, part_frames(silu(self.norm1(join_frames(x, batch))), frames))

        def second(h: Tensor) -> Tensor:
            return convolved(self.conv2, part_frames(silu(self.norm2(h)), frames))

        h = join_frames(recomputed(first, x), batch)
        h = add(h, self.time_emb_proj(activated_embedding_BE)[:, :, None, None])
        return add(recomputed(second, h), self.conv_shortcut(x))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(self.conv, x)


class Upsample(nn.Module):
    """Nearest-neighbour to the size of the next skip tensor (twice the size, or one less where a side was odd)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return convolved(self.conv, F.interpolate(x, size=size, mode="nearest"))


class _GatedGelu(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, wide: Tensor) -> Tensor:
        """Of what ``proj`` made: value * GELU(gate)."""
        value, gate = wide.chunk(2, dim=-1)
        gelu = F.gelu(gate)
        out: Tensor = gelu.mul_(value) if lean() else gelu * value
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # The place of the published dropout, which is 0, is kept for the names in the state dict.
        self.net = nn.Sequential(_GatedGelu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, y: Tensor, norm: nn.Module) -> Tensor:
        """Of ``norm(y)``."""
        gated, narrow = self.net[0], self.net[2]
        wide = recomputed(lambda y: gated.get_submodule("proj")(norm(y)), y)
        return recomputed(lambda wide: narrow(gated(wide)), wide)


class TransformerBlock(nn.Module):
    """Spatial, text and temporal attention, then the feed-forward; all with a norm before and a residual around."""

    gradient_checkpointing: Checkpointing = "none"  # see `cinemo.networks.memory.checkpoint_activations`

    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, text_width)
        self.norm_temp = nn.LayerNorm(width)
        self.attn_temp = TemporalAttention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)
        self.field: nn.Module | None = None  # reads a motion field, see `cinemo.networks.motion_field`

    def context(self, text: Tensor | TextKeysValues) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Of all that the network is told, what this block is: keys and values of the text, and of a motion field."""
        if isinstance(text, Tensor):
            return self.attn2.keys_values(text), None
        return text[self.attn2], None if self.field is None else text[self][1]

    def forward(self, y: Tensor, keys_values: tuple[Tensor, Tensor], field: Tensor | None) -> Tensor:
        """``y``: (B*N, h*w, C), overwritten where no gradients are asked for; the others are its `context`."""
        (images, cells, width), batch = y.shape, len(keys_values[0])
        run = made_again if self.gradient_checkpointing == "selective" else plainly

        def to_text(y: Tensor) -> Tensor:
            return self.attn2(self.norm2(y), keys_values)  # type: ignore[no-any-return]

        def along_time(y: Tensor) -> Tensor:
            z: Tensor = self.attn_temp(self.norm_temp(y.transpose(1, 2)).flatten(0, 1))
            return z.reshape(batch, -1, *z.shape[1:]).transpose(1, 2)

        y = residual(y, 0, lambda y: self.attn1(self.norm1(y)), widest=4)
        y = y.reshape(batch, -1, width)  # the text is the same for all frames of an item
        y = residual(y, 1, lambda y: run(to_text, y), widest=3)
        y = residual(y.reshape(batch, -1, cells, width), 2, lambda y: run(along_time, y), widest=4)
        if self.field is not None and field is not None:
            y = self.field(y, field)
        y = residual(y.reshape(-1, width), 0, lambda y: run(self.ff, y, self.norm3), widest=8)
        return y.reshape(images, cells, width)


class Transformer(nn.Module):
    """One `TransformerBlock` on the cells of each frame; its outer group norm is per frame (eps 1e-6)."""

    def __init__(self, width: int, heads: int, text_width: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, text_width)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, text: Tensor | TextKeysValues) -> Tensor:
        images, width, rows, columns = x.shape
        y = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(images, rows * columns, width)
        for block in self.transformer_blocks:
            y = block(y, *cast(TransformerBlock, block).context(text))
        return add(self.proj_out(y.reshape(images, rows, columns, width).permute(0, 3, 1, 2)), x)


class Stage(nn.Module):
    """One level: resnets, each followed by a transformer where there is one, then perhaps a change of resolution."""

    def __init__(
        self,
        resnets: list[Resnet],
        attentions: list[Transformer],
        downsampler: Downsample | None = None,
        upsampler: Upsample | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        return zip_longest(self.resnets, self.attentions)
