"""Attention of the LaVie UNet (arXiv 2309.15103): inside a frame, to the text, and along time at each pixel.

Temporal attention has rotary positions (arXiv 2104.09864) on the first 32 channels of every head, interleaved pairs,
and a learned bias per head and bucketed frame distance; both act together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cinemo.networks.memory import lean, recomputed

ROTARY_DIM = 32
DISTANCE_BUCKETS = 32


# Keys and values (B, L, heads, d) of a text for each attention to it, see `Attention.keys_values`.
TextKeysValues = Mapping[nn.Module, tuple[Tensor, Tensor]]


class TemporalPositions(NamedTuple):
    """What temporal attention needs to know of N frame positions.

    ``turns``: (N, 1, 16, 2), cosine and sine for each pair of rotated channels. ``buckets_NN``: the bias row of
    query i and key j.
    """

    turns: Tensor
    buckets_NN: Tensor


def rotary_frequencies() -> Tensor:
    """(16,) float32: 10000^(-2k/32)."""
    return 1.0 / 10000 ** (torch.arange(0, ROTARY_DIM, 2).float() / ROTARY_DIM)


def distance_bucket(query: int, key: int) -> int:
    """0..31: exact below distance 8, logarithmic up to 32 and beyond; keys later than the query use the upper half."""
    distance = abs(query - key)
    bucket = distance if distance < 8 else min(15, 8 + int(8 * math.log(distance / 8) / math.log(4)))
    return bucket + 16 if key > query else bucket


def temporal_positions(frames: int, device: torch.device, dtype: torch.dtype) -> TemporalPositions:
    """Tables for ``frames`` positions. Angles are at least float32: in half precision late positions blur."""
    make = _computed_positions if torch.compiler.is_compiling() else _kept_positions
    return make(frames, device, dtype)


def _positions(frames: int, device: torch.device, dtype: torch.dtype) -> TemporalPositions:
    wide = torch.promote_types(dtype, torch.float32)
    angles = torch.arange(frames, dtype=wide, device="cpu")[:, None] * rotary_frequencies().to(wide)
    turns = torch.stack([angles.cos(), angles.sin()], dim=2)[:, None]
    buckets = [[distance_bucket(i, j) for j in range(frames)] for i in range(frames)]
    return TemporalPositions(turns.to(device), torch.tensor(buckets, device=device))


def _computed_positions(frames: int, device: torch.device, dtype: torch.dtype) -> TemporalPositions:
    """The same in operations of the device alone: a compiled graph then holds no copy from the host."""
    wide = torch.promote_types(dtype, torch.float32)
    number_N = torch.arange(frames, device=device)
    frequencies = 10000 ** (-torch.arange(0, ROTARY_DIM, 2, dtype=torch.float32, device=device) / ROTARY_DIM)
    angles = number_N.to(wide)[:, None] * frequencies.to(wide)
    apart_NN = number_N[None] - number_N[:, None]
    buckets_NN = 16 * (apart_NN > 0).long() + apart_NN.abs().clamp(max=7)
    for begins in (
        distance for distance in range(8, frames) if distance_bucket(distance, 0) > distance_bucket(distance - 1, 0)
    ):
        buckets_NN = buckets_NN + (apart_NN.abs() >= begins)
    return TemporalPositions(torch.stack([angles.cos(), angles.sin()], dim=2)[:, None], buckets_NN)


@functools.lru_cache(maxsize=64)
def _kept_positions(frames: int, device: torch.device, dtype: torch.dtype) -> TemporalPositions:
    # Kept for later calls, so it must not depend on the mode or default device of the first one.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        return _positions(frames, device, dtype)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate interleaved pairs (x0, x1) of the first 32 channels of (B, N, heads, d): x0 cos - x1 sin, x1 cos + x0 sin.

    Where no gradient is asked for, ``x`` itself is changed.
    """
    pairs = x[..., :ROTARY_DIM].unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    if torch.compiler.is_compiling():  # compilers know no complex numbers
        (x0, x1), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack([x0 * cos - x1 * sin, x1 * cos + x0 * sin], dim=-1)
        return torch.cat([turned.flatten(-2).to(x.dtype), x[..., ROTARY_DIM:]], dim=-1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.to(turns.dtype)) * torch.view_as_complex(turns))
    if not lean():
        return torch.cat([turned.flatten(-2).to(x.dtype), x[..., ROTARY_DIM:]], dim=-1)
    pairs.copy_(turned)
    return x


class Attention(nn.Module):
    """Multi-head attention of queries (B, N, C) to a context (B, L, D), or to themselves.

    Args:
        head_width: d; None: C / heads.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, head_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * (head_width or width // heads)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_width or width, inner, bias=False)
        self.to_v = nn.Linear(context_width or width, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``keys_values``: of a context, from `keys_values`; None: of ``x``."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        return self._mix(q, *(keys_values or self.keys_values(x)), None)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, L, heads, d) of ``context`` (B, L, D)."""
        k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.to_k(context), self.to_v(context)))
        return k, v

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Softmax attention of (B, N, heads, d); logits are scaled by d^-0.5."""
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if bias is not None and bias.requires_grad and bias.device.type == "cpu":
            # No fused kernel there gives the bias a gradient, and SDPA's own way without one takes twice this.
            logits = torch.add(bias, q @ k.transpose(-1, -2), alpha=q.shape[-1] ** -0.5)
            mixed = logits.softmax(dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
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
        turns, buckets_NN = temporal_positions(x.shape[1], x.device, q.dtype)
        # A mask of four dimensions: for three, SDPA has no fused kernel.
        bias = self.time_rel_pos_bias(buckets_NN)[None]
        return recomputed(lambda q, k, v, bias: self._mix(rotate(q, turns), rotate(k, turns), v, bias), q, k, v, bias)
