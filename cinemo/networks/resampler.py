"""The query transformer that turns an image's CLIP tokens into context (DynamiCrafter, arXiv 2310.12190, section 3.1).

Learned queries, a set of them for each frame, look at the tokens; the paper calls the network P, checkpoints
``image_proj_model``. Names and shapes in the state dict are the published ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cinemo.config import Part
from cinemo.networks.memory import add
from cinemo.types import InputError


class ResamplerConfig(Part):
    """Arguments of `Resampler`, by their published names; the defaults are the published network."""

    dim: int = Field(1024, ge=1)
    depth: int = Field(4, ge=1)
    dim_head: int = Field(64, ge=1)
    heads: int = Field(12, ge=1)
    num_queries: int = Field(16, ge=1, description="tokens that come out, for each frame")
    embedding_dim: int = Field(1280, ge=1, description="width of the tokens that go in")
    output_dim: int = Field(1024, ge=1, description="width of those that come out: the UNet's context_dim")
    ff_mult: int = Field(4, ge=1)
    video_length: int | None = Field(
        16, ge=1, description="frames with queries of their own; None: one set for all frames"
    )


class Resampler(nn.Module):
    """Tokens of an image (B, L, embedding_dim) -> (B, F, Q, output_dim), or (B, Q, output_dim) for all frames alike.

    Args:
        dim: width of the queries; ``heads * dim_head`` need not be the same.
        num_queries: Q.
        video_length: F; None: one set of queries for all frames.
    """

    def __init__(
        self,
        dim: int = 1024,
        depth: int = 4,
        dim_head: int = 64,
        heads: int = 12,
        num_queries: int = 16,
        embedding_dim: int = 1280,
        output_dim: int = 1024,
        ff_mult: int = 4,
        video_length: int | None = 16,
    ) -> None:
        super().__init__()
        self.config = {
            "dim": dim,
            "depth": depth,
            "dim_head": dim_head,
            "heads": heads,
            "num_queries": num_queries,
            "embedding_dim": embedding_dim,
            "output_dim": output_dim,
            "ff_mult": ff_mult,
            "video_length": video_length,
        }
        self.num_queries, self.video_length = num_queries, video_length
        self.latents = nn.Parameter(torch.randn(1, num_queries * (video_length or 1), dim) * dim**-0.5)
        self.proj_in = nn.Linear(embedding_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([_QueryAttention(dim, dim_head, heads), _feed_forward(dim, ff_mult)]) for _ in range(depth)
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.latents.dtype

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        """
        Raises:
            InputError: tokens of another width.
        """
        if tokens_BLD.shape[2] != self.proj_in.in_features:
            raise InputError(
                f"image tokens are {tokens_BLD.shape[2]} wide, expected {self.proj_in.in_features} (embedding_dim)"
            )
        x, queries = self.proj_in(tokens_BLD), self.latents.repeat(len(tokens_BLD), 1, 1)
        for attention, feed_forward in cast(Iterable[tuple[nn.Module, nn.Module]], self.layers):
            queries = add(attention(x, queries), queries)
            queries = add(feed_forward(queries), queries)
        out: Tensor = self.norm_out(self.proj_out(queries))
        return out if self.video_length is None else out.reshape(len(out), self.video_length, self.num_queries, -1)


class _QueryAttention(nn.Module):
    """Attention of queries to an image's tokens and to each other; each has its own norm."""

    def __init__(self, width: int, head_width: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        queries = self.norm2(queries)
        k, v = self.to_kv(torch.cat([self.norm1(x), queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q(queries), k, v))
        out: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def _feed_forward(width: int, factor: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, factor * width, bias=False),
        nn.GELU(),
        nn.Linear(factor * width, width, bias=False),
    )
