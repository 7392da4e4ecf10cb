"""Attention of the LaVie UNet (arXiv 2309.15103): inside a frame, to the text, and along time at each pixel.

Temporal attention has rotary positions (arXiv 2104.09864) on the first 32 channels of every head, interleaved pairs,
and a learned bias per head and bucketed frame distance; both act together.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_DIM = 32
DISTANCE_BUCKETS = 32


class TemporalPositions(NamedTuple):
    """What temporal attention needs to know of N frame positions.

    ``cos``, ``sin``: (N, 1, d) for heads of d channels; see `rotate`. ``buckets_NN``: bias row for (query i, key j).
    """

    cos: Tensor
    sin: Tensor
    buckets_NN: Tensor


def rotary_frequencies() -> Tensor:
    """(16,) float32: 10000^(-2k/32)."""
    return 1.0 / 10000 ** (torch.arange(0, ROTARY_DIM, 2).float() / ROTARY_DIM)


def distance_bucket(query: int, key: int) -> int:
    """0..31: exact below distance 8, logarithmic up to 32 and beyond; keys later than the query use the upper half."""
    distance = abs(query - key)
    bucket = distance if distance < 8 else min(15, 8 + int(8 * math.log(distance / 8) / math.log(4)))
    return bucket + 16 if key > query else bucket


@functools.lru_cache(maxsize=64)
def temporal_positions(frames: int, head_size: int, device: torch.device, dtype: torch.dtype) -> TemporalPositions:
    """Tables for ``frames`` positions. Angles are at least float32: in half precision late positions blur."""
    wide = torch.promote_types(dtype, torch.float32)
    # Kept for later calls, so it must not depend on the mode or default device of the first one.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        angles = torch.arange(frames, dtype=wide)[:, None] * rotary_frequencies().to(wide)
        unrotated = torch.zeros(frames, head_size - ROTARY_DIM, dtype=wide)
        cos = torch.cat([angles.cos().repeat_interleave(2, dim=1), unrotated + 1], dim=1)
        sin = torch.cat([torch.stack([-angles.sin(), angles.sin()], dim=2).flatten(1), unrotated], dim=1)
        buckets = torch.tensor([[distance_bucket(i, j) for j in range(frames)] for i in range(frames)])
        return TemporalPositions(cos[:, None].to(device, dtype), sin[:, None].to(device, dtype), buckets.to(device))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x0, x1) of the first 32 channels of (B, N, heads, d): x0 cos - x1 sin, x1 cos + x0 sin.

    The minus is in the ``sin`` table, whose rest is 0 (of ``cos``: 1), so other channels pass unchanged.
    """
    partner = x.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, partner, sin)


class Attention(nn.Module):
    """Multi-head attention of queries (B, N, C) to ``context`` (B, L, D), or to themselves."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width or width, width, bias=False)
        self.to_v = nn.Linear(context_width or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self._mix(q, k, v, None)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Softmax attention of (B, N, heads, d); logits are scaled by d^-0.5."""
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
        out: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return out


class _Rotary(nn.Module):
    """Holds the published buffer's place in the state dict; the angles come from `temporal_positions`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freqs", rotary_frequencies())


class _DistanceBias(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(DISTANCE_BUCKETS, heads)

    def forward(self, buckets_NN: Tensor) -> Tensor:
        bias_hNN: Tensor = self.relative_attention_bias(buckets_NN).permute(2, 0, 1)
        return bias_hNN


class TemporalAttention(Attention):
    """Self-attention over the N frames of (B, N, C), not causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.time_rel_pos_bias = _DistanceBias(heads)
        self.rotary_emb = _Rotary()
        nn.init.zeros_(self.to_out[0].get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.to_q(x), self.to_k(x), self.to_v(x)))
        cos, sin, buckets_NN = temporal_positions(x.shape[1], q.shape[-1], x.device, q.dtype)
        return self._mix(rotate(q, cos, sin), rotate(k, cos, sin), v, self.time_rel_pos_bias(buckets_NN))
